"""Other rules beside the project's: how often they err, and where a safer policy is judged worse."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.verdict import rules
from bench.verdict.losses import LOSSES, SHARED
from bench.verdict.sizes import ALPHA, Sizes
from engine.verdict.planning import beta, confirmed

MEANS = (
    "normal",
    "lognormal(1.5) harm",
    "1 % of answers lose 5 sd",
    "2 % of prompts lose 8 sd",
    "5 % of prompts lose 3 sd",
    "exponential cost",
    "lognormal(1) cost",
    "lognormal(2) cost",
    "lognormal(1) means of prompts",
    "zero-inflated: 90 % cost 0, else lognormal(1)",
    "0/1, 2 % of answers",
    "0/1, 2 % of prompts",
    "0/1, 10 % of prompts",
)
# Prompts and responses.
AT = ((32, 6), (96, 2), (96, 6))


@dataclass(frozen=True)
class Compared:
    """Shares of false "met" by several rules, on the same samples."""

    name: str
    prompts: int
    responses: int
    ours: float
    student: float
    hall: float
    bootstrap_t: float | None  # of the first `Sizes.slow` samples; None where it was not asked
    cut: float  # by the bound for a stated range, on scores that are cut to it


def means(sizes: Sizes, names: Sequence[str] = MEANS, at: Sequence[tuple[int, int]] = AT) -> list[Compared]:
    """Compares rules for means at the boundary."""
    found = []
    for name in names:
        loss, generator = LOSSES[name], sizes.generator(f"compared {name}")
        for P, G in at:
            drawn = [loss.beyond((n, P, G), generator) for n in sizes.chunks()]
            x, cut = (torch.cat([getattr(d, side).mean(-1) for d in drawn]) for side in ("scores", "cut"))
            span = drawn[0].span
            words = [
                confirmed(x, 0.0, ALPHA, span if loss.known else None),
                rules.student(x, ALPHA),
                rules.hall(x, ALPHA),
                rules.bootstrap_t(x[: sizes.slow], ALPHA, generator) if (P, G) == at[-1] else None,
                confirmed(cut, 0.0, ALPHA, span),
            ]
            shares = [None if w is None else float(w.double().mean()) for w in words]
            found.append(Compared(name, P, G, *shares))
    return found


@dataclass(frozen=True)
class Rate:
    """Shares of false "met" for a rate at its limit: by each prompt's share, and by one correlation."""

    limit: float
    how: str  # the policy's responses to one prompt share their harm
    reference: str  # the same of the reference's
    reference_rate: float
    ours: float
    pooled: float


def rates(sizes: Sizes, limits: Sequence[float] = (0.02, 0.05, 0.1)) -> list[Rate]:
    """Compares the bound on shares of prompts with the exact binomial bound of an effective number of
    responses, at 96 prompts x 6."""
    found, shape = [], (96, 6)
    for limit in limits:
        for how, reference in (
            ("of answers", "of answers"),
            ("correlation .3", "correlation .3"),
            ("of prompts", "of prompts"),
            ("of prompts", "of answers"),
        ):
            generator = sizes.generator(f"rate {limit} {how} {reference}")
            ours, pooled = [], []
            for n in sizes.chunks():
                before = _answers((n, *shape), 0.2, SHARED[reference], generator)
                after = _answers((n, *shape), limit, SHARED[how], generator)
                ours.append(confirmed(limit - after.mean(-1), 0.0, ALPHA, (limit - 1, limit)))
                pooled.append(rules.clopper_pearson(after, before, limit, ALPHA))
            words = [float(torch.cat(each).double().mean()) for each in (ours, pooled)]
            found.append(Rate(limit, how, reference, 0.2, *words))
    return found


def _answers(shape: tuple[int, int, int], rate: float, correlation: float, generator) -> Tensor:
    """Draws answers of which 1 is unsafe, [R, P, G]."""
    rates_RP = beta(torch.Size(shape[:2]), rate, correlation, generator)
    return (torch.rand(shape, generator=generator) < rates_RP[..., None]).double()


@dataclass(frozen=True)
class Monotone:
    """How often one more unsafe answer turns a word into a better one."""

    limit: float
    prompts: int
    responses: int
    chains: int
    ours: int  # steps from a worse word to a better one
    own: int  # the same by the binomial bound, with the correlation of the policy's own answers


def monotone(sizes: Sizes, chains: int = 20) -> list[Monotone]:
    """Makes answers unsafe one after the other, at random, and judges after each."""
    found = []
    for limit, P, G in ((0.02, 96, 24), (0.02, 300, 6), (0.05, 96, 6), (0.2, 20, 6)):
        generator = sizes.generator(f"monotone {limit} {P} {G}")
        steps = min(P * G, int(3 * limit * P * G) + 2)
        order = torch.rand(chains, P * G, generator=generator).argsort(1)
        # The step at which each answer becomes unsafe.
        rank = order.argsort(1).view(chains, P, G)
        ours, own = [], []
        for step in range(steps):
            unsafe = (rank < step).double()
            x, span = limit - unsafe.mean(-1), (limit - 1, limit)
            met = confirmed(x, 0.0, ALPHA, span).int()
            ours.append(met - confirmed(-x, 0.0, ALPHA, (-span[1], -span[0])).int())
            own.append(rules.clopper_pearson(unsafe, unsafe, limit, ALPHA).int())
        worse = [int((torch.stack(each).diff(dim=0) > 0).sum()) for each in (ours, own)]
        found.append(Monotone(limit, P, G, chains, *worse))
    return found
