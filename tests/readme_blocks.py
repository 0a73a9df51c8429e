"""Run the code blocks of README.md and of the pages in docs/: every bash or python block with `<!-- ci: run
-->` on the line above its fence.

`python tests/readme_blocks.py` runs each page's blocks in order in a temporary folder of its own and stops at
the first that fails. Pages named behind it are the only ones that run; `--test-command` prints the bash block
under the README's heading "Tests" instead.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARK = "<!-- ci: run -->"
_MARKED = re.compile(rf"^{MARK}\n```(bash|python)\n((?:.*\n)*?)```$", re.MULTILINE)
_TESTS = re.compile(r"^#+ Tests\n(?:(?!#).*\n)*?```bash\n((?:.*\n)*?)```$", re.MULTILINE)


def pages() -> list[Path]:
    """Returns README.md and every page in docs/, in a fixed order."""
    return [README, *sorted((ROOT / "docs").rglob("*.md"))]


def marked_blocks(text: str) -> list[tuple[str, str]]:
    """Returns (language, code) of the blocks to run."""
    return _MARKED.findall(text)


def suite_command(text: str) -> str:
    """Returns the bash block under the heading "Tests". Raises: ValueError where there is none."""
    found = _TESTS.search(text)
    if found is None:
        raise ValueError('README.md has no bash block under a heading "Tests"')
    return found[1].strip()


def run_blocks(text: str, name: str) -> bool:
    """Runs a page's blocks in a fresh folder; tells whether all ended well, and names the page if not."""
    with tempfile.TemporaryDirectory() as folder:
        for language, code in marked_blocks(text):
            print(f"--- {name}: {language}\n{code}", flush=True)
            command = (
                ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else ["python", "-c", code]
            )
            if status := subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL).returncode:
                print(f"{name}: the block above failed with exit code {status}", file=sys.stderr)
                return False
    return True


def main() -> int:
    """Runs the command line and returns its exit code."""
    if sys.argv[1:] == ["--test-command"]:
        print(suite_command(README.read_text(encoding="utf-8")))
        return 0
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or pages()
    for page in chosen:
        if not run_blocks(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
