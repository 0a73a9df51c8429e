"""A run's constraints, and what training makes of them.

Training knows improvements alone: "mean cost at most m" and "rate at most q" are turned into required
improvements over the reference's level once, on its samples of the training prompts. A constraint on one kind
of prompts is the expectation over these; in the Lagrangian its utility counts there with weight 1 / (their
share), elsewhere not at all. The verdict judges each constraint by its own measure.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.constraints.kinds import KINDS, WorstShare
from engine.constraints.limit import FEWEST_PROMPTS, Limit
from engine.errors import UserError
from engine.intervals import betting
from engine.records import Prompts, ScaledScores, Units


def limits(config: RunConfig, names: Sequence[str], worst_above: Sequence[float | None] = ()) -> list[Limit]:
    """Builds the constraints on the costs `names` that the settings ask for.

    worst_above: `WorstShare.above` of each, where the reference's samples have fixed them.
    """
    found = [_limit(config, j, name) for j, name in enumerate(names)]
    return [
        replace(limit, above=above) if isinstance(limit, WorstShare) else limit
        for limit, above in zip(found, worst_above or [None] * len(found), strict=True)
    ]


def _limit(config: RunConfig, j: int, name: str) -> Limit:
    """Builds the constraint on cost j, of the first kind for which the settings give a value."""
    asked = ((kind, kind.asked(config, j)) for kind in KINDS.values())
    kind, value = next((kind, value) for kind, value in asked if value is not None)
    return kind.of(config, j, name, value)


def check_prompts(limits: Sequence[Limit], sets: dict[str, Prompts]) -> None:
    """Checks that each set of prompts has two at least that each constraint is about. Raises: UserError."""
    for limit in limits:
        for name, prompts in sets.items():
            if limit.on and (n := len(limit.rows(prompts))) < 2:
                kinds = ", ".join(sorted({kind or "(none)" for kind in prompts.kind}))
                raise UserError(
                    f"--cost-on {limit.on}: {n} of the {len(prompts)} {name} are of that kind, "
                    f"and constraint {limit.name} needs at least 2; kinds there: {kinds}. "
                    "The column kind of the prompt file names them."
                )


def check_confirmable(limits: Sequence[Limit], heldout: Prompts, alpha: float) -> None:
    """Checks that some outcome on the held-out prompts can confirm each limit on a cost with a known range.

    alpha: the error of a one-sided bound at the last look. A worst share whose `above` is not fixed yet is
    taken with the best one.
    Raises: UserError naming how many prompts could.
    """
    for limit in limits:
        if can_confirm(limit, heldout, alpha):
            continue
        (low, high), n = limit.span(1.0), len(limit.rows(heldout))
        least = low + _least_share(n, alpha) * (high - low)
        enough = betting.fewest((limit.value - low) / (high - low), alpha)
        could = f"it takes {enough} prompts" if enough else "no number of prompts can"
        raise UserError(
            f"{limit.flag} {limit.value:g}: {n} held-out prompts cannot confirm it whatever the answers "
            f"are: with the least cost for every one of them the bound is {least:.3g}; {could} "
            "(--eval-prompts, --eval-budget, more --heldout prompts), or a higher limit."
        )


def can_confirm(limit: Limit, heldout: Prompts, alpha: float) -> bool:
    """Tells whether some outcome on the held-out prompts confirms a limit; see `check_confirmable`."""
    span = limit.span(1.0)
    if not limit.at_most or span is None:
        return True
    return _least_share(len(limit.rows(heldout)), alpha) <= (limit.value - span[0]) / (span[1] - span[0])


def _least_share(n: int, alpha: float) -> float:
    """Returns the bound on the mean of n numbers in [0, 1] that are all 0."""
    return float(betting.upper_bound(torch.zeros(n, dtype=torch.float64), alpha))


def warnings(limits: Sequence[Limit], heldout: Prompts) -> list[str]:
    """Says for which constraints there will be no word, as the held-out prompts are too few."""
    few = [x.name for x in limits if x.span(1.0) is None and len(x.rows(heldout)) < FEWEST_PROMPTS]
    return (
        [
            f"constraint {', '.join(few)}: fewer than {FEWEST_PROMPTS} held-out prompts give no verdict "
            "where scores have no stated range; give more, or --cost-range"
        ]
        if few
        else []
    )


def weights(limits: Sequence[Limit], prompts: Prompts, reference: Prompts) -> Tensor:
    """Returns how much the Lagrangian counts each utility of each prompt, float64 [P, J].

    A constraint on one kind of prompts counts there with weight 1 / (their share among the `reference`
    prompts), elsewhere not at all.
    """
    weight_PJ = torch.ones(len(prompts), len(limits), dtype=torch.float64)
    for j, limit in enumerate(limits):
        if limit.on:
            weight_PJ[:, j] = 0.0
            weight_PJ[limit.rows(prompts), j] = len(reference) / len(limit.rows(reference))
    return weight_PJ


def required(limits: Sequence[Limit], scores: ScaledScores, prompts: Prompts, units: Units) -> Tensor:
    """Returns the improvements over the reference that the constraints ask for, in units, float64 [J].

    scores: of the reference's samples.
    """
    needed = [
        limit.required(utility_PG, unit)
        for limit, utility_PG, unit in zip(
            limits, _judged_by(limits, scores, prompts), units.utility_J, strict=True
        )
    ]
    return torch.tensor(needed, dtype=torch.float64)


def aims(
    limits: Sequence[Limit],
    scores: ScaledScores,
    prompts: Prompts,
    units: Units,
    *,
    margin: float,
    heldout: Prompts,
    n_responses: int,
) -> list[float]:
    """Returns each `Limit.aim` for a verdict on the prompts `heldout`, in the constraint's measure."""
    utilities = _judged_by(limits, scores, prompts)
    return [
        limit.aim(
            utility_PG, unit, margin=margin, n_prompts=len(limit.rows(heldout)), n_responses=n_responses
        )
        for limit, utility_PG, unit in zip(limits, utilities, units.utility_J, strict=True)
    ]


def aimed_improvement(
    limits: Sequence[Limit], aimed: Sequence[float], needed_J: Tensor, units: Units
) -> Tensor:
    """Returns the `aims` as improvements over the reference in units, float64 [J]; needed: `required`."""
    room = [limit.room(a, unit) for limit, a, unit in zip(limits, aimed, units.utility_J, strict=True)]
    return needed_J + torch.tensor(room, dtype=torch.float64)


def missing(
    limits: Sequence[Limit],
    aimed: Sequence[float],
    aim_J: Tensor,
    units: Units,
    policy_PGJ: Tensor,
    reference_PGJ: Tensor,
) -> Tensor:
    """Returns what each prompt misses of its constraints, in units, float64 [P, J]; below 0 where one is met.

    Their mean over prompts is aim - improvement. An improvement is one over the reference's samples of the
    same prompt, a level that of the prompt (`MeanCost.missing`). Utilities [P, G, J] are in units; aimed,
    aim: `aims`, `aimed_improvement`.
    """
    each = zip(
        limits,
        policy_PGJ.unbind(2),
        reference_PGJ.unbind(2),
        aimed,
        aim_J.tolist(),
        units.utility_J,
        strict=True,
    )
    return torch.stack([limit.missing(*values) for limit, *values in each], dim=1)


def _judged_by(limits: Sequence[Limit], scores: ScaledScores, prompts: Prompts) -> list[Tensor]:
    """Returns, for each constraint, its utilities [P, G] of the prompts that it is about."""
    return [scores.utility_PGJ[limit.rows(prompts), :, j] for j, limit in enumerate(limits)]
