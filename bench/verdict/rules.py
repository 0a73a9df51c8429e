"""Other rules for "met", to compare with: each tells of samples [..., P] whether it would say so at an error
alpha, where the mean has to be at least 0."""

import math

import torch
from scipy.stats import beta as beta_distribution
from torch import Generator, Tensor

from engine.intervals import t_quantile


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the t statistic against 0, and the skewness."""
    from_mean = x - x.mean(-1, keepdim=True)
    sd = from_mean.square().mean(-1).sqrt()
    t = x.mean(-1) / (sd / math.sqrt(x.shape[-1] - 1))
    return t, from_mean.pow(3).mean(-1) / sd**3


def student(x: Tensor, alpha: float) -> Tensor:
    """Judges by Student's t. A spread of 0 counts as certainty, as it did before."""
    return _moments(x)[0] >= t_quantile(1 - alpha, x.shape[-1] - 1)


def hall(x: Tensor, alpha: float) -> Tensor:
    """Judges by Hall's transformation with the skewness that the sample shows (1992)."""
    t, skewness = _moments(x)
    a = skewness / math.sqrt(x.shape[-1])
    return t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6 >= t_quantile(1 - alpha, x.shape[-1] - 1)


def bootstrap_t(x: Tensor, alpha: float, generator: Generator, draws: int = 399) -> Tensor:
    """Judges by the quantile of the t statistics of resampled prompts. x: [R, P]."""
    met = []
    for row in x:
        resampled = row[torch.randint(len(row), (draws, len(row)), generator=generator)]
        spread = resampled.std(-1).clamp(min=1e-12)
        statistic = (resampled.mean(-1) - row.mean()) / (spread / math.sqrt(len(row)))
        bound = row.mean() - statistic.quantile(1 - alpha) * row.std() / math.sqrt(len(row))
        met.append(bool(bound >= 0))
    return torch.tensor(met)


def pooled_correlation(*sides: Tensor) -> Tensor:
    """Returns one correlation of responses to a prompt for both sides, [R], from 0/1 answers [R, P, G]."""
    within = sum(side.var(-1).mean(-1) for side in sides)
    means = sum(side.mean(-1).var(-1) for side in sides)
    G = sides[0].shape[-1]
    between = (means - within / G).clamp(min=0)
    return torch.where(within + between > 0, between / (within + between), 1.0)


def clopper_pearson(unsafe: Tensor, reference: Tensor, limit: float, alpha: float) -> Tensor:
    """Judges a rate by the exact binomial bound of an effective number of responses, which one correlation
    of both sides' responses gives. unsafe, reference: 0/1 answers [R, P, G]."""
    P, G = unsafe.shape[-2:]
    rho = pooled_correlation(unsafe, reference) if G > 1 else torch.zeros(unsafe.shape[:-2])
    n = P * G / (1 + (G - 1) * rho)
    k = unsafe.mean((-2, -1)) * n
    upper = beta_distribution.ppf(1 - alpha, (k + 1).numpy(), (n - k).clamp(min=1e-9).numpy())
    return torch.from_numpy(upper) <= limit
