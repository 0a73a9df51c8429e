"""What the constraints ask: an improvement over the reference, a mean cost, or a rate of unsafe responses; on all prompts, or on one kind.

Training knows improvements alone: "mean cost at most m" and "rate at most q" are turned into required improvements over the reference's own
level once, on its samples of the training prompts. A constraint on one kind of prompts is the expectation over these; in the Lagrangian its
utility counts there with weight 1 / (their share), elsewhere not at all. The verdict judges each constraint by its own measure.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine import intervals
from engine.config import RunConfig
from engine.errors import UserError
from engine.records import Limit, Prompts, Scores, Units


def limits(config: RunConfig, names: Sequence[str]) -> list[Limit]:
    """The constraints on the costs `names`."""
    found = []
    for j, name in enumerate(names):
        mean, rate = (config.cost_mean or (math.inf,) * len(names))[j], (config.cost_rate or (1.0,) * len(names))[j]
        on = (config.cost_on or ("all",) * len(names))[j]
        kind, value = ("mean", mean) if mean < math.inf else ("rate", rate) if rate < 1 else ("improvement", config.threshold[j])
        found.append(Limit(name=name, kind=kind, value=value, on="" if on == "all" else on, unsafe_above=unsafe_above(config)[j]))
    return found


def unsafe_above(config: RunConfig) -> tuple[float, ...]:
    """--unsafe-above for each cost: one value serves all."""
    return config.unsafe_above * len(config.cost) if len(config.unsafe_above) == 1 else config.unsafe_above


def counted_above(limits: Sequence[Limit]) -> list[float | None]:
    """For `Units.unsafe_above_J`: a rate's responses are counted above a cost, other utilities stay as they are."""
    return [limit.unsafe_above if limit.kind == "rate" else None for limit in limits]


def check_prompts(limits: Sequence[Limit], sets: dict[str, Prompts]) -> None:
    """Raises: UserError where one of the sets of prompts has fewer than two that a constraint is about."""
    for limit in limits:
        for name, prompts in sets.items():
            if limit.on and (n := len(limit.rows(prompts))) < 2:
                kinds = ", ".join(sorted({kind or "(none)" for kind in prompts.kind}))
                raise UserError(
                    f"--cost-on {limit.on}: {n} of the {len(prompts)} {name} are of that kind, and constraint {limit.name} needs at "
                    f"least 2; kinds there: {kinds}. The column kind of the prompt file names them."
                )


def weighted(limits: Sequence[Limit], scores: Scores, prompts: Prompts, reference: Prompts) -> Tensor:
    """Utilities as the Lagrangian counts them, float64 [P, G, J]; shares are those among the `reference` prompts."""
    utility_PGJ = scores.utility_PGJ.clone()
    for j, limit in enumerate(limits):
        if limit.on:
            weight_P = torch.zeros(len(prompts), dtype=torch.float64)
            weight_P[limit.rows(prompts)] = len(reference) / len(limit.rows(reference))
            utility_PGJ[..., j] *= weight_P[:, None]
    return utility_PGJ


def required(limits: Sequence[Limit], scores: Scores, prompts: Prompts, units: Units) -> Tensor:
    """Improvements over the reference that the constraints ask for, in units, float64 [J]. scores: of the reference's samples, in units."""
    needed = []
    for j, limit in enumerate(limits):
        own = scores.utility_PGJ[limit.rows(prompts), :, j]
        needed.append(limit.value if limit.kind == "improvement" else -limit.value / units.utility_J[j] - float(own.mean()))
    return torch.tensor(needed, dtype=torch.float64)


def aims(
    limits: Sequence[Limit], scores: Scores, prompts: Prompts, units: Units, *, margin: float, heldout: Prompts, n_responses: int
) -> list[float]:
    """What to aim at so that the verdict on `heldout` can confirm each value, in its own measure.

    improvement: value + margin x standard error predicted for the held-out prompts. mean: value - margin x that of a mean cost, whose
    prompts vary too. rate: the a with a + margin sqrt(a (1 - a) / n) = value, n the effective number of responses: it lies above 0 always.
    """
    aimed = []
    for j, limit in enumerate(limits):
        own, n = scores.utility_PGJ[limit.rows(prompts), :, j], len(limit.rows(heldout))
        within, between = _variances(own)
        if limit.kind == "improvement":
            aimed.append(limit.value + margin * intervals.predicted_se(own, n, n_responses))
        elif limit.kind == "mean":
            aimed.append(limit.value - margin * units.utility_J[j] * math.sqrt((between + within / n_responses) / n))
        else:
            effective = n * n_responses / (1 + (n_responses - 1) * between / (between + within))
            a, q = margin**2 / effective, limit.value
            aimed.append((q + a / 2 - math.sqrt(a * q * (1 - q) + a * a / 4)) / (1 + a))
    return aimed


def aimed_improvement(limits: Sequence[Limit], aimed: Sequence[float], needed_J: Tensor, units: Units) -> Tensor:
    """`aims` as improvements over the reference in units, float64 [J]; needed: `required`."""
    own_unit = [-1.0 if limit.kind == "improvement" else unit for limit, unit in zip(limits, units.utility_J, strict=True)]
    room = [(limit.value - a) / u for limit, a, u in zip(limits, aimed, own_unit, strict=True)]
    return needed_J + torch.tensor(room, dtype=torch.float64)


def missing(
    limits: Sequence[Limit], aimed: Sequence[float], aim_J: Tensor, units: Units, policy_PGJ: Tensor, reference_PGJ: Tensor
) -> Tensor:
    """What each prompt misses of its own constraint, in units, float64 [P, J]; below 0 where it is met. Their mean is aim - improvement.

    An improvement is taken over the prompt's own reference samples; a mean cost or a rate is the prompt's own level, so that one below the
    limit already misses nothing (arXiv 2410.19933: E_x [E_y c - d]+). Utilities [P, G, J] in units; aimed, aim: `aims`,
    `aimed_improvement`.
    """
    missing_PJ = aim_J - (policy_PGJ.mean(1) - reference_PGJ.mean(1))
    for j, limit in enumerate(limits):
        if limit.kind != "improvement":
            missing_PJ[:, j] = -policy_PGJ[..., j].mean(1) - aimed[j] / units.utility_J[j]
    return missing_PJ


def _variances(x_PG: Tensor) -> tuple[float, float]:
    """(within prompts, of the prompts' true means) of a score [P, G]."""
    within = float(x_PG.var(1).mean())
    return within, max(0.0, float(x_PG.mean(1).var()) - within / x_PG.shape[1])


def text(limit: Limit, improvement: float, se: float, needed: float, aimed: float, unit: float) -> str:
    """A measured constraint in a line of an iteration. improvement, se, needed (`required`): in units; aimed: in its own measure."""
    on = f" on {limit.on}" if limit.on else ""
    if limit.kind == "improvement":
        return f"{limit.name}{on} {improvement:+.2f} +- {se:.2f} (b {limit.value:.2f}, aim {aimed:.2f})"
    level, se = limit.value + (needed - improvement) * unit, se * unit
    if limit.kind == "mean":
        return f"{limit.name}{on} mean cost {level:.3g} +- {se:.2g} (at most {limit.value:g}, aim {aimed:.3g})"
    return f"{limit.name}{on} rate {100 * level:.1f} +- {100 * se:.1f} % (at most {100 * limit.value:g} %, aim {100 * aimed:.1f} %)"


def opening(limit: Limit, needed: float, aimed: float, unit: float, n_prompts: int) -> str:
    """The line that says what a constraint asks, after the reference is known."""
    on = f" on {limit.on} prompts ({n_prompts})" if limit.on else ""
    if limit.kind == "improvement":
        return (
            f"constraint {limit.name}{on}: b {limit.value:.2f} + margin {aimed - limit.value:.2f} = aim {aimed:.2f} (within-prompt "
            f"standard deviations; one is {unit:.3g} of the scorer's units)"
        )
    level = limit.value + needed * unit
    if limit.kind == "mean":
        shown = f"mean cost at most {limit.value:g}, aim {aimed:.3g}; the reference has {level:.3g}"
    else:
        shown = f"share of responses with a cost above {limit.unsafe_above:g} at most {100 * limit.value:g} %, aim {100 * aimed:.1f} %; "
        shown += f"the reference has {100 * level:.1f} %"
    return f"constraint {limit.name}{on}: {shown}; needed improvement {needed:.2f} (within-prompt standard deviations, {unit:.3g} each)"
