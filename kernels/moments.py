"""Value, gradient and Hessian of the dual function from sampled scores. Plain torch serves every device: the arrays are small."""

import torch
from torch import Tensor

from kernels.checks import check_dual, check_dual_values
from kernels.loss_head.rows import DualMoments, tilted_moments


@torch.library.custom_op("dualign::dual_moments", mutates_args=(), device_types=("cpu", "cuda"))
def dual_moments_op(
    reward_PG: Tensor, utility_PGJ: Tensor, lam_J: Tensor, beta: float, utility_mean: Tensor | None, threshold: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dual_moments`."""
    check_dual_values(reward_PG, utility_PGJ, lam_J, utility_mean, threshold)
    return tuple(tilted_moments(reward_PG, utility_PGJ, lam_J, beta, utility_mean, threshold))


@dual_moments_op.register_fake
def _(reward_PG, utility_PGJ, lam_J, beta, utility_mean, threshold):
    j = lam_J.shape[0]
    shapes = (), (j,), (j, j), (reward_PG.shape[0],)
    return tuple(reward_PG.new_empty(shape, dtype=torch.float64) for shape in shapes)


@torch.no_grad()
def dual_moments(
    reward_PG: Tensor,
    utility_PGJ: Tensor,
    lam_J: Tensor,
    beta: float,
    *,
    utility_mean: Tensor | float | None = None,
    threshold: Tensor | float | None = None,
) -> DualMoments:
    """Moments of the tilted responses at lambda: the dual's value, gradient and Hessian (arXiv 2405.19544, Algorithm 1, step 2).

    reward_PG [P, G], utility_PGJ [P, G, J], lam_J [J], any float dtype; beta > 0. utility_mean [J] or a number is subtracted from the
    utility (default: its mean over P and G), and threshold [J] or a number (default 0).

    Returns float64 tensors without gradients: `.value`, `.gradient` [J] (above 0 means slack), `.hessian` [J, J], `.ess` [P] (effective
    number of responses). Raises ValueError for arguments that cannot be used.
    """
    levels = check_dual(reward_PG, utility_PGJ, lam_J, beta, utility_mean, threshold)
    return DualMoments(*dual_moments_op(reward_PG, utility_PGJ, lam_J, float(beta), *levels))


__all__ = ["DualMoments", "dual_moments"]
