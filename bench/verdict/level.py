"""How often a constraint is called met, or not met, falsely: one look, one constraint, at its boundary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from bench.verdict.losses import LOSSES, Loss
from bench.verdict.sizes import ALPHA, ERRORS, Sizes, too_often
from engine.constraints import FEWEST_PROMPTS
from engine.verdict.planning import confirmed

HOLDS, REFUSED, NEEDS_RANGE, FAILS = "holds", "refused", "needs a range", "fails"
# A cell a little above what is allowed is drawn anew with so many times as many verdicts.
AGAIN = 4
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
                cell = judged(rule, loss, G, x, y, span)
                # What lies a little above is drawn anew, and more of it, so that chance names no cell.
                if cell.cut is not None and not too_often(max(cell.met, cell.not_met), len(x), 2 * ERRORS):
                    more = replace(
                        sizes, replications=AGAIN * sizes.replications, prompts=(P,), responses=(G,)
                    )
                    again = prompt_means(loss, more, more.generator(f"again {loss.name} {P} {G}"))
                    cell = judged(rule, loss, G, again[0][G], again[1][G], span)
                found.append(cell)
    return found


def judged(rule: Rule, loss: Loss, G: int, x: Tensor, cut: Tensor, span: tuple[float, float]) -> Cell:
    """Judges samples [R, P] of a loss, and cut ones where the words on these are too often false."""
    own = words(rule, x, span if loss.known else None)
    wrong = too_often(max(own), len(x))
    return Cell(loss.name, x.shape[1], G, *own, words(rule, cut, span) if wrong else None, len(x))


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
