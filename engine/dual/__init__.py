"""The Lagrange dual: solved from samples of the reference, descended from measured slack, with intervals.

The library (names below; below the report and the run folder)

    problem.py      the input, checked and scaled
    solver.py       solve; the limits of what thresholds samples support
    feasibility.py  whether thresholds are supported, decided exactly where the solver is slow
    steps.py        the next multipliers from measured slack
    uncertainty.py  intervals of the multipliers, with the bias of few responses taken out

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
