"""Damages each file of finished runs and sweeps before every command that reads them."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.faults.cases import Case
from bench.faults.commands import COMMANDS
from bench.faults.edits import NOTE, WAYS, damage
from bench.faults.outcome import (
    CLEAN,
    REFUSED,
    WRONG,
    Outcome,
    Tree,
    compared,
    ending,
    lost,
    tree,
)
from bench.faults.slots import Slot

# (command, the part of its result that is compared); the first ones restore, the others only read.
RESTORING = ("resume", "full-resume", "sweep-resume")
COMPARED = {
    "resume": "run",
    "full-resume": "run",
    "sweep-resume": "sweep",
    "evaluate": "run/evaluation-1",
    "full-evaluate": "run/evaluation-1",
    "export": "exported",
    "full-export": "exported",
    "samples-of": "second",
}


def cases(slot: Slot, seed: int, commands: Sequence[str] = tuple(COMPARED)) -> list[Case]:
    """Lists every file of the run or sweep that a command reads, damaged in every way."""
    listed = []
    for name in commands:
        base = COMMANDS[name].needs
        root = "sweep" if base == "sweep" else "run"
        slot.make(base)
        files = sorted(path for path in (slot.kept / base / root).rglob("*") if path.is_file())
        for path in files:
            if path.name == "judged.jsonl" and name != "evaluate":
                continue  # Nothing but the file knows which verdicts there were beside the run's own.
            file = path.relative_to(slot.kept / base).as_posix()
            if base == "full" and "/adapters/" not in file:
                continue
            for way in WAYS:
                run = partial(damaged, name=name, file=file, way=way, seed=seed)
                listed.append(Case(f"damage/{name}/{file}/{way}", (name,), run))
    return listed


def damaged(slot: Slot, name: str, file: str, way: str, seed: int) -> Outcome:
    """Damages a file, runs the command and compares what it made."""
    command = COMMANDS[name]
    slot.begin(command.needs)
    if not damage(slot.work / file, way, random.Random(f"{seed} {file} {way}")):
        return Outcome(CLEAN, "nothing to damage in this way")
    before = tree(slot.work)
    ended = slot.call(command.words)
    after = tree(slot.work)
    outcome = ending(ended, names_of(file))
    whole = tree(slot.kept / command.needs)
    gone = [path for path in lost(before, after) if after.get(path) != whole.get(path)]
    if name in RESTORING:
        # Tables and pictures are written anew as runs are read.
        gone = [path for path in gone if path not in after]
    if outcome is None:
        outcome = compared(without_notes(part(after, COMPARED[name])), slot.oracle(name, COMPARED[name]))
        # An evaluation adds its verdict to those on record.
        gone = [path for path in gone if path != file and not _grew(before[path], after.get(path))]
    if outcome.kind in (CLEAN, REFUSED) and gone and name not in RESTORING:
        return Outcome(WRONG, f"took away {', '.join(gone[:3])}; {outcome.detail}")
    if outcome.kind == REFUSED and gone:
        return Outcome(WRONG, f"refused, and took away {', '.join(gone[:3])}; {outcome.detail}")
    return outcome


def _grew(before: bytes | str, after: bytes | str | None) -> bool:
    """Tells whether a file is as it was, with more behind it."""
    return isinstance(before, bytes) and isinstance(after, bytes) and after.startswith(before)


def names_of(file: str) -> list[str]:
    """Returns the words of which a refusal has to hold one: the file, or its folder below the run's."""
    path = Path(file)
    parents = [parent.name for parent in path.parents if parent.name not in ("", "run", "sweep", "stages")]
    # What a missing file of a stage was called, nobody knows.
    stage = (
        [f"stage {int(path.name[:2])} "] if path.parent.name == "stages" and path.name[:2].isdigit() else []
    )
    return [path.name, *parents, *stage]


def without_notes(found: Tree) -> Tree:
    """Leaves out the user's note that stood in place of a file, and the folder that it was set aside in."""
    notes = [Path(name) for name in found if Path(name).name == NOTE]
    aside = {path.as_posix() for note in notes for path in (note, note.parent)}
    return {name: content for name, content in found.items() if name not in aside}


def part(whole: Tree, folder: str) -> Tree:
    """Returns what a tree has below a folder."""
    return {
        name.removeprefix(f"{folder}/"): content
        for name, content in whole.items()
        if name.startswith(f"{folder}/")
    }
