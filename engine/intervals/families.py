"""Several constraints at once: each one's own word, and one word for all of them."""

from collections.abc import Sequence


def holm(errors: Sequence[float], alpha: float) -> list[float]:
    """Returns the error at which each of several claims is tested, so that any false one among those made has
    probability alpha at most (Holm 1979, Scand. J. Statist. 6).

    errors: of each claim, the least error at which its own bound confirms it. The claim with the least is
    tested at alpha / J, the next one at alpha / (J - 1), and so on; from the first that fails on, all the
    others are tested at its error.

    >>> holm([0.03, 0.001], 0.05)
    [0.05, 0.025]
    >>> holm([0.03, 0.04], 0.05)
    [0.025, 0.025]
    """
    tested, at = [alpha] * len(errors), 0.0
    failed = False
    for rank, j in enumerate(sorted(range(len(errors)), key=lambda j: errors[j])):
        at = at if failed else alpha / (len(errors) - rank)
        failed = failed or errors[j] > at
        tested[j] = at
    return tested
