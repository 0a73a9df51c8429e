"""lambda* of random subsets of the prompts, and of the responses: its spread, its interval,
and the bias of few responses."""

import math
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.figures.drawing import finish
from engine import dual
from engine.errors import UserError

DRAWS = 60
PROMPTS = (25, 50, 100, 200, 400)
RESPONSES = (2, 3, 4, 5, 6, 7, 8)


class _Solved(NamedTuple):
    """One draw that supports the thresholds."""

    lam: Tensor
    half: Tensor  # half width of the delta-method interval
    ess: float  # mean effective sample size


def lam_of_subsets(
    reward_PG: Tensor, utility_PGJ: Tensor, aim_J: Tensor, beta: float, draws: int = DRAWS
) -> dict[str, list]:
    """Solves for lambda* on subsets of the prompts and of the responses.

    Returns lambda* of all samples under "full", and under "prompts" and "responses" a row for each size:
    the mean, the 2.5 and 97.5 % of the draws, and the mean half width of the delta-method intervals.
    Draws that do not support the thresholds count as infinite in the quantiles, which are None there,
    and are left out of the mean.
    """
    P, G = reward_PG.shape
    full = dual.solve(reward_PG, utility_PGJ, aim_J, beta).lam
    generator = torch.Generator().manual_seed(0)

    def drawn(kind: str, n: int) -> tuple[Tensor, Tensor]:
        if kind == "prompts":
            # The spread is that of other prompts like these, so they are drawn with replacement.
            rows = torch.randint(P, (n,), generator=generator)
            return reward_PG[rows], utility_PGJ[rows]
        chosen = torch.rand(P, G, generator=generator).argsort(1)[:, :n]
        expanded = chosen[..., None].expand(-1, -1, utility_PGJ.shape[2])
        return reward_PG.gather(1, chosen), utility_PGJ.gather(1, expanded)

    def solved(r: Tensor, g: Tensor) -> _Solved | None:
        try:
            solution = dual.solve(r, g, aim_J, beta, start_J=full)
        except UserError:
            return None
        interval = dual.lam_interval(r, g, aim_J, beta, solution)
        return _Solved(solution.lam, (interval.high - interval.low) / 2, float(solution.ess.mean()))

    result: dict[str, list] = {"full": full.tolist(), "prompts": [], "responses": []}
    for kind, sizes, largest in (("prompts", PROMPTS, P), ("responses", RESPONSES, G)):
        for n in sizes:
            if n <= largest:
                result[kind].append(_row(n, [solved(*drawn(kind, n)) for _ in range(draws)], full))
    return result


def _row(n: int, solutions: list[_Solved | None], full: Tensor) -> dict:
    """Summarises the draws of one size; None stands for a draw that does not support the thresholds."""
    infinite = torch.full_like(full, math.inf)
    low, high = _percentiles(torch.stack([infinite if x is None else x.lam for x in solutions]))
    kept = [x for x in solutions if x is not None]
    return {
        "n": n,
        "mean": torch.stack([x.lam for x in kept]).mean(0).tolist() if kept else None,
        "low": _finite(low),
        "high": _finite(high),
        "half": torch.stack([x.half for x in kept]).mean(0).tolist() if kept else None,
        "unsupported": len(solutions) - len(kept),
        "ess": float(np.mean([x.ess for x in kept])) if kept else None,
    }


def _percentiles(draws: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Returns (low, high), the bounds of the central `level` of draws along the first dimension.

    They are draws themselves, not interpolated but rounded outward; inf counts as the largest value.
    """
    ordered = draws.sort(dim=0).values
    cut = math.floor((1 - level) / 2 * (len(ordered) - 1) + 1e-9)
    return ordered[cut], ordered[len(ordered) - 1 - cut]


def _finite(values: Tensor) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in values.tolist()]


def draw_subsets(by_size: dict[str, list]) -> Figure:
    """Draws lambda* against the numbers of prompts and responses."""
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2), ("prompts", "responses"), strict=True):
        rows = by_size[kind]
        x = [row["n"] for row in rows]
        for j, lam in enumerate(by_size["full"]):
            colour = f"C{j}"

            def label(text: str, first: bool = j == 0) -> str | None:
                return text if first else None

            mean = [row["mean"][j] if row["mean"] else math.nan for row in rows]
            half = np.array([row["half"][j] if row["half"] else math.nan for row in rows])
            low, high = (
                np.array([math.nan if row[k][j] is None else row[k][j] for row in rows])
                for k in ("low", "high")
            )
            axis.plot(x, mean, "o-", color=colour, label=label(f"mean of {DRAWS} subsets"))
            axis.fill_between(x, low, high, color=colour, alpha=0.2, label=label("95 % of subsets"))
            interval = label("delta-method interval, mean width")
            axis.errorbar(x, mean, yerr=half, fmt="none", ecolor="#222222", capsize=3, label=interval)
            axis.axhline(lam, color=colour, linewidth=1, linestyle=":", label=label("all samples"))
        axis.set(xlabel=f"number of {kind}", ylabel="one-shot lambda (run's units)")
        spread = "Drawn with replacement: spread"
        bias = "Fewer responses of each prompt: bias"
        axis.set_title(spread if kind == "prompts" else bias, loc="left")
        if kind == "prompts":
            axis.set_xscale("log")
            axis.set_xticks(x, [str(n) for n in x])
            axis.minorticks_off()
        finish(axis)
    return figure
