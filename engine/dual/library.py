"""The names of the library, as `engine.dual` gives them."""

from engine.dual.solver import (
    Infeasible,
    Solution,
    largest_multiple,
    largest_threshold,
    solve,
    tilt_kl,
    tilted_improvement,
)
from engine.dual.steps import (
    bisection_step,
    guarded_step,
    optimistic_step,
    resolved,
    secant_step,
    step,
)
from engine.dual.uncertainty import (
    Interval,
    ess_warning,
    lam_interval,
    said,
    unbiased_improvement,
)
from engine.intervals import paired_improvement, predicted_se, standard_error, within_deviation

__all__ = [
    "Infeasible",
    "Interval",
    "Solution",
    "bisection_step",
    "ess_warning",
    "guarded_step",
    "lam_interval",
    "largest_multiple",
    "largest_threshold",
    "optimistic_step",
    "paired_improvement",
    "predicted_se",
    "resolved",
    "said",
    "secant_step",
    "solve",
    "standard_error",
    "step",
    "tilt_kl",
    "tilted_improvement",
    "unbiased_improvement",
    "within_deviation",
]
