"""How certain the multipliers are: intervals, the bootstrap, and warnings."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.dual.problem import (
    check_problem,
    dimensionless,
    dimensionless_start,
    in_brackets,
    solve_psd,
    within_std,
)
from engine.dual.solver import ACCEPTED, Solution, descend, single_direction, solve, tilted_improvement
from engine.errors import UserError
from engine.intervals import float64, t_quantile


@dataclass(frozen=True)
class Interval:
    """A two-sided interval for each multiplier, float64 [J]."""

    low: Tensor
    high: Tensor
    se: Tensor  # standard error


def range_text(low: Tensor, high: Tensor) -> str:
    """Prints the range of one multiplier."""
    return f"[{float(low):.3f}, {'unbounded' if high.isinf() else f'{float(high):.3f}'}]"


def lam_interval(
    reward_PG,
    utility_PGJ,
    threshold_J,
    beta: float,
    solution: Solution,
    *,
    absolute: bool = False,
    level: float = 0.95,
) -> Interval:
    """Computes intervals of `solve`'s multipliers by the delta method, clustered by prompt.

    lambda solves mean_p u_p(lambda) = 0 on the constraints above 0, with prompt p's part of the gradient

        u_p = sum_i w_pi g_pi - mean_i g_pi - b,    or sum_i w_pi g_pi - level with `absolute`

    The mean that an improvement is measured from comes from the same samples, and as all prompts have G
    responses it is a mean over prompts as well. So Var(lambda) = H^-1 Cov_p(u_p) / P H^-1 with the dual's
    Hessian H. Quantiles are Student's with P - 1 degrees of freedom. Not in the interval: the bias of G
    responses (see `ess_warning`), and that units were estimated.

    A constraint at 0 with room is treated as if it alone were let go below 0: its Newton step ends at a value
    below 0 with a standard error, and the interval is [0, max(0, value + t se)]. It is [0, 0] where the room
    is clear, and passes continuously into that of an active constraint.

    Where H is singular over the constraints without clear room, as for two equal utilities,
    only some sums of multipliers are determined. A multiplier that is not has the standard error inf
    and the interval [0, inf], "not identified".

    Raises: UserError for fewer than 2 prompts, for a solution of other scores, and for one held by lam_max.
    """
    reward, utility, threshold = check_problem(reward_PG, utility_PGJ, threshold_J, beta, math.inf, False)
    P, lam, gradient = len(reward), solution.lam, solution.gradient
    if P < 2:
        raise UserError(f"{P} prompt(s): an interval over prompts needs at least 2.")
    scale = within_std(utility)
    u_PJ = (
        tilted_improvement(reward, utility, lam, beta)[1] - threshold + (utility.mean(1) if absolute else 0.0)
    )
    if ((u_PJ.mean(0) - gradient).abs() > 1e-6 * scale).any():
        raise UserError(
            f"lambda {in_brackets(lam)}: solved from other scores, thresholds or beta than these; "
            "give the same to both."
        )
    if ((lam > 0) & (gradient < -1e-6 * scale)).any():
        raise UserError(
            f"lambda {in_brackets(lam)}: stopped by lam_max, where it has no interval; raise lam_max."
        )
    covariance = torch.cov(u_PJ.T).reshape(len(lam), len(lam)) / P
    centre, se = torch.zeros_like(lam), torch.zeros_like(lam)
    for j in range(len(lam)):
        if not _identified(solution.hessian, scale, (lam > 0) | (gradient <= 1e-6 * scale), j):
            se[j] = math.inf
            continue
        free = lam > 0
        free[j] = True
        unit = torch.eye(len(lam), dtype=torch.float64)[j, free]
        row = solve_psd(solution.hessian[free][:, free], unit)
        centre[j] = lam[j] - row @ gradient[free]
        se[j] = (row @ covariance[free][:, free] @ row).clamp(min=0).sqrt()
    reach = t_quantile((1 + level) / 2, P - 1) * se
    low, high = torch.where(lam > 0, centre - reach, 0.0), centre + reach
    return Interval(low=low.clamp(min=0), high=high.clamp(min=0), se=se)


def _identified(hessian: Tensor, scale: Tensor, active: Tensor, j: int) -> bool:
    """Tells whether the Hessian over the `active` constraints and j determines multiplier j.

    It does where every change of multiplier j changes the gradient.
    """
    chosen = active.clone()
    chosen[j] = True
    eigenvalue, basis = torch.linalg.eigh((hessian / scale[:, None] / scale)[chosen][:, chosen])
    flat = eigenvalue <= 1e-9 * eigenvalue[-1]
    return float(basis[int(chosen[:j].sum()), flat].square().sum()) < 1e-9


def bootstrap(
    reward_PG,
    utility_PGJ,
    threshold_J,
    beta: float,
    *,
    absolute: bool = False,
    draws: int = 400,
    seed: int = 0,
    start_J=None,
) -> Tensor:
    """Solves the dual for `draws` samples of P prompts, drawn with replacement.

    Returns the multipliers, float64 [draws, J]. A prompt is drawn with all its responses. Each solve starts
    at `start_J`, such as the solution's lambda. The row of a draw is inf where its thresholds are not
    supported, or only just, so that lambda has no accurate value.

    Raises: UserError as `solve`.
    """
    reward, utility, threshold = check_problem(reward_PG, utility_PGJ, threshold_J, beta, math.inf, False)
    r, g, scale = dimensionless(reward, utility, beta)
    level_PJ = utility.mean(1)
    start, unbounded = dimensionless_start(start_J, scale / beta), torch.full_like(scale, math.inf)
    generator = torch.Generator().manual_seed(seed)
    lam = torch.full((draws, len(scale)), math.inf, dtype=torch.float64)
    for d in range(draws):
        rows = torch.randint(len(r), (len(r),), generator=generator)
        b = (threshold - level_PJ[rows].mean(0) if absolute else threshold) / scale
        if single_direction(g[rows], b) is None:
            descent = descend(r[rows], g[rows], b, unbounded, start, certify=True)
            if descent.unsupported is None and descent.kkt <= ACCEPTED:
                lam[d] = descent.x * beta / scale
    return lam


def percentiles(draws, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Returns (low, high), the bounds of the central `level` of draws along the first dimension.

    They are draws themselves, not interpolated but rounded outward; inf counts as the largest value.
    """
    ordered = float64(draws).sort(dim=0).values
    cut = math.floor((1 - level) / 2 * (len(ordered) - 1) + 1e-9)
    return ordered[cut], ordered[len(ordered) - 1 - cut]


def ess_warning(ess_P: Tensor, G: int) -> str | None:
    """Warns in one line where the mean effective number of responses is below G / 4.

    lambda is over-estimated then. In one case 8 responses a prompt, of an effective size of 1.4, gave lambda
    0.39, and 4 of them 0.57. `half_sample` estimates by how much. Returns None where no warning is due.
    """
    ess = float(float64(ess_P).mean())
    if ess >= G / 4:
        return None
    return (
        f"The tilted weights rest on {ess:.1f} of {G} responses per prompt, so lambda is over-estimated: "
        "raise beta or sample more."
    )


def half_sample(
    reward_PG, utility_PGJ, threshold_J, beta: float, lam_J: Tensor, *, absolute: bool = False, seed: int = 0
) -> str:
    """Says what a random half of each prompt's responses gives, as a sentence that
    goes on from `ess_warning`.

    lam_J: `solve`'s multipliers from all responses. A bias in 1 / G, as that of self-normalised weights,
    doubles with half of the responses, so the difference of the two multipliers estimates it. Returns "" for
    fewer than 4 responses.
    """
    reward, utility = float64(reward_PG), float64(utility_PGJ)
    P, G = reward.shape
    if G < 4:
        return ""
    half = torch.rand(P, G, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)[:, : G // 2]
    try:
        half_reward, half_utility = reward.gather(1, half), utility.take_along_dim(half[..., None], 1)
        lam = solve(half_reward, half_utility, threshold_J, beta, absolute=absolute).lam
    except UserError:
        return " A random half of the responses does not support the thresholds at all."
    values, excess = (", ".join(f"{x:.3f}" for x in v.tolist()) for v in (lam, (lam - lam_J).clamp(min=0)))
    return (
        f" A random half of the responses gives lambda {values}: "
        f"if the excess falls as 1 / responses, it is now about {excess}."
    )
