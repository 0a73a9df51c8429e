"""Declares what every constraint can do, and its result on held-out prompts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from engine import intervals
from engine.config import RunConfig
from engine.intervals import Estimate, number
from engine.records import Prompts


@dataclass(frozen=True, kw_only=True)
class Limit(ABC):
    """A constraint: it asks for `value`, in its own measure, on the prompts of kind `on` ("" for all).

    Its methods take utilities [P, G] in the run's units, of the prompts in `rows` alone;
    `unit` is one such unit in the scorer's.
    """

    kind: ClassVar[str]  # its name in evaluation.json
    flag: ClassVar[str]  # the flag that gives `value`
    highest: ClassVar[float | None] = None  # no utility lies above this; None where that is not known

    name: str
    value: float
    on: str = ""

    @classmethod
    @abstractmethod
    def asked(cls, config: RunConfig, j: int) -> float | None:
        """Returns `value` where the settings ask for this kind of constraint on cost j, else None."""

    @classmethod
    def of(cls, config: RunConfig, j: int, name: str, value: float) -> Self:
        """Builds the constraint on cost j of a run."""
        on = config.cost_on[j] if config.cost_on else "all"
        return cls(name=name, value=value, on="" if on == "all" else on)

    def rows(self, prompts: Prompts) -> list[int]:
        """Returns the places of the prompts that the constraint is about."""
        return [p for p, kind in enumerate(prompts.kind) if not self.on or kind == self.on]

    @property
    def counted_above(self) -> float | None:
        """The cost above which a response is unsafe, with the utility -1 and else 0; None keeps utilities."""
        return None

    def check_reference(self, utility_PG: Tensor) -> None:
        """Checks the reference's utilities, counted but not yet in units.

        Raises: UserError where they say nothing about the constraint.
        """
        return None

    @abstractmethod
    def required(self, utility_PG: Tensor, unit: float) -> float:
        """Returns the improvement over the reference's samples, `utility_PG`, that is asked for, in units."""

    @abstractmethod
    def aim(
        self, utility_PG: Tensor, unit: float, *, margin: float, n_prompts: int, n_responses: int
    ) -> float:
        """Returns what to aim at, in the constraint's measure, so that the verdict can confirm `value`.

        utility: of the reference's samples. margin: how many standard errors of a verdict on n_prompts with
        n_responses each lie between the two.
        """

    @abstractmethod
    def room(self, aimed: float, unit: float) -> float:
        """Returns how far an aim goes beyond `value`, as an improvement in units."""

    @abstractmethod
    def missing(
        self, policy_PG: Tensor, reference_PG: Tensor, aimed: float, aim: float, unit: float
    ) -> Tensor:
        """Returns what each prompt misses of the constraint, in units, float64 [P]; below 0 where it holds.

        aimed: the aim in the constraint's measure. aim: the same as an improvement, in units.
        """

    @abstractmethod
    def measure(self, policy_PG: Tensor, unit: float, confidence: float) -> Estimate | None:
        """Measures the policy's level; None where the improvement itself is judged."""

    @abstractmethod
    def reference_level(self, reference_PG: Tensor, unit: float) -> float | None:
        """Returns the reference's level; None where the improvement itself is judged."""

    @abstractmethod
    def as_utility(self, judged: Estimate) -> tuple[Estimate, float]:
        """Returns the estimate that is judged and `value`, both with the sign for which larger is better."""

    @abstractmethod
    def progress(self, improvement: float, se: float, needed: float, aimed: float, unit: float) -> str:
        """Says what an iteration measured.

        improvement, se and needed (`required`) are in units, aimed is in the constraint's measure.
        """

    @abstractmethod
    def opening(self, needed: float, aimed: float, unit: float, n_prompts: int) -> str:
        """Says what is asked for on n_prompts prompts, once the reference is known; see `progress`."""

    @abstractmethod
    def asked_text(self) -> str:
        """Says what was asked for in a few words."""

    @abstractmethod
    def slack_text(self, slack: Estimate, confidence: float) -> str:
        """Says how much is left to `value`."""

    @abstractmethod
    def verdict_text(self, judged: "Judged", confidence: float) -> str:
        """Says the verdict, with as many digits as the comparison needs to be true as printed."""


@dataclass(frozen=True)
class Judged:
    """A constraint's result on held-out prompts."""

    limit: Limit
    aim: float  # what the dual aimed at, in the constraint's measure
    estimate: Estimate  # improvement over the reference, in units
    word: str  # the verdict: "met", "not met" or "not resolved"
    measured: Estimate | None = None  # the policy's level in the constraint's measure, where that is judged
    reference: float | None = None  # the reference's level
    unit: float = 1.0  # one unit of the improvement, in the scorer's units

    @property
    def name(self) -> str:
        """The name of the constraint."""
        return self.limit.name

    @property
    def required(self) -> float:
        """Returns the improvement over the held-out reference, in units, at which
        the constraint just holds."""
        return self.limit.value if self.measured is None else (self.reference - self.limit.value) / self.unit

    @property
    def slack(self) -> Estimate:
        """Measures what is left to what the constraint asks for, in its own measure:
        above 0 it holds with room."""
        e, b = self.limit.as_utility(self.measured or self.estimate)
        return replace(
            e, mean=e.mean - b, low=e.low - b, high=e.high - b, lower=e.lower - b, upper=e.upper - b
        )

    @property
    def prompts_text(self) -> str:
        """Opens the details of a verdict on some of the prompts; empty where it is on all of them."""
        return f"on {self.estimate.n} {self.limit.on} prompts: " if self.limit.on else ""


def judge(
    limit: Limit, aim: float, policy_PG: Tensor, reference_PG: Tensor, unit: float, confidence: float = 0.95
) -> Judged:
    """Judges a constraint by the utilities of its held-out prompts, [P, G1] and [P, G2] in units."""
    improvement = intervals.improvement(policy_PG, reference_PG, confidence)
    measured = limit.measure(policy_PG, unit, confidence)
    return Judged(
        limit=limit,
        aim=aim,
        estimate=improvement,
        word=word(*limit.as_utility(measured or improvement)),
        measured=measured,
        reference=limit.reference_level(reference_PG, unit),
        unit=unit,
    )


def word(estimate: Estimate, threshold: float) -> str:
    """Compares the one-sided bounds with the threshold.

    Returns "met" where the lower one reaches it, "not met" where the upper one is below it, and else
    "not resolved".
    """
    if estimate.lower >= threshold:
        return "met"
    return "not met" if estimate.upper < threshold else "not resolved"


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
