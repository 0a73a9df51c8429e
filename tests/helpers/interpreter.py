"""Tests of Triton kernels in Triton's interpreter, in a process of their own,
because Triton chooses it on import."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_interpreter starts")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter cannot")


def run_interpreted(file: str, *arguments: str) -> None:
    """Runs pytest on `file` with Triton's interpreter; skips where there is none that works."""
    pytest.importorskip("triton")
    triton, numpy = (
        tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip(f"triton {version('triton')} cannot interpret with numpy {version('numpy')}")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", file, *arguments]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
