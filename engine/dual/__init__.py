"""The Lagrange dual: solve it from reference samples, descend it from measured slack, and say how sure the multipliers are."""

from engine.dual.solver import Infeasible, Solution, largest_multiple, largest_threshold, solve, tilted_improvement
from engine.dual.steps import bisection_step, optimistic_step, resolved, secant_step, step
from engine.dual.uncertainty import Interval, bootstrap, ess_warning, half_sample, lam_interval, percentiles
from engine.intervals import paired_improvement, predicted_se, standard_error, within_deviation

__all__ = [
    "Infeasible",
    "Interval",
    "Solution",
    "bisection_step",
    "bootstrap",
    "ess_warning",
    "half_sample",
    "lam_interval",
    "largest_multiple",
    "largest_threshold",
    "optimistic_step",
    "paired_improvement",
    "percentiles",
    "predicted_se",
    "resolved",
    "secant_step",
    "solve",
    "standard_error",
    "step",
    "tilted_improvement",
    "within_deviation",
]
