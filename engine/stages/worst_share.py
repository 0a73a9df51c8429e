"""Chooses the cost t above which each `--cost-worst` counts.

The mean of the worst share A of costs c is the minimum over t of t + E(c - t)+ / A. So it is at most L where
that is so for one t, and for a fixed t this is a mean cost. The best policy is that of the t at which the
constrained objective E r - beta KL, the minimum of the dual, is highest. That t is a cost which the policy
gives with some probability (Rockafellar and Uryasev 2000, Journal of Risk 2, Theorem 1), so the costs of the
reference's samples are tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.constraints import Limit, WorstShare

EACH = 32  # costs tried at a time: first over all of them, then between the two beside the best one
EQUAL = 1e-9  # relative difference of objectives that are taken for one


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What a choice is worth."""

    objective: float  # E r - beta KL at the dual's solution; higher is better
    slack_J: Sequence[
        float
    ]  # of each constraint there, in the scorers' own units: tells equal objectives apart


def choose(
    limits: Sequence[Limit],
    cost_J: Sequence[Tensor],
    worth: Callable[[Sequence[Limit]], Worth | None],
) -> list[Limit]:
    """Returns the constraints with `WorstShare.above` chosen, the others as they are.

    cost_J: of each constraint, the reference's costs [P, G] on the prompts that it is about. worth: of
    constraints that are all fixed, some of `limits`; None where they cannot be met together.

    Several are chosen in turn: each once with those that are chosen already, then all again. Where no choice
    can be met, that one is taken with which the samples support the lowest mean: the dual's solver then says
    what they support.
    """
    found = list(limits)
    places = [j for j, limit in enumerate(limits) if isinstance(limit, WorstShare)]
    for j in places + (places if len(places) > 1 else []):

        def tried(above: float, j: int = j) -> tuple[Worth | None, float, Limit]:
            limit = replace(found[j], above=above)
            fixed = [limit if i == j else x for i, x in enumerate(found) if i == j or _is_fixed(x)]
            own = len([i for i in range(j) if _is_fixed(found[i])])
            at = worth(fixed)
            slack = 0.0 if at is None else at.slack_J[own]
            return at, slack, limit

        found[j] = _best(found[j], cost_J[j], tried)
    return found


def _is_fixed(limit: Limit) -> bool:
    return not isinstance(limit, WorstShare) or limit.above is not None


def _best(limit: WorstShare, cost_PG: Tensor, tried: Callable) -> Limit:
    """Chooses among the costs, but for the largest one, above which there is nothing."""
    costs = cost_PG.unique()
    last = max(0, len(costs) - 2)
    known: dict[int, tuple] = {}
    low, high = 0, last
    while True:
        at = torch.linspace(low, high, EACH, dtype=torch.float64).round().long().unique().tolist()
        known |= {i: tried(float(costs[i])) for i in at if i not in known}
        best = _highest(known) if any(worth for worth, *_ in known.values()) else _lowest(known, cost_PG)
        places = sorted(known)
        here = places.index(best)
        low, high = places[max(0, here - 1)], places[min(len(places) - 1, here + 1)]
        if all(i in known for i in range(low, high + 1)):
            return known[best][2]


def _highest(known: dict[int, tuple]) -> int:
    """Returns the place with the highest objective, and of equal ones that with the most slack."""
    met = {i: (worth.objective, slack) for i, (worth, slack, _) in known.items() if worth is not None}
    top = max(objective for objective, _ in met.values())
    equal = {i: slack for i, (objective, slack) in met.items() if objective >= top - EQUAL * (1 + abs(top))}
    return max(equal, key=lambda i: equal[i])


def _lowest(known: dict[int, tuple], cost_PG: Tensor) -> int:
    """Returns the place at which the best response of every prompt has the lowest mean."""
    return min(known, key=lambda i: float(known[i][2].counted(cost_PG).amin(1).mean()))
