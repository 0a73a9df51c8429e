"""The list of malformed inputs."""

from collections.abc import Sequence
from functools import partial

from bench.faults.cases import Case
from bench.faults.inputs import cells, classifiers, flags, models, paths, scorers, tables
from bench.faults.inputs.malformed import Malformed, judge
from bench.faults.slots import Slot


def cases(slot: Slot, seed: int, commands: Sequence[str] = ()) -> list[Case]:
    """Lists all malformed inputs; they do not depend on the seed."""
    sources = (
        tables.cases(),
        cells.cases(),
        models.cases(),
        classifiers.cases(),
        scorers.cases(),
        flags.cases(),
        paths.cases(),
    )
    return [
        Case(f"inputs/{one.name}", needs_of(one), partial(judge, malformed=one))
        for source in sources
        for one in source
    ]


def needs_of(malformed: Malformed) -> tuple[str, ...]:
    """Returns the undisturbed commands that a case needs."""
    return (malformed.needs, "export") if malformed.restores else (malformed.needs,)
