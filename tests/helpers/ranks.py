"""Runs a function on several ranks: forked processes that talk by gloo."""

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.ranks import Ranks

# So long may the ranks of a test take; a hang is an error of the test.
PATIENCE_S = 240


def on_ranks(size: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """Returns what `function` returns on each rank, or the exception that it raises there.

    The ranks are children of this process, so that the function may be a closure, and what they return is
    pickled. Raises: AssertionError where a rank does not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_forked(rank, size, function, Path(folder)) for rank in range(size)]
        deadline = time.monotonic() + PATIENCE_S
        while children and time.monotonic() < deadline:
            children = [pid for pid in children if os.waitpid(pid, os.WNOHANG)[0] == 0]
            time.sleep(0.01)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert not children, "ranks wait for one another"
        return [_result(Path(folder) / f"{rank}") for rank in range(size)]


def _result(file: Path) -> Any:
    return pickle.loads(file.read_bytes()) if file.exists() else ChildProcessError("the rank was killed")


def _forked(rank: int, size: int, function: Callable[[Ranks], Any], folder: Path) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        ranks = Ranks.join(dist.FileStore(str(folder / "store"), size), rank, size, rank, size)
        try:
            result = function(ranks)
        except BaseException as error:
            result = error
            if not isinstance(error, ValueError | ArithmeticError | KeyboardInterrupt):
                traceback.print_exc()
        (folder / f"{rank}.tmp").write_bytes(_pickled(result))
        (folder / f"{rank}.tmp").rename(folder / f"{rank}")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing of the tests' own process may go on in the child.
        os._exit(code)


def _pickled(result: Any) -> bytes:
    try:
        data = pickle.dumps(result)
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))
