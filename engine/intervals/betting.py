"""Exact bounds on the mean of numbers with a known range, by betting against every mean too far up.

A gambler bets that the mean of independent x in [0, 1] lies below m. After each x his capital is multiplied
by 1 + c (m - x) / (1 - m) with a fixed 0 < c <= 1. Where the mean is m or more, the expected capital never
exceeds the 1 that he began with, so by Markov's inequality it reaches 1 / alpha with probability alpha at
most: for any P and any distribution (Waudby-Smith and Ramdas, arXiv 2010.09686, section 4).

What is our own is the choice of bets. A capital spread over a few c that depend on m, alpha and P alone is a
product of factors which fall in every x and rise in m: so the bound does not depend on the order of the
prompts, is monotone in each number, and where every x is 0 it is within log(1 / 0.4) / P of the exact
binomial bound.
"""

import math

import torch
from torch import Tensor

# The shares of the capital that are bet with each c: from all of it, the best bet where no x exceeds 0, down
# to the best one where every x is 0 or 1.
SHARES = (0.4, 0.2, 0.2, 0.2)
# Halvings of the interval that holds the bound.
HALVINGS = 40


def log_capital(x: Tensor, m: Tensor | float, alpha: float) -> Tensor:
    """Returns the log of the gambler's capital against means of m or more, [...].

    x: [..., P] in [0, 1]. m: [...] above 0 and below 1. alpha: chooses the bets.
    """
    m = torch.as_tensor(m, dtype=torch.float64)
    least = (2 * math.log(1 / alpha) * (1 - m) / (x.shape[-1] * m)).sqrt().clamp(max=1)
    odds = (m[..., None] - x) / (1 - m[..., None])
    n = len(SHARES) - 1
    logs = [
        math.log(share) + torch.log1p(least[..., None] ** (i / n) * odds).sum(-1)
        for i, share in enumerate(SHARES)
    ]
    return torch.stack(logs).logsumexp(0)


def upper_bound(x: Tensor, alpha: float) -> Tensor:
    """Returns what the mean of x [..., P] in [0, 1] exceeds with probability alpha at most, [...].

    It is the smallest m whose `log_capital` is log(1 / alpha), and 1 where there is none.
    """
    low, high = x.mean(-1), torch.ones(x.shape[:-1], dtype=torch.float64)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        inside = middle.clamp(1e-300, 1 - 1e-16)
        refuted = log_capital(x, inside, alpha) >= math.log(1 / alpha)
        low, high = torch.where(refuted, low, middle), torch.where(refuted, middle, high)
    return high


def bounds(x: Tensor, least: float, most: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Returns bounds on the mean of independent x [..., P] in [least, most]: the mean lies below the first,
    and above the second, with probability alpha at most each."""
    width = most - least
    share = ((x - least) / width).clamp(0, 1)
    return least + width * (1 - upper_bound(1 - share, alpha)), least + width * upper_bound(share, alpha)


def fewest(share: float, alpha: float) -> int | None:
    """Returns how many numbers in [0, 1], all 0, bound their mean by `share`; None where no million does."""
    if not share > 0:
        return None

    def enough(n: int) -> bool:
        return float(upper_bound(torch.zeros(n, dtype=torch.float64), alpha)) <= share

    low, high = 0, 1
    while not enough(high):
        if high > 1_000_000:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
