"""Bounds of settings, each beside the setting that it bounds.

    temperature: float = bounded(0.7, above=0)
    schedule: str = one_of("constant", "linear", "cosine")

A subclass that only gives a field another default keeps its bound. What relates several settings is checked
by the method `check` of the config class that has them.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers between bounds, of which at least one is given."""

    above: float | None
    at_least: float | None
    below: float | None
    at_most: float | None
    infinite: bool  # whether an infinite value is accepted: it limits nothing
    says: str  # the end of the message to a user who gives another number

    def holds(self, value: float) -> bool:
        """Tells whether a value lies within the bounds; NaN never does."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


@dataclass(frozen=True)
class Choice:
    """The words that a setting accepts. An empty one may be among them, as a default that no user writes."""

    accepted: tuple[str, ...]
    infinite = False

    @property
    def says(self) -> str:
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
) -> Any:
    """Declares a field that is a number within bounds, or a tuple of such numbers.
    At least one bound is given.

    infinite: an infinite value is accepted too, as it limits nothing. says: replaces the bounds in the
    message to a user who gives another number.
    """
    if at_most is None and below is None:
        bounds = f"must be above {above}" if at_least is None else f"must be at least {at_least}"
    else:
        low = f"({above}" if at_least is None else f"[{at_least}"
        bounds = f"must lie in {low}, {below})" if at_most is None else f"must lie in {low}, {at_most}]"
    bound = Range(
        above=above, at_least=at_least, below=below, at_most=at_most, infinite=infinite, says=says or bounds
    )
    return field(default=default, metadata={"bound": bound})


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
                raise UserError(f"{flag} {x}: {bound.says}.")


def _bound(config_class: type, name: str) -> Range | Choice | None:
    """Returns the bound of a field: that of the nearest class which declares one."""
    for cls in config_class.__mro__:
        declared = cls.__dict__.get("__dataclass_fields__", {}).get(name)
        if declared is not None and "bound" in declared.metadata:
            return declared.metadata["bound"]
    return None
