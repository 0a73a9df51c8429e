"""Changes what a run read, between its start and --resume, and before it is evaluated."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from bench.faults.alterations import ALTERATIONS, Alteration
from bench.faults.cases import Case
from bench.faults.commands import COMMANDS, SMALL, Command
from bench.faults.operations import KillAt, watch
from bench.faults.outcome import CLEAN, REFUSED, WRONG, Outcome, compared, ending, tree
from bench.faults.slots import Slot

# How far a run has come, by its file operations, when its inputs change.
STOPS = (0.35, 0.7)
ONE_COST = ("--reward", "heads/helpfulness", "--cost", "heads/harm", "--audit", "heads/harm-audit")
GUESTS = (
    "--reward",
    "heads/helpfulness",
    "--cost",
    "heads/harm",
    "letters=judge:letters",
    "--threshold",
    "0.01",
    "0.01",
    "--audit",
    "unfriendly=classifier",
    "--force",
)


class Changed(NamedTuple):
    """A run whose inputs are changed."""

    flags: tuple[str, ...]
    alterations: tuple[str, ...]  # names of ALTERATIONS


DATA = tuple(name for name in ALTERATIONS if name.startswith(("prompts-", "heldout-")))
MODEL = ("tokenizer", "template", "generation", "weights", "other-version")
RUNS = {
    "guests": Changed(
        ("caid", *SMALL[:-2], "--iterations", "2", "--slack-prompts", "3", *GUESTS),
        (
            *DATA,
            *MODEL,
            "head",
            "head-deleted",
            "classifier",
            "classifier-template",
            "scorer",
            "scorer-deleted",
        ),
    ),
    "pairs": Changed(
        ("mocan", *SMALL, *ONE_COST, "--pairs", "pairs.jsonl"),
        ("pairs-removed", "pairs-same-length", "pairs-added", "pairs-deleted", "tokenizer", "template"),
    ),
    "preferences": Changed(
        ("pecan", *SMALL, *ONE_COST, "--preference-steps", "2", "--preferences", "preferences.jsonl"),
        (
            "preferences-removed",
            "preferences-relabelled",
            "preferences-added",
            "preferences-deleted",
            "template",
        ),
    ),
    "dated": Changed(("mocan", *SMALL, *ONE_COST, "--model", "dated"), ("tomorrow",)),
    "split": Changed(
        ("mocan", *SMALL, *ONE_COST, "--model", "dated", "--heldout", ""),
        ("prompts-removed", "prompts-added", "tomorrow", "template-dated"),
    ),
}


def add_commands() -> None:
    """Adds the runs and their evaluations to the commands."""
    for name, changed in RUNS.items():
        flags = list(changed.flags)
        # A flag that is given twice is the later one's.
        while duplicated := [flag for flag in flags if flag.startswith("--") and flags.count(flag) > 1]:
            at = flags.index(duplicated[0])
            del flags[at : at + 2]
        if "--heldout" in flags and flags[flags.index("--heldout") + 1] == "":
            at = flags.index("--heldout")
            del flags[at : at + 2]
        words = ("engine.train", *flags, "--out", "run")
        COMMANDS[f"run-{name}"] = Command(words, "run", resumes=True)
        COMMANDS[f"evaluate-{name}"] = COMMANDS["evaluate"]._replace(needs=f"run-{name}")


add_commands()


def cases(slot: Slot, seed: int, commands: Sequence[str] = ()) -> list[Case]:
    """Lists every change of every input of the runs."""
    listed = []
    for name, changed in RUNS.items():
        for alteration in changed.alterations:
            for stop in STOPS:
                run = partial(resumed, name=name, alteration=alteration, stop=stop)
                listed.append(Case(f"changes/{name}/{alteration}/resume-{stop}", (f"run-{name}",), run))
            run = partial(evaluated, name=name, alteration=alteration)
            needs = f"run-{name}", f"evaluate-{name}"
            listed.append(Case(f"changes/{name}/{alteration}/evaluate", needs, run))
    return listed


def resumed(slot: Slot, name: str, alteration: str, stop: float) -> Outcome:
    """Kills a run, changes an input, and goes on: the run has to end as if nothing had been changed."""
    begin_stopped(slot, name, stop)
    return changed(slot, alteration, ("engine.train", "--resume", "run"), "run", f"run-{name}")


def evaluated(slot: Slot, name: str, alteration: str) -> Outcome:
    """Changes an input of a finished run and evaluates it: the result has to be the same."""
    slot.begin(f"run-{name}")
    return changed(slot, alteration, COMMANDS["evaluate"].words, "run/evaluation-1", f"evaluate-{name}")


def changed(slot: Slot, alteration: str, words: tuple, result: str, oracle: str) -> Outcome:
    """Changes an input, calls a command, and compares the folder `result` with the undisturbed one."""
    change, before = ALTERATIONS[alteration], tree(slot.work / "run")
    change.change(slot.work)
    ended = slot.call(words, before=outside_of(alteration))
    return judged(
        slot,
        words,
        change,
        ended,
        before,
        lambda: compared(tree(slot.work / result), slot.oracle(oracle, result)),
    )


def judged(
    slot: Slot, words: tuple, change: Alteration, ended, before, compare: Callable[[], Outcome]
) -> Outcome:
    """Judges a command that met a change: it may refuse what cannot be kept, where --accept-changes helps."""
    outcome = ending(ended, change.named) or compare()
    if outcome.kind != REFUSED:
        return outcome
    if not change.refusable:
        return Outcome(WRONG, f"refused, though the run has it: {outcome.detail}")
    after = tree(slot.work / "run")
    if any(name not in after for name in before if not name.endswith(".tmp")):
        return Outcome(WRONG, f"refused with a loss: {outcome.detail}")
    if change.acceptable:
        if "--accept-changes" not in outcome.detail:
            return Outcome(WRONG, f"does not name --accept-changes: {outcome.detail}")
        accepted = ending(slot.call((*words, "--accept-changes")))
        if accepted is not None and accepted.kind == REFUSED:
            return Outcome(WRONG, f"--accept-changes does not help: {accepted.detail}")
        if accepted is not None:
            return accepted._replace(detail=f"with --accept-changes: {accepted.detail}")
    return outcome


def begin_stopped(slot: Slot, name: str, stop: float) -> None:
    """Makes the working folder that of a run that was killed after a share of its file operations."""
    whole = f"run-{name}"
    kept = f"{whole}-{stop}"
    if not (slot.kept / kept).is_dir():
        n = int(slot.about(whole)["operations"] * stop)
        slot.begin("inputs")
        slot.call(COMMANDS[whole].words, before=lambda: watch(slot.work, KillAt(n)))
        slot.keep(kept)
        again = slot.call(("engine.train", "--resume", "run"))
        same = compared(tree(slot.work / "run"), slot.oracle(whole, "run"))
        assert again.code == 0 and same.kind == CLEAN, f"{whole} does not resume: {again.err} {same.detail}"
    slot.begin(kept)


def outside_of(alteration: str) -> Callable[[], None]:
    """Returns what changes the world of a command instead of its files."""

    from engine.stages import job

    def tomorrow() -> None:
        # The date of a zone 24 hours ahead.
        os.environ["TZ"] = "AHEAD-24"
        time.tzset()

    def other_version() -> None:
        real = job.version
        job.version = lambda name: "0.0.7" if name in ("tokenizers", "numpy") else real(name)

    return {"tomorrow": tomorrow, "other-version": other_version}.get(alteration, lambda: None)
