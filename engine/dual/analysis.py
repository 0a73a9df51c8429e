"""Computes what `python -m engine.dual` shows: multipliers, their intervals,
and the trade-off by threshold."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import dual
from engine.dual.config import DualConfig
from engine.dual.scores_file import Table, joined
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Solutions along K thresholds."""

    x_K: np.ndarray  # the threshold of one constraint, or the common factor of several
    lam_KJ: np.ndarray
    gain_K: np.ndarray  # predicted improvement of the reward
    gain_se_K: np.ndarray
    # What the intervals of the true multipliers are about, and their bounds; NaN where the responses are too
    # few to say so.
    true_KJ: np.ndarray
    low_KJ: np.ndarray
    high_KJ: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Holds what is printed, drawn and written, in the units asked for."""

    file: str
    config: DualConfig
    table: Table
    units: list[float]  # one unit of the reward and of each utility, in the file's units
    reward_PG: Tensor
    utility_PGJ: Tensor
    mean_J: Tensor
    b_J: Tensor  # required improvements
    solution: dual.Solution
    interval: dual.Interval
    gain_P: Tensor  # predicted improvement of the reward
    improvement_PJ: Tensor  # predicted improvement of the utilities
    gain_at_zero: float  # mean of gain_P at lambda 0
    at_zero_J: Tensor  # mean of improvement_PJ at lambda 0
    alone_J: Tensor  # largest improvement that each constraint alone supports
    multiple: float  # largest multiple of the required improvements that is supported for all together
    warnings: list[str]

    @property
    def unit(self) -> str:
        """Names the unit of the numbers."""
        return "units of the file" if self.config.units == "raw" else "within-prompt sd"

    @property
    def shift_J(self) -> Tensor:
        """Returns what is to be added to an improvement to give a threshold as the user writes it."""
        return self.mean_J if self.config.absolute else torch.zeros_like(self.mean_J)


def analyse(file: str, table: Table, config: DualConfig) -> Analysis:
    """Solves the dual and measures its uncertainty.

    Raises: UserError for a constant column or thresholds that do not match the columns; dual.Infeasible.
    """
    J = len(table.names)
    if len(config.threshold) != J:
        values = " ".join(map(str, config.threshold))
        raise UserError(
            f"--threshold {values}: {len(config.threshold)} value(s) for {J} constraint(s) "
            f"({joined(table.names)}); give one per constraint, "
            "or name the columns meant with --utility and --cost."
        )
    columns = {"reward": table.reward_PG, **dict(zip(table.names, table.utility_PGJ.unbind(2), strict=True))}
    deviations = [dual.within_deviation(x_PG, f"{file}: column {name!r}") for name, x_PG in columns.items()]
    units = [1.0] * (1 + J) if config.units == "raw" else deviations
    reward, utility = (
        table.reward_PG / units[0],
        table.utility_PGJ / torch.tensor(units[1:], dtype=torch.float64),
    )
    threshold, mean = torch.tensor(config.threshold, dtype=torch.float64), utility.mean((0, 1))
    problem = {
        "reward_PG": reward,
        "utility_PGJ": utility,
        "threshold_J": threshold,
        "beta": config.beta,
        "absolute": config.absolute,
    }
    solution = dual.solve(**problem)
    gain_P, improvement_PJ = dual.tilted_improvement(reward, utility, solution.lam, config.beta)
    gain_at_zero_P, at_zero_PJ = dual.tilted_improvement(reward, utility, torch.zeros(J), config.beta)
    warning = dual.ess_warning(solution.ess, reward.shape[1])
    return Analysis(
        file=file,
        config=config,
        table=table,
        units=units,
        reward_PG=reward,
        utility_PGJ=utility,
        mean_J=mean,
        b_J=threshold - mean if config.absolute else threshold,
        solution=solution,
        interval=dual.lam_interval(**problem, solution=solution),
        gain_P=gain_P,
        improvement_PJ=improvement_PJ,
        gain_at_zero=float(gain_at_zero_P.mean()),
        at_zero_J=at_zero_PJ.mean(0),
        alone_J=dual.largest_threshold(utility),
        multiple=dual.largest_multiple(utility, threshold, absolute=config.absolute),
        warnings=[warning] if warning else [],
    )


def as_dict(analysis: Analysis, curve: Curve) -> dict:
    """Returns the content of dual.json.

    null stands for what is unbounded; lam_se is null for a multiplier that the scores do not identify. The
    intervals are about lam_corrected, which is lam itself where `intervals_of_true_lambda` is false.
    """
    config, solution, (P, G) = analysis.config, analysis.solution, analysis.reward_PG.shape
    return {
        "scores": analysis.file,
        "prompts": P,
        "responses": G,
        "beta": config.beta,
        "absolute": config.absolute,
        "units": config.units,
        "seed": config.seed,
        "reward_unit": analysis.units[0],
        "intervals_of_true_lambda": analysis.interval.of_truth,
        "constraints": [_constraint(analysis, j) for j in range(len(analysis.table.names))],
        "largest_multiple": finite_or_none(analysis.multiple),
        "reward_improvement": float(analysis.gain_P.mean()),
        "reward_improvement_se": float(dual.standard_error(analysis.gain_P)),
        "reward_improvement_at_zero": analysis.gain_at_zero,
        "ess": float(solution.ess.mean()),
        "value": solution.value,
        "kkt": solution.kkt,
        "warnings": analysis.warnings,
        "curve": {
            "x": curve.x_K.tolist(),
            "lam": curve.lam_KJ.tolist(),
            "reward_improvement": curve.gain_K.tolist(),
        },
    }


def _constraint(analysis: Analysis, j: int) -> dict:
    name, config, solution = analysis.table.names[j], analysis.config, analysis.solution
    interval = analysis.interval
    return {
        "name": name,
        "negated": name in config.cost,
        "unit": analysis.units[1 + j],
        "threshold": config.threshold[j],
        "b": float(analysis.b_J[j]),
        "lam": float(solution.lam[j]),
        "lam_corrected": float(interval.lam[j]),
        "lam_se": finite_or_none(interval.se[j]),
        "lam_interval": [finite_or_none(interval.low[j]), finite_or_none(interval.high[j])],
        "slack": float(solution.gradient[j]),
        "improvement": float(solution.predicted_improvement[j]),
        "improvement_se": float(dual.standard_error(analysis.improvement_PJ)[j]),
        "improvement_at_zero": float(analysis.at_zero_J[j]),
        "largest_improvement": float(analysis.alone_J[j]),
    }


def trace_curve(analysis: Analysis, points: int = 61) -> Curve:
    """Solves the dual along rising thresholds.

    The threshold of one constraint goes from its improvement at lambda 0 to near the largest that is
    supported. Those of several have a common factor, from 0 on.
    """
    config, b = analysis.config, analysis.b_J
    reward, utility, J = analysis.reward_PG, analysis.utility_PGJ, len(b)
    if J == 1:
        low, asked, top = min(float(analysis.at_zero_J), float(b)), float(b), float(analysis.alone_J)
    else:
        low, asked, top = 0.0, 1.0, min(analysis.multiple, 3.0)
    x_K = np.unique([*np.linspace(low, max(low + 0.95 * (top - low), asked), points), asked])
    lam, solved, gains = None, [], []
    for x in x_K:
        b_J = b * x if J > 1 else b.new_tensor([x])
        try:
            solution = dual.solve(reward, utility, b_J, config.beta, start_J=lam)
        except UserError:  # so near to the limit that lambda has no accurate value
            break
        lam, interval = solution.lam, dual.lam_interval(reward, utility, b_J, config.beta, solution)
        known = 1.0 if interval.of_truth else math.nan
        bounds = [known * part.numpy() for part in (interval.lam, interval.low, interval.high)]
        solved.append([lam.numpy(), *bounds])
        gains.append(dual.tilted_improvement(reward, utility, lam, config.beta)[0])
    lam_KJ, true_KJ, low_KJ, high_KJ = np.stack(solved, axis=1)
    x_K = x_K[: len(lam_KJ)]
    return Curve(
        x_K=x_K + float(analysis.shift_J) if J == 1 else x_K,
        lam_KJ=lam_KJ,
        gain_K=np.array([float(gain_P.mean()) for gain_P in gains]),
        gain_se_K=np.array([float(dual.standard_error(gain_P)) for gain_P in gains]),
        true_KJ=true_KJ,
        low_KJ=low_KJ,
        high_KJ=high_KJ,
    )


def finite_or_none(value: Tensor | float) -> float | None:
    """Converts a number for JSON, which has no infinity."""
    return float(value) if math.isfinite(value) else None
