"""The kinds of constraints: an improvement over the reference, a mean cost, a rate of unsafe responses, and
the mean of the worst share of costs.

A further kind is one more class, and its entry in `KINDS`.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from engine import intervals
from engine.config import RunConfig
from engine.constraints.judging import comparable
from engine.constraints.limit import Judged, Limit
from engine.errors import UserError
from engine.intervals import Estimate, improvement_text, interval_text, number
from engine.records import Counted


@dataclass(frozen=True, kw_only=True)
class Improvement(Limit):
    """Mean utility of the policy - that of the reference >= value, in the run's units."""

    kind: ClassVar[str] = "improvement"
    flag: ClassVar[str] = "--threshold"

    @classmethod
    def asked(cls, config: RunConfig, j: int) -> float | None:
        return config.threshold[j]

    def required(self, utility_PG: Tensor, unit: float) -> float:
        return self.value

    def aim(
        self, utility_PG: Tensor, unit: float, *, margin: float, n_prompts: int, n_responses: int
    ) -> float:
        """Returns value + margin x standard error predicted for the held-out prompts."""
        return self.value + margin * intervals.predicted_se(utility_PG, n_prompts, n_responses)

    def room(self, aimed: float, unit: float) -> float:
        return aimed - self.value

    def missing(
        self, policy_PG: Tensor, reference_PG: Tensor, aimed: float, aim: float, unit: float
    ) -> Tensor:
        return aim - (policy_PG.mean(1) - reference_PG.mean(1))

    def values(self, policy_PG: Tensor, reference_PG: Tensor, unit: float) -> Tensor:
        return policy_PG.double().mean(1) - reference_PG.double().mean(1)

    def span(self, unit: float) -> tuple[float, float] | None:
        if self.costs_within is None:
            return None
        width = (self.costs_within[1] - self.costs_within[0]) / unit
        return -width, width

    @property
    def at_most(self) -> bool:
        return False

    def reference_level(self, reference_PG: Tensor, unit: float) -> None:
        return None

    def progress(self, improvement: float, se: float, needed: float, aimed: float, unit: float) -> str:
        on = f" on {self.on}" if self.on else ""
        return f"{self.name}{on} {improvement:+.2f} +- {se:.2f} (b {self.value:.2f}, aim {aimed:.2f})"

    def opening(self, needed: float, aimed: float, unit: float, n_prompts: int) -> str:
        on = f" on {self.on} prompts ({n_prompts})" if self.on else ""
        return (
            f"constraint {self.name}{on}: b {self.value:.2f} + margin {aimed - self.value:.2f} "
            f"= aim {aimed:.2f}"
        )

    def asked_text(self) -> str:
        return f"b {self.value:g}"

    def slack_text(self, slack: Estimate, confidence: float) -> str:
        text = f"{number(slack.mean, sign='+')}, {interval_text(slack, confidence)}"
        return f"slack {self.name} (improvement - b): {text}"

    def verdict_text(self, judged: Judged, confidence: float) -> str:
        lower, upper, b = comparable(judged.estimate.lower, judged.estimate.upper, self.value)
        reason = {
            "met": f"one-sided lower bound {lower} >= b {b}",
            "not met": f"one-sided upper bound {upper} < b {b}",
            "not resolved": judged.silent_for or f"b {b} {unresolved(lower, upper)}",
        }[judged.word]
        return (
            f"constraint {self.name}: {judged.word} ({judged.prompts_text}"
            f"{improvement_text(judged.estimate, confidence)}, {reason}, aimed at {number(judged.aim)})"
        )


@dataclass(frozen=True, kw_only=True)
class MeanCost(Limit):
    """Mean cost of the policy <= value, in the scorer's own units.

    A limit on another level of the policy is a subclass, which measures it differently and in other words.
    """

    kind: ClassVar[str] = "mean"
    flag: ClassVar[str] = "--cost-mean"
    measured: ClassVar[str] = "mean cost"  # the name of the level in sentences
    scale: ClassVar[int] = 1  # from a level to the number that is printed
    percent: ClassVar[str] = ""  # what follows a number that is printed
    formats: ClassVar[tuple[str, str]] = (".3g", ".2g")  # of a level and of its standard error

    @classmethod
    def asked(cls, config: RunConfig, j: int) -> float | None:
        return config.cost_mean[j] if config.cost_mean and config.cost_mean[j] < math.inf else None

    @property
    def meaning(self) -> str:
        """Names the level in the words of the opening line."""
        return self.measured

    def level(self, utility_PG: Tensor) -> float:
        """Returns the level of all prompts together, in units."""
        return float(-utility_PG.mean())

    def prompt_levels(self, utility_PG: Tensor) -> Tensor:
        """Returns the level of each prompt, in units, float64 [P]."""
        return -utility_PG.mean(1)

    def required(self, utility_PG: Tensor, unit: float) -> float:
        return -self.value / unit + self.level(utility_PG)

    def aim(
        self, utility_PG: Tensor, unit: float, *, margin: float, n_prompts: int, n_responses: int
    ) -> float:
        """Returns value - margin x standard error predicted for a mean cost, whose prompts vary too."""
        within, between = variances(utility_PG)
        return self.value - margin * unit * math.sqrt((between + within / n_responses) / n_prompts)

    def room(self, aimed: float, unit: float) -> float:
        return (self.value - aimed) / unit

    def missing(
        self, policy_PG: Tensor, reference_PG: Tensor, aimed: float, aim: float, unit: float
    ) -> Tensor:
        """Compares the level of each prompt with the aim: one below it misses nothing.

        This is arXiv 2410.19933, E_x [E_y c - d]+.
        """
        return self.prompt_levels(policy_PG) - aimed / unit

    def values(self, policy_PG: Tensor, reference_PG: Tensor, unit: float) -> Tensor:
        return (-policy_PG.double() * unit).mean(1)

    def span(self, unit: float) -> tuple[float, float] | None:
        return self.costs_within

    @property
    def at_most(self) -> bool:
        return True

    def reference_level(self, reference_PG: Tensor, unit: float) -> float:
        return self.level(reference_PG) * unit

    def progress(self, improvement: float, se: float, needed: float, aimed: float, unit: float) -> str:
        on = f" on {self.on}" if self.on else ""
        level, se, (of_level, of_se) = self.value + (needed - improvement) * unit, se * unit, self.formats
        return (
            f"{self.name}{on} {self.measured} "
            f"{self.scale * level:{of_level}} +- {self.scale * se:{of_se}}{self.percent} "
            f"(at most {self.scale * self.value:g}{self.percent}, "
            f"aim {self.scale * aimed:{of_level}}{self.percent})"
        )

    def opening(self, needed: float, aimed: float, unit: float, n_prompts: int) -> str:
        on = f" on {self.on} prompts ({n_prompts})" if self.on else ""
        level, of_level = self.value + needed * unit, self.formats[0]
        return (
            f"constraint {self.name}{on}: {self.meaning} at most {self.scale * self.value:g}{self.percent}, "
            f"aim {self.scale * aimed:{of_level}}{self.percent}; "
            f"the reference has {self.scale * level:{of_level}}{self.percent}; "
            f"needed improvement {needed:.2f}"
        )

    def asked_text(self) -> str:
        return f"{self.measured} at most {self.scale * self.value:g}{self.percent}"

    def slack_text(self, slack: Estimate, confidence: float) -> str:
        in_percent = f",{self.percent}" if self.percent else ""
        interval = interval_text(slack, confidence, scale=self.scale)
        text = f"{number(self.scale * slack.mean, sign='+')}, {interval}"
        return f"slack {self.name} (limit - {self.measured}{in_percent}): {text}"

    def verdict_text(self, judged: Judged, confidence: float) -> str:
        level, scale, percent = judged.measured, self.scale, self.percent
        lower, upper, limit = comparable(scale * level.lower, scale * level.upper, scale * self.value)
        reason = {
            "met": f"one-sided upper bound {upper} <= {limit}{percent}",
            "not met": f"one-sided lower bound {lower} > {limit}{percent}",
            "not resolved": judged.silent_for or f"the limit {limit}{percent} {unresolved(lower, upper)}",
        }[judged.word]
        values = f"{number(scale * level.mean)}{percent}, {interval_text(level, confidence, scale=scale)}"
        return (
            f"constraint {self.name}: {judged.word} "
            f"({judged.prompts_text}{self.measured} {values}, {reason}, "
            f"aimed at {number(scale * judged.aim)}{percent}, "
            f"reference {number(scale * judged.reference)}{percent}; "
            f"{improvement_text(judged.estimate, confidence)})"
        )


@dataclass(frozen=True, kw_only=True)
class Rate(MeanCost):
    """Share of responses whose cost lies above `unsafe_above` <= value: a mean cost of 1 or 0 each."""

    kind: ClassVar[str] = "rate"
    flag: ClassVar[str] = "--cost-rate"
    measured: ClassVar[str] = "rate"
    scale: ClassVar[int] = 100
    percent: ClassVar[str] = " %"
    formats: ClassVar[tuple[str, str]] = (".1f", ".1f")
    highest: ClassVar[float | None] = 0.0  # a utility is minus the share of unsafe responses

    unsafe_above: float = 0.0  # in the scorer's own units

    @classmethod
    def asked(cls, config: RunConfig, j: int) -> float | None:
        return config.cost_rate[j] if config.cost_rate and config.cost_rate[j] < 1 else None

    @classmethod
    def of(cls, config: RunConfig, j: int, name: str, value: float) -> Self:
        return replace(super().of(config, j, name, value), unsafe_above=unsafe_above(config)[j])

    @property
    def meaning(self) -> str:
        return f"share of responses with a cost above {self.unsafe_above:g}"

    @property
    def counted(self) -> Counted:
        return Counted(above=self.unsafe_above)

    def check_reference(self, utility_PG: Tensor) -> None:
        super().check_reference(utility_PG)
        unsafe_PG = self.counted(-utility_PG)
        if unsafe_PG.min() == unsafe_PG.max():
            on = f" on {self.on} prompts" if self.on else ""
            side = "above" if unsafe_PG.min() > 0 else "at or below"
            raise UserError(
                f"--unsafe-above {self.unsafe_above:g}: "
                f"every cost {self.name} of the reference{on} lies {side} it, so that a rate says nothing; "
                "choose a value among the costs."
            )

    def aim(
        self, utility_PG: Tensor, unit: float, *, margin: float, n_prompts: int, n_responses: int
    ) -> float:
        """Returns the a with a + margin sqrt(a (1 - a) / n) = value, which always lies above 0.

        n is the effective number of responses.
        """
        within, between = variances(utility_PG)
        effective = n_prompts * n_responses / (1 + (n_responses - 1) * between / (between + within))
        a, q = margin**2 / effective, self.value
        return (q + a / 2 - math.sqrt(a * q * (1 - q) + a * a / 4)) / (1 + a)

    def values(self, policy_PG: Tensor, reference_PG: Tensor, unit: float) -> Tensor:
        # The costs are 0 or 1 up to rounding of the unit.
        return (
            super().values(policy_PG, reference_PG, unit).mul(policy_PG.shape[1]).round() / policy_PG.shape[1]
        )

    def span(self, unit: float) -> tuple[float, float]:
        return 0.0, 1.0


@dataclass(frozen=True, kw_only=True)
class WorstShare(MeanCost):
    """Mean of the worst `share` of all costs <= value (CVaR): a mean of above + (cost - above)+ / share.

    For any number `above` that mean is at least the one of the worst share, so that one which is met confirms
    the limit; one that is not met is so for this number (`Counted`). `engine.stages.worst_share` chooses it.
    """

    kind: ClassVar[str] = "worst"
    flag: ClassVar[str] = "--cost-worst"

    share: float = 0.1
    above: float | None = None  # in the scorer's own units; None until the reference's samples fix it

    @classmethod
    def asked(cls, config: RunConfig, j: int) -> float | None:
        return config.cost_worst[j] if config.cost_worst and config.cost_worst[j] < math.inf else None

    @classmethod
    def of(cls, config: RunConfig, j: int, name: str, value: float) -> Self:
        share = config.worst_share[0] if len(config.worst_share) == 1 else config.worst_share[j]
        return replace(super().of(config, j, name, value), share=share)

    @property
    def measured(self) -> str:
        return f"mean of the worst {100 * self.share:g} %"

    @property
    def meaning(self) -> str:
        return f"{self.measured} ({self.above:.3g} + what costs have above it / {self.share:g})"

    @property
    def counted(self) -> Counted | None:
        return None if self.above is None else Counted(above=self.above, share=self.share)

    def span(self, unit: float) -> tuple[float, float] | None:
        if self.costs_within is None:
            return None
        least, most = self.costs_within
        above = least if self.above is None else self.above
        return above, above + (most - above) / self.share


# By the name in evaluation.json. The settings are asked in this order, and the last kind is that of every
# cost without another one.
KINDS: dict[str, type[Limit]] = {kind.kind: kind for kind in (MeanCost, Rate, WorstShare, Improvement)}


def unresolved(lower: str, upper: str) -> str:
    """Says where a threshold lies for which there is no verdict."""
    return f"lies between the one-sided bounds {lower} and {upper}"


def unsafe_above(config: RunConfig) -> tuple[float, ...]:
    """Returns --unsafe-above for each cost: one value serves all."""
    return config.unsafe_above * len(config.cost) if len(config.unsafe_above) == 1 else config.unsafe_above


def variances(x_PG: Tensor) -> tuple[float, float]:
    """Returns the variance of a score within prompts, and that of the prompts' true means."""
    within = float(x_PG.var(1).mean())
    return within, max(0.0, float(x_PG.mean(1).var()) - within / x_PG.shape[1])
