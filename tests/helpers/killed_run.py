"""Makes smoke runs in forked children that are killed at chosen events.

An event is a step of progress or an fsync inside the write of a checkpoint.
"""

import os
import random
import signal
import sys
from pathlib import Path

import torch

import engine.caid  # noqa: F401, imported before the forks
from engine import train
from engine.model.tokenizer import load_tokenizer
from engine.run import plan
from engine.run.display import Progress
from engine.run.run import Stage
from engine.stages.smoke import smoke_folder

FLAGS = ["--preset", "smoke", "--iterations", "2", "--seed", "3", "--threads", "1"]


def run(argv: list[str], on_event) -> int:
    """Runs the command line in a child whose events call on_event(stage, kind).

    Returns the child's exit code, negative for a signal.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    current = {"stage": "start"}
    stage_init, advance, fsync = Stage.__init__, Progress.advance, os.fsync

    def opened(self, run, number, name):
        current["stage"] = name
        stage_init(self, run, number, name)

    def advanced(self, n=1):
        advance(self, n)
        on_event(current["stage"], "progress")

    def synced(handle):
        on_event(current["stage"], "write")
        fsync(handle)

    Stage.__init__, Progress.advance, os.fsync = opened, advanced, synced
    sys.stdout = open(os.devnull, "w")
    code = 1
    try:
        code = train.main(argv)
        sys.stdout.flush()
    finally:
        # Nothing of the tests' own process may go on in the child.
        os._exit(code)


def prepare() -> None:
    """Imports the tokenizer's library and measures the machine once, before
    the forks, in place of each child."""
    load_tokenizer(smoke_folder())
    plan.matmul_rate(torch.float32, torch.device("cpu"))


def whole_and_killed(folder: Path, seed: int) -> list[tuple[str, str]]:
    """Makes the run `whole`, undisturbed, and the run `killed`, killed once in each stage, at a seeded event,
    and resumed each time; returns the stages and kinds of event killed at."""
    prepare()
    rng = random.Random(seed)
    log = folder / "events.txt"

    def record(stage: str, kind: str) -> None:
        with open(log, "a") as file:
            file.write(f"{stage} {kind}\n")

    assert run([*FLAGS, "--out", str(folder / "whole")], record) == 0
    events: dict[str, list[str]] = {}
    for line in log.read_text().splitlines():
        stage, kind = line.split()
        events.setdefault(stage, []).append(kind)
    events.pop("start", None)

    argv, killed = [*FLAGS, "--out", str(folder / "killed")], []
    for stage, kinds in events.items():
        # Half of the kills fall into a write where the stage has progress too.
        writes = [i for i, kind in enumerate(kinds) if kind == "write"]
        chosen = rng.choice(writes) if rng.random() < 0.5 else rng.randrange(len(kinds))
        seen = {"n": 0}

        def kill(at: str, kind: str, stage=stage, chosen=chosen, seen=seen) -> None:
            if at == stage:
                if seen["n"] == chosen:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen["n"] += 1

        assert run(argv, kill) == -signal.SIGKILL, (stage, chosen)
        killed.append((stage, kinds[chosen]))
        argv = ["--resume", str(folder / "killed")]
    assert run(argv, lambda stage, kind: None) == 0
    return killed
