"""The Lagrange dual: solved from samples of the reference, descended from measured slack, with intervals.

The library (names in library.py; below the report and the run folder)

    problem.py      the input, checked and scaled
    solver.py       solve; the limits of what thresholds samples support
    feasibility.py  whether thresholds are supported, decided exactly where the solver is slow
    steps.py        the next multipliers from measured slack
    uncertainty.py  intervals of the multipliers, with the bias of few responses taken out

The command `python -m engine.dual SCORES`

    __main__.py     the command line
    config.py       its flags
    answer.py       what it does and prints
    scores_file.py  files of scores, and the pairs that are made from them
    analysis.py     multipliers, their intervals and the trade-off along the thresholds
    picture.py      dual.png
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Returns what `dual.NAME` stands for. The library loads torch, which the command line needs not."""
    import engine.dual.library as library

    return getattr(library, name)
