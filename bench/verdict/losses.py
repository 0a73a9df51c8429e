"""What prompts may lose: distributions of the scores of responses, at the boundary of a constraint.

Each loss draws what a response has beyond what is asked for, with a true mean of exactly 0: of an
improvement the policy's score - the reference's - b, of a cost the limit - the cost. So a constraint that is
called met is called so falsely.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from scipy.integrate import quad
from scipy.stats import lognorm, norm, t
from torch import Generator, Tensor

from engine.verdict.planning import beta

Shape = tuple[int, int, int]
Draw = Callable[[Shape, Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A policy's scores, larger is better."""

    name: str
    draw: Draw  # scores of responses [R, P, G] of the policy
    cdf: Callable[[float], float]  # of a score of the policy
    range: tuple[float, float]  # what somebody may state as a range of the score, cut to it
    # The same two of the reference, where an improvement is judged.
    reference: tuple[Draw, Callable[[float], float]] | None = None
    known: bool = False  # scores are within `range` by nature
    # Light tails and no skewness: the bounds without a range have to hold.
    even: bool = False

    def beyond(self, shape: Shape, generator: Generator) -> "Beyond":
        """Draws what responses have beyond what is asked for."""
        policy, reference = self.draw(shape, generator), None
        if self.reference is not None:
            reference = self.reference[0](shape, generator)
        return self.between(policy, reference)

    def between(self, policy: Tensor, reference: Tensor | None) -> "Beyond":
        """Returns what scores of a policy [..., P, G] have beyond what is asked for."""
        least, most = self.range
        scores, cut = policy - self.mean(cut=False), policy.clamp(least, most) - self.mean(cut=True)
        low, high = least - self.mean(cut=True), most - self.mean(cut=True)
        if reference is not None:
            scores, cut = scores - reference, cut - reference.clamp(least, most)
            low, high = low - most, high - least
        return Beyond(cut if self.known else scores, cut, (low, high))

    def mean(self, cut: bool) -> float:
        """Returns the mean of the policy's score beyond the reference's. cut: both are cut to the range."""
        least, most = self.range if cut else (-1e6, 1e3)
        mean = mean_within(self.cdf, least, most)
        return mean if self.reference is None else mean - mean_within(self.reference[1], least, most)


@dataclass(frozen=True)
class Beyond:
    """What responses have beyond what is asked for, [..., P, G]."""

    scores: Tensor
    cut: Tensor  # the same where scores are cut to their range
    span: tuple[float, float]  # the least and the most that `cut` can be


@cache
def mean_within(cdf: Callable[[float], float], least: float, most: float) -> float:
    """Returns the mean of a score that is cut to [least, most]: most - the integral of its cdf."""
    edges = sorted({least, most, *(x for x in EDGES if least < x < most)})
    parts = [quad(cdf, a, b, epsabs=1e-10, limit=200)[0] for a, b in zip(edges, edges[1:], strict=False)]
    return most - sum(parts)


# Where a cdf may jump or bend, and steps towards its far tails.
EDGES = (-1e5, -1e4, -1e3, -300, -100, -30, -10, -5, -2, -1, -0.5, -0.2, -0.05, 0, 1, 2, 5, 10, 100)


def _normal(shape: Shape, generator: Generator) -> Tensor:
    # In single precision, which is several times as fast to draw.
    return torch.randn(shape, generator=generator).double()


def _t3(shape: Shape, generator: Generator) -> Tensor:
    chi2 = sum(_normal(shape, generator).square() for _ in range(3))
    return _normal(shape, generator) / (chi2 / 3).sqrt()


def _exponential(shape: Shape, generator: Generator) -> Tensor:
    return -torch.empty(shape).exponential_(generator=generator).double()


def _of_prompts(shape: Shape, generator: Generator) -> Tensor:
    return _normal((*shape[:2], 1), generator)


def _bad(share: float, loss: float, of_prompts: bool) -> Draw:
    """Draws normal scores of which a share of responses, or of prompts, loses so many deviations."""

    def draw(shape: Shape, generator: Generator) -> Tensor:
        harmed = torch.rand((*shape[:2], 1 if of_prompts else shape[2]), generator=generator) < share
        return _normal(shape, generator) - loss * harmed

    return draw


def _zero_or_one(share: float, correlation: float) -> Draw:
    """Draws minus costs of 0 or 1, whose rate differs from prompt to prompt (beta) by a correlation."""

    def draw(shape: Shape, generator: Generator) -> Tensor:
        rate = beta(torch.Size((*shape[:2], 1)), share, correlation, generator)
        return -(torch.rand(shape, generator=generator) < rate).double()

    return draw


def _zero_or_one_cdf(share: float) -> Callable[[float], float]:
    return lambda x: 0.0 if x < -1 else share if x < 0 else 1.0


def _bad_cdf(share: float, loss: float) -> Callable[[float], float]:
    return lambda x: share * norm.cdf(x + loss) + (1 - share) * norm.cdf(x)


def _lognormal_cdf(sd: float, share: float = 1.0) -> Callable[[float], float]:
    return lambda x: 1.0 if x >= 0 else share * lognorm.sf(-x, sd)


# The spread of a cost between prompts, and within one, on the scale of its logarithm.
BETWEEN, WITHIN = 1.0, 0.5
NORMAL = (_normal, norm.cdf)


def _improvements() -> list[Loss]:
    against = {"reference": NORMAL}
    found = [
        Loss(name="normal", draw=_normal, cdf=norm.cdf, range=(-5, 5), even=True, **against),
        Loss(
            name="normal, effects between prompts",
            draw=lambda s, g: _normal(s, g) + _of_prompts(s, g),
            cdf=norm(scale=2**0.5).cdf,
            range=(-6, 6),
            even=True,
            **against,
        ),
        Loss(
            name="t with 3 degrees",
            draw=_t3,
            cdf=t(3).cdf,
            range=(-6, 6),
            reference=(_t3, t(3).cdf),
            even=True,
        ),
        Loss(
            name="exponential harm",
            draw=_exponential,
            cdf=lambda x: math.exp(min(x, 0.0)),
            range=(-6, 4),
            **against,
        ),
        Loss(
            name="lognormal(1.5) harm",
            draw=lambda s, g: -(1.5 * _normal(s, g)).exp(),
            cdf=_lognormal_cdf(1.5),
            range=(-20, 4),
            **against,
        ),
    ]
    for share in (0.05, 0.01):
        found.append(
            Loss(
                name=f"{100 * share:g} % of answers lose 5 sd",
                draw=_bad(share, 5, of_prompts=False),
                cdf=_bad_cdf(share, 5),
                range=(-8, 4),
                **against,
            )
        )
    for share, loss in ((0.02, 8), (0.05, 3)):
        found.append(
            Loss(
                name=f"{100 * share:g} % of prompts lose {loss} sd",
                draw=_bad(share, loss, of_prompts=True),
                cdf=_bad_cdf(share, loss),
                range=(-loss - 3, 4),
                **against,
            )
        )
    return found


def _costs() -> list[Loss]:
    found = [
        Loss(
            name="exponential cost",
            draw=_exponential,
            cdf=lambda x: math.exp(min(x, 0.0)),
            range=(-8, 0),
        )
    ]
    for sd, most in ((1.0, 15), (1.5, 30), (2.0, 60)):
        found.append(
            Loss(
                name=f"lognormal({sd:g}) cost",
                draw=lambda s, g, sd=sd: -(sd * _normal(s, g)).exp(),
                cdf=_lognormal_cdf(sd),
                range=(-most, 0),
            )
        )
    found.append(
        Loss(
            name="lognormal(1) means of prompts",
            draw=lambda s, g: -(BETWEEN * _of_prompts(s, g) + WITHIN * _normal(s, g)).exp(),
            cdf=_lognormal_cdf((BETWEEN**2 + WITHIN**2) ** 0.5),
            range=(-15, 0),
        )
    )

    def some_costs(shape: Shape, generator: Generator) -> Tensor:
        there = torch.rand(shape, generator=generator) < 0.1
        return there * -_normal(shape, generator).exp()

    found.append(
        Loss(
            name="zero-inflated: 90 % cost 0, else lognormal(1)",
            draw=some_costs,
            cdf=_lognormal_cdf(1.0, 0.1),
            range=(-15, 0),
        )
    )
    return found


# How responses to one prompt share their harm -> the correlation of two of them.
SHARED = {"of answers": 0.0, "correlation .3": 0.3, "of prompts": 1.0}


def _rates() -> list[Loss]:
    reference = (_zero_or_one(0.1, 0.0), _zero_or_one_cdf(0.1))
    improvement = Loss(
        name="0/1, from 10 % to 2 % of answers",
        draw=_zero_or_one(0.02, 0.0),
        cdf=_zero_or_one_cdf(0.02),
        range=(-1, 0),
        reference=reference,
        known=True,
    )
    return [improvement] + [
        Loss(
            name=f"0/1, {100 * q:g} % {how}",
            draw=_zero_or_one(q, correlation),
            cdf=_zero_or_one_cdf(q),
            range=(-1, 0),
            known=True,
        )
        for how, correlation in SHARED.items()
        for q in (0.005, 0.02, 0.05, 0.1, 0.2)
    ]


IMPROVEMENTS, COSTS, RATES = _improvements(), _costs(), _rates()
LOSSES = {loss.name: loss for loss in (*IMPROVEMENTS, *COSTS, *RATES)}
