"""The Lagrange dual of constrained alignment: solve it from reference samples, descend it from measured slack.

Distribution-space dual (arXiv 2405.19544, and 2505.19387 section 2), g the utilities, h = g - mean(g) - b:

    D(lambda) = beta E_x ln E_{y ~ reference} exp((r + lambda . h) / beta),    grad D = E h under the tilted policy

Its minimiser over lambda >= 0 needs samples of the reference only. A positive gradient is slack: that constraint holds with room.

    solve(reward_PG, utility_PGJ, [0.3], beta=1.0).lam
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import UserError
from kernels import dual_moments

TOLERANCE = 1e-10  # KKT residual, in standard deviations of the utility


class Infeasible(UserError):
    """No finite multipliers exist: no re-weighting of the given responses meets the thresholds.

    Attributes, in the utilities' units:
    - largest_improvement: float64 [J], the best response of every prompt, averaged, minus the mean: each constraint alone.
    - direction: float64 [J], v >= 0 with sum 1 and mean_p max_i v . (g_pi - mean) < v . b, which certifies the claim.
    - largest_multiple: float, thresholds up to this multiple of b are supported together, to 0.1 %.
    """

    def __init__(self, message: str, largest_improvement: Tensor, direction: Tensor, largest_multiple: float):
        super().__init__(message)
        self.largest_improvement = largest_improvement
        self.direction = direction
        self.largest_multiple = largest_multiple


@dataclass(frozen=True)
class Solution:
    """The minimiser of the plug-in dual and what was measured there, in the caller's units, float64."""

    lam: Tensor  # [J]
    value: float  # D(lam)
    gradient: Tensor  # [J]: predicted slack, 0 where lam is between its bounds
    hessian: Tensor  # [J, J]: mean tilted covariance / beta
    kkt: float  # largest violation of the optimality conditions, in standard deviations of the utility
    ess: Tensor  # [P]: effective number of responses under the tilted weights
    iterations: int
    predicted_improvement: Tensor  # [J]: tilted mean - mean


def solve(
    reward_PG,
    utility_PGJ,
    threshold_J,
    beta: float,
    *,
    absolute: bool = False,
    enumerated: bool = False,
    lam_max: float = math.inf,
    force: bool = False,
) -> Solution:
    """Minimise the plug-in dual over 0 <= lambda <= lam_max (arXiv 2405.19544, appendix E, and its Hessian).

    reward [P, G], utility [P, G, J], threshold [J] (or a number): numpy, torch or lists, any float type. The threshold is the
    required improvement over the mean of the utility, or a level with `absolute`. `enumerated` says that the G responses are all
    there are, equally likely, so that infeasibility is proven. `force` goes on with unsupported thresholds; it needs a finite lam_max,
    where such multipliers end.

    A constant added to one prompt's reward or utility changes neither the multipliers nor the policies.

    Raises: Infeasible; UserError for shapes, values that are not finite, beta <= 0, a utility that never varies within a prompt.
    """
    reward, utility, threshold = _check(reward_PG, utility_PGJ, threshold_J, beta, lam_max, force)
    mean = utility.mean((0, 1))
    if absolute:
        threshold = threshold - mean
    scale = _within_std(utility)

    # Per-prompt constants cancel, so both are centred and then made dimensionless: the solver below has one scale.
    r = (reward - reward.mean(1, keepdim=True)) / beta
    g = (utility - utility.mean(1, keepdim=True)) / scale
    b = threshold / scale
    unsupported = None if force else _single_direction(g, b)
    if unsupported is None:
        x, moments, kkt, iterations, unsupported = _newton(r, g, b, lam_max * scale / beta, certify=not force)
    if unsupported is not None:
        raise _infeasible(g, b, unsupported, scale, mean if absolute else None, enumerated)
    if kkt > 100 * TOLERANCE:
        raise ArithmeticError(
            f"the dual solver stopped at KKT residual {kkt:.2g} after {iterations} iterations; raise beta {beta} or lower the threshold."
        )

    gradient = moments.gradient * scale
    return Solution(
        lam=(x * beta / scale).clamp(max=lam_max),
        value=float(moments.value * beta + reward.mean()),
        gradient=gradient,
        hessian=moments.hessian * scale[:, None] * scale / beta,
        kkt=kkt,
        ess=moments.ess,
        iterations=iterations,
        predicted_improvement=gradient + threshold,
    )


def largest_threshold(utility_PGJ) -> Tensor:
    """Largest improvement each constraint alone supports: mean over prompts of the best response, minus the mean. float64 [J]."""
    utility = _float64(utility_PGJ)
    return utility.amax(1).mean(0) - utility.mean((0, 1))


def step(
    lam_J: Tensor,
    slack_J: Tensor,
    eta: float | Tensor,
    *,
    max_change: float = 2.0,
    lam_max: float = math.inf,
    floor: float = 0.05,
) -> Tensor:
    """One projected dual descent step, lambda <- [lambda - eta * slack]_+ (arXiv 2505.19387, Algorithm 2). float64 [J].

    slack = measured improvement - threshold. `eta` is a number, or the Hessian [J, J] of the dual: then its inverse is the step, over the
    constraints that are not at 0 with room (inverting over all of them would let an inactive constraint move the others).
    Each multiplier changes at most by the factor max_change, so that a policy not yet trained out does not wind it up. At or below
    `floor` it may fall to 0 or rise to floor * max_change.

    Raises: UserError if slack or multipliers are not finite.
    """
    lam, slack = _float64(lam_J), _float64(slack_J)
    eta = _float64(eta)
    if not (lam.isfinite().all() and slack.isfinite().all() and eta.isfinite().all()):
        raise UserError(f"dual step: lambda {lam.tolist()}, slack {slack.tolist()}, step {eta.tolist()} must be finite.")
    if eta.ndim == 0:
        change = -eta * slack
    else:
        change = torch.zeros_like(lam)
        free = ~((lam <= 0) & (slack > 0))
        change[free] = -_solve_psd(eta[free][:, free], slack[free])
    lower = torch.where(lam > floor, lam / max_change, 0.0)
    upper = lam.clamp(min=floor) * max_change
    return (lam + change).clamp(min=lower, max=upper).clamp(0.0, lam_max)


def standard_error(values_P) -> Tensor:
    """Standard error of the mean of independent per-prompt values [P, ...]: std(ddof=1) / sqrt(P). Raises: UserError below 2 prompts."""
    values = _float64(values_P)
    if len(values) < 2:
        raise UserError(f"{len(values)} prompt(s): a standard error needs at least 2.")
    return values.std(0) / math.sqrt(len(values))


def paired_improvement(policy_PG, reference_PG) -> tuple[Tensor, Tensor]:
    """Mean improvement over the reference and its standard error, clustered by prompt: responses of one prompt are not independent.

    policy [P, G1] and reference [P, G2], or [P, G1, J] and [P, G2, J]: the same prompts, any numbers of responses. float64 [] or [J].

    Raises: UserError if the prompts differ in number or are fewer than 2.
    """
    policy, reference = _float64(policy_PG), _float64(reference_PG)
    if len(policy) != len(reference):
        raise UserError(f"{len(policy)} policy prompts, {len(reference)} reference prompts: score both on the same prompts.")
    difference_P = policy.mean(1) - reference.mean(1)
    return difference_P.mean(0), standard_error(difference_P)


def predicted_se(utility_PG, n_prompts: int, n_responses: int) -> float:
    """Standard error that `paired_improvement` will have on n_prompts with n_responses of each policy, from reference samples alone:

        sqrt(2 * pooled within-prompt variance / n_responses / n_prompts)

    The spread of the effect between prompts is not in it, nor a change of variance by training.

    Raises: UserError below 2 responses per prompt.
    """
    utility = _float64(utility_PG)
    if utility.shape[1] < 2:
        raise UserError(f"{utility.shape[1]} response(s) per prompt: a within-prompt variance needs at least 2.")
    return math.sqrt(2 * float(utility.var(1).mean()) / n_responses / n_prompts)


def ess_warning(ess_P: Tensor, G: int) -> str | None:
    """One line if the mean effective number of responses is below G / 4, where lambda depends on G; else None."""
    ess = float(_float64(ess_P).mean())
    if ess >= G / 4:
        return None
    return f"The tilted weights rest on {ess:.1f} of {G} responses per prompt, so lambda depends on {G}: raise beta or sample more."


def _float64(values) -> Tensor:
    return torch.as_tensor(values).detach().to("cpu", torch.float64)


def _check(reward_PG, utility_PGJ, threshold_J, beta: float, lam_max: float, force: bool) -> tuple[Tensor, Tensor, Tensor]:
    reward, utility, threshold = _float64(reward_PG), _float64(utility_PGJ), _float64(threshold_J).reshape(-1)
    if reward.ndim != 2 or utility.ndim != 3 or utility.shape[:2] != reward.shape or utility.numel() == 0:
        raise UserError(f"reward {list(reward.shape)}, utility {list(utility.shape)}: give [P, G] and [P, G, J], none of them 0.")
    if len(threshold) != utility.shape[2]:
        raise UserError(f"{len(threshold)} threshold(s) for {utility.shape[2]} utilities: give one per utility.")
    for name, values in {"reward": reward, "utility": utility, "threshold": threshold}.items():
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            raise UserError(f"{name}{list(index)} is {values[index].item()}: it must be finite; drop or repair {len(bad)} such value(s).")
    if not (beta > 0 and math.isfinite(beta)):
        raise UserError(f"beta {beta}: must be above 0 and finite.")
    if not lam_max > 0:
        raise UserError(f"lam_max {lam_max}: must be above 0.")
    if force and not math.isfinite(lam_max):
        raise UserError(f"force with lam_max {lam_max}: give a finite lam_max, where unsupported multipliers end.")
    spread = (utility.amax(1) - utility.amin(1)).amax(0)
    for j in (spread <= 1e-12 * utility.abs().amax((0, 1))).nonzero()[:, 0].tolist():
        raise UserError(f"utility {j} (counting from 0) is the same for all responses of every prompt: sample more responses or drop it.")
    return reward, utility, threshold


def _within_std(utility_PGJ: Tensor) -> Tensor:
    """Pooled within-prompt standard deviation of each utility, [J]."""
    return utility_PGJ.var(1, correction=0).mean(0).sqrt()


def _solve_psd(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix^-1 vector for a positive semi-definite matrix whose smallest eigenvalues are raised to 1e-12 of the largest."""
    eigenvalue, basis = torch.linalg.eigh(matrix)
    smallest = (1e-12 * eigenvalue.max()).clamp(min=1e-100) if len(vector) else 0.0
    return basis @ ((basis.T @ vector) / eigenvalue.clamp(min=smallest))


def _support(g_PGJ: Tensor, direction_J: Tensor) -> float:
    """mean_p max_i v . g_pi: the largest improvement of v . g that any re-weighting of the responses reaches (g centred)."""
    return float((g_PGJ @ direction_J).amax(1).mean())


def _single_direction(g_PGJ: Tensor, b_J: Tensor) -> Tensor | None:
    """The unit vector of a constraint that cannot be met alone, or None. At the limit itself lambda is infinite: refused too."""
    room = g_PGJ.amax(1).mean(0) - b_J
    if room.min() > TOLERANCE:
        return None
    return torch.eye(len(b_J), dtype=torch.float64)[room.argmin()]


def _newton(r, g, b, cap, *, certify: bool):
    """Projected Newton with an active set and Armijo backtracking (Bertsekas 1982) on 0 <= x <= cap, from x = 0.

    If the thresholds cannot be met together the dual is unbounded below and the iterates go to infinity; since
    D(x) >= mean_p max_i x . h + mean_p min_i r - ln G, their own direction certifies it after finitely many steps. Where it
    converges, the tilted policy itself meets the thresholds. So the path decides feasibility exactly and needs no linear program.

    Returns: x, moments, KKT residual, iterations, certified direction or None.
    """
    zero = torch.zeros_like(b)

    def moments_at(x):
        return dual_moments(r, g, x, 1.0, utility_mean=zero, threshold=b)

    noise = 1e-14 * (1 + float(r.abs().max()))  # below this, differences of the value are rounding
    x = zero
    moments = moments_at(x)
    for iteration in range(500):
        gradient = moments.gradient
        # x - clip(x - gradient) is the size of the projected gradient; the sharper residual counts |gradient| off the bounds.
        residual = torch.where(x <= 0, -gradient, torch.where(x >= cap, gradient, gradient.abs())).clamp(min=0).max().item()
        if residual <= TOLERANCE:
            break
        if certify and x.max() > 0:
            direction = x / x.sum()
            if _support(g, direction) - float(direction @ b) < -1e-12:
                return x, moments, residual, iteration, direction
        near = min(1e-3, float((x - (x - gradient).clamp(min=0).minimum(cap)).abs().max()))
        to_zero, to_cap = (x <= near) & (gradient > 0), (x >= cap - near) & (gradient < 0)
        free = ~(to_zero | to_cap)
        change = torch.where(to_zero, -x, torch.where(to_cap, cap - x, 0.0))
        change[free] = -_solve_psd(moments.hessian[free][:, free], gradient[free])
        change *= min(1.0, 10 * max(1.0, float(x.max())) / max(float(change.abs().max()), 1e-300))
        slope = float(gradient @ change)
        for halving in range(60):
            t = 0.5**halving
            trial = (x + t * change).clamp(min=0).minimum(cap)
            trial_moments = moments_at(trial)
            if trial_moments.value <= moments.value + 1e-4 * t * slope + noise:
                break
        else:
            break
        x, moments = trial, trial_moments
    return x, moments, residual, iteration, None


def _infeasible(g, b, direction, scale, mean, enumerated: bool) -> Infeasible:
    """The error with its certificate, in the caller's units (g, b, direction are in standard deviations)."""
    multiple = _support(g, direction) / float(direction @ b)
    # Each round either finds the next lower multiple or shows 0.999 of this one to be supported (Dinkelbach's iteration).
    for _ in range(40 if len(b) > 1 else 0):
        target = 0.999 * multiple * b
        better = _single_direction(g, target)
        if better is None:
            better = _newton(torch.zeros_like(g[..., 0]), g, target, torch.full_like(b, math.inf), certify=True)[-1]
        if better is None:
            break
        direction, multiple = better, _support(g, better) / float(better @ b)
    best = g.amax(1).mean(0) * scale
    v = direction / scale
    shown = "level" if mean is not None else "b"
    offset = mean if mean is not None else torch.zeros_like(scale)
    why = (
        "is infeasible, which is proven as all responses are enumerated"
        if enumerated
        else f"is beyond what the {g.shape[1]} samples of each prompt show (best of {g.shape[1]}), which is no proof of infeasibility"
    )
    together = f", together {_show(offset + multiple * b * scale)}" if len(b) > 1 else ""
    message = f"threshold {shown} = {_show(offset + b * scale)} {why}; largest supported {shown} = {_show(offset + best)} alone{together}."
    return Infeasible(message, best, v / v.sum(), multiple)


def _show(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"
