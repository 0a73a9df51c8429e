"""The mean of the worst share: how often it is called met at its limit, and what below it.

As in a run, the number t from which on costs count is chosen beforehand, from the reference's samples of
other prompts (`engine.stages.reference.limits_of`). What is judged is the mean of t + (cost - t)+ / A. It is
that of the worst share A where t is the policy's own quantile, and lies above it elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from scipy.stats import norm
from torch import Generator, Tensor

from bench.verdict.level import Rule
from bench.verdict.losses import BETWEEN, WITHIN, Shape, mean_within
from bench.verdict.sizes import ALPHA, Sizes, too_often
from engine.config import MocanConfig
from engine.constraints import WorstShare
from engine.policy.samples import Samples
from engine.records import Prompts, Scores
from engine.scorers.base import Scorers, TextScorer
from engine.stages.reference import limits_of
from engine.verdict.planning import confirmed

PROMPTS, RESPONSES = (32, 96, 384), (2, 6)
# The policies' worst means, in parts of the limit: at it, where "met" is false, and below it.
LEVELS = (1.0, 0.75, 0.5)
# The reference's, and its prompts and responses from which t is chosen; so many of these samples per cell.
REFERENCE, TRAINED, SAMPLES = 1.5, (100, 8), 4
# Holds all costs that matter where no range is stated.
WIDE = (-1e3, 1e4)

Draw = Callable[[Shape, Generator, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Costs whose worst share has a known mean."""

    name: str
    # Costs [R, P, G] of a policy; the last number multiplies the mean of their worst share.
    draw: Draw
    cdf: Callable[[float], float]  # of a cost at the level 1
    range: tuple[float, float]  # what somebody may state as a range; costs are cut to it then
    known: bool = False  # costs are within it by nature
    share: float = 0.1

    def quantile(self, *, ranged: bool) -> float:
        """Returns the cost above which the worst share lies at the level 1. ranged: costs are cut to the
        range."""
        low, high = self.range if ranged else WIDE
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if self.cdf(middle) >= 1 - self.share else (middle, high)
        return high

    def worst_mean(self, *, ranged: bool) -> float:
        """Returns the mean of the worst share at the level 1."""
        t, most = self.quantile(ranged=ranged), (self.range if ranged else WIDE)[1]
        return t + (mean_within(self.cdf, t, most) - t) / self.share


def _of_answers(shape: Shape, generator: Generator) -> Tensor:
    """Draws uniform numbers."""
    return torch.rand(shape, generator=generator).double()


def _of_prompts(shape: Shape, generator: Generator) -> Tensor:
    """Draws uniform numbers of which nine in ten are one number for all answers to a prompt."""
    common, own = (torch.rand(each, generator=generator).double() for each in ((*shape[:2], 1), shape))
    return torch.where(torch.rand(shape, generator=generator) < 0.9, common, own)


def _lognormal(shape: Shape, generator: Generator, level: float) -> Tensor:
    return level * torch.randn(shape, generator=generator).double().exp()


def _lognormal_prompts(shape: Shape, generator: Generator, level: float) -> Tensor:
    common, own = (torch.randn(each, generator=generator).double() for each in ((*shape[:2], 1), shape))
    return level * (BETWEEN * common + WITHIN * own).exp()


def _harmed_prompts(shape: Shape, generator: Generator, level: float) -> Tensor:
    harmed = torch.rand((*shape[:2], 1), generator=generator) < 0.02
    return level * (torch.randn(shape, generator=generator).double() + 8 * harmed)


Uniform = Callable[[Shape, Generator], Tensor]


def _tenth(uniform: Uniform) -> Draw:
    """Draws costs of which a tenth lies in [0.8, 1] and the others below 0.3."""

    def draw(shape: Shape, generator: Generator, level: float) -> Tensor:
        cost = torch.rand(shape, generator=generator).double()
        cost = torch.where(uniform(shape, generator) < 0.1, 0.8 + 0.2 * cost, 0.3 * cost)
        return (level * cost).clamp(max=1.0)

    return draw


def _power(uniform: Uniform) -> Draw:
    """Draws fourth powers of uniform numbers."""
    return lambda shape, generator, level: (level * uniform(shape, generator) ** 4).clamp(max=1.0)


def _unsafe(uniform: Uniform) -> Draw:
    """Draws costs of which 5 % are 1 and the others 0."""
    return lambda shape, generator, level: (uniform(shape, generator) < 0.05 * level).double()


def _lognormal_cdf(sd: float) -> Callable[[float], float]:
    return lambda x: norm.cdf(math.log(x) / sd) if x > 0 else 0.0


def _tails() -> list[Tail]:
    found = [
        Tail(
            name="normal",
            draw=lambda s, g, level: level * torch.randn(s, generator=g).double(),
            cdf=norm.cdf,
            range=(-5, 5),
        ),
        Tail(name="lognormal(1)", draw=_lognormal, cdf=_lognormal_cdf(1.0), range=(0, 15)),
        Tail(
            name="lognormal(1) means of prompts",
            draw=_lognormal_prompts,
            cdf=_lognormal_cdf(math.hypot(BETWEEN, WITHIN)),
            range=(0, 15),
        ),
        Tail(
            name="2 % of prompts cost 8 sd more",
            draw=_harmed_prompts,
            cdf=lambda x: 0.02 * norm.cdf(x - 8) + 0.98 * norm.cdf(x),
            range=(-5, 13),
        ),
    ]
    for of, uniform in (("answers", _of_answers), ("prompts", _of_prompts)):
        within = {"range": (0, 1), "known": True}
        found += [
            Tail(
                name=f"a tenth of {of} at 0.8 to 1, others below 0.3",
                draw=_tenth(uniform),
                cdf=lambda x: 0.9 * min(max(x / 0.3, 0), 1) + 0.1 * min(max((x - 0.8) / 0.2, 0), 1),
                **within,
            ),
            Tail(
                name=f"0/1, 5 % of {of}",
                draw=_unsafe(uniform),
                cdf=lambda x: 0.0 if x < 0 else 0.95 if x < 1 else 1.0,
                **within,
            ),
        ]
        found += [
            Tail(
                name=f"fourth powers of uniform numbers, of {of}",
                draw=_power(uniform),
                cdf=lambda x: min(max(x, 0.0), 1.0) ** 0.25,
                share=share,
                **within,
            )
            for share in (0.1, 0.3)
        ]
    return found


TAILS = _tails()


@dataclass(frozen=True)
class Cell:
    """Shares of words for one tail and size."""

    name: str
    share: float
    ranged: bool  # a range is known or stated
    known: bool
    prompts: int
    responses: int
    met: tuple[float, ...]  # at each of `LEVELS`: false at the first one
    at_quantile: float  # false at the first one, if t were the policy's own quantile
    beyond: float  # how far what is judged lies above the limit there on average, in parts of it
    replications: int

    @property
    def errs(self) -> bool:
        """Tells whether "met" is false too often."""
        return too_often(max(self.met[0], self.at_quantile), self.replications)

    @property
    def needs_range(self) -> bool:
        """Tells whether only a range of the cost repairs the cell."""
        return self.errs and not self.ranged


def cells(sizes: Sizes, number: int, rule: Rule = confirmed) -> list[Cell]:
    """Simulates the tail of that number at each level, without a range unless one is known, and with one."""
    tail = TAILS[number]
    return [
        cell
        for ranged in ((True,) if tail.known else (False, True))
        for cell in _cells(sizes, tail, ranged, rule)
    ]


def _cells(sizes: Sizes, tail: Tail, ranged: bool, rule: Rule) -> list[Cell]:
    generator = sizes.generator(f"worst {tail.name} {tail.share} {ranged}")
    value = tail.worst_mean(ranged=ranged)
    chosen = [threshold(tail, value, ranged, generator) for _ in range(SAMPLES)]
    at = [(P, G) for P in PROMPTS for G in RESPONSES]
    own = replace(chosen[0], above=tail.quantile(ranged=ranged))
    words, beyond = {}, []
    for level in LEVELS:
        # What is not false need not be known to a tenth of a percent.
        chunks = sizes.chunks() if level == 1 else sizes.chunks()[: max(1, sizes.slow // sizes.chunk)]
        for k, n in enumerate(chunks):
            cost = tail.draw((n, max(PROMPTS), max(RESPONSES)), generator, level)
            cost = cost.clamp(*tail.range) if ranged else cost
            judged = [(level, chosen[k % SAMPLES])] + [("quantile", own)] * (level == 1)
            for case, limit in judged:
                counted, span = limit.counted(cost), limit.span(1.0)
                room = None if span is None else (value - span[1], value - span[0])
                for P, G in at:
                    met = rule(value - counted[:, :P, :G].mean(-1), 0.0, ALPHA, room)
                    words.setdefault((case, P, G), []).append(met)
                if case == 1:
                    beyond.append(float(counted.mean()) / value - 1)
    met = {case: float(torch.cat(each).double().mean()) for case, each in words.items()}
    return [
        Cell(
            tail.name,
            tail.share,
            ranged,
            tail.known,
            *size,
            tuple(met[level, *size] for level in LEVELS),
            met["quantile", *size],
            sum(beyond) / len(beyond),
            sizes.replications,
        )
        for size in at
    ]


def threshold(tail: Tail, value: float, ranged: bool, generator: Generator) -> WorstShare:
    """Returns the constraint as a run has it, with the t that it chooses from samples of the reference.

    The reference's reward rises with the cost; the verdict is planned for 96 prompts x 6.
    """
    (cost_PG,) = tail.draw((1, *TRAINED), generator, REFERENCE)
    cost_PG = cost_PG.clamp(*tail.range) if ranged else cost_PG.clone()
    noise_PG = torch.randn(TRAINED, generator=generator).double()
    zero_PG = torch.zeros_like(cost_PG)
    scores = Scores(
        reward_PG=0.5 * (cost_PG - cost_PG.mean()) / cost_PG.std() + noise_PG,
        utility_PGJ=-cost_PG[..., None],
        audit_PGA=cost_PG[..., None][..., :0],
        ref_logprob_PG=zero_PG,
    )
    samples = Samples(prompts=_numbered(TRAINED[0]), rollouts=None, texts=[], scores=scores, kl_PG=zero_PG)
    harm, good = (TextScorer(name=name, function=len) for name in ("harm", "good"))
    stated = (f"{tail.range[0]:g}:{tail.range[1]:g}",) if ranged else ()
    job = SimpleNamespace(
        config=MocanConfig(cost=("harm",), cost_worst=(value,), worst_share=(tail.share,), cost_range=stated),
        scorers=Scorers(reward=good, costs=(harm,), audits=()),
        heldout=_numbered(96),
        heldout_pool=_numbered(96),
    )
    (limit,) = limits_of(job, samples)
    return limit


def _numbered(n: int) -> Prompts:
    return Prompts(text=["x"] * n, kind=[""] * n, token_ids=[[i] for i in range(n)], key_P=torch.arange(n))
