"""A malformed input, and the judgement of how a command took it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.faults.commands import SMALL
from bench.faults.outcome import CLEAN, REFUSED, WRONG, Outcome, compared, ending, tree
from bench.faults.slots import Slot

TRAIN = ("engine.train", "mocan", *SMALL, "--out", "run")
LIMIT_S = 60.0


class Malformed(NamedTuple):
    """A command that meets something malformed."""

    name: str
    words: tuple[str, ...]
    write: Callable[[Path], object] = lambda work: None  # prepares the working folder
    named: tuple[str, ...] = ()  # a refusal holds one of these
    accepts: bool = False  # a command may also take it, as it does no harm
    needs: str = "inputs"
    restores: bool = False  # an export that is the undisturbed one is right
    made: tuple[str, ...] = ()  # what a command that takes it leaves


def with_flags(*flags: str) -> tuple[str, ...]:
    """Returns the words of a small run with other values of some flags."""
    words = list(TRAIN)
    for flag in (word for word in flags if word.startswith("--")):
        if flag in words:
            at = words.index(flag)
            end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[at:end]
    return (*words, *flags)


def judge(slot: Slot, malformed: Malformed) -> Outcome:
    """Runs a command on a malformed input: it is refused in one line, or does no harm."""
    slot.begin(malformed.needs)
    malformed.write(slot.work)
    before = tree_of(slot)
    ended = slot.call(malformed.words, limit_s=LIMIT_S)
    outcome = ending(ended, malformed.named)
    if outcome is None:
        if (
            malformed.restores
            and compared(tree(slot.work / "exported"), slot.oracle("export", "exported")).kind == CLEAN
        ):
            return Outcome(CLEAN, "restored")
        if missing := [name for name in malformed.made if not (slot.work / name).exists()]:
            return Outcome(WRONG, f"accepted, but made no {missing[0]}")
        if malformed.accepts:
            return Outcome(CLEAN, "accepted")
        said = ended.out.strip().splitlines()
        return Outcome(WRONG, f"accepted in silence: {said[-1] if said else 'no output'}")
    if outcome.kind == REFUSED:
        left = sorted(name for name in tree_of(slot).keys() ^ before.keys())
        # A run that was refused for its scores has begun, and keeps what it has.
        unbegun = [
            name for name in left if not name.startswith(("run", "sweep", "trained", "dual", "second"))
        ]
        if unbegun:
            return Outcome(WRONG, f"refused, and left {', '.join(unbegun[:3])}: {outcome.detail}")
    return outcome


def tree_of(slot: Slot) -> dict:
    """Reads the working folder; what cannot be read, such as a pipe, is left out."""
    return {
        path.relative_to(slot.work).as_posix(): None
        for path in slot.work.rglob("*")
        if "__pycache__" not in path.parts
    }
