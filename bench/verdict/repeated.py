"""Looks and families: how often a constraint at its boundary is ever called met, where one looks several
times or asks for several constraints."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bench.verdict.losses import LOSSES, Loss
from bench.verdict.sizes import ALPHA, Sizes, too_often
from engine.intervals import betting, holm, skewed
from engine.looks import Size, planned, share
from engine.verdict.planning import confirmed

# Per prompt, of policy and reference.
RESPONSES = 6
# At the last planned look bounds are at most so much further from the mean than those of one look.
WIDEST = 1.15


@dataclass(frozen=True)
class Looked:
    """What several looks at one loss came to."""

    how: str  # what a look adds
    name: str  # of the loss
    looks: int
    met: float  # share of constraints ever called met
    uncorrected: float  # the same with every look at the whole error
    width: float | None  # of the last look's bound against one look's, on average; None for attempts
    replications: int

    @property
    def holds(self) -> bool:
        """Tells whether the share is at most the nominal one, and the bound narrow enough."""
        narrow = self.width is None or self.width <= WIDEST
        return narrow and not too_often(self.met, self.replications)


# Draws of a look, numbers [R, P], from the first to the last of `looks`: (loss, R, looks, generator).
Sampling = Callable[[Loss, int, int, Generator], list[Tensor]]


def new_prompts(loss: Loss, n: int, looks: int, generator: Generator) -> list[Tensor]:
    """Adds 32 prompts with 2 responses at each look."""
    x = loss.beyond((n, 32 * looks, 2), generator).scores.mean(-1)
    return [x[:, : 32 * k] for k in range(1, looks + 1)]


def more_responses(loss: Loss, n: int, looks: int, generator: Generator) -> list[Tensor]:
    """Adds 2 responses to each of 96 prompts at each look."""
    x = loss.beyond((n, 96, 2 * looks), generator).scores
    return [x[..., : 2 * k].mean(-1) for k in range(1, looks + 1)]


def retrained(loss: Loss, n: int, looks: int, generator: Generator) -> list[Tensor]:
    """Judges another policy each time, on the same 96 prompts and the reference's same 6 responses."""
    shape = (n, 96, RESPONSES)
    reference = None if loss.reference is None else loss.reference[0](shape, generator)
    policies = [loss.draw(shape, generator) for _ in range(looks)]
    return [loss.between(policy, reference).scores.mean(-1) for policy in policies]


def as_planned(loss: Loss, n: int, looks: int, generator: Generator) -> list[Tensor]:
    """Takes the looks of a run with the default settings and enough held-out prompts."""
    sizes = planned(Size(96, RESPONSES), 384, 4 * 96 * RESPONSES)[:looks]
    x = loss.beyond((n, sizes[-1].prompts, sizes[-1].responses), generator).scores
    return [x[:, : size.prompts, : size.responses].mean(-1) for size in sizes]


SAMPLINGS: dict[str, Sampling] = {
    "new prompts": new_prompts,
    "more responses to the same prompts": more_responses,
    "retrained policies, same prompts": retrained,
    "as a run plans": as_planned,
}
LOOKED_AT = (
    "normal",
    "normal, effects between prompts",
    "exponential harm",
    "0/1, 10 % of answers",
    "0/1, 10 % of prompts",
)


def looked(sizes: Sizes, name: str) -> list[Looked]:
    """Looks at a loss in every way, up to each number of looks."""
    found, loss = [], LOSSES[name]
    for how, sampling in SAMPLINGS.items():
        counts = (3,) if sampling is as_planned else sizes.looks
        generator = sizes.generator(f"{how}, {loss.name}")
        chunks = [sampling(loss, n, max(counts), generator) for n in sizes.chunks()]
        each = [torch.cat(x) for x in zip(*chunks, strict=True)]
        span = loss.beyond((1, 1, 1), generator).span if loss.known else None
        for count in counts:
            shares = [share(k, 0, 1) if sampling is retrained else share(0, k, count) for k in range(count)]
            met, plain = (
                torch.stack([confirmed(x, 0.0, s * ALPHA, span) for x, s in zip(each, used, strict=False)])
                for used in (shares, [1.0] * count)
            )
            width = None
            if sampling is not retrained and count > 1:
                last = each[count - 1]
                width = float(distance(last, shares[-1] * ALPHA, span) / distance(last, ALPHA, span))
            rates = [float(x.any(0).double().mean()) for x in (met, plain)]
            found.append(Looked(how, name, count, *rates, width, sizes.replications))
    return found


def distance(x: Tensor, alpha: float, span: tuple[float, float] | None) -> Tensor:
    """Returns how far the lower bound lies below the mean of samples [R, P], on average."""
    some = x[:200]
    lower = (skewed.bounds(some, alpha) if span is None else betting.bounds(some, *span, alpha))[0]
    return (some.mean(-1) - lower).mean()


@dataclass(frozen=True)
class Family:
    """What judging J constraints together came to, by the shares of verdicts."""

    kind: str  # of the numbers of prompts
    J: int
    correlation: float
    at_boundary: str  # which constraints are at their boundary: "all" or "one"
    prompts: int
    any_met: float  # any of those at the boundary is called met by its own word
    all_met: float  # all together are called met
    uncorrected: float  # as `any_met`, each word at the whole error
    replications: int

    @property
    def holds(self) -> bool:
        """Tells whether both words keep the nominal rate."""
        return not too_often(max(self.any_met, self.all_met), self.replications)


def _skewed_harm(z: Tensor) -> Tensor:
    """Turns normal numbers into exponential harm with a mean of 0."""
    return torch.special.log_ndtr(z) + 1


def _unsafe(z: Tensor) -> Tensor:
    """Turns normal numbers into 0.1 - a cost, which is 1 for a tenth of the prompts."""
    return 0.1 - (torch.special.ndtr(z) < 0.1).double()


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float] | None]] = {
    "normal": (lambda z: z, None),
    "exponential harm": (_skewed_harm, None),
    "0/1, 10 % of prompts": (_unsafe, (-0.9, 0.1)),
}


def families(sizes: Sizes, kind: str) -> list[Family]:
    """Judges one to three constraints on numbers of prompts of a kind."""
    found = []
    make, span = KINDS[kind]
    for P in (32, 96):
        generator = sizes.generator(f"families {kind} {P}")
        shape = (sizes.replications, P)
        common, *own = (torch.randn(shape, generator=generator).double() for _ in range(4))
        for J in (1, 2, 3):
            for rho in (0.0, 0.5) if J > 1 else (0.0,):
                each = [make(rho**0.5 * common + (1 - rho) ** 0.5 * z) for z in own[:J]]
                for which in ("all", "one") if J > 1 else ("all",):
                    # The others hold by far.
                    far = 0.0 if span else 3.0
                    others = [torch.full_like(x, 0.1) if span else x + far for x in each[1:]]
                    numbers = each if which == "all" else [each[0], *others]
                    n_boundary = J if which == "all" else 1
                    at = _met_at(numbers, span, J)  # [levels, R, J]
                    words = by_holm(at)[:, :n_boundary]
                    alone = at[0]
                    rates = [
                        float(x.double().mean())
                        for x in (words.any(1), alone.all(1), alone[:, :n_boundary].any(1))
                    ]
                    found.append(Family(kind, J, rho, which, P, *rates, sizes.replications))
    return found


def _met_at(numbers: list[Tensor], span: tuple[float, float] | None, J: int) -> Tensor:
    """Tells which constraints are confirmed at the errors alpha / 1, ..., alpha / J: bool [J, R, J]."""
    levels = [ALPHA / k for k in range(1, J + 1)]
    return torch.stack(
        [torch.stack([confirmed(x, 0.0, level, span) for x in numbers], -1) for level in levels]
    )


def by_holm(met: Tensor) -> Tensor:
    """Returns which constraints their own words call met, bool [R, J].

    met: those confirmed at the errors alpha / 1, ..., alpha / J, [J, R, J]. `engine.intervals.holm` does the
    correction, given for each constraint the largest k at which it is confirmed.
    """
    J = met.shape[-1]
    found = torch.zeros(met.shape[1:], dtype=torch.bool)
    least = torch.where(met, ALPHA / torch.arange(1, J + 1).double()[:, None, None], 1.0).amin(0)
    for outcome in least.unique(dim=0):
        tested = holm(outcome.tolist(), ALPHA)
        words = [error <= at * (1 + 1e-9) for error, at in zip(outcome.tolist(), tested, strict=True)]
        found[(least == outcome).all(1)] = torch.tensor(words)
    return found
