"""No test module imports another: what several of them use stands in helper modules."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
# This program runs test_gpu.py after it has put a pretended GPU in place, and shortens its samples.
PROGRAMS = {"pretended_gpu.py"}


def imported_tests(source: str) -> set[str]:
    """Lists the test modules that a source imports anywhere in it.

    Imports may be absolute or relative, and may stand inside functions.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    parts = {part for name in names for part in name.split(".")}
    return parts & {file.stem for file in FILES if file.stem.startswith("test_")}


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.name not in PROGRAMS],
    ids=lambda file: file.relative_to(TESTS).as_posix(),
)
def test_no_test_module_is_imported(file):
    assert not imported_tests(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import test_layers",
        "import tests.test_layers as layers",
        "from test_layers import LAYERS",
        "def f():\n    from tests.test_layers import LAYERS",
        "from . import test_layers",
        "from tests import conftest, test_layers",
    ],
)
def test_each_way_to_import_counts(source):
    assert imported_tests(source) == {"test_layers"}


def test_other_imports_do_not_count():
    assert not imported_tests(
        "import pytest\nfrom tests.helpers.runs import SMOKE\nfrom kernels import test_x\n"
    )
