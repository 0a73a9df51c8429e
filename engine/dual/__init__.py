"""The Lagrange dual: solved from samples of the reference, descended from measured slack, with intervals.

The library (names below; below the report and the run folder)

    problem.py      the input, checked and scaled
    solver.py       solve; the limits of what thresholds samples support
    feasibility.py  whether thresholds are supported, decided exactly where the solver is slow
    steps.py        the next multipliers from measured slack
    uncertainty.py  intervals of the multipliers

The command `python -m engine.dual SCORES`

    __main__.py     the command line and what it prints
    config.py       its flags
    scores_file.py  files of scores, and the pairs that are made from them
    analysis.py     multipliers, their intervals and the trade-off along the thresholds
    picture.py      dual.png
"""

from engine.dual.solver import (
    Infeasible,
    Solution,
    largest_multiple,
    largest_threshold,
    solve,
    tilted_improvement,
)
from engine.dual.steps import bisection_step, optimistic_step, resolved, secant_step, step
from engine.dual.uncertainty import (
    Interval,
    bootstrap,
    ess_warning,
    half_sample,
    lam_interval,
    percentiles,
)
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
