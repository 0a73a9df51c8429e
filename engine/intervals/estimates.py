"""Means over prompts with standard errors and intervals: improvements, shares and rates.

The last functions print them.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from scipy.special import stdtrit
from torch import Tensor

from engine.errors import UserError
from engine.intervals import betting, skewed


def within_deviation(x_PG, name: str) -> float:
    """Returns the pooled within-prompt standard deviation of a score [P, G], G >= 2: one unit of it in a run.

    Raises: UserError where `name` is constant within every prompt.
    """
    x = float64(x_PG)
    value = float(x.var(dim=1).mean().sqrt())
    if value <= 1e-9 * max(1.0, float(x.abs().max())):
        raise UserError(
            f"{name} gives all responses of a prompt one score, so there is nothing to align; "
            "use another one."
        )
    return value


def standard_error(values_P) -> Tensor:
    """Returns the standard error of the mean of independent per-prompt values [P, ...].

    It is std(ddof=1) / sqrt(P).

    Raises: UserError below 2 prompts.
    """
    values = float64(values_P)
    if len(values) < 2:
        raise UserError(f"{len(values)} prompt(s): a standard error needs at least 2.")
    return values.std(0) / math.sqrt(len(values))


def paired_improvement(policy_PG, reference_PG) -> tuple[Tensor, Tensor]:
    """Returns the mean improvement over the reference and its standard error.

    The error is clustered by prompt, as responses of one prompt are not independent.

    policy [P, G1] and reference [P, G2], or [P, G1, J] and [P, G2, J]: the same prompts, any numbers of
    responses. Both results are float64 [] or [J].

    Raises: UserError if the prompts differ in number or are fewer than 2.
    """
    policy, reference = float64(policy_PG), float64(reference_PG)
    if len(policy) != len(reference):
        raise UserError(
            f"{len(policy)} policy prompts, {len(reference)} reference prompts: "
            "score both on the same prompts."
        )
    difference_P = policy.mean(1) - reference.mean(1)
    return difference_P.mean(0), standard_error(difference_P)


def predicted_se(utility_PG, n_prompts: int, n_responses: int) -> float:
    """Predicts the standard error of `paired_improvement` from reference samples alone.

    On n_prompts with n_responses of each policy it is

        sqrt(2 * pooled within-prompt variance / n_responses / n_prompts)

    The spread of the effect between prompts is not in it, nor a change of variance by training.

    Raises: UserError below 2 responses per prompt.
    """
    utility = float64(utility_PG)
    if utility.shape[1] < 2:
        raise UserError(
            f"{utility.shape[1]} response(s) per prompt: a within-prompt variance needs at least 2."
        )
    return math.sqrt(2 * float(utility.var(1).mean()) / n_responses / n_prompts)


def float64(values) -> Tensor:
    """Converts numbers to a float64 tensor on the CPU."""
    # The dtype is given at once, since a list would else be rounded to float32 on the way.
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()


@dataclass(frozen=True)
class Estimate:
    """A mean over n prompts, its two-sided interval (low, high) and two one-sided bounds (lower, upper).

    All four have one confidence, 0.95 unless a function was given another one, or an error of the bounds.
    """

    mean: float
    se: float
    low: float
    high: float
    lower: float
    upper: float
    n: int


@dataclass(frozen=True)
class Share:
    """A share of responses, averaged over n prompts, with its two-sided Wilson interval."""

    mean: float
    low: float
    high: float
    n: int


def t_quantile(probability: float, degrees: int) -> float:
    """Returns the quantile of Student's t distribution."""
    return float(stdtrit(degrees, probability))


def estimate(
    values_P: Tensor,
    confidence: float = 0.95,
    *,
    alpha: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Estimate:
    """Estimates the mean over prompts, with the standard error std(ddof=1) / sqrt(P).

    values_P: [P], one independent number per prompt. confidence: above 0.5 and below 1. alpha: the error of
    each one-sided bound, 1 - confidence unless given. limits: the least and the most that any of the numbers
    can be, where that is known: the bounds are exact then (`engine.intervals.betting`), and else approximate
    (`engine.intervals.skewed`).
    Raises: UserError for fewer than two prompts, or a number that is not finite or beyond `limits`.
    """
    values_P = torch.as_tensor(values_P, dtype=torch.float64)
    n = values_P.numel()
    if n < 2:
        raise UserError(
            f"{n} held-out prompt(s): a standard error needs at least 2; "
            "raise --eval-prompts or give more prompts."
        )
    bad = torch.nonzero(~torch.isfinite(values_P)).flatten().tolist()
    if bad:
        raise UserError(
            f"held-out prompt {bad[0]} has the score difference {values_P[bad[0]].item()}: "
            "make the scorer return finite numbers."
        )

    def bounds(error: float) -> tuple[float, float]:
        pair = skewed.bounds(values_P, error) if limits is None else betting.bounds(values_P, *limits, error)
        return pair[0].item(), pair[1].item()

    mean, se = values_P.mean().item(), values_P.std().item() / math.sqrt(n)
    low, high = bounds((1 - confidence) / 2)
    lower, upper = bounds(1 - confidence if alpha is None else alpha)
    return Estimate(mean=mean, se=se, low=low, high=high, lower=lower, upper=upper, n=n)


def improvement(policy_PG: Tensor, reference_PG: Tensor, confidence: float = 0.95) -> Estimate:
    """Estimates the policy's mean score minus the reference's, paired by prompt; their G may differ."""
    assert policy_PG.shape[0] == reference_PG.shape[0], (policy_PG.shape, reference_PG.shape)
    return estimate(policy_PG.double().mean(1) - reference_PG.double().mean(1), confidence)


def negated(e: Estimate) -> Estimate:
    """Returns the estimate of minus the mean."""
    return replace(e, mean=-e.mean, low=-e.high, high=-e.low, lower=-e.upper, upper=-e.lower)


def clipped(e: Estimate, least: float, most: float) -> Estimate:
    """Returns an estimate whose bounds end at the least and the most that its mean can be."""
    bounds = {name: min(most, max(least, getattr(e, name))) for name in ("low", "high", "lower", "upper")}
    return replace(e, **bounds)


def rate(unsafe_PG: Tensor, confidence: float = 0.95, *, alpha: float | None = None) -> Estimate:
    """Estimates a share of responses [P, G] (values 0 and 1, or 1/2 for a tie), with exact bounds, clustered
    by prompt.

    A prompt's share is one number between 0 and 1, however alike its responses are: so nothing is assumed of
    how they share their harm, and the bounds are monotone in every response.
    Raises: UserError for fewer than two prompts.
    """
    return estimate(unsafe_PG.double().mean(1), confidence, alpha=alpha, limits=(0.0, 1.0))


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the two-sided score interval of a share of n independent cases (Wilson 1927).

    It has a width at 0 and 1 too.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def number(value: float, digits: int = 2, sign: str = "") -> str:
    """Prints a number with fixed digits, never as "-0.00"."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def interval_text(result: Estimate | Share, confidence: float, digits: int = 2, scale: float = 1) -> str:
    """Prints a two-sided interval with its confidence."""
    low, high = (number(scale * x, digits) for x in (result.low, result.high))
    return f"{100 * confidence:g} % [{low}, {high}]"


def improvement_text(result: Estimate, confidence: float) -> str:
    """Prints an improvement over the reference with its interval."""
    return f"improvement {number(result.mean, sign='+')}, {interval_text(result, confidence)}"
