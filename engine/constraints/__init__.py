"""The constraints of a run: what each asks for, what training aims at, and how each is judged and said."""

from engine.constraints.kinds import KINDS, Improvement, MeanCost, Rate, unsafe_above
from engine.constraints.limit import Judged, Limit, judge, word
from engine.constraints.training import (
    aimed_improvement,
    aims,
    check_prompts,
    counted_above,
    limits,
    missing,
    required,
    weights,
)

__all__ = [
    "KINDS",
    "Improvement",
    "Judged",
    "Limit",
    "MeanCost",
    "Rate",
    "aimed_improvement",
    "aims",
    "check_prompts",
    "counted_above",
    "judge",
    "limits",
    "missing",
    "required",
    "unsafe_above",
    "weights",
    "word",
]
