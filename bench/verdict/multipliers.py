"""How often the interval of the one-shot multipliers holds the true ones, those of unlimited prompts and
responses.

A cell is a kind of scores and a size. In each of its replications scores are drawn, and `engine.dual` solves
for the multipliers and gives their interval. The truth is known in closed form for normal scores, else from a
few hundred prompts of evenly spaced spreads with thousands of responses each.

    print(*table(rows(replications=2000, seed=0)), sep="\n")
"""

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from bench.theory.exact_stages import ExactStages
from bench.theory.problem import make
from bench.theory.updates import regression
from engine import dual
from engine.config import MocanConfig
from engine.errors import UserError
from engine.intervals import t_quantile
from engine.records import Target, lagrangian

CORRELATION = -0.45  # of the reward with each utility, before a kind bends them
BETWEEN = 0.2  # of two utilities


def _normal(z, spread, rng=None):
    return z * np.exp(0.3 * spread - 0.09)


def _unequal(z, spread, rng=None):
    """The 5 % of prompts that spread most do so four times as much as the 5 % that spread least."""
    return z * np.exp(0.42 * spread - 0.42**2)


def _bent(z, bend: Callable):
    return np.concatenate([z[..., :1], bend(z[..., 1:])], -1)


def _lognormal(z, sigma: float):
    """Returns lognormal values of mean 0 and standard deviation 1."""
    square = math.exp(sigma**2)
    return (np.exp(sigma * z) - math.sqrt(square)) / math.sqrt(square * (square - 1))


def _harmful(z, spread, rng=None):
    """Costs are lognormal, so utilities fall far now and then."""
    return _normal(_bent(z, lambda x: -_lognormal(-x, 0.7)), spread)


def _outstanding(z, spread, rng=None):
    """Utilities rise far now and then, up to 4 standard deviations."""
    return _normal(_bent(z, lambda x: np.minimum(_lognormal(x, 0.5), 4)), spread)


def _whole(z, spread, rng=None):
    """Rewards and utilities are grades of a few whole numbers."""
    return _normal(np.round(1.5 * z) / 1.53, spread)


def _unsafe(z, spread, rng=None):
    """Costs are 0 or 1, in about 22 % of the responses, more with some prompts than with others."""
    limit = NormalDist().inv_cdf(0.2) + 0.4 * spread
    return np.concatenate([z[..., :1], (z[..., 1:] >= limit) / 0.41], -1)


def _heavy(z, spread, rng):
    """Responses differ in how far out all their scores are, up to 5 standard deviations. The true tilt has
    its weight in a few of very many responses, which 8 or 32 do not show."""
    size = np.exp(0.6 * rng.normal(size=(*z.shape[:2], 1)) - 0.36)
    return _normal(np.clip(z * size, -5, 5), spread)


KINDS: dict[str, Callable] = {
    "normal": _normal,
    "unequal prompts": _unequal,
    "lognormal costs": _harmful,
    "lognormal utilities": _outstanding,
    "whole numbers": _whole,
    "0/1 costs": _unsafe,
    "heavy tails": _heavy,
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A kind of scores, the size of a data set, and what is asked of it."""

    kind: str = "normal"
    P: int = 96
    G: int = 8
    b_J: tuple[float, ...] = (0.3,)
    beta: float = 1.0


CELLS = [
    *(Cell(kind=kind, G=G) for kind in KINDS for G in (8, 32)),
    *(Cell(kind=kind, G=4) for kind in ("normal", "unequal prompts", "lognormal costs")),
    *(
        Cell(kind=kind, G=G, b_J=(0.3,) * J)
        for kind in ("normal", "lognormal costs")
        for J in (2, 3)
        for G in (8, 32)
    ),
    *(Cell(kind=kind, P=P) for kind in ("normal", "unequal prompts", "lognormal costs") for P in (32, 400)),
    *(Cell(beta=beta, G=G) for beta in (0.5, 0.7, 2.0) for G in (8, 32)),
    *(Cell(b_J=(b,), beta=beta) for b in (0.2, 0.6) for beta in (1.0, 2.0)),
    Cell(kind="heavy tails", beta=2.0),
    Cell(P=1000),
    Cell(b_J=(0.3, -0.5)),  # the second constraint has room
    Cell(b_J=(0.3, -0.27)),  # it has hardly any
]


def rows(replications: int = 2000, seed: int = 0, cells: list[Cell] = CELLS) -> list[dict]:
    """Simulates each cell; one dict a cell, with numbers or None.

    - claimed: share of the replications whose interval is said to be of the true multipliers.
    - coverage: share of these whose interval of 95 % holds them, of the worst constraint. None where fewer
      than 5 % claim it. width: the median width of these intervals, of that constraint.
    - at_same_G: coverage of the true multipliers by intervals without the correction, in all replications.
    - truth, solved, corrected: the multipliers of the first constraint, true and on average.
    - ess: mean effective share of the responses. unsupported: replications whose samples do not support the
      thresholds, which are left out.
    """
    return [_row(cell, replications, seed) for cell in cells]


def table(found: list[dict]) -> list[str]:
    """Writes the rows as lines of a Markdown table."""
    head = [
        "scores",
        "P",
        "G",
        "b",
        "beta",
        "effective",
        "true",
        "solved",
        "corrected",
        "before",
        "held",
        "width",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in found:
        b = ", ".join(f"{b:g}" for b in row["b"])
        cells = [row["kind"], str(row["P"]), str(row["G"]), b, f"{row['beta']:g}"]
        cells += [
            "" if row[name] is None else f"{row[name]:.2f}"
            for name in ("ess", "truth", "solved", "corrected")
        ]
        cells.append("" if row["at_same_G"] is None else f"{100 * row['at_same_G']:.0f} %")
        claim = "no claim" if row["coverage"] is None else f"{100 * row['coverage']:.1f} %"
        if row["coverage"] is not None and row["claimed"] < 1:
            claim += f", claimed in {100 * row['claimed']:.0f} %"
        cells += [claim, "" if row["width"] is None else f"{row['width']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _row(cell: Cell, replications: int, seed: int) -> dict:
    # A cell's numbers do not depend on the other cells.
    rng, truth = np.random.default_rng([seed, zlib.crc32(repr(cell).encode())]), true_lam(cell)
    found, ess, unsupported = [], [], 0
    for _ in range(replications):
        reward, utility = draw(cell, rng, cell.P, cell.G, rng.normal(size=(cell.P, 1, 1)))
        try:
            solution = dual.solve(reward, utility, cell.b_J, cell.beta)
        except UserError:
            unsupported += 1
            continue
        interval = dual.lam_interval(reward, utility, cell.b_J, cell.beta, solution)
        ess.append(float(solution.ess.mean()) / cell.G)
        found.append((solution, interval, _uncorrected(reward, utility, cell, solution)))
    claims = [part for part in found if part[1].of_truth]
    row = {
        "kind": cell.kind,
        "P": cell.P,
        "G": cell.G,
        "b": list(cell.b_J),
        "beta": cell.beta,
        "ess": float(np.mean(ess)) if ess else None,
        "unsupported": unsupported,
        "claimed": len(claims) / max(1, len(found)),
        "coverage": None,
        "width": None,
        "at_same_G": None,
        "truth": float(truth[0]),
        "solved": float(np.mean([float(part[0].lam[0]) for part in found])) if found else None,
        "corrected": None,
    }
    if found:
        same_G = torch.stack([(low <= truth) & (truth <= high) for _, _, (low, high) in found])
        row["at_same_G"] = float(same_G.double().mean(0).min())
    if len(claims) >= max(1, 0.05 * len(found)):
        held = torch.stack([(x.low <= truth) & (truth <= x.high) for _, x, _ in claims]).double().mean(0)
        worst = int(held.argmin())
        row["coverage"] = float(held[worst])
        row["width"] = float(np.median([float(x.high[worst] - x.low[worst]) for _, x, _ in claims]))
        row["corrected"] = float(np.mean([float(x.lam[0]) for _, x, _ in claims]))
    return row


def draw(cell: Cell, rng: np.random.Generator, P: int, G: int, spread) -> tuple[np.ndarray, np.ndarray]:
    """Draws rewards [P, G] and utilities [P, G, J] of prompts with the standard normal `spread` [P, 1, 1]."""
    z = rng.normal(size=(P, G, 1 + len(cell.b_J))) @ np.linalg.cholesky(_covariance(len(cell.b_J))).T
    scores = KINDS[cell.kind](z, spread, rng)
    return scores[..., 0], scores[..., 1:]


def true_lam(cell: Cell) -> torch.Tensor:
    """Returns the multipliers of unlimited prompts and responses, float64 [J].

    Tilting a normal distribution by exp(s / beta) moves the mean of g by Cov(g, s) / beta, so that the dual
    of the kinds that are normal within prompts is a quadratic. Their spreads have the mean square 1.
    """
    b, J = np.asarray(cell.b_J), len(cell.b_J)
    if cell.kind in ("normal", "unequal prompts"):
        covariance = _covariance(J)
        lam, free = np.zeros(J), np.ones(J, bool)
        for _ in range(J):  # multipliers below 0 are let go one after another
            lam[free] = np.linalg.solve(
                covariance[1:, 1:][free][:, free], (cell.beta * b - covariance[0, 1:])[free]
            )
            lam[~free] = 0
            free &= lam >= 0
        return torch.from_numpy(lam.clip(min=0))
    P, G = 300, 6000
    spread = np.array([NormalDist().inv_cdf((p + 0.5) / P) for p in range(P)])[:, None, None]
    reward, utility = draw(cell, np.random.default_rng(1), P, G, spread)
    return dual.solve(reward, utility, cell.b_J, cell.beta).lam


def _covariance(J: int) -> np.ndarray:
    covariance = np.full((1 + J, 1 + J), BETWEEN) + (1 - BETWEEN) * np.eye(1 + J)
    covariance[0, 1:] = covariance[1:, 0] = CORRELATION
    return covariance


def _uncorrected(reward, utility, cell: Cell, solution: dual.Solution) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the bounds of the interval that leaves the bias of G responses in; multipliers at 0 are taken
    to be known."""
    u_PJ = dual.tilted_improvement(reward, utility, solution.lam, cell.beta)[1]
    free = solution.lam > 0
    inverse = torch.linalg.inv(solution.hessian[free][:, free])
    covariance = torch.cov(u_PJ[:, free].T).reshape(inverse.shape)
    reach = torch.zeros_like(solution.lam)
    se = (inverse @ covariance @ inverse / cell.P).diagonal().sqrt()
    reach[free] = t_quantile(0.975, cell.P - 1) * se
    return solution.lam - reach, solution.lam + reach


def warm_starts(seeds: range = range(40)) -> list[dict]:
    """Compares where policies end at the solved and at the corrected multipliers, in the exact world.

    24 prompts with 30 listed responses each, of which `G` are drawn; problems of `bench.theory.problem`, J
    constraints, and a class of policies that is `eps` away from the tilts. |E g - b| of a policy is exact.
    One dict a cell, with means over seeds and constraints, each for "solved" and "corrected":

    - tilt: of pi*(lambda). class: of the policy that fits the drawn responses best (regression on pairs).
    - short: how far the latter falls short of b on average; below 0 where it goes beyond.
    """
    found = []
    for eps, J, G in itertools.product((0.0, 0.3, 1.0), (1, 2), (4, 8, 32)):
        row = {"eps": eps, "J": J, "G": G}
        slacks: dict[tuple[str, str], list] = {}
        for seed in seeds:
            problem = make(seed, J=J, eps=eps, P=24, Y=30)
            world = ExactStages(problem, MocanConfig(beta=problem.beta), regression, draws=G, seed=seed)
            solution, scores = world.solve_dual(), world.scores
            u_PJ = dual.unbiased_improvement(scores.reward_PG, scores.utility_PGJ, solution.lam, problem.beta)
            slack_J = u_PJ.mean(0) - problem.b_J
            corrected = dual.step(solution.lam, slack_J, solution.hessian, max_change=math.inf)
            for name, lam in (("solved", solution.lam), ("corrected", corrected)):
                tilt_PY = (problem.reward_PY + problem.utility_PYJ @ lam).div(problem.beta).softmax(1)
                tilted_J = (tilt_PY[..., None] * problem.shifted_PYJ).sum(1).mean(0)
                target = Target(lam_J=lam, score=lagrangian(lam), coefficient=problem.beta)
                slacks.setdefault(("tilt", name), []).append(tilted_J)
                slacks.setdefault(("class", name), []).append(problem.slack_J(world.fit(target, 1)))
        for (where, name), values in slacks.items():
            row[f"{where}, {name}"] = float(torch.stack(values).abs().mean())
            if where == "class":
                row[f"short, {name}"] = -float(torch.stack(values).mean())
        found.append(row)
    return found
