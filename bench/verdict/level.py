"""How often a constraint is called met, or not met, falsely: one look, one constraint, at its boundary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bench.verdict.losses import LOSSES, Loss
from bench.verdict.sizes import ALPHA, Sizes, too_often
from engine.constraints import FEWEST_PROMPTS
from engine.verdict.planning import confirmed

HOLDS, REFUSED, NEEDS_RANGE, FAILS = "holds", "refused", "needs a range", "fails"
# Tells of samples [..., P] whether the mean is called at least 0: (x, threshold, alpha, span).
Rule = Callable[[Tensor, float, float, tuple[float, float] | None], Tensor]


@dataclass(frozen=True)
class Cell:
    """The shares of false words for one loss and size."""

    name: str  # of the loss
    prompts: int
    responses: int
    met: float  # by the scores as they are: exactly where their range is known by nature
    not_met: float
    # By scores that are cut to a stated range, exactly; None where it holds without.
    cut: tuple[float, float] | None
    replications: int

    @property
    def loss(self) -> Loss:
        """Returns the loss."""
        return LOSSES[self.name]

    @property
    def outcome(self) -> str:
        """Says what becomes of the cell. It fails where even a stated range does not help, or is to be
        unnecessary."""
        if not self.loss.known and self.prompts < FEWEST_PROMPTS:
            return FAILS if self.met or self.not_met else REFUSED
        if self.cut is None:
            return HOLDS
        return FAILS if self.loss.even or too_often(max(self.cut), self.replications) else NEEDS_RANGE


def cells(sizes: Sizes, names: Sequence[str], rule: Rule = confirmed) -> list[Cell]:
    """Simulates every cell of some losses. rule: what judges, with or without a range."""
    found = []
    for loss in [LOSSES[name] for name in names]:
        means, cut, span = prompt_means(loss, sizes, sizes.generator(loss.name))
        for P in sizes.prompts:
            for G in sizes.responses:
                x, y = means[G][:, :P], cut[G][:, :P]
                own = words(rule, x, span if loss.known else None)
                wrong = too_often(max(own), sizes.replications)
                found.append(Cell(loss.name, P, G, *own, words(rule, y, span) if wrong else None, len(x)))
    return found


def words(rule: Rule, x: Tensor, span: tuple[float, float] | None) -> tuple[float, float]:
    """Returns the shares of samples [R, P] called met and not met."""
    other = None if span is None else (-span[1], -span[0])
    met, not_met = rule(x, 0.0, ALPHA, span), rule(-x, 0.0, ALPHA, other)
    return float(met.double().mean()), float(not_met.double().mean())


def prompt_means(
    loss: Loss, sizes: Sizes, generator: Generator
) -> tuple[dict[int, Tensor], dict[int, Tensor], tuple[float, float]]:
    """Draws means over responses for the most prompts, [R, P] by the number of responses: of scores, and of
    scores cut to their range. Fewer prompts and responses are the first of these."""
    P, G = max(sizes.prompts), max(sizes.responses)
    means, cut = ({g: [] for g in sizes.responses} for _ in range(2))
    for n in sizes.chunks():
        drawn = loss.beyond((n, P, G), generator)
        for g in sizes.responses:
            means[g].append(drawn.scores[..., :g].mean(-1))
            cut[g].append(means[g][-1] if loss.known else drawn.cut[..., :g].mean(-1))
    return *({g: torch.cat(x) for g, x in each.items()} for each in (means, cut)), drawn.span
