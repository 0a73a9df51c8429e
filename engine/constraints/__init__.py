"""The constraints of a run: what each asks for, what training aims at, and how each is judged and said."""

from engine.constraints.training import (
    aimed_improvement,
    aims,
    check_prompts,
    counted_above,
    limits,
    missing,
    opening,
    required,
    text,
    unsafe_above,
    weighted,
)
from engine.records import Limit

__all__ = [
    "Limit",
    "aimed_improvement",
    "aims",
    "check_prompts",
    "counted_above",
    "limits",
    "missing",
    "opening",
    "required",
    "text",
    "unsafe_above",
    "weighted",
]
