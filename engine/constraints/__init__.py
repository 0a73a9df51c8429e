"""The constraints of a run: what each asks for, what training aims at, and how each is judged and said."""

from engine.constraints.judging import judge, overall, word
from engine.constraints.kinds import KINDS, Improvement, MeanCost, Rate, WorstShare, unsafe_above
from engine.constraints.limit import FEWEST_PROMPTS, Judged, Limit
from engine.constraints.training import (
    aimed_improvement,
    aims,
    can_confirm,
    check_confirmable,
    check_prompts,
    limits,
    missing,
    required,
    warnings,
    weights,
)

__all__ = [
    "FEWEST_PROMPTS",
    "KINDS",
    "Improvement",
    "Judged",
    "Limit",
    "MeanCost",
    "Rate",
    "WorstShare",
    "aimed_improvement",
    "aims",
    "can_confirm",
    "check_confirmable",
    "check_prompts",
    "judge",
    "limits",
    "missing",
    "overall",
    "required",
    "unsafe_above",
    "warnings",
    "weights",
    "word",
]
