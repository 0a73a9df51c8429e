"""The Lagrange dual of constrained alignment, solved from samples of the reference.

The dual in the space of distributions (arXiv 2405.19544, and 2505.19387 section 2), with the utilities
g and h = g - mean(g) - b:

    D(lambda) = beta E_x ln E_{y ~ reference} exp((r + lambda . h) / beta)
    grad D    = E h under the tilted policy

Finding its minimiser over lambda >= 0 takes samples of the reference only. A positive gradient is slack: that
constraint holds with room.

    solve(reward_PG, utility_PGJ, [0.3], beta=1.0).lam

The same for a file of scores, without Python: python -m engine.dual SCORES.jsonl --cost harm --threshold 0.3
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.dual.feasibility import support, unsupported_direction
from engine.dual.problem import (
    as_float64,
    check_problem,
    dimensionless,
    dimensionless_start,
    in_brackets,
    solve_psd,
)
from engine.errors import UserError
from engine.intervals import float64
from kernels import dual_moments
from kernels.moments import DualMoments

TOLERANCE = 1e-10  # KKT residual, in standard deviations of the utility, at which the solver stops
ACCEPTED = 100 * TOLERANCE  # KKT residual that is accepted where rounding stops the solver before


class Infeasible(UserError):
    """No finite multipliers exist: no re-weighting of the given responses meets the thresholds.

    Attributes, in the utilities' units:
    - largest_improvement: float64 [J], the best response of every prompt, averaged, minus the mean: what each
      constraint alone supports. With `bounds`, the highest possible value stands in place of the best
      response; inf where a utility has none.
    - direction: float64 [J], v >= 0 with sum 1 and mean_p max_i v . (g_pi - mean) < v . b,
      which certifies the claim.
    - largest_multiple: float, thresholds up to this multiple of b are supported together, to 0.1 %; NaN
      without `explain`.
    - proven: bool, True where the claim holds for all policies, because the responses were enumerated or the
      bound of a score is asked for. False where it is the limit of these samples.
    """

    def __init__(
        self,
        message: str,
        largest_improvement: Tensor,
        direction: Tensor,
        largest_multiple: float,
        proven: bool,
    ) -> None:
        super().__init__(message)
        self.proven = proven
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
    bounds: Sequence[float | None] | None = None,
    lam_max: float = math.inf,
    force: bool = False,
    method: str = "newton",
    start_J=None,
    explain: bool = True,
) -> Solution:
    """Minimises the plug-in dual over 0 <= lambda <= lam_max (arXiv 2405.19544, appendix E, and its Hessian).

    reward [P, G], utility [P, G, J], threshold [J] (or a number): numpy, torch or lists, any float type.

    - The threshold is the required improvement over the mean of the utility, or a level with `absolute`.
    - `enumerated` says that the G responses are all there are, equally likely,
      so that infeasibility is proven.
    - `bounds` [J] are the highest values that the utilities can take at all, None where that is not known. A
      threshold that asks for so much on average is proven infeasible, whatever the samples.
    - `force` goes on with unsupported thresholds. It needs a finite lam_max, where such multipliers end.
    - `start_J` is a guess of lambda, by default 0.
    - `explain` searches, where thresholds are not supported, for what would be. Without it
      `Infeasible.largest_multiple` is NaN.
    - `method`: "newton" takes projected Newton steps. "pgd" takes the paper's projected gradient steps,
      of length 1 / (largest eigenvalue of the Hessian) in units of each utility's standard deviation,
      and needs more of them. Both stop by the same rule, so their optima agree.

    A constant added to one prompt's reward or utility changes neither the multipliers nor the policies.

    Raises: Infeasible. UserError for shapes, values that are not finite, beta <= 0, a utility that never
    varies within a prompt, and where rounding keeps the solver from the optimum. Warns (UserWarning) where
    rounding stops it short of a KKT residual of 1e-10.
    """
    reward, utility, threshold = check_problem(reward_PG, utility_PGJ, threshold_J, beta, lam_max, force)
    if method not in STEPS:
        raise UserError(f"method {method!r}: must be one of {', '.join(STEPS)}.")
    mean = utility.mean((0, 1))
    if absolute:
        threshold = threshold - mean
    r, g, scale = dimensionless(reward, utility, beta)
    b, start = threshold / scale, dimensionless_start(start_J, scale / beta)
    if bounds is not None and not force:
        _check_bounds(bounds, utility, threshold, mean, scale, absolute)
    unsupported = None if force else single_direction(g, b)
    if unsupported is None:
        descent = descend(r, g, b, lam_max * scale / beta, start, method=method, certify=not force)
        unsupported = descent.unsupported
    if unsupported is not None:
        multiple = math.nan
        if explain:
            multiple, unsupported = _largest_multiple(g, b, unsupported)
        raise _infeasible(g, b, unsupported, multiple, scale, mean if absolute else None, enumerated)
    moments = descent.moments
    if descent.kkt > TOLERANCE:
        stopped = (
            f"the dual solver stopped at KKT residual {descent.kkt:.2g} after {descent.iterations} iterations"
        )
        if descent.kkt > ACCEPTED:
            raise UserError(f"{stopped}; raise beta {beta} or lower the threshold.")
        warnings.warn(
            f"{stopped}, above {TOLERANCE:g}: lambda is known to fewer digits; raise beta {beta} for more.",
            stacklevel=2,
        )

    gradient = moments.gradient * scale
    return Solution(
        lam=(descent.x * beta / scale).clamp(max=lam_max),
        value=float(moments.value * beta + reward.mean()),
        gradient=gradient,
        hessian=moments.hessian * scale[:, None] * scale / beta,
        kkt=descent.kkt,
        ess=moments.ess,
        iterations=descent.iterations,
        predicted_improvement=gradient + threshold,
    )


def largest_threshold(utility_PGJ) -> Tensor:
    """Computes the largest improvement that each constraint alone supports, float64 [J].

    It is the mean over prompts of the best response, minus the mean.
    """
    utility = float64(utility_PGJ)
    return utility.amax(1).mean(0) - utility.mean((0, 1))


def largest_multiple(utility_PGJ, threshold_J, *, absolute: bool = False) -> float:
    """Finds the largest multiple of the improvements b that is supported for all together, to 0.1 %.

    It is inf where no b is above 0. With `absolute`, b is the threshold minus the mean of the utility.
    Raises: UserError as `solve`.
    """
    utility = float64(utility_PGJ)
    reward, utility, threshold = check_problem(utility[..., 0], utility, threshold_J, 1.0, math.inf, False)
    _, g, scale = dimensionless(reward, utility, 1.0)
    b = (threshold - utility.mean((0, 1)) if absolute else threshold) / scale
    alone = torch.where(b > 0, g.amax(1).mean(0) / b, math.inf)
    if alone.min() == math.inf:
        return math.inf
    return _largest_multiple(g, b, torch.eye(len(b), dtype=torch.float64)[alone.argmin()])[0]


def tilted_improvement(reward_PG, utility_PGJ, lam_J, beta: float) -> tuple[Tensor, Tensor]:
    """Predicts the improvement of each prompt's mean reward [P] and utility [P, J] at lambda, float64.

    The prompt's responses are re-weighted by exp((reward + lambda . utility) / beta). The mean over prompts
    of the second value, minus b, is the dual's gradient.
    """
    reward, utility, lam = float64(reward_PG), float64(utility_PGJ), float64(lam_J)
    change_PG = ((reward + utility @ lam) / beta).softmax(1) - 1 / reward.shape[1]
    return (change_PG * reward).sum(1), torch.einsum("pg,pgj->pj", change_PG, utility)


def tilt_kl(score_PG, beta: float) -> float:
    """Estimates KL(tilt || reference) of the tilt exp(score / beta), nats per response, mean over prompts.

    score_PG [P, G]: of the reference's samples. With the weights w_i = softmax(score / beta) a prompt's is
    sum_i w_i ln(G w_i), which is at most ln G and too small for few responses. The jackknife over responses
    takes out the part of that bias which falls as 1 / G.
    """
    x_PG = float64(score_PG) / beta
    G = x_PG.shape[1]

    def plug_in(x_PG: Tensor) -> float:
        log_w = x_PG.log_softmax(1)
        return float((log_w.exp() * log_w).sum(1).mean()) + math.log(x_PG.shape[1])

    if G == 1:
        return 0.0
    left_out = [plug_in(torch.cat((x_PG[:, :i], x_PG[:, i + 1 :]), 1)) for i in range(G)]
    return max(0.0, G * plug_in(x_PG) - (G - 1) * sum(left_out) / G)


def _check_bounds(
    bounds, utility: Tensor, threshold: Tensor, mean: Tensor, scale: Tensor, absolute: bool
) -> None:
    """Refuses a required improvement that takes a utility to its highest possible value or above.

    Raises: Infeasible; UserError for bounds that are not one number or None per
    utility, or are passed already.
    """
    highest = as_float64("bounds", [math.inf if bound is None else bound for bound in bounds])
    if highest.shape != threshold.shape or highest.isnan().any():
        J = len(threshold)
        raise UserError(f"bounds {list(bounds)}: give a number or None for each of the {J} utilities.")
    above = utility.amax((0, 1)) > highest
    if above.any():
        j = int(above.nonzero()[0])
        raise UserError(
            f"bounds: utility {j} (counting from 0) reaches {utility[..., j].max():.6g}, "
            f"above its bound {highest[j]:.6g}."
        )
    best = highest - mean
    room = (best - threshold) / scale
    if room.min() > TOLERANCE:
        return
    shift, shown = (mean, "level") if absolute else (torch.zeros_like(mean), "b")
    raise Infeasible(
        f"threshold {shown} = {in_brackets(shift + threshold)} is infeasible, which is proven as the "
        f"utilities are never above {in_brackets(highest)}; largest {shown} that can be asked for lies below "
        f"{in_brackets(shift + best)} alone.",
        largest_improvement=best,
        direction=torch.eye(len(best), dtype=torch.float64)[room.argmin()],
        largest_multiple=float(torch.where(threshold > 0, best / threshold, math.inf).min()),
        proven=True,
    )


def single_direction(g_PGJ: Tensor, b_J: Tensor) -> Tensor | None:
    """Returns the unit vector of a constraint that cannot be met alone, or None.

    A constraint exactly at its limit counts as one that cannot be met: its lambda would be infinite.
    """
    room = g_PGJ.amax(1).mean(0) - b_J
    if room.min() > TOLERANCE:
        return None
    return torch.eye(len(b_J), dtype=torch.float64)[room.argmin()]


def _newton_change(x: Tensor, moments: DualMoments, cap: Tensor) -> Tensor:
    """Computes the change of x in a projected Newton step with an active set (Bertsekas 1982)."""
    gradient = moments.gradient
    near = min(1e-3, float((x - (x - gradient).clamp(min=0).minimum(cap)).abs().max()))
    to_zero, to_cap = (x <= near) & (gradient > 0), (x >= cap - near) & (gradient < 0)
    free = ~(to_zero | to_cap)
    change = torch.where(to_zero, -x, torch.where(to_cap, cap - x, 0.0))
    change[free] = -solve_psd(moments.hessian[free][:, free], gradient[free])
    return change


def _gradient_change(x: Tensor, moments: DualMoments, cap: Tensor) -> Tensor:
    """Computes the change of x in a projected gradient step (arXiv 2405.19544, Theorem 2).

    The step length is 1 / (largest eigenvalue of the Hessian).
    """
    step = 1 / torch.linalg.eigvalsh(moments.hessian)[-1].clamp(min=1e-100)
    return (x - step * moments.gradient).clamp(min=0).minimum(cap) - x


# Newton steps after which a linear program decides whether the thresholds are supported. A problem that is
# neither at the edge of what is nor has rewards that are huge in units of beta takes a handful.
FEW = (_newton_change, 40)
BY_NEWTON = 4  # rounds of `_largest_multiple` that begin with Newton's steps
STEPS = {"newton": FEW, "pgd": (_gradient_change, 50_000)}  # (change of x, most iterations)


class Descent(NamedTuple):
    """Where `descend` has ended."""

    x: Tensor
    moments: DualMoments
    kkt: float  # KKT residual
    iterations: int
    unsupported: Tensor | None  # the direction that certifies infeasibility, if x went that way


def descend(r, g, b, cap, start, *, method: str = "newton", certify: bool) -> Descent:
    """Minimises the dual over 0 <= x <= cap, see `_descend`.

    Where Newton's steps do not get there soon, a linear program decides whether there is a minimum
    (`unsupported_direction`), and it is approached from larger betas, at which the dual is smoother.
    """
    if method != "newton":
        return _descend(r, g, b, cap, start, steps=STEPS[method], certify=certify)
    descent = _descend(r, g, b, cap, start, steps=FEW, certify=certify)
    if descent.unsupported is not None or descent.kkt <= TOLERANCE:
        return descent
    if certify and (direction := unsupported_direction(g, b, TOLERANCE)) is not None:
        return descent._replace(unsupported=direction)
    iterations, times = descent.iterations, 8.0 ** math.ceil(math.log(max(1.0, float(r.abs().max())), 8))
    x = start / times if times > 1 else descent.x
    while times >= 1:
        at = _descend(r / times, g, b, cap / times, x, steps=FEW, certify=False, stalled=8)
        iterations, times, x = iterations + at.iterations, times / 8, at.x * 8
    return min(descent, at, key=lambda found: found.kkt)._replace(iterations=iterations)


def _descend(
    r,
    g,
    b,
    cap,
    start,
    *,
    steps: tuple[Callable, int],
    certify: bool,
    stalled: float = math.inf,
) -> Descent:
    """Minimises the dual over 0 <= x <= cap with Armijo backtracking along the projected change of `steps`.

    If the thresholds cannot be met together the dual is unbounded below and the iterates go to infinity.
    Since D(x) >= mean_p max_i x . h + mean_p min_i r - ln G, their direction then certifies it after finitely
    many steps. Where the descent converges, the tilted policy itself meets the thresholds. So the path
    decides feasibility exactly. `certify` asks for that decision. It ends after as many steps in a row as
    `stalled` without a smaller residual.
    """
    zero = torch.zeros_like(b)
    (change_of, most), least, idle = steps, math.inf, 0

    def moments_at(x):
        return dual_moments(r, g, x, 1.0, utility_mean=zero, threshold=b)

    noise = 1e-14 * (1 + float(r.abs().max()))  # below this, differences of the value are rounding
    x = start.minimum(cap)
    moments = moments_at(x)
    for iteration in range(most):
        gradient = moments.gradient
        # The size of the projected gradient would be x - clip(x - gradient). This residual is sharper: off
        # the bounds it counts all of |gradient|.
        residual = torch.where(x <= 0, -gradient, torch.where(x >= cap, gradient, gradient.abs()))
        residual = residual.clamp(min=0).max().item()
        least, idle = min(least, residual), 0 if residual < least else idle + 1
        if residual <= TOLERANCE or idle >= stalled:
            break
        if certify and x.max() > 0:
            direction = x / x.sum()
            if support(g, direction) - float(direction @ b) < -1e-12:
                return Descent(x, moments, residual, iteration, direction)
        change = change_of(x, moments, cap)
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
    return Descent(x, moments, residual, iteration, None)


def _largest_multiple(g: Tensor, b: Tensor, direction: Tensor) -> tuple[float, Tensor]:
    """Finds the largest supported multiple of b, to 0.1 %, and the direction that shows it to be the largest.

    direction: one to start from, with direction . b > 0.
    """
    multiple = support(g, direction) / float(direction @ b)
    no_reward, unbounded, start = (
        torch.zeros_like(g[..., 0]),
        torch.full_like(b, math.inf),
        torch.zeros_like(b),
    )
    # Each round finds a lower limit, or shows that 0.999 of this one is supported (Dinkelbach's iteration).
    # Newton's steps find one fast; the best one, which the linear program finds, needs fewer rounds.
    for number in range(40 if len(b) > 1 else 0):
        target = 0.999 * multiple * b
        better = single_direction(g, target)
        if better is None and number < BY_NEWTON:
            descent = _descend(no_reward, g, target, unbounded, start, steps=FEW, certify=True)
            better = descent.unsupported
            if better is None and descent.kkt <= TOLERANCE:
                break
        if better is None:
            better = unsupported_direction(g, target)
        if better is None:
            break
        direction, multiple = better, support(g, better) / float(better @ b)
    return multiple, direction


def _infeasible(g, b, direction, multiple: float, scale, mean, enumerated: bool) -> Infeasible:
    """Builds the error with its certificate, in the caller's units.

    g, b, direction: in standard deviations. multiple: of b that is supported, NaN where it is not known.
    mean: of the utilities where the thresholds are levels, else None.
    """
    best = g.amax(1).mean(0) * scale
    v = direction / scale
    shown = "level" if mean is not None else "b"
    offset = mean if mean is not None else torch.zeros_like(scale)
    if enumerated:
        why = "is infeasible, which is proven as all responses are enumerated"
    else:
        G = g.shape[1]
        why = (
            f"is beyond what the {G} samples of each prompt show (best of {G}), "
            "which is no proof of infeasibility"
        )
    together = ""
    if len(b) > 1 and not math.isnan(multiple):
        together = f", together {in_brackets(offset + multiple * b * scale)}"
    message = (
        f"threshold {shown} = {in_brackets(offset + b * scale)} {why}; "
        f"largest supported {shown} = {in_brackets(offset + best)} alone{together}."
    )
    return Infeasible(
        message,
        largest_improvement=best,
        direction=v / v.sum(),
        largest_multiple=multiple,
        proven=enumerated,
    )
