"""Value, gradient and Hessian of the dual function from sampled scores.

Plain torch serves every device, because the arrays are small.
"""

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import FLOATS, check_finite, check_positive, check_tensor


class DualMoments(NamedTuple):
    """Result of `dual_moments`, float64, without gradients."""

    value: Tensor  # scalar
    gradient: Tensor  # [J], above 0 means slack
    hessian: Tensor  # [J, J]
    ess: Tensor  # [P], effective number of responses


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
    """Returns moments of the responses tilted at lambda: the dual's value, gradient and Hessian.

    This is step 2 of Algorithm 1 in arXiv 2405.19544. With g' = g - utility_mean - threshold and the weights
    w = softmax_i((r + lam . g') / beta) of a prompt's responses:

        value    = (beta / P) sum_p [logsumexp_i((r + lam . g') / beta) - ln G]
        gradient = mean_p E_w[g']
        hessian  = mean_p Cov_w[g'] / beta
        ess      = 1 / sum_i w_i^2

    - reward_PG [P, G], utility_PGJ [P, G, J], lam_J [J]: any float dtype; beta > 0.
    - utility_mean [J] or a number is subtracted from the utility (default: its mean over P and G), and so is
      threshold [J] or a number (default 0).

    Returns float64 tensors without gradients: `.value`, `.gradient` [J] (above 0 means slack),
    `.hessian` [J, J], `.ess` [P] (effective number of responses). Raises ValueError for
    arguments that cannot be used.
    """
    levels = _check(reward_PG, utility_PGJ, lam_J, beta, utility_mean, threshold)
    return DualMoments(*dual_moments_op(reward_PG, utility_PGJ, lam_J, float(beta), *levels))


@torch.library.custom_op("dualign::dual_moments", mutates_args=(), device_types=("cpu", "cuda"))
def dual_moments_op(
    reward_PG: Tensor,
    utility_PGJ: Tensor,
    lam_J: Tensor,
    beta: float,
    utility_mean: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `dual_moments` from arguments of which all but the values are checked."""
    values = {"reward_PG": reward_PG, "utility_PGJ": utility_PGJ, "lam_J": lam_J}
    values |= {"utility_mean": utility_mean, "threshold": threshold}
    for name, value in values.items():
        if value is not None:
            check_finite(name, value, False)
    prompts, responses = reward_PG.shape

    def here(value: Tensor) -> Tensor:
        return value.to(reward_PG.device, torch.float64, non_blocking=True)

    reward, utility, lam = reward_PG.double(), utility_PGJ.double(), here(lam_J)
    utility = utility - (utility.mean((0, 1)) if utility_mean is None else here(utility_mean))
    if threshold is not None:
        utility = utility - here(threshold)
    tilted = (reward + utility @ lam) / beta
    value = beta * (tilted.logsumexp(1).mean() - torch.tensor(responses, dtype=torch.float64).log())
    w = tilted.softmax(1)
    mean_PJ = torch.einsum("pg,pgj->pj", w, utility)
    spread = utility - mean_PJ[:, None]
    hessian = torch.einsum("pgj,pgk->jk", spread * w[..., None], spread) / (prompts * beta)
    return value, mean_PJ.mean(0), hessian, 1 / w.square().sum(1)


@dual_moments_op.register_fake
def _(reward_PG, utility_PGJ, lam_J, beta, utility_mean, threshold):
    j = lam_J.shape[0]
    shapes = (), (j,), (j, j), (reward_PG.shape[0],)
    return tuple(reward_PG.new_empty(shape, dtype=torch.float64) for shape in shapes)


def _check(
    reward_PG: Tensor,
    utility_PGJ: Tensor,
    lam_J: Tensor,
    beta: float,
    utility_mean: Tensor | float | None,
    threshold: Tensor | float | None,
) -> list[Tensor | None]:
    """Checks all but the values of tensors; returns utility_mean and threshold as tensors."""
    check_tensor("reward_PG", reward_PG, (None, None), FLOATS, None)
    prompts, responses = reward_PG.shape
    if prompts == 0 or responses == 0:
        shape = list(reward_PG.shape)
        raise ValueError(f"reward_PG has shape {shape}: expected at least one prompt and one response")
    places = (reward_PG.device, torch.device("cpu"))
    check_tensor("utility_PGJ", utility_PGJ, (prompts, responses, None), FLOATS, (reward_PG.device,))
    constraints = utility_PGJ.shape[2]
    check_tensor("lam_J", lam_J, (constraints,), FLOATS, places)
    check_positive("beta", beta)
    levels = []
    for name, value in (("utility_mean", utility_mean), ("threshold", threshold)):
        if value is not None:
            if not isinstance(value, (Tensor, Real)) or isinstance(value, bool):
                raise ValueError(f"{name} = {value!r}: expected a number or a tensor [{constraints}]")
            value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
            check_tensor(name, value, (constraints,) if value.dim() else (), FLOATS, places)
        levels.append(value)
    return levels
