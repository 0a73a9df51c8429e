"""The order of the packages, and that every import of engine/ and kernels/ follows it."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module imports from the lines above its own, and within its own package. `kernels` may be imported from
# everywhere, and has an order of its own.
KERNELS = """
reference checks random compiled triton_math gather_triton
products moments gather
loss_head sampling attention layer
""".strip()
LAYERS = """
errors
records files intervals keys looks ranks
config model command
data run constraints quickstart
verdict
report policy
rollout dual
scorers
stages
caid mocan baselines
pecan
train evaluate export sweep
""".strip()
LEVELS = {
    package: {name: level for level, line in enumerate(layers.split("\n")) for name in line.split()}
    for package, layers in (("engine", LAYERS), ("kernels", KERNELS))
}


def modules(package: str) -> dict[str, Path]:
    """Finds every module of a package; returns its file by dotted name."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules("engine") | modules("kernels")


def imports(name: str, source: str) -> set[str]:
    """Lists the modules of this project that a module imports anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                if below == "kernels._native":
                    continue  # compiled code, which imports nothing
                found.add(below if below in MODULES else node.module)
    return {module for module in found if module in MODULES and module != name}


@functools.cache
def all_imports() -> dict[str, set[str]]:
    """Reads the imports of every module, by its name; not on import, which each process of tests does."""
    return {name: imports(name, file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def part(module: str) -> str:
    """Names the file or package of engine/ or kernels/ that a module belongs to."""
    return module.split(".")[1]


def upward(name: str, imported: set[str]) -> list[str]:
    """Lists what a module imports of its package from its own line or from below."""
    package = name.split(".")[0]
    levels = LEVELS[package]
    return sorted(
        module
        for module in imported
        if module.startswith(f"{package}.")
        and part(module) != part(name)
        and levels[part(module)] >= levels[part(name)]
    )


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_imports_point_to_lower_layers(name):
    assert part(name) in LEVELS[name.split(".")[0]], (
        f"{name}: give {part(name)} a place in the order of layers"
    )
    assert not upward(name, all_imports()[name])


def test_no_circle_of_modules():
    try:
        TopologicalSorter(all_imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kernels_know_nothing_of_the_engine():
    assert not {
        name
        for name, imported in all_imports().items()
        if name.startswith("kernels") and any(m.startswith("engine") for m in imported)
    }


def test_lazy_imports_count():
    source = "def f():\n    from engine.stages import job\n    import engine.caid\n"
    assert upward("engine.data.tables", imports("engine.data.tables", source)) == [
        "engine.caid",
        "engine.stages.job",
    ]


def test_a_circle_is_found():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_long(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 500
