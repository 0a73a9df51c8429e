"""How many held-out prompts a verdict needs, before there is any: by the bounds that will judge, on numbers
drawn as the asker assumes them."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from engine.constraints import FEWEST_PROMPTS
from engine.intervals import betting, skewed

# In how many of 100 verdicts the word is to be "met".
POWER = 0.8
# Verdicts that are drawn for each number of prompts: the share of those met is off by 0.02 then.
VERDICTS = 400
MOST_PROMPTS = 20_000


def confirmed(x: Tensor, threshold: float, alpha: float, span: tuple[float, float] | None = None) -> Tensor:
    """Tells for many samples at once whether the lower bound on their mean reaches a threshold, bool [...].

    x: [..., P], a number for each prompt. alpha: the error of the bound. span: the least and the most that
    any number can be, where that is known. It is the rule of `engine.constraints.judge`, which goes by the
    bounds of one sample.
    """
    if span is not None:
        least, most = span
        share = ((x - least) / (most - least)).clamp(0, 1)
        # What the mean of 1 - x has to lie below.
        m = 1 - (threshold - least) / (most - least)
        if not 0 < m < 1:
            return torch.full(x.shape[:-1], m >= 1)
        return betting.log_capital(1 - share, m, alpha) >= math.log(1 / alpha)
    low, high = x.aminmax(dim=-1)
    spread = high - low > 1e-9 * torch.maximum(low.abs(), high.abs()).clamp(min=1)
    if x.shape[-1] < FEWEST_PROMPTS:
        return torch.zeros_like(spread)
    return spread & (skewed.bounds(x, alpha)[0] >= threshold)


def prompts_needed(
    draw: Callable[[Generator, int], Tensor], alpha: float, span: tuple[float, float] | None = None
) -> int | None:
    """Returns how many prompts confirm in `POWER` of all verdicts that the mean is at least 0.

    draw: numbers [VERDICTS, P] of a generator and P, as they are assumed. alpha, span: see `confirmed`; span
    belongs to the numbers as they are drawn. None where `MOST_PROMPTS` are not enough.
    """

    def enough(n: int) -> bool:
        x = draw(Generator().manual_seed(n), n)
        return float(confirmed(x, 0.0, alpha, span).double().mean()) >= POWER

    low = 1 if span else FEWEST_PROMPTS - 1
    high = max(FEWEST_PROMPTS, low + 1)
    while not enough(high):
        if high >= MOST_PROMPTS:
            return None
        low, high = high, min(2 * high, MOST_PROMPTS)
    # What is drawn differs from one P to the next, so that a hundredth more or less is not told apart.
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def normal(
    slack: float,
    within: float,
    between: float,
    n_responses: int,
    span: tuple[float, float] | None = None,
) -> Callable[[Generator, int], Tensor]:
    """Returns a draw of improvements beyond what is asked for, `slack` on average.

    within: the standard deviation of responses to one prompt, of policy and reference each. between: that of
    the improvement's true mean from prompt to prompt. All are in one unit. span: what lies beyond it is put
    at its end.
    """
    sd = math.sqrt(2 * within**2 / n_responses + between**2)

    def draw(generator: Generator, n: int) -> Tensor:
        x = slack + sd * torch.randn(VERDICTS, n, dtype=torch.float64, generator=generator)
        return x if span is None else x.clamp(*span)

    return draw


def unsafe(
    limit: float, rate: float, correlation: float, n_responses: int
) -> Callable[[Generator, int], Tensor]:
    """Returns a draw of limit - the share of unsafe responses of each prompt.

    rate: the true one. correlation: of two responses to one prompt, in [0, 1]; their shares are beta
    distributed then, and for 1 a prompt is either all safe or all unsafe.
    """

    def draw(generator: Generator, n: int) -> Tensor:
        rate_P = beta(torch.Size((VERDICTS, n)), rate, correlation, generator)
        return limit - torch.binomial(torch.full_like(rate_P, n_responses), rate_P, generator) / n_responses

    return draw


def beta(shape: torch.Size, mean: float, correlation: float, generator: Generator) -> Tensor:
    """Draws rates in [0, 1] of a mean, so that two answers at one rate have a correlation."""
    if correlation <= 0 or not 0 < mean < 1:
        return torch.full(shape, mean, dtype=torch.float64)
    if correlation >= 1:
        return (torch.rand(shape, dtype=torch.float64, generator=generator) < mean).double()
    both = 1 / correlation - 1
    a, b = (
        torch._standard_gamma(torch.full(shape, x * both, dtype=torch.float64), generator=generator)
        for x in (mean, 1 - mean)
    )
    return a / (a + b)
