"""What `python -m engine.dual SCORES --threshold B` does: multipliers, their uncertainty and the trade-off, from a file of scores.

SCORES is jsonl or parquet with one row per response: `prompt` (text or a whole number), `reward`, one column for each utility or cost,
and `response` where pairs are exported. All prompts have the same number of responses; their rows need not stand together.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import dual
from engine.dual.config import DualConfig
from engine.dual.scores_file import Table, listed
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Solutions along K thresholds, and the bootstrap's interval of lambda there (of one constraint only)."""

    x_K: np.ndarray  # the threshold of one constraint, or the common factor of several
    lam_KJ: np.ndarray
    gain_K: np.ndarray  # predicted improvement of the reward
    gain_se_K: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What is printed, drawn and written, in the units asked for."""

    file: str
    config: DualConfig
    table: Table
    units: list[float]  # of the reward and each utility, in the file's
    reward_PG: Tensor
    utility_PGJ: Tensor
    mean_J: Tensor
    b_J: Tensor  # required improvements
    solution: dual.Solution
    interval: dual.Interval
    bootstrap: tuple[Tensor, Tensor]  # low, high, each [J]
    lost: int  # bootstrap samples that do not support the thresholds
    gain_P: Tensor  # predicted improvement of the reward
    improvement_PJ: Tensor
    gain_at_zero: float  # the same at lambda 0
    at_zero_J: Tensor
    alone_J: Tensor  # largest improvements that are supported
    multiple: float  # of the required improvements, supported together
    warnings: list[str]

    @property
    def unit(self) -> str:
        return "units of the file" if self.config.raw else "within-prompt sd"

    @property
    def shift_J(self) -> Tensor:
        """From an improvement to a threshold."""
        return self.mean_J if self.config.absolute else torch.zeros_like(self.mean_J)


def analyse(file: str, table: Table, config: DualConfig) -> Analysis:
    """Solve the dual and measure its uncertainty.

    Raises: UserError for a constant column or thresholds that do not match the columns; dual.Infeasible.
    """
    J = len(table.names)
    if len(config.threshold) != J:
        raise UserError(
            f"--threshold {' '.join(map(str, config.threshold))}: {len(config.threshold)} value(s) for {J} constraint(s) "
            f"({listed(table.names)}); give one per constraint, or name the columns meant with --utility and --cost."
        )
    columns = {"reward": table.reward_PG, **dict(zip(table.names, table.utility_PGJ.unbind(2), strict=True))}
    deviations = [dual.within_deviation(column, f"{file}: column {name!r}") for name, column in columns.items()]
    units = [1.0] * (1 + J) if config.raw else deviations
    reward, utility = table.reward_PG / units[0], table.utility_PGJ / torch.tensor(units[1:], dtype=torch.float64)
    threshold, mean = torch.tensor(config.threshold, dtype=torch.float64), utility.mean((0, 1))
    problem = {"reward_PG": reward, "utility_PGJ": utility, "threshold_J": threshold, "beta": config.beta, "absolute": config.absolute}
    solution = dual.solve(**problem)
    draws = dual.bootstrap(**problem, draws=config.draws, seed=config.seed, start_J=solution.lam)
    gain_P, improvement_PJ = dual.tilted_improvement(reward, utility, solution.lam, config.beta)
    gain_at_zero, at_zero = dual.tilted_improvement(reward, utility, torch.zeros(J), config.beta)
    lost = int(draws[:, 0].isinf().sum())
    warnings = []
    if warning := dual.ess_warning(solution.ess, reward.shape[1]):
        warnings.append(warning + dual.half_sample(**problem, lam_J=solution.lam, seed=config.seed))
    if lost:
        warnings.append(f"{lost} of {config.draws} bootstrap samples do not support the thresholds; they count as infinite multipliers.")
    return Analysis(
        file=file, config=config, table=table, units=units, reward_PG=reward, utility_PGJ=utility, mean_J=mean,
        b_J=threshold - mean if config.absolute else threshold, solution=solution, interval=dual.lam_interval(**problem, solution=solution),
        bootstrap=dual.percentiles(draws), lost=lost, gain_P=gain_P, improvement_PJ=improvement_PJ,
        gain_at_zero=float(gain_at_zero.mean()), at_zero_J=at_zero.mean(0), alone_J=dual.largest_threshold(utility),
        multiple=dual.largest_multiple(utility, threshold, absolute=config.absolute), warnings=warnings,
    )  # fmt: skip


def as_dict(found: Analysis, curve: Curve) -> dict:
    """The content of dual.json; null stands for what is unbounded, lam_se null for a multiplier that the scores do not identify."""
    config, solution = found.config, found.solution
    se = dual.standard_error(found.improvement_PJ)
    constraints = [
        {
            "name": name, "negated": name in config.cost, "unit": found.units[1 + j], "threshold": config.threshold[j],
            "b": float(found.b_J[j]), "lam": float(solution.lam[j]), "lam_se": finite_or_none(found.interval.se[j]),
            "lam_delta": [finite_or_none(found.interval.low[j]), finite_or_none(found.interval.high[j])],
            "lam_bootstrap": [finite_or_none(bound[j]) for bound in found.bootstrap], "slack": float(solution.gradient[j]),
            "improvement": float(solution.predicted_improvement[j]), "improvement_se": float(se[j]),
            "improvement_at_zero": float(found.at_zero_J[j]), "largest_improvement": float(found.alone_J[j]),
        }
        for j, name in enumerate(found.table.names)
    ]  # fmt: skip
    P, G = found.reward_PG.shape
    return {
        "scores": found.file, "prompts": P, "responses": G, "beta": config.beta, "absolute": config.absolute, "raw": config.raw,
        "draws": config.draws, "seed": config.seed, "reward_unit": found.units[0], "constraints": constraints,
        "largest_multiple": finite_or_none(found.multiple), "reward_improvement": float(found.gain_P.mean()),
        "reward_improvement_se": float(dual.standard_error(found.gain_P)), "reward_improvement_at_zero": found.gain_at_zero,
        "ess": float(solution.ess.mean()), "value": solution.value, "kkt": solution.kkt, "unsupported_draws": found.lost,
        "warnings": found.warnings,
        "curve": {"x": curve.x_K.tolist(), "lam": curve.lam_KJ.tolist(), "reward_improvement": curve.gain_K.tolist()},
    }  # fmt: skip


def trace(found: Analysis, points: int = 61) -> Curve:
    """The dual's solutions as the thresholds rise: one constraint from its improvement at lambda 0 to near the largest supported one,
    several by a common factor from 0 on."""
    config, b = found.config, found.b_J
    J = len(b)
    if J == 1:
        low, own, top = min(float(found.at_zero_J), float(b)), float(b), float(found.alone_J)
    else:
        low, own, top = 0.0, 1.0, min(found.multiple, 3.0)
    x_K = np.unique([*np.linspace(low, max(low + 0.95 * (top - low), own), points), own])
    lam, lams, gains = None, [], []
    for x in x_K:
        try:
            lam = dual.solve(found.reward_PG, found.utility_PGJ, b * x if J > 1 else [x], config.beta, start_J=lam).lam
        except UserError:  # so near to the limit that lambda has no accurate value
            break
        lams.append(lam.numpy())
        gains.append(dual.tilted_improvement(found.reward_PG, found.utility_PGJ, lam, config.beta)[0])
    x_K = x_K[: len(lams)]
    return Curve(
        x_K=x_K + float(found.shift_J) if J == 1 else x_K,
        lam_KJ=np.stack(lams),
        gain_K=np.array([float(gain_P.mean()) for gain_P in gains]),
        gain_se_K=np.array([float(dual.standard_error(gain_P)) for gain_P in gains]),
        band=_band(found, x_K + float(found.shift_J), np.stack(lams).max()) if J == 1 else None,
    )


def _band(found: Analysis, x_K: np.ndarray, lam_max: float) -> tuple[np.ndarray, np.ndarray]:
    """The bootstrap's 95 % interval of one multiplier at all thresholds: a sample's improvement at lambda is a mean over its prompts, so
    a table of every prompt's improvement serves all samples, and lambda is read off backwards."""
    P = len(found.reward_PG)
    grid = np.linspace(0, 3 * max(lam_max, 1e-3), 150)
    level_P = found.utility_PGJ[..., 0].mean(1) if found.config.absolute else torch.zeros(P, dtype=torch.float64)
    table_LP = torch.stack(
        [
            dual.tilted_improvement(found.reward_PG, found.utility_PGJ, torch.tensor([lam]), found.config.beta)[1][:, 0] + level_P
            for lam in grid
        ]
    )
    generator = torch.Generator().manual_seed(found.config.seed)
    draws = []
    for _ in range(found.config.draws):
        reached_L = table_LP[:, torch.randint(P, (P,), generator=generator)].mean(1).numpy()
        draws.append(np.interp(x_K, reached_L, grid, left=0.0, right=math.inf))
    low, high = dual.percentiles(np.stack(draws))
    return low.numpy(), high.numpy()


def finite_or_none(value: Tensor | float) -> float | None:
    return float(value) if math.isfinite(value) else None
