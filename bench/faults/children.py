"""Runs commands of the engine in forked children, so that the imports of torch are paid once.

A child is as `python -m MODULE WORDS` in a folder: it has a working folder, standard streams and a module
search path of its own, and ends with the exit code that the command ends with.
"""

import contextlib
import importlib
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

# What a child may take: a number that is absurdly large must not take the machine down.
MEMORY_BYTES = 12 * 2**30
MODULES = (
    "engine.caid",
    "engine.mocan",
    "engine.pecan",
    "engine.baselines.primal_dual",
    "engine.train",
    "engine.evaluate",
    "engine.stages.evaluate",
    "engine.stages.plan",
    "engine.stages.profile",
    "engine.export",
    "engine.stages.export",
    "engine.sweep.__main__",
    "engine.sweep.runs",
    "engine.dual.__main__",
    "engine.dual.answer",
    "engine.scorers.training",
    "engine.scorers.classifiers",
)


class Ended(NamedTuple):
    """How a command ended."""

    code: int  # negative for the signal that killed it
    out: str
    err: str
    seconds: float
    hung: bool = False  # killed, as its time was up


def prepare() -> None:
    """Imports everything that a command imports and measures the machine, before the forks."""
    import torch

    torch.set_num_threads(1)
    for name in (*MODULES, "datasets", "pyarrow.parquet", "matplotlib.pyplot", "transformers"):
        importlib.import_module(name)
    from engine.run import plan

    rate = plan.matmul_rate(torch.float32, torch.device("cpu"))
    plan.matmul_rate = lambda dtype, device: rate
    # One commit, also where somebody commits while cases run.
    from engine.ranks import Ranks
    from engine.stages import alike, inputs

    # A template that writes the time is told noon, so that equal runs are equal on one day.
    inputs.datetime = Noon
    commit = alike.versions(Ranks())["commit"]
    done = subprocess.CompletedProcess("git", 0, commit + "\n", "")
    alike.subprocess = SimpleNamespace(run=lambda *words, **options: done)
    assert alike.versions(Ranks())["commit"] == commit


def shown(figure: Any) -> bytes:
    """Returns the texts and coordinates of a matplotlib figure, in place of its pixels."""
    parts: list[Any] = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        parts += [
            axes.get_title("left"),
            axes.get_xlabel(),
            axes.get_ylabel(),
            axes.get_xlim(),
            axes.get_ylim(),
        ]
        parts += [(text.get_text(), text.get_position()) for text in axes.texts]
        parts += [line.get_xydata().tolist() for line in axes.lines]
        parts += [patch.get_path().vertices.tolist() for patch in axes.patches]
        parts += [path.vertices.tolist() for artist in axes.collections for path in artist.get_paths()]
        parts += [artist.get_offsets().tolist() for artist in axes.collections]
    return "\n".join(map(repr, parts)).encode()


def stand_in_for_pictures() -> None:
    """Lets matplotlib save a digest of what a figure shows; drawing takes most of a small run's time."""
    import hashlib

    from matplotlib.figure import Figure

    def savefig(self, target, **options) -> None:
        target.write(b"\x89PNG" + hashlib.sha256(shown(self)).hexdigest().encode())

    Figure.savefig = savefig


class Noon(datetime):
    """A clock that stands still for a day."""

    @classmethod
    def now(cls, tz=None) -> datetime:
        """Returns the noon of today."""
        return datetime.now(tz).replace(hour=12, minute=0, second=0, microsecond=0)


def import_learned(names: Iterable[str]) -> None:
    """Imports modules that commands have imported in children; the ones that cannot be are left to them."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def call(
    words: Sequence[str],
    folder: Path,
    *,
    limit_s: float,
    before: Callable[[], None] = lambda: None,
    kill_after_s: float | None = None,
    learn: Path | None = None,
) -> Ended:
    """Runs `python -m WORDS` in `folder` and waits for its end.

    before: is called in the child before the command. kill_after_s: sends SIGKILL at that time. learn: file
    in which the child leaves the names of all modules that it has imported.
    The standard streams are kept beside `folder`.
    """
    streams = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_command(words, folder, streams, before, learn)
    deadline = start + min(limit_s, limit_s if kill_after_s is None else kill_after_s)
    killed = False
    while True:
        ended, status, _ = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if not killed and time.monotonic() > deadline:
            _kill(child)
            killed = True
        time.sleep(0.002)
    out, err = (path.read_bytes().decode(errors="replace") for path in streams)
    code = os.waitstatus_to_exitcode(status)
    hung = killed and kill_after_s is None and code == -signal.SIGKILL
    return Ended(code, out, err, time.monotonic() - start, hung)


class Act(NamedTuple):
    """What is done to a rank while it works: a signal after some seconds."""

    rank: int
    signal: int
    after_s: float


def call_on_ranks(
    words: Sequence[str],
    folder: Path,
    size: int,
    *,
    limit_s: float,
    before: Callable[[int], None] = lambda rank: None,
    act: Act | None = None,
) -> Ended:
    """Runs `python -m WORDS` on ranks as torchrun does, which ends the others once one has failed.

    before: is called in each child with its rank, before the command.
    Returns how all of them ended: the exit code is rank 0's where that is none or all have the same, else the
    first other one; `seconds` are those from the first end that was no success to the last one, and the whole
    time where all went well. Standard output is rank 0's, of standard error that of all.
    """
    streams = [
        [folder.with_name(f"{folder.name}.{rank}.{name}") for name in ("out", "err")] for rank in range(size)
    ]
    from torch.distributed import TCPStore

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    running = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "faults",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            _be_the_command(words, folder, streams[rank], lambda rank=rank: before(rank), None)
        running[child] = rank
    # By this the ranks find one another and note who has said why all end; it outlives them, as torchrun's.
    # It has a thread, so it comes after the forks.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    codes, failed_at, hung = {}, None, False
    while running:
        now = time.monotonic()
        if act is not None and now > start + act.after_s:
            for child in [child for child, rank in running.items() if rank == act.rank]:
                os.kill(child, act.signal)
            act = None
        if now > start + limit_s:
            hung = True
            for child in running:
                _kill(child)
        for child in list(running):
            ended, status, _ = os.wait4(child, os.WNOHANG)
            if not ended:
                continue
            code = codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
            if code != 0 and failed_at is None:
                failed_at = time.monotonic()
                for other in running:
                    os.kill(other, signal.SIGTERM)
        time.sleep(0.002)
    end = time.monotonic()
    del store
    code = next((code for _, code in sorted(codes.items()) if code), 0)
    texts = [[path.read_bytes().decode(errors="replace") for path in pair] for pair in streams]
    seconds = end - (start if failed_at is None else failed_at)
    return Ended(code, texts[0][0], "".join(err for _, err in texts), seconds, hung)


def _kill(child: int) -> None:
    """Kills a child and what it started; the child leads a process group."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)


def _be_the_command(
    words: Sequence[str], folder: Path, streams: list[Path], before: Callable[[], None], learn: Path | None
) -> None:
    """Turns this process into the command; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        for number, path in enumerate(streams, 1):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
        # A shell has programs in the background ignore Ctrl-C, and so would the command.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin = os.fdopen(0, "r", closefd=False)
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(
            2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
        )
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        sys.argv = [words[0], *words[1:]]
        # The module is imported already, which runpy warns of.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        before()
        code = _exit_code(words[0])
        if learn is not None:
            learn.write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            code = 120
        os._exit(code)


def _exit_code(module: str) -> int:
    """Runs a module as Python does with -m; returns the exit code that Python would end with."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    return 0
