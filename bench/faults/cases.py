"""A case: one disturbance of one command."""

import random
from collections.abc import Callable
from typing import NamedTuple

from bench.faults.outcome import Outcome
from bench.faults.slots import Slot


class Case(NamedTuple):
    """One disturbance, by a name that says all of it."""

    name: str  # PART/COMMAND/WHAT, which --case takes
    needs: tuple[str, ...]  # undisturbed commands that have to be kept in a slot
    run: Callable[[Slot], Outcome]


def chosen(cases: list[Case], seed: int, at_most: int) -> list[Case]:
    """Returns a seeded choice of the cases, in their order; all of them where `at_most` is 0."""
    if not at_most or at_most >= len(cases):
        return cases
    rng = random.Random(f"{seed} {len(cases)}")
    return [cases[i] for i in sorted(rng.sample(range(len(cases)), at_most))]
