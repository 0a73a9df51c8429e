"""Chooses the cost t above which each `--cost-worst` counts.

The mean of the worst share A of costs c is the minimum over t of t + E(c - t)+ / A. So it is at most L where
that is so for one t, and for a fixed t this is a mean cost. The best policy is that of the t at which the
constrained objective E r - beta KL, the minimum of the dual, is highest. That t is a cost which the policy
gives with some probability (Rockafellar and Uryasev 2000, Journal of Risk 2, Theorem 1), so the costs of the
reference's samples are tried.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.constraints import Limit, WorstShare

EACH = 32  # costs tried at a time: first over all of them, then between the two beside the best one
ROUNDS = 8  # over several worst shares, at most
EQUAL = 1e-9  # relative difference of objectives that are taken for one


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What a choice is worth."""

    objective: float  # E r - beta KL at the dual's solution; higher is better
    # Of each constraint there, in the scorers' own units: decides between equal objectives.
    slack_J: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A cost that was tried: the constraint with it, and what it is worth."""

    limit: WorstShare
    objective: float | None  # None where the constraints cannot be met together
    slack: float  # of this constraint


def choose(
    limits: Sequence[Limit],
    cost_J: Sequence[Tensor],
    worth: Callable[[Sequence[Limit]], Worth | None],
) -> list[Limit]:
    """Returns the constraints with `WorstShare.above` chosen, the others as they are.

    cost_J: of each constraint, the reference's costs [P, G] on the prompts that it is about. worth: of
    constraints that are all fixed, some of `limits`; None where they cannot be met together.

    Several are chosen in turn, with those that are chosen already, until none changes. Where no choice can be
    met, that one is taken with which the samples support the lowest mean: the dual's solver then says what
    they support.
    """
    found = list(limits)
    places = [j for j, limit in enumerate(limits) if isinstance(limit, WorstShare)]
    for _ in range(ROUNDS if len(places) > 1 else 1):
        before = list(found)
        for j in places:
            found[j] = _best(cost_J[j], lambda above, j=j: _tried(found, j, above, worth))
        if found == before:
            break
    return found


def _tried(
    limits: Sequence[Limit], j: int, above: float, worth: Callable[[Sequence[Limit]], Worth | None]
) -> Tried:
    """Tries a cost for constraint j, beside the constraints that are fixed."""
    limit = replace(limits[j], above=above)
    before = [x for x in limits[:j] if _is_fixed(x)]
    found = worth([*before, limit, *(x for x in limits[j + 1 :] if _is_fixed(x))])
    return Tried(
        limit=limit,
        objective=None if found is None else found.objective,
        slack=math.nan if found is None else found.slack_J[len(before)],
    )


def _is_fixed(limit: Limit) -> bool:
    return not isinstance(limit, WorstShare) or limit.above is not None


def _best(cost_PG: Tensor, tried: Callable[[float], Tried]) -> Limit:
    """Chooses among the costs, but for the largest one, above which there is nothing."""
    costs = cost_PG.unique()
    known: dict[int, Tried] = {}
    low, high = 0, max(0, len(costs) - 2)
    while True:
        at = torch.linspace(low, high, EACH, dtype=torch.float64).round().long().unique().tolist()
        known |= {i: tried(float(costs[i])) for i in at if i not in known}
        best, places = _highest(known, cost_PG), sorted(known)
        here = places.index(best)
        low, high = places[max(0, here - 1)], places[min(len(places) - 1, here + 1)]
        if all(i in known for i in range(low, high + 1)):
            return known[best].limit


def _highest(known: dict[int, Tried], cost_PG: Tensor) -> int:
    """Returns the place with the highest objective, and of equal ones that with the most slack.

    Where none has one, it is the place at which the mean is lowest if every prompt has its best response.
    """
    met = {i: at for i, at in known.items() if at.objective is not None}
    if not met:
        return min(known, key=lambda i: float(known[i].limit.counted(cost_PG).amin(1).mean()))
    top = max(at.objective for at in met.values())
    equal = [i for i, at in met.items() if at.objective >= top - EQUAL * (1 + abs(top))]
    return max(equal, key=lambda i: met[i].slack)
