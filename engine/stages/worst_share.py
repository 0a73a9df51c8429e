"""Chooses the cost t above which each `--cost-worst` counts.

The mean of the worst share A of costs c is the minimum over t of t + E(c - t)+ / A. So it is at most L where
that is so for one t, and for a fixed t this is a mean cost. The best policy is that of the t at which the
constrained objective E r - beta KL, the minimum of the dual, is highest. That t is a cost which the policy
gives with some probability (Rockafellar and Uryasev 2000, Journal of Risk 2, Theorem 1), so the costs of the
reference's samples are tried.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from engine.constraints import Limit, WorstShare

EACH = 64  # costs tried at a time: first over all of them, then between the two beside the best one
TOGETHER = 1024  # combinations at a time, at most, of the costs of several worst shares
ROUNDS = 8  # over several worst shares one by one, at most
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

    Several are chosen together, from some of their costs, and then in turn beside the others, until none
    changes. In turn alone they may end where each is the best one beside the others and better ones exist, or
    where none can be met although others can. Where no choice can be met, that one is taken with which the
    samples support the lowest mean: the dual's solver then says what they support.
    """
    found = list(limits)
    places = [j for j, limit in enumerate(limits) if isinstance(limit, WorstShare)]
    if len(places) > 1:
        found = _together(found, places, cost_J, worth)
    for _ in range(ROUNDS if len(places) > 1 else 1):
        before = list(found)
        for j in places:
            found[j] = _best(cost_J[j], found[j].above, lambda above, j=j: _tried(found, j, above, worth))
        if found == before:
            break
    return found


def _together(
    limits: Sequence[Limit],
    places: Sequence[int],
    cost_J: Sequence[Tensor],
    worth: Callable[[Sequence[Limit]], Worth | None],
) -> list[Limit]:
    """Chooses the worst shares at `places` from combinations of their costs: first of some over all costs,
    then of those between the costs beside the best ones.

    A combination is worth no more than any of its costs is without the other worst shares, as the margin of
    the aims is the same for all. So the one that may be worth most is tried first, and none that cannot be
    worth more than the best one is tried at all. Returns the constraints as they are where no combination can
    be met.
    """
    costs = {j: cost_J[j].unique().tolist() for j in places}
    each = max(4, int(TOGETHER ** (1 / len(places))))
    ends = {j: (0, max(0, len(costs[j]) - 2)) for j in places}
    alone: dict[int, dict[int, float]] = {j: {} for j in places}
    tried, best, highest = set(), None, -math.inf
    while True:
        axes = {j: _spread(*ends[j], each) for j in places}
        for j, axis in axes.items():
            new = [i for i in axis if i not in alone[j]]
            alone[j] |= {i: _objective(_fixed(limits, {j: costs[j][i]}), worth) for i in new}
        at_most = {
            at: min(alone[j][i] for j, i in zip(places, at, strict=True)) for at in product(*axes.values())
        }
        for at in sorted(at_most.keys() - tried, key=lambda at: (-at_most[at], at)):
            if at_most[at] <= highest:
                break
            chosen = _fixed(limits, {j: costs[j][i] for j, i in zip(places, at, strict=True)})
            tried.add(at)
            if (found := _objective(chosen, worth)) > highest:
                best, highest, kept = at, found, chosen
        if best is None:
            return list(limits)
        if all(high - low < each for low, high in ends.values()):
            return kept
        ends = {j: _beside(axes[j], i) for j, i in zip(places, best, strict=True)}


def _fixed(limits: Sequence[Limit], above: dict[int, float]) -> list[Limit]:
    """Returns the constraints with the costs `above` of some places."""
    return [replace(x, above=above[j]) if j in above else x for j, x in enumerate(limits)]


def _objective(limits: Sequence[Limit], worth: Callable[[Sequence[Limit]], Worth | None]) -> float:
    """Returns the objective with the constraints that are fixed; minus infinity where they cannot be met."""
    found = worth([x for x in limits if _is_fixed(x)])
    return -math.inf if found is None else found.objective


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


def _best(cost_PG: Tensor, present: float | None, tried: Callable[[float], Tried]) -> Limit:
    """Chooses among the costs, but for the largest one, above which there is nothing.

    present: the cost that is chosen already, if any; one that is worth less does not replace it.
    """
    costs = cost_PG.unique()
    low, high = 0, max(0, len(costs) - 2)
    known: dict[int, Tried] = {}
    if present is not None:
        known[costs.tolist().index(present)] = tried(present)
    while True:
        known |= {i: tried(float(costs[i])) for i in _spread(low, high, EACH) if i not in known}
        best = _highest(known, cost_PG)
        low, high = _beside(known, best)
        if all(i in known for i in range(low, high + 1)):
            return known[best].limit


def _spread(low: int, high: int, n: int) -> list[int]:
    """Returns n whole numbers from low to high, about evenly spaced, or all where there are fewer."""
    return torch.linspace(low, high, n, dtype=torch.float64).round().long().unique().tolist()


def _beside(places: Iterable[int], at: int) -> tuple[int, int]:
    """Returns the places next to one on both sides, or itself where there is none."""
    return (
        max((i for i in places if i < at), default=at),
        min((i for i in places if i > at), default=at),
    )


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
