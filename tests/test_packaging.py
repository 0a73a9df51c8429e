"""The package's metadata, its guard against another package named kernels, and the README and the pages in
docs/: their blocks, links and layout."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from readme_blocks import MARK, marked_blocks, pages, run_blocks, suite_command

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not there")


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()


def run_with_other_kernels(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python with another package `kernels` first on its path.

    -S keeps an editable install's import hook out of the way.
    """
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-S", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def check_message(message: str, folder: Path) -> None:
    assert str(folder / "kernels") in message
    assert str(ROOT / "kernels") in message
    assert "pip uninstall kernels" in message


def test_no_dependency_is_named_kernels():
    project = PROJECT["project"]
    requirements = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    names = {requirement_name(r) for r in requirements}
    assert "torch" in names and "kernels" not in names
    # An extra such as transformers[kernels] would bring it in.
    assert not [r for r in requirements if "[" in r]


def test_installed_dependencies_do_not_require_kernels():
    for requirement in PROJECT["project"]["dependencies"]:
        name = requirement_name(requirement)
        if name == "triton" and sys.platform != "linux":
            continue
        required = [r for r in distribution(name).requires or [] if "extra ==" not in r]
        assert "kernels" not in {requirement_name(r) for r in required}, name


def test_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {"test", "bench", "flash"}
    assert any(re.fullmatch(r"ruff==[\d.]+", r) for r in extras["test"])


def test_wheel_holds_the_two_packages_and_their_data_is_there():
    assert PROJECT["tool"]["scikit-build"]["wheel"]["packages"] == ["kernels", "engine"]
    assert list((ROOT / "engine" / "assets" / "prompts").glob("*.jsonl"))
    ignored = subprocess.run(
        ["git", "check-ignore", *map(str, data_files())], cwd=ROOT, capture_output=True, text=True
    )
    # The wheel leaves out what git ignores.
    assert ignored.stdout == ""


def data_files() -> list[Path]:
    return [path for path in (ROOT / "engine" / "assets").rglob("*") if path.is_file()]


def test_import_with_another_kernels_says_what_and_how_to_cure(tmp_path):
    result = run_with_other_kernels(tmp_path, "-c", "import engine")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: ")
    check_message(result.stderr.splitlines()[-1], tmp_path)


def test_command_with_another_kernels_prints_one_line_and_exits_2(tmp_path):
    result = run_with_other_kernels(tmp_path, "-m", "engine.train", "--preset", "smoke")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    check_message(result.stderr, tmp_path)


def test_blocks_are_found_in_order():
    tests = "## Tests\n\nText.\n```bash\na && b\n```\n## More\n"
    text = (
        tests
        + "<!-- ci: run -->\n```python\nx = 1\n```\n```bash\nskip\n```\n<!-- ci: run -->\n```bash\ny\n```\n"
    )
    assert marked_blocks(text) == [("python", "x = 1\n"), ("bash", "y\n")]
    assert suite_command(text) == "a && b"
    with pytest.raises(ValueError, match="Tests"):
        suite_command("## Tests\n## Other\n```bash\na\n```\n")


def test_blocks_of_a_page_share_a_folder_that_no_other_page_sees(capfd):
    first = f"{MARK}\n```bash\necho one > left\n```\n\n{MARK}\n```python\nprint(open('left').read())\n```\n"
    assert run_blocks(first, "first.md")
    assert not run_blocks(f"{MARK}\n```bash\ncat left\n```\n{MARK}\n```bash\necho never\n```\n", "second.md")
    out, err = capfd.readouterr()
    assert "one\n" in out and "never" not in out
    assert "second.md: the block above failed" in err


PAGES = pages()
SUBJECTS = (
    "getting-started",
    "verdict",
    "algorithms",
    "losses",
    "multipliers",
    "sweeps",
    "inside",
    "performance",
    "many-gpus",
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def headings(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@needs_readme
def test_every_page_in_docs_is_found():
    found = {name_of(page) for page in PAGES}
    assert {"README.md", *(f"docs/{subject}.md" for subject in SUBJECTS)} <= found
    tracked = subprocess.run(
        ["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    assert {name for name in tracked if name.endswith(".md")} <= found


@needs_readme
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_mark_stands_above_a_block_that_runs(page):
    text = page.read_text(encoding="utf-8")
    assert text.count(MARK) == len(marked_blocks(text))


@needs_readme
@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "LOG.md"], ids=name_of)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), f"{name_of(page)}: {link}"


@needs_readme
def test_readme_is_short_and_leads_to_every_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for subject in SUBJECTS:
        assert f"](docs/{subject}.md" in text


@needs_readme
def test_readme_shows_lines_of_the_whole_output():
    shown, whole = (
        re.findall(
            r"^```console\n(CAID on .*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        for path in (README, ROOT / "docs" / "verdict.md")
    )
    assert len(shown) == len(whole) == 1
    lines = [line for line in shown[0].splitlines() if line != "..."]
    assert len(lines) == 10 and any(line.startswith("constraint harm: ") for line in lines)
    order = [whole[0].splitlines().index(line) for line in lines]
    assert order == sorted(order)


@needs_readme
def test_readme_test_command():
    assert suite_command(README.read_text(encoding="utf-8")) == 'pip install -e ".[test]" && python -m pytest'


@needs_readme
def test_readme_tree_names_folders_that_exist():
    line = r"(?:(?!```).*\n)*?"
    text = README.read_text(encoding="utf-8")
    tree = re.search(rf"^```(?:text)?\n({line}[├└ ]*kernels/.*\n{line})```$", text, re.MULTILINE)
    assert tree is not None
    named = set(re.findall(r"^(?:[├└]── )?([.\w-]+)/", tree[1], re.MULTILINE))
    assert {"kernels", "engine"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_dir()] == []
