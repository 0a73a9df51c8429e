"""Means over prompts: standard errors, intervals, and bounds that keep their level over several looks and
constraints."""

from engine.intervals.estimates import (
    Estimate,
    Share,
    clipped,
    estimate,
    float64,
    improvement,
    improvement_text,
    interval_text,
    negated,
    number,
    paired_improvement,
    predicted_se,
    rate,
    standard_error,
    t_quantile,
    wilson,
    within_deviation,
)
from engine.intervals.families import holm

__all__ = [
    "Estimate",
    "Share",
    "clipped",
    "estimate",
    "float64",
    "holm",
    "improvement",
    "improvement_text",
    "interval_text",
    "negated",
    "number",
    "paired_improvement",
    "predicted_se",
    "rate",
    "standard_error",
    "t_quantile",
    "wilson",
    "within_deviation",
]
