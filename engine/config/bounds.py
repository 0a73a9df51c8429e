"""Bounds of settings, each beside the setting that it bounds.

    temperature: float = bounded(0.7, at_least=1e-6, at_most=1e6)
    schedule: str = one_of("constant", "linear", "cosine")

A subclass that only gives a field another default keeps its bound. What relates several settings is checked
by the method `check` of the config class that has them.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from engine.errors import UserError

MOST = 10**9  # of anything that is counted: what does not fit in time or memory is for the plan to say
LARGEST_SCORE = 1e100  # in size: the squares of larger ones are no float64 any more


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers between a lower and an upper bound."""

    above: float | None
    at_least: float | None
    below: float | None
    at_most: float | None
    infinite: bool  # whether infinity is accepted: it limits nothing
    says: str  # the end of the message to a user who gives another number
    too_low: str  # the same for a number below the bounds, where that needs other words

    def holds(self, value: float) -> bool:
        """Tells whether a value lies within the bounds; NaN never does."""
        return (
            value == math.inf
            if self.infinite and math.isinf(value)
            else self._low(value) and (value < self.below if self.at_most is None else value <= self.at_most)
        )

    def _low(self, value: float) -> bool:
        """Tells whether a value keeps the lower bound."""
        return value > self.above if self.at_least is None else value >= self.at_least

    def message(self, value: float) -> str:
        """Ends the message to a user who gives a value that does not hold."""
        return self.says if self._low(value) else self.too_low or self.says


@dataclass(frozen=True)
class Choice:
    """The words that a setting accepts. An empty one may be among them, as a default that no user writes."""

    accepted: tuple[str, ...]
    infinite = False

    def message(self, value: str) -> str:
        """Ends the message to a user who gives another word."""
        return f"must be one of {', '.join(filter(None, self.accepted))}"

    def holds(self, value: str) -> bool:
        """Tells whether a word is one of those accepted."""
        return value in self.accepted


def bounded(
    default: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    infinite: bool = False,
    says: str = "",
    too_low: str = "",
) -> Any:
    """Declares a field that is a number between a lower and an upper bound, or a tuple of such numbers.

    infinite: infinity is accepted too, as it limits nothing. says: replaces the bounds in the message to a
    user who gives another number; too_low: only for one below them.
    """
    assert (above is None) != (at_least is None) and (below is None) != (at_most is None), "give both bounds"
    low = f"({_short(above)}" if at_least is None else f"[{_short(at_least)}"
    high = f"{_short(below)})" if at_most is None else f"{_short(at_most)}]"
    bound = Range(
        above=above,
        at_least=at_least,
        below=below,
        at_most=at_most,
        infinite=infinite,
        says=says or f"must lie in {low}, {high}",
        too_low=too_low,
    )
    return field(default=default, metadata={"bound": bound})


def count(default: int, *, at_least: int = 1, too_low: str = "") -> Any:
    """Declares a field that counts something, up to `MOST`."""
    return bounded(default, at_least=at_least, at_most=MOST, too_low=too_low)


def any_seed(default: int = 0, *, largest: int = 2**63 - 1) -> Any:
    """Declares a field that is a seed: any int64, or one of at most `largest` in size."""
    return bounded(default, at_least=-largest, at_most=largest)


def _short(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def one_of(*accepted: str, default: str | None = None) -> Any:
    """Declares a field that takes one of these words. The first is the default,
    unless another one is named."""
    return field(default=accepted[0] if default is None else default, metadata={"bound": Choice(accepted)})


def check(config: Any) -> None:
    """Refuses values that no run, or no evaluation, can use.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    config.check()


def check_bounds(config: Any) -> None:
    """Checks every field of a config by itself: its numbers are finite and within the field's bound.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    for name in [f.name for f in fields(config)]:
        flag, bound, value = f"--{name.replace('_', '-')}", _bound(type(config), name), getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not (bound and bound.infinite) and not all(
            math.isfinite(x) for x in values if isinstance(x, float)
        ):
            raise UserError(f"{flag} {' '.join(map(str, values))}: must be finite.")
        for x in values:
            if bound and not bound.holds(x):
                raise UserError(f"{flag} {x}: {bound.message(x)}.")


def _bound(config_class: type, name: str) -> Range | Choice | None:
    """Returns the bound of a field: that of the nearest class which declares one."""
    for cls in config_class.__mro__:
        declared = cls.__dict__.get("__dataclass_fields__", {}).get(name)
        if declared is not None and "bound" in declared.metadata:
            return declared.metadata["bound"]
    return None
