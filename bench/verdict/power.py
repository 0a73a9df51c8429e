"""What a verdict takes: the slack that is confirmed in 80 % of cases, the responses that looks ask for, and
whether the planner's numbers of prompts are enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import binom

from bench.verdict.level import prompt_means
from bench.verdict.losses import LOSSES, SHARED
from bench.verdict.repeated import RESPONSES
from bench.verdict.sizes import ALPHA, Sizes
from engine.constraints import FEWEST_PROMPTS
from engine.intervals import betting, skewed
from engine.looks import FIRST, Size, planned, share
from engine.verdict import planning
from engine.verdict.planning import POWER, confirmed

# Of the slack that is confirmed, by loss; the last one by betting on scores that are cut to their range.
JUDGED = (
    ("normal", False),
    ("normal, effects between prompts", False),
    ("5 % of answers lose 5 sd", False),
    ("normal", True),
)
LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Slack:
    """What the mean has to lie beyond its boundary, in deviations of a response, to be met in 80 %."""

    name: str
    prompts: int
    responses: int
    slack: float


def slacks(sizes: Sizes, judged: Sequence[tuple[str, bool]] = JUDGED) -> list[Slack]:
    """Finds the slack of each size from the bounds at the boundary, as they move with the mean."""
    found = []
    for name, cut in judged:
        loss = LOSSES[name]
        means = prompt_means(loss, sizes, sizes.generator(f"slack {name}"))
        label = f"{name}, range {loss.range[0]:g} to {loss.range[1]:g} stated" if cut else name
        for P in [P for P in sizes.prompts if P >= FEWEST_PROMPTS]:
            for G in sizes.responses:
                # Of some hundred bounds the 80 % quantile is known to 2 %.
                x = means[1 if cut else 0][G][:, :P][: sizes.slow]
                bounds = betting.bounds(x, *means[2], ALPHA) if cut else skewed.bounds(x, ALPHA)
                found.append(Slack(label, P, G, float((-bounds[0]).quantile(POWER))))
    return found


@dataclass(frozen=True)
class Sequential:
    """What a run's looks come to where its policy has a slack, beside a single look at all responses."""

    slack: float  # in deviations of a response
    met: float
    responses: float  # of the policy, on average
    looks: float  # on average
    one_look: float  # share met by one look at as many responses as all looks may take
    first_look: float  # by one at as many as the first one takes


def sequential(sizes: Sizes, slacks: Sequence[float] = (-0.2, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3)) -> list:
    """Takes a run's default looks at normal improvements."""
    asked = planned(Size(96, RESPONSES), 384, 4 * 96 * RESPONSES)
    shape, generator, found = asked[-1], sizes.generator("sequential"), []
    x = torch.cat(
        [
            LOSSES["normal"].beyond((n, shape.prompts, shape.responses), generator).scores.mean(-1)
            for n in sizes.chunks()
        ]
    )
    for slack in slacks:
        met, not_met, total, looks = (torch.zeros(len(x)) for _ in range(4))
        for k, size in enumerate(asked):
            open_yet = (met + not_met == 0).float()
            total, looks = total + open_yet * size.total, looks + open_yet
            if k:
                total -= open_yet * asked[k - 1].total
            y, alpha = x[:, : size.prompts] + slack, ALPHA * share(0, k, len(asked))
            met = torch.maximum(met, open_yet * confirmed(y, 0.0, alpha))
            not_met = torch.maximum(not_met, open_yet * (1 - met) * confirmed(-y, 0.0, alpha))
        one, first = (
            float(confirmed(x[:, : size.prompts] + slack, 0.0, FIRST * ALPHA).double().mean())
            for size in (asked[-1], asked[0])
        )
        numbers = [float(each.mean()) for each in (met, total, looks)]
        found.append(Sequential(slack, *numbers, one, first))
    return found


@dataclass(frozen=True)
class Planned:
    """The planner's number of prompts for a limit on a rate, and how often they confirm it."""

    limit: float
    rate: float
    how: str  # responses to one prompt share their harm
    prompts: int | None
    met: float | None  # in verdicts that are drawn anew
    # By the exact binomial bound, which asks that all answers are independent; None where they are not.
    binomial: int | None


def plans(sizes: Sizes, limits: Sequence[float] = LIMITS) -> list[Planned]:
    """Plans rates of none, a third and half of each limit at 6 responses, and simulates the plans."""
    found = []
    for limit in limits:
        for how, correlation in SHARED.items():
            for part in (0.0, 1 / 3, 1 / 2) if correlation == 0 else (1 / 3,):
                draw = planning.unsafe(limit, limit * part, correlation, RESPONSES)
                span = (limit - 1, limit)
                n = planning.prompts_needed(draw, ALPHA, span)
                met = None
                if n:
                    again = partial(draw, sizes.generator(f"plan {limit} {part} {how}"))
                    rounds = -(-sizes.slow // planning.VERDICTS)
                    words = [confirmed(again(n), 0.0, ALPHA, span) for _ in range(rounds)]
                    met = float(torch.cat(words).double().mean())
                alone = None if correlation else binomial_prompts(limit, limit * part)
                found.append(Planned(limit, limit * part, how, n, met, alone))
    return found


def binomial_prompts(limit: float, rate: float) -> int:
    """Returns how many prompts the Clopper-Pearson bound needs, where all answers are independent."""
    prompts = np.arange(1, 2000)
    n = RESPONSES * prompts
    # The most unsafe answers of n with which the bound is at most the limit; -1 where there are none.
    most = binom.ppf(ALPHA, n, limit)
    most = np.where(binom.cdf(most, n, limit) > ALPHA, most - 1, most)
    power = np.where(most < 0, 0.0, binom.cdf(most, n, rate))
    # It falls a little between the numbers at which one more unsafe answer is allowed.
    return int(prompts[np.flatnonzero(power < POWER).max() + 1])
