"""What held-out responses say of constraints: bounds, a word for each, and one word for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine import intervals
from engine.constraints.limit import MET, NOT_MET, NOT_RESOLVED, Judged, Limit
from engine.intervals import Estimate, number


def judge(
    limits: Sequence[Limit],
    aims: Sequence[float],
    policy: Sequence[Tensor],
    reference: Sequence[Tensor],
    units: Sequence[float],
    *,
    confidence: float = 0.95,
    alpha: float | None = None,
    before: Sequence[Judged] = (),
) -> tuple[Judged, ...]:
    """Judges the constraints of a run, each by the utilities of its held-out prompts, in units.

    policy, reference: [P, G1] and [P, G2] of each constraint. units: one unit of each in the scorer's.
    confidence: of the two-sided intervals. alpha: the error of this look, 1 - confidence unless given.
    before: the result of the look before. Single words are corrected for several constraints
    (`engine.intervals.families.holm`).

    Raises: UserError for fewer than two prompts or scores that are not finite.
    """
    alpha = 1 - confidence if alpha is None else alpha
    each = [
        _Numbers.of(limit, *scores, unit)
        for limit, *scores, unit in zip(limits, policy, reference, units, strict=True)
    ]
    errors = [x.error(limit) for x, limit in zip(each, limits, strict=True)] if len(limits) > 1 else [0.0]
    tested = intervals.holm(errors, alpha)
    judged = []
    for j, (limit, x) in enumerate(zip(limits, each, strict=True)):
        estimate = alone = x.estimate(confidence, alpha)
        if len(limits) > 1:
            estimate = x.estimate(confidence, tested[j])
            # A false "not met" is corrected by Bonferroni alone.
            wider = x.estimate(confidence, alpha / len(limits))
            estimate = replace(estimate, **{"lower" if limit.at_most else "upper": _other(wider, limit)})
        if before:
            estimate = _closed(estimate, before[j].judged)
        improvement = intervals.improvement(policy[j], reference[j], confidence)
        found = Judged(
            limit=limit,
            aim=float(aims[j]),
            estimate=improvement if limit.at_most else estimate,
            word=NOT_RESOLVED,
            measured=estimate if limit.at_most else None,
            reference=limit.reference_level(reference[j], units[j]),
            unit=units[j],
            exact=x.span is not None,
            spread=x.spread,
        )
        holds, earlier = not found.silent_for and _word(alone, limit) == MET, before[j] if before else None
        judged.append(
            replace(
                found,
                word=_kept(earlier) or (NOT_RESOLVED if found.silent_for else _word(estimate, limit)),
                holds=holds or bool(earlier and earlier.holds),
            )
        )
    return tuple(judged)


def overall(judged: Sequence[Judged]) -> str:
    """Returns one word for all constraints.

    "met" where each one's own bound confirms it: this needs no correction, since all must hold (Berger 1982,
    Technometrics 24). "not met" where one of them is not.
    """
    if any(c.word == NOT_MET for c in judged):
        return NOT_MET
    return MET if all(c.holds for c in judged) else NOT_RESOLVED


@dataclass(frozen=True)
class _Numbers:
    """The numbers of the prompts whose mean a constraint is about, and their range where it is known."""

    values_P: Tensor
    span: tuple[float, float] | None

    @staticmethod
    def of(limit: Limit, policy_PG: Tensor, reference_PG: Tensor, unit: float) -> "_Numbers":
        assert policy_PG.shape[0] == reference_PG.shape[0], (policy_PG.shape, reference_PG.shape)
        values_P = limit.values(policy_PG, reference_PG, unit)
        costs = torch.cat([(-scores_PG.double() * unit).flatten() for scores_PG in (policy_PG, reference_PG)])
        if limit.costs_within is None and limit.counted is None and _are_0_and_1(costs):
            limit = replace(limit, costs_within=(0.0, 1.0))
        within = limit.span(unit) if limit.at_most else limit.costs_within
        beyond = within and (costs.min() < within[0] - 1e-9 or costs.max() > within[1] + 1e-9)
        return _Numbers(values_P, None if beyond else limit.span(unit))

    @property
    def spread(self) -> bool:
        low, high = (float(x) for x in self.values_P.aminmax())
        return high - low > 1e-9 * max(1.0, abs(low), abs(high))

    def estimate(self, confidence: float, alpha: float) -> Estimate:
        return intervals.estimate(self.values_P, confidence, alpha=alpha, limits=self.span)

    def error(self, limit: Limit) -> float:
        """Returns the least error at which the bound confirms the constraint, to a thousandth of itself."""
        low, high = 1e-12, 0.5
        if not self._confirms(limit, high):
            return 1.0
        while high > low * 1.001:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if self._confirms(limit, middle) else (middle, high)
        return high

    def _confirms(self, limit: Limit, alpha: float) -> bool:
        return _word(self.estimate(0.95, alpha), limit) == MET


def _are_0_and_1(costs: Tensor) -> bool:
    """Tells whether costs are 0 or 1 each, up to the rounding of units, and both are there."""
    whole = costs.round()
    near = bool(((costs - whole).abs() < 1e-9).all())
    return near and float(whole.min()) == 0.0 and float(whole.max()) == 1.0


def _word(e: Estimate, limit: Limit) -> str:
    return word(intervals.negated(e), -limit.value) if limit.at_most else word(e, limit.value)


def _other(e: Estimate, limit: Limit) -> float:
    return e.lower if limit.at_most else e.upper


def _closed(now: Estimate, before: Estimate) -> Estimate:
    """Returns `now` with bounds no looser than before: at every look they hold together."""
    return replace(now, lower=max(now.lower, before.lower), upper=min(now.upper, before.upper))


def _kept(earlier: Judged | None) -> str:
    """Returns the word that an earlier look has given; what it has decided stands."""
    return earlier.word if earlier and earlier.word != NOT_RESOLVED else ""


def word(estimate: Estimate, threshold: float) -> str:
    """Compares the one-sided bounds with the threshold.

    Returns "met" where the lower one reaches it, "not met" where the upper one is below it, and else
    "not resolved".
    """
    if estimate.lower >= threshold:
        return MET
    return NOT_MET if estimate.upper < threshold else NOT_RESOLVED


def comparable(lower: float, upper: float, threshold: float) -> tuple[str, str, str]:
    """Prints the three numbers with so many digits that what one reads compares as the numbers do."""
    digits, bounds = 2, [x for x in (lower, upper) if x != threshold]
    while digits < 8 and any(
        (round(x, digits) < round(threshold, digits)) != (x < threshold) for x in bounds
    ):
        digits += 1
    while digits < 8 and abs(round(threshold, digits) - threshold) > 1e-9:
        digits += 1
    return number(lower, digits), number(upper, digits), number(threshold, digits)
