"""Declares what every constraint can do, and its result on held-out prompts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from engine import intervals
from engine.config import RunConfig
from engine.errors import UserError
from engine.intervals import Estimate
from engine.records import Counted, Prompts

# Fewer prompts give no word where scores have no stated range: bounds that rest on the sample's own spread
# and skewness are off by too much then (`bench.verdict`).
FEWEST_PROMPTS = 20

MET, NOT_MET, NOT_RESOLVED = "met", "not met", "not resolved"


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
    # The least and the most that any response can cost, in the scorer's own units; None where nobody says so.
    costs_within: tuple[float, float] | None = None

    @classmethod
    @abstractmethod
    def asked(cls, config: RunConfig, j: int) -> float | None:
        """Returns `value` where the settings ask for this kind of constraint on cost j, else None."""

    @classmethod
    def of(cls, config: RunConfig, j: int, name: str, value: float) -> Self:
        """Builds the constraint on cost j of a run."""
        on = config.cost_on[j] if config.cost_on else "all"
        return cls(name=name, value=value, on="" if on == "all" else on, costs_within=config.costs_within(j))

    def rows(self, prompts: Prompts) -> list[int]:
        """Returns the places of the prompts that the constraint is about."""
        return [p for p, kind in enumerate(prompts.kind) if not self.on or kind == self.on]

    @property
    def counted(self) -> Counted | None:
        """How its cost counts; None where it is taken as it is."""
        return None

    def check_reference(self, utility_PG: Tensor) -> None:
        """Checks the reference's utilities, as the scorer gives them.

        Raises: UserError where they say nothing about the constraint, or lie outside `costs_within`.
        """
        if self.costs_within is None:
            return
        (least, most), (low, high) = self.costs_within, torch.aminmax(-utility_PG)
        if low < least or high > most:
            outside = float(low) if low < least else float(high)
            raise UserError(
                f"--cost-range {least:g}:{most:g}: cost {self.name} gave {outside:g} for a response of the "
                "reference; state a range that holds all costs, or leave it out."
            )

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
    def values(self, policy_PG: Tensor, reference_PG: Tensor, unit: float) -> Tensor:
        """Returns the number of each prompt whose mean is judged, in the constraint's measure, [P]."""

    @abstractmethod
    def span(self, unit: float) -> tuple[float, float] | None:
        """Returns the least and the most that any of `values` can be; None where `costs_within` is."""

    @property
    @abstractmethod
    def at_most(self) -> bool:
        """Tells whether the mean of `values` is to be at most `value`; else it is to be at least `value`."""

    @abstractmethod
    def reference_level(self, reference_PG: Tensor, unit: float) -> float | None:
        """Returns the reference's level; None where the improvement itself is judged."""

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
    """A constraint's result on held-out prompts.

    The one-sided bounds of what is judged are those of the look's error, corrected for the number of
    constraints, and no looser than at any look before.
    """

    limit: Limit
    aim: float  # what the dual aimed at, in the constraint's measure
    estimate: Estimate  # improvement over the reference, in units
    word: str  # the verdict: "met", "not met" or "not resolved"
    measured: Estimate | None = None  # the policy's level in the constraint's measure, where that is judged
    reference: float | None = None  # the reference's level
    unit: float = 1.0  # one unit of the improvement, in the scorer's units
    # Whether the bound of this constraint alone confirms it, at this look or at one before, without a
    # correction for the others: what "all met" rests on.
    holds: bool = False
    exact: bool = False  # the bounds are exact, as all costs lie in a known range; else they are approximate
    spread: bool = True  # the numbers that were averaged differ

    @property
    def name(self) -> str:
        """The name of the constraint."""
        return self.limit.name

    @property
    def judged(self) -> Estimate:
        """What is compared with the constraint's value."""
        return self.measured or self.estimate

    @property
    def required(self) -> float:
        """Returns the improvement over the held-out reference, in units, at which
        the constraint just holds."""
        return self.limit.value if self.measured is None else (self.reference - self.limit.value) / self.unit

    @property
    def slack(self) -> Estimate:
        """Measures what is left to what the constraint asks for, in its own measure:
        above 0 it holds with room."""
        e, b = self.judged, self.limit.value
        e = replace(e, mean=e.mean - b, low=e.low - b, high=e.high - b, lower=e.lower - b, upper=e.upper - b)
        return intervals.negated(e) if self.limit.at_most else e

    @property
    def prompts_text(self) -> str:
        """Opens the details of a verdict on some of the prompts; empty where it is on all of them."""
        return f"on {self.estimate.n} {self.limit.on} prompts: " if self.limit.on else ""

    @property
    def silent_for(self) -> str:
        """Says why no word is given whatever the bounds are; empty where one may be."""
        if self.exact:
            return ""
        if self.estimate.n < FEWEST_PROMPTS:
            return (
                f"{self.estimate.n} prompts are too few where scores have no stated range: it takes "
                f"{FEWEST_PROMPTS}, or --cost-range"
            )
        if not self.spread:
            return "all prompts have one number, so nothing tells how others would differ"
        return ""
