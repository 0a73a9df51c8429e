"""Fills the disk at random sizes, then takes the cure that the message names."""

import random
import resource
import shlex
from collections.abc import Sequence
from functools import partial

from bench.faults.cases import Case
from bench.faults.commands import COMMANDS, again
from bench.faults.kills import KILLED
from bench.faults.operations import Disk, watch
from bench.faults.outcome import CLEAN, REFUSED, WRONG, Outcome, compared, ending, tree
from bench.faults.slots import Slot

SIZES = 8  # sizes of disks for each command, and a third as many limits of a file's size
SMALLEST_LIMIT = 16_384  # what a command prints has to fit


def cases(slot: Slot, seed: int, commands: Sequence[str] = KILLED) -> list[Case]:
    """Lists full disks and limits of a file's size for all commands."""
    listed = []
    for name in commands:
        rng = random.Random(f"{seed} disks {name}")
        total = slot.about(name)["bytes"]
        files = [path for path in (slot.kept / name / COMMANDS[name].out).rglob("*") if path.is_file()]
        largest = max(path.stat().st_size for path in files)
        for n in sorted({rng.randrange(total + 1) for _ in range(SIZES)}):
            listed.append(Case(f"disks/{name}/full-{n}", (name,), partial(full, name=name, n_bytes=n)))
        if largest > SMALLEST_LIMIT:
            for n in sorted({rng.randrange(SMALLEST_LIMIT, largest) for _ in range(SIZES // 3)}):
                run = partial(full, name=name, n_bytes=n, of_a_file=True)
                listed.append(Case(f"disks/{name}/limit-{n}", (name,), run))
    return listed


def full(slot: Slot, name: str, n_bytes: int, of_a_file: bool = False) -> Outcome:
    """Runs a command on a disk with little room, then as its message says with all the room it wants."""
    command = COMMANDS[name]
    slot.begin(command.needs or "inputs")

    def before() -> None:
        if of_a_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        else:
            watch(slot.work, Disk(n_bytes))

    first = slot.call(command.words, before=before)
    stopped = ending(first)
    oracle = tree(slot.kept / name)
    if stopped is None:
        whole = compared(tree(slot.work), oracle)
        return (
            whole
            if whole.kind == CLEAN or of_a_file
            else Outcome(WRONG, f"full disk unnoticed: {whole.detail}")
        )
    if stopped.kind != REFUSED:
        return stopped
    begun = (slot.work / command.out / command.begun).exists()
    words = again(name, begun)
    if "--resume" in stopped.detail:
        said = shlex.split(stopped.detail.rpartition("--resume")[2].replace("'", ""))[0].rstrip(".,;")
        if not (command.resumes or name == "resume") or not said.endswith(command.out):
            return Outcome(WRONG, f"nothing can be resumed there: {stopped.detail}")
    second = slot.call(words)
    outcome = ending(second) or compared(tree(slot.work), oracle)
    if outcome.kind == CLEAN:
        return stopped
    if outcome.kind == REFUSED:
        return Outcome(WRONG, f"blocked after a full disk: {outcome.detail}")
    return outcome._replace(detail=f"after a full disk: {outcome.detail}")
