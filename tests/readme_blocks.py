"""Run the README's own code blocks: every bash or python block with `<!-- ci: run -->` on the line above its fence.

`python tests/readme_blocks.py` runs them in order in one temporary folder and stops at the first that fails; with `--test-command` it
prints the bash block under the heading "Tests" instead.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
_MARKED = re.compile(r"^<!-- ci: run -->\n```(bash|python)\n((?:.*\n)*?)```$", re.MULTILINE)
_TESTS = re.compile(r"^#+ Tests\n(?:(?!#).*\n)*?```bash\n((?:.*\n)*?)```$", re.MULTILINE)


def marked_blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of the blocks to run."""
    return _MARKED.findall(text)


def suite_command(text: str) -> str:
    """The bash block under the heading "Tests". Raises ValueError where there is none."""
    found = _TESTS.search(text)
    if found is None:
        raise ValueError('README.md has no bash block under a heading "Tests"')
    return found[1].strip()


def main() -> int:
    text = README.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--test-command"]:
        print(suite_command(text))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for language, code in marked_blocks(text):
            print(f"--- {language}\n{code}", flush=True)
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else ["python", "-c", code]
            if status := subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL).returncode:
                print(f"README.md: the block above failed with exit code {status}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
