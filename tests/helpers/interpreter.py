"""Tests of Triton kernels in Triton's interpreter, in a process of their own,
because Triton chooses it on import."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_interpreter.py starts"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter cannot")


def run_interpreted(*files: Path) -> None:
    """Runs the tests of `files` that have `interpreted`, with Triton's interpreter; skips where there is none
    that works."""
    pytest.importorskip("triton")
    triton, numpy = (
        tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip(f"triton {version('triton')} cannot interpret with numpy {version('numpy')}")
    # Only these tests and the compiled ones, which are skipped then, have a condition.
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-m", "skipif"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # Each file has tests that ran, not only skipped ones.
    missing = [file.name for file in files if not re.search(rf"{file.name} s*\.", done.stdout)]
    assert not missing, done.stdout[-4000:]
