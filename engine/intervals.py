"""Means over prompts with standard errors and intervals: improvements, shares and rates.

The last functions print them.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from scipy.special import betaincinv, stdtrit
from torch import Tensor

from engine.errors import UserError


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

    All four have one confidence: 0.95 unless a function was given another one.
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


def estimate(difference_P: Tensor, confidence: float = 0.95) -> Estimate:
    """Estimates the mean over prompts, with Student t intervals of P - 1 degrees of freedom.

    Its standard error is std(ddof=1) / sqrt(P).

    difference_P: [P], one independent number per prompt. confidence: above 0.5 and below 1.
    Raises: UserError for fewer than two prompts or a number that is not finite.
    """
    difference_P = torch.as_tensor(difference_P, dtype=torch.float64)
    n = difference_P.numel()
    if n < 2:
        raise UserError(
            f"{n} held-out prompt(s): a standard error needs at least 2; "
            "raise --eval-prompts or give more prompts."
        )
    bad = torch.nonzero(~torch.isfinite(difference_P)).flatten().tolist()
    if bad:
        raise UserError(
            f"held-out prompt {bad[0]} has the score difference {difference_P[bad[0]].item()}: "
            "make the scorer return finite numbers."
        )
    mean, se = difference_P.mean().item(), difference_P.std().item() / math.sqrt(n)
    two, one = t_quantile((1 + confidence) / 2, n - 1) * se, t_quantile(confidence, n - 1) * se
    return Estimate(
        mean=mean, se=se, low=mean - two, high=mean + two, lower=mean - one, upper=mean + one, n=n
    )


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


def rate(unsafe_PG: Tensor, confidence: float = 0.95) -> Estimate:
    """Estimates a share of responses [P, G] (values 0 and 1, or 1/2 for a tie) with exact binomial bounds,
    clustered by prompt.

    The bounds are those of an effective number of responses (Korn and Graubard 1998, Clopper and Pearson
    1934): they have a width at 0 and 1, and keep their confidence for rare events.

    The effective number is p (1 - p) / (squared standard error over prompts), corrected for that error's
    degrees of freedom. These are as many as prompts have an unsafe response (or a safe one, if fewer), minus
    1: with P - 1 of them, as for common events, a limit on a rare one is called met falsely in 13 of 100
    cases instead of 5. The number is at least P, as the variance of a mean of P shares is p (1 - p) / P at
    most, and at most P G. Where all responses are alike it is P, since nobody can see then how alike those
    to one prompt are.

    Raises: UserError for fewer than two prompts.
    """
    unsafe_PG = unsafe_PG.double()
    share_P = unsafe_PG.mean(1)
    e = estimate(share_P, confidence)
    P, n, p = e.n, unsafe_PG.numel(), e.mean
    effective = float(P)
    if e.se > 0:
        telling = max(2, min(int((share_P > 0).sum()), int((share_P < 1).sum())))
        q = (1 + confidence) / 2
        known = p * (1 - p) / e.se**2 * (t_quantile(q, n - 1) / t_quantile(q, telling - 1)) ** 2
        effective = min(float(n), max(float(P), known))
    k = p * effective

    def below(alpha: float) -> float:
        return float(betaincinv(k, effective - k + 1, alpha)) if k > 0 else 0.0

    def above(alpha: float) -> float:
        return float(betaincinv(k + 1, effective - k, 1 - alpha)) if k < effective else 1.0

    two, one = (1 - confidence) / 2, 1 - confidence
    return replace(e, low=below(two), high=above(two), lower=below(one), upper=above(one))


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
