"""The dual's input: checked, and scaled so that the solver has one scale."""

import math

import torch
from torch import Tensor

from engine.errors import UserError
from engine.intervals import float64


def check_problem(
    reward_PG, utility_PGJ, threshold_J, beta: float, lam_max: float, force: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the arguments of `solve` and returns reward, utility and threshold as float64.

    Raises: UserError naming the argument and the value that cannot be used.
    """
    reward, utility = as_float64("reward", reward_PG), as_float64("utility", utility_PGJ)
    threshold = as_float64("threshold", threshold_J).reshape(-1)
    if reward.ndim != 2 or utility.ndim != 3 or utility.shape[:2] != reward.shape or utility.numel() == 0:
        shapes = f"reward {list(reward.shape)}, utility {list(utility.shape)}"
        raise UserError(f"{shapes}: give [P, G] and [P, G, J], none of them 0.")
    if len(threshold) != utility.shape[2]:
        raise UserError(
            f"{len(threshold)} threshold(s) for {utility.shape[2]} utilities: give one per utility."
        )
    for name, values in {"reward": reward, "utility": utility, "threshold": threshold}.items():
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            raise UserError(
                f"{name}{list(index)} is {values[index].item()}: it must be finite; "
                f"drop or repair {len(bad)} such value(s)."
            )
    if not (_is_above_0(beta) and math.isfinite(beta)):
        raise UserError(f"beta {beta}: must be above 0 and finite.")
    if not _is_above_0(lam_max):
        raise UserError(f"lam_max {lam_max}: must be above 0.")
    if force and not math.isfinite(lam_max):
        raise UserError(
            f"force with lam_max {lam_max}: give a finite lam_max, where unsupported multipliers end."
        )
    spread = (utility.amax(1) - utility.amin(1)).amax(0)
    for j in (spread <= 1e-12 * utility.abs().amax((0, 1))).nonzero()[:, 0].tolist():
        raise UserError(
            f"utility {j} (counting from 0) is the same for all responses of every prompt: "
            "sample more responses or drop it."
        )
    return reward, utility, threshold


def as_float64(name: str, values) -> Tensor:
    """Converts an argument; `name` is what messages call it. Raises: UserError where it is not numbers."""
    try:
        return float64(values)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"{name} is {str(values)[:60]!r}: give numbers, in lists of equal length, "
            "a numpy array or a tensor."
        ) from None


def _is_above_0(value) -> bool:
    try:
        return bool(value > 0)
    except (TypeError, ValueError, RuntimeError):
        return False


def within_std(utility_PGJ: Tensor) -> Tensor:
    """Computes the pooled within-prompt standard deviation (ddof 0) of each utility, [J]."""
    return utility_PGJ.var(1, correction=0).mean(0).sqrt()


def dimensionless(reward: Tensor, utility: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centres and scale the scores.

    Returns (r, g, scale), with r in units of beta and g in standard deviations. Constants of a prompt cancel
    in the dual, so both are centred within prompts. `scale` [J] are the standard deviations. The solver's
    unknown is x = lambda * scale / beta.
    """
    scale = within_std(utility)
    r = (reward - reward.mean(1, keepdim=True)) / beta
    return r, (utility - utility.mean(1, keepdim=True)) / scale, scale


def dimensionless_start(lam_J, x_per_lam: Tensor) -> Tensor:
    """Turns a guess of lambda (None: 0) into the solver's x.

    Raises: UserError for a wrong number of values.
    """
    if lam_J is None:
        return torch.zeros_like(x_per_lam)
    lam = as_float64("start_J", lam_J).reshape(-1)
    if lam.shape != x_per_lam.shape or not lam.isfinite().all():
        raise UserError(f"start_J {lam.tolist()}: give {len(x_per_lam)} finite number(s), a guess of lambda.")
    return (lam * x_per_lam).clamp(min=0)


def solve_psd(matrix: Tensor, right: Tensor) -> Tensor:
    """Computes matrix^-1 right (a vector or a matrix) for a positive semi-definite matrix.

    Eigenvalues below 1e-12 of the largest are raised to that.
    """
    eigenvalue, basis = torch.linalg.eigh(matrix)
    smallest = (1e-12 * eigenvalue.max()).clamp(min=1e-100) if len(right) else 0.0
    eigenvalue = eigenvalue.clamp(min=smallest)
    return basis @ ((basis.T @ right) / (eigenvalue if right.ndim == 1 else eigenvalue[:, None]))


def in_brackets(values: Tensor) -> str:
    """Writes a vector for a message: [0.3, 1.25]."""
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"
