"""The Lagrange dual of constrained alignment: solve it from reference samples, descend it from measured slack.

Distribution-space dual (arXiv 2405.19544, and 2505.19387 section 2), g the utilities, h = g - mean(g) - b:

    D(lambda) = beta E_x ln E_{y ~ reference} exp((r + lambda . h) / beta),    grad D = E h under the tilted policy

Its minimiser over lambda >= 0 needs samples of the reference only. A positive gradient is slack: that constraint holds with room.

    solve(reward_PG, utility_PGJ, [0.3], beta=1.0).lam

The same without Python, on a file of scores (engine/dual_command.py): python -m engine.dual SCORES.jsonl --cost harm --threshold 0.3
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import UserError
from engine.verdict.evaluation import t_quantile
from kernels import dual_moments
from kernels.dual_moments import DualMoments

TOLERANCE = 1e-10  # KKT residual, in standard deviations of the utility
ACCEPTED = 100 * TOLERANCE  # where rounding stops the solver before


class Infeasible(UserError):
    """No finite multipliers exist: no re-weighting of the given responses meets the thresholds.

    Attributes, in the utilities' units:
    - largest_improvement: float64 [J], the best response of every prompt, averaged, minus the mean: each constraint alone.
      With `bounds`, the highest possible value in place of the best response; inf where it has none.
    - direction: float64 [J], v >= 0 with sum 1 and mean_p max_i v . (g_pi - mean) < v . b, which certifies the claim.
    - largest_multiple: float, thresholds up to this multiple of b are supported together, to 0.1 %.
    - proven: bool, for all policies: the responses were enumerated, or a bound of a score is asked for. Else it is the samples' limit.
    """

    def __init__(self, message: str, largest_improvement: Tensor, direction: Tensor, largest_multiple: float, proven: bool):
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
) -> Solution:
    """Minimise the plug-in dual over 0 <= lambda <= lam_max (arXiv 2405.19544, appendix E, and its Hessian).

    reward [P, G], utility [P, G, J], threshold [J] (or a number): numpy, torch or lists, any float type. The threshold is the
    required improvement over the mean of the utility, or a level with `absolute`. `enumerated` says that the G responses are all
    there are, equally likely, so that infeasibility is proven. `bounds` [J] are the highest values that the utilities can take at all, None
    where that is not known: a threshold that asks for so much on average is proven infeasible, whatever the samples. `force` goes on with
    unsupported thresholds; it needs a finite lam_max, where such multipliers end. `start_J` is a guess of lambda, by default 0.

    `method`: "newton" takes projected Newton steps. "pgd" takes the paper's projected gradient steps, of length 1 / (largest eigenvalue of
    the Hessian) in units of each utility's standard deviation, and needs more of them. Both stop by the same rule, so their optima agree.

    A constant added to one prompt's reward or utility changes neither the multipliers nor the policies.

    Raises: Infeasible; UserError for shapes, values that are not finite, beta <= 0, a utility that never varies within a prompt, and
    where rounding keeps the solver from the optimum. Warns (UserWarning) where it stops it short of a KKT residual of 1e-10.
    """
    reward, utility, threshold = _check(reward_PG, utility_PGJ, threshold_J, beta, lam_max, force)
    if method not in STEPS:
        raise UserError(f"method {method!r}: must be one of {', '.join(STEPS)}.")
    mean = utility.mean((0, 1))
    if absolute:
        threshold = threshold - mean
    r, g, scale = _dimensionless(reward, utility, beta)
    b, start = threshold / scale, _start(start_J, scale / beta)
    if bounds is not None and not force:
        _check_bounds(bounds, utility, threshold, mean, scale, absolute)
    unsupported = None if force else _single_direction(g, b)
    if unsupported is None:
        x, moments, kkt, iterations, unsupported = _descend(r, g, b, lam_max * scale / beta, start, method=method, certify=not force)
    if unsupported is not None:
        raise _infeasible(g, b, unsupported, scale, mean if absolute else None, enumerated)
    if kkt > TOLERANCE:
        stopped = f"the dual solver stopped at KKT residual {kkt:.2g} after {iterations} iterations"
        if kkt > ACCEPTED:
            raise UserError(f"{stopped}; raise beta {beta} or lower the threshold.")
        warnings.warn(f"{stopped}, above {TOLERANCE:g}: lambda is known to fewer digits; raise beta {beta} for more.", stacklevel=2)

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


def largest_multiple(utility_PGJ, threshold_J, *, absolute: bool = False) -> float:
    """Improvements up to this multiple of b are supported together, to 0.1 %; inf where no b is above 0. With `absolute`, b is the
    threshold minus the mean of the utility.

    Raises: UserError as `solve`.
    """
    utility = _float64(utility_PGJ)
    reward, utility, threshold = _check(utility[..., 0], utility, threshold_J, 1.0, math.inf, False)
    _, g, scale = _dimensionless(reward, utility, 1.0)
    b = (threshold - utility.mean((0, 1)) if absolute else threshold) / scale
    alone = torch.where(b > 0, g.amax(1).mean(0) / b, math.inf)
    if alone.min() == math.inf:
        return math.inf
    return _largest_multiple(g, b, torch.eye(len(b), dtype=torch.float64)[alone.argmin()])[0]


def within_deviation(x_PG, name: str) -> float:
    """Pooled within-prompt standard deviation (ddof 1) of a score [P, G], G >= 2: one unit of it in a run.

    Raises: UserError where `name` is constant within every prompt.
    """
    x = _float64(x_PG)
    value = float(x.var(dim=1).mean().sqrt())
    if value <= 1e-9 * max(1.0, float(x.abs().max())):
        raise UserError(f"{name} gives all responses of a prompt one score, so there is nothing to align; use another one.")
    return value


def tilted_improvement(reward_PG, utility_PGJ, lam_J, beta: float) -> tuple[Tensor, Tensor]:
    """Predicted improvement of each prompt's mean reward [P] and utility [P, J] when its responses are re-weighted by
    exp((reward + lambda . utility) / beta). float64; the mean over prompts of the second, minus b, is the dual's gradient."""
    reward, utility, lam = _float64(reward_PG), _float64(utility_PGJ), _float64(lam_J)
    change_PG = ((reward + utility @ lam) / beta).softmax(1) - 1 / reward.shape[1]
    return (change_PG * reward).sum(1), torch.einsum("pg,pgj->pj", change_PG, utility)


@dataclass(frozen=True)
class Interval:
    """A two-sided interval for each multiplier, float64 [J]."""

    low: Tensor
    high: Tensor
    se: Tensor  # standard error


def lam_interval(
    reward_PG, utility_PGJ, threshold_J, beta: float, solution: Solution, *, absolute: bool = False, level: float = 0.95
) -> Interval:
    """Interval of `solve`'s multipliers by the delta method, clustered by prompt.

    lambda solves mean_p u_p(lambda) = 0 on the constraints above 0, with prompt p's part of the gradient

        u_p = sum_i w_pi g_pi - mean_i g_pi - b,    or sum_i w_pi g_pi - level with `absolute`:

    the mean that an improvement is measured from comes from the same samples, and as all prompts have G responses it is a mean over
    prompts as well. So Var(lambda) = H^-1 Cov_p(u_p) / P H^-1 with the dual's Hessian H. Quantiles are Student's with P - 1 degrees
    of freedom. Not in it: the bias of G responses (see `ess_warning`), and that units were estimated.

    A constraint at 0 with room is treated as if it alone were let go below 0: its Newton step ends at a value below 0 with a standard
    error, and the interval is [0, max(0, value + t se)]. It is [0, 0] where the room is clear, and passes continuously into that of an
    active constraint.

    Where H is singular over the constraints without clear room, as for two equal utilities, only some sums of multipliers are determined:
    one that is not has the standard error inf and the interval [0, inf], "not identified".

    Raises: UserError where the solution is not of these scores, or is held by lam_max; below 2 prompts.
    """
    reward, utility, threshold = _check(reward_PG, utility_PGJ, threshold_J, beta, math.inf, False)
    P, lam, gradient = len(reward), solution.lam, solution.gradient
    if P < 2:
        raise UserError(f"{P} prompt(s): an interval over prompts needs at least 2.")
    scale = _within_std(utility)
    u_PJ = tilted_improvement(reward, utility, lam, beta)[1] - threshold + (utility.mean(1) if absolute else 0.0)
    if ((u_PJ.mean(0) - gradient).abs() > 1e-6 * scale).any():
        raise UserError(f"lambda {_show(lam)}: solved from other scores, thresholds or beta than these; give the same to both.")
    if ((lam > 0) & (gradient < -1e-6 * scale)).any():
        raise UserError(f"lambda {_show(lam)}: stopped by lam_max, where it has no interval; raise lam_max.")
    covariance = torch.cov(u_PJ.T).reshape(len(lam), len(lam)) / P
    centre, se = torch.zeros_like(lam), torch.zeros_like(lam)
    for j in range(len(lam)):
        if not _identified(solution.hessian, scale, (lam > 0) | (gradient <= 1e-6 * scale), j):
            se[j] = math.inf
            continue
        free = lam > 0
        free[j] = True
        unit = torch.eye(len(lam), dtype=torch.float64)[j, free]
        row = _solve_psd(solution.hessian[free][:, free], unit)
        centre[j] = lam[j] - row @ gradient[free]
        se[j] = (row @ covariance[free][:, free] @ row).clamp(min=0).sqrt()
    reach = t_quantile((1 + level) / 2, P - 1) * se
    return Interval(low=torch.where(lam > 0, centre - reach, 0.0).clamp(min=0), high=(centre + reach).clamp(min=0), se=se)


def _identified(hessian: Tensor, scale: Tensor, active: Tensor, j: int) -> bool:
    """Whether the Hessian over the `active` constraints and j determines multiplier j: no change of it leaves the gradient as it is."""
    own = active.clone()
    own[j] = True
    eigenvalue, basis = torch.linalg.eigh((hessian / scale[:, None] / scale)[own][:, own])
    flat = eigenvalue <= 1e-9 * eigenvalue[-1]
    return float(basis[int(own[:j].sum()), flat].square().sum()) < 1e-9


def bootstrap(
    reward_PG, utility_PGJ, threshold_J, beta: float, *, absolute: bool = False, draws: int = 400, seed: int = 0, start_J=None
) -> Tensor:
    """Multipliers of `draws` samples of P prompts drawn with replacement, with all their responses: float64 [draws, J].

    `start_J`, such as the solution's lambda, is where each solve starts. A draw whose thresholds are not supported, or so nearly that
    lambda has no accurate value, is inf throughout.

    Raises: UserError as `solve`.
    """
    reward, utility, threshold = _check(reward_PG, utility_PGJ, threshold_J, beta, math.inf, False)
    r, g, scale = _dimensionless(reward, utility, beta)
    level_PJ = utility.mean(1)
    start, unbounded = _start(start_J, scale / beta), torch.full_like(scale, math.inf)
    generator = torch.Generator().manual_seed(seed)
    lam = torch.full((draws, len(scale)), math.inf, dtype=torch.float64)
    for d in range(draws):
        rows = torch.randint(len(r), (len(r),), generator=generator)
        b = (threshold - level_PJ[rows].mean(0) if absolute else threshold) / scale
        if _single_direction(g[rows], b) is None:
            x, _, kkt, _, unsupported = _descend(r[rows], g[rows], b, unbounded, start, certify=True)
            if unsupported is None and kkt <= ACCEPTED:
                lam[d] = x * beta / scale
    return lam


def percentiles(draws, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """(low, high): the central `level` of draws along the first dimension; inf counts as largest. No interpolation, outward."""
    ordered = _float64(draws).sort(dim=0).values
    cut = math.floor((1 - level) / 2 * (len(ordered) - 1) + 1e-9)
    return ordered[cut], ordered[len(ordered) - 1 - cut]


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

    slack = measured improvement - threshold. Each multiplier stays in [0, lam_max] and changes at most by the factor max_change, so that
    a policy not yet trained out does not wind it up. At or below `floor` it may fall to 0 or rise to floor * max_change.

    `eta` is a number, or the Hessian H [J, J] of the dual: then the change d minimises the dual's model slack . d + d . H d / 2 within
    these bounds, so that no multiplier makes up for a change of another one that the bounds cut off.

    Raises: UserError if slack or multipliers are not finite.
    """
    lam, slack = _float64(lam_J), _float64(slack_J)
    eta = _float64(eta)
    if not (lam.isfinite().all() and slack.isfinite().all() and eta.isfinite().all()):
        raise UserError(f"dual step: lambda {lam.tolist()}, slack {slack.tolist()}, step {eta.tolist()} must be finite.")
    lower, upper = _bounds(lam, max_change, lam_max, floor)
    return (lam - eta * slack).clamp(min=lower, max=upper) if eta.ndim == 0 else _model_minimum(lam, slack, eta, lower, upper)


def resolved(slack_J: Tensor, se_J: Tensor) -> Tensor:
    """slack x max(0, 1 - (se / slack)^2): what of a measured slack stands out of its noise, float64 [J].

    The positive-part shrinkage of James and Stein, one coordinate at a time. A slack within one standard error counts as 0 and moves
    no multiplier, one of three standard errors keeps 8/9 of itself, and one known exactly (se 0) all. `optimistic_step`, `secant_step` and
    `bisection_step` shrink the slack by themselves; give `step` what comes out of this.

    Raises: UserError if a value is not finite.
    """
    slack, se = _float64(slack_J), _float64(se_J)
    if not (slack.isfinite().all() and se.isfinite().all()):
        raise UserError(f"dual step: slack {slack.tolist()} and standard error {se.tolist()} must be finite.")
    return torch.where(slack.abs() > se, slack * (1 - (se / slack) ** 2), 0.0)


def optimistic_step(
    history: Sequence[tuple[Tensor, Tensor, Tensor]],
    eta: float | Tensor,
    *,
    max_change: float = 2.0,
    lam_max: float = math.inf,
    floor: float = 0.05,
) -> Tensor:
    """`step` on a forecast of the slack: lambda <- [lambda - eta (2 u_t - u_{t-1})]_+ (arXiv 2602.22146, dual side). float64 [J].

    Against a policy that follows lambda slowly, plain descent circles; the forecast damps it, so that the last iterate converges.
    history: rows (lambda, slack measured there, its standard errors), oldest first; with one row this is the plain step. The forecast is
    shrunk (`resolved`) by its own standard error, sqrt(4 se_t^2 + se_{t-1}^2).

    Raises: UserError as `step`; if history is empty.
    """
    if not history:
        raise UserError("dual step: history is empty; give at least one row (lambda, slack, standard error).")
    lam, slack, se = (_float64(x) for x in history[-1])
    if len(history) > 1:
        _, previous, previous_se = (_float64(x) for x in history[-2])
        slack, se = 2 * slack - previous, (4 * se**2 + previous_se**2).sqrt()
    return step(lam, resolved(slack, se), eta, max_change=max_change, lam_max=lam_max, floor=floor)


def secant_step(
    history: Sequence[tuple[Tensor, Tensor, Tensor]],
    hessian_JJ: Tensor,
    *,
    max_change: float = 2.0,
    lam_max: float = math.inf,
    floor: float = 0.05,
) -> Tensor:
    """A quasi-Newton step from the last of `history`, rows (lambda, slack measured there, its standard errors), oldest first. float64 [J].

    The slack is the dual's gradient, so its differences measure the curvature. Starting from `hessian_JJ`, the model H is corrected by each
    measured pair dlambda, du with Powell's damped BFGS update, which keeps it positive semi-definite. With one row this is `step`. The
    slack of the last row, from which the step is taken, is shrunk by its standard error (`resolved`).

    Noise: with n the standard error of dlambda . du and d the larger of |dlambda . du| and dlambda . H dlambda, the measured du counts with
    weight 1 - (2 n / d)^2 and the model's own H dlambda with the rest. Below two standard errors the model does not change at all, and the
    older end of the pair is kept, until the multipliers have moved far enough to tell.

    Trust region: a point where the slack is further from 0 than at the best point so far, by more than the noise, and asks for the way
    back, has passed the optimum. The next multipliers then lie within half that distance of the best point; each good step doubles the
    radius. Distances are in the metric of `hessian_JJ`. The bounds of `step` on each change hold as well.

    Raises: UserError if a value is not finite or history is empty.
    """
    points = [tuple(_float64(x) for x in row) for row in history]
    metric = model = _float64(hessian_JJ)
    if not points or not all(x.isfinite().all() for x in (model, *(x for point in points for x in point))):
        raise UserError(f"dual step: history {points} and Hessian {model.tolist()} must be finite, and history not empty.")
    anchor = best = points[0]
    radius = math.inf
    for point in points[1:]:
        model, anchor = _learned(model, anchor, point)
        way = point[0] - best[0]
        noise = float(_solve_psd(metric, torch.diag(point[2] ** 2 + best[2] ** 2)).trace()) ** 0.5
        if float(way @ point[1]) > 0 and _distance_from_0(metric, point) > _distance_from_0(metric, best) + noise:
            radius = float(way @ metric @ way) ** 0.5 / 2
        else:
            best, radius = point, 2 * radius
    lam, slack, se = points[-1]
    lower, upper = _bounds(lam, max_change, lam_max, floor)
    target = _model_minimum(lam, resolved(slack, se), model, lower, upper)
    way = target - best[0]
    length = float(way @ metric @ way) ** 0.5
    if length > radius:
        target = best[0] + way * (radius / length)
    return target.clamp(min=lower, max=upper)


def bisection_step(
    history: Sequence[tuple[Tensor, Tensor, Tensor]], *, max_change: float = 2.0, lam_max: float = math.inf, floor: float = 0.05
) -> Tensor:
    """The middle of the bracket that `history`, rows (lambda, slack measured there, its standard error), oldest first, leaves for one
    constraint. float64 [1].

    It knows the slack's sign alone. Without a bracket, lambda changes by the factor max_change. A later point overrules earlier ones
    on its other side: a policy that lags behind lambda can close the bracket at the wrong place. A slack within one standard error of 0 has
    no sign: it leaves the bracket as it is, and where it is the last one, lambda stays.

    Raises: UserError if a value is not finite, history is empty or there is more than one constraint.
    """
    points = [tuple(_float64(x) for x in row) for row in history]
    if not points or not all(x.isfinite().all() and len(x) == 1 for point in points for x in point):
        raise UserError(f"bisection step: history {points} must be finite, not empty and of one constraint.")
    low, high = None, None
    for lam, slack, se in points:
        if resolved(slack, se) == 0:
            continue
        if slack < 0:
            low, high = lam, None if high is not None and high <= lam else high
        else:
            low, high = None if low is not None and low >= lam else low, lam
    lam, slack, se = points[-1]
    if resolved(slack, se) == 0:
        target = lam
    elif high is None:
        target = lam.clamp(min=floor) * max_change
    elif low is None:
        target = torch.where(lam > floor * max_change, lam / max_change, 0.0)
    else:
        target = (low + high) / 2
    lower, upper = _bounds(lam, max_change, lam_max, floor)
    return target.clamp(min=lower, max=upper)


def _learned(model: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The model corrected by the pair (old, new), and the older end of the next pair; see `secant_step`."""
    way, change = new[0] - old[0], new[1] - old[1]
    expected = model @ way
    curvature = float(way @ expected)
    if curvature <= 0:  # the multipliers did not move
        return model, old
    noise = float(way**2 @ (new[2] ** 2 + old[2] ** 2))
    weight = 1 - 4 * noise / max(curvature, abs(float(way @ change))) ** 2
    if weight <= 0:
        return model, old
    change = expected + weight * (change - expected)
    measured = float(way @ change)
    if measured < 0.2 * curvature:
        change = expected + 0.8 * curvature / (curvature - measured) * (change - expected)
        measured = 0.2 * curvature
    return model - torch.outer(expected, expected) / curvature + torch.outer(change, change) / measured, new


def _distance_from_0(hessian: Tensor, point: tuple[Tensor, ...]) -> float:
    """Length of the slack that is still to be worked off, in the metric of the inverse Hessian."""
    lam, slack, _ = point
    open_slack = torch.where(lam > 0, slack, slack.clamp(max=0))
    return float(open_slack @ _solve_psd(hessian, open_slack)) ** 0.5


def _model_minimum(lam: Tensor, slack: Tensor, hessian: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The x in [lower, upper] that minimises slack . (x - lam) + (x - lam) . H (x - lam) / 2, by an active set: a coordinate that meets a
    bound is fixed there and the others are solved again; at the minimum over these, the one that pulls hardest away from its bound is
    let go. Where H is singular the change is the shortest one, if there is a shortest."""
    x, at_lower, at_upper = lam.clamp(min=lower, max=upper), lam <= lower, lam >= upper
    fixed = (at_lower & (slack >= 0)) | (at_upper & (slack <= 0))
    for _ in range(20 * len(lam)):  # a few are enough: the model falls from one set's minimum to the next
        gradient = slack + hessian @ (x - lam)
        free, change = ~fixed, torch.zeros_like(x)
        change[free] = -_solve_psd(hessian[free][:, free], gradient[free])
        room = torch.where(change > 0, upper - x, lower - x)
        share = torch.where(change.abs() > room.abs(), room / change, 1.0)
        if share.min() < 1:
            x = torch.where(share == share.min(), torch.where(change > 0, upper, lower), x + share.min() * change)
            fixed = fixed | (share == share.min())
            continue
        x = x + change
        pull = torch.where(x <= lower, -1.0, 1.0) * (slack + hessian @ (x - lam)) / hessian.diagonal().clamp(min=1e-100).sqrt()
        pull = torch.where(fixed & (lower < upper), pull, 0.0)
        if pull.max() <= 1e-12 * (slack.abs() / hessian.diagonal().clamp(min=1e-100).sqrt()).max():
            break
        fixed[pull.argmax()] = False
    return x.clamp(min=lower, max=upper)


def _bounds(lam: Tensor, max_change: float, lam_max: float, floor: float) -> tuple[Tensor, Tensor]:
    """(least, largest) next multipliers, see `step`."""
    lower = torch.where(lam > floor, lam / max_change, 0.0)
    return lower.clamp(max=lam_max), (lam.clamp(min=floor) * max_change).clamp(max=lam_max)


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
    """One line if the mean effective number of responses is below G / 4, where lambda is over-estimated; else None.

    In one case 8 responses a prompt, of an effective size of 1.4, gave 0.39, and 4 of them 0.57. `half_sample` says by how much.
    """
    ess = float(_float64(ess_P).mean())
    if ess >= G / 4:
        return None
    return f"The tilted weights rest on {ess:.1f} of {G} responses per prompt, so lambda is over-estimated: raise beta or sample more."


def half_sample(reward_PG, utility_PGJ, threshold_J, beta: float, lam_J: Tensor, *, absolute: bool = False, seed: int = 0) -> str:
    """What a random half of each prompt's responses gives, as a sentence that goes on from `ess_warning`; "" below 4 responses.

    lam: `solve`'s multipliers from all of them. A bias in 1 / G, as that of self-normalised weights, doubles with half of the
    responses, so the difference of the two estimates it.
    """
    reward, utility = _float64(reward_PG), _float64(utility_PGJ)
    P, G = reward.shape
    if G < 4:
        return ""
    half = torch.rand(P, G, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)[:, : G // 2]
    try:
        lam = solve(reward.gather(1, half), utility.take_along_dim(half[..., None], 1), threshold_J, beta, absolute=absolute).lam
    except UserError:
        return " A random half of the responses does not support the thresholds at all."
    values, excess = (", ".join(f"{x:.3f}" for x in v.tolist()) for v in (lam, (lam - lam_J).clamp(min=0)))
    return f" A random half of the responses gives lambda {values}: if the excess falls as 1 / responses, it is now about {excess}."


def _float64(values) -> Tensor:
    # With the dtype from the start: a list would be rounded to float32 on the way.
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()


def _argument(name: str, values) -> Tensor:
    try:
        return _float64(values)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} is {str(values)[:60]!r}: give numbers, in lists of equal length, a numpy array or a tensor.") from None


def _is_above_0(value) -> bool:
    try:
        return bool(value > 0)
    except (TypeError, ValueError, RuntimeError):
        return False


def _check(reward_PG, utility_PGJ, threshold_J, beta: float, lam_max: float, force: bool) -> tuple[Tensor, Tensor, Tensor]:
    reward, utility = _argument("reward", reward_PG), _argument("utility", utility_PGJ)
    threshold = _argument("threshold", threshold_J).reshape(-1)
    if reward.ndim != 2 or utility.ndim != 3 or utility.shape[:2] != reward.shape or utility.numel() == 0:
        raise UserError(f"reward {list(reward.shape)}, utility {list(utility.shape)}: give [P, G] and [P, G, J], none of them 0.")
    if len(threshold) != utility.shape[2]:
        raise UserError(f"{len(threshold)} threshold(s) for {utility.shape[2]} utilities: give one per utility.")
    for name, values in {"reward": reward, "utility": utility, "threshold": threshold}.items():
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            raise UserError(f"{name}{list(index)} is {values[index].item()}: it must be finite; drop or repair {len(bad)} such value(s).")
    if not (_is_above_0(beta) and math.isfinite(beta)):
        raise UserError(f"beta {beta}: must be above 0 and finite.")
    if not _is_above_0(lam_max):
        raise UserError(f"lam_max {lam_max}: must be above 0.")
    if force and not math.isfinite(lam_max):
        raise UserError(f"force with lam_max {lam_max}: give a finite lam_max, where unsupported multipliers end.")
    spread = (utility.amax(1) - utility.amin(1)).amax(0)
    for j in (spread <= 1e-12 * utility.abs().amax((0, 1))).nonzero()[:, 0].tolist():
        raise UserError(f"utility {j} (counting from 0) is the same for all responses of every prompt: sample more responses or drop it.")
    return reward, utility, threshold


def _check_bounds(bounds, utility: Tensor, threshold: Tensor, mean: Tensor, scale: Tensor, absolute: bool) -> None:
    """Raises: Infeasible where a required improvement (`threshold`) takes a utility to the highest value that it can have, or above."""
    highest = _argument("bounds", [math.inf if bound is None else bound for bound in bounds])
    if highest.shape != threshold.shape or highest.isnan().any():
        raise UserError(f"bounds {list(bounds)}: give a number or None for each of the {len(threshold)} utilities.")
    above = utility.amax((0, 1)) > highest
    if above.any():
        j = int(above.nonzero()[0])
        raise UserError(f"bounds: utility {j} (counting from 0) reaches {utility[..., j].max():.6g}, above its bound {highest[j]:.6g}.")
    best = highest - mean
    room = (best - threshold) / scale
    if room.min() > TOLERANCE:
        return
    direction = torch.eye(len(best), dtype=torch.float64)[room.argmin()]
    shift, shown = (mean, "level") if absolute else (torch.zeros_like(mean), "b")
    raise Infeasible(
        f"threshold {shown} = {_show(shift + threshold)} is infeasible, which is proven as the utilities are never above {_show(highest)}; "
        f"largest {shown} that can be asked for lies below {_show(shift + best)} alone.",
        best, direction, float(torch.where(threshold > 0, best / threshold, math.inf).min()), True,
    )  # fmt: skip


def _within_std(utility_PGJ: Tensor) -> Tensor:
    """Pooled within-prompt standard deviation of each utility, [J]."""
    return utility_PGJ.var(1, correction=0).mean(0).sqrt()


def _dimensionless(reward: Tensor, utility: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(r, g, scale): per-prompt constants cancel, so both are centred and then divided, r by beta and g by its standard deviation [J]: the
    solver has one scale. Its x is lambda * scale / beta."""
    scale = _within_std(utility)
    return (reward - reward.mean(1, keepdim=True)) / beta, (utility - utility.mean(1, keepdim=True)) / scale, scale


def _start(lam_J, per_x: Tensor) -> Tensor:
    if lam_J is None:
        return torch.zeros_like(per_x)
    lam = _argument("start_J", lam_J).reshape(-1)
    if lam.shape != per_x.shape or not lam.isfinite().all():
        raise UserError(f"start_J {lam.tolist()}: give {len(per_x)} finite number(s), a guess of lambda.")
    return (lam * per_x).clamp(min=0)


def _solve_psd(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right (a vector or a matrix) for a positive semi-definite matrix whose smallest eigenvalues are raised to 1e-12 of the
    largest."""
    eigenvalue, basis = torch.linalg.eigh(matrix)
    smallest = (1e-12 * eigenvalue.max()).clamp(min=1e-100) if len(right) else 0.0
    eigenvalue = eigenvalue.clamp(min=smallest)
    return basis @ ((basis.T @ right) / (eigenvalue if right.ndim == 1 else eigenvalue[:, None]))


def _support(g_PGJ: Tensor, direction_J: Tensor) -> float:
    """mean_p max_i v . g_pi: the largest improvement of v . g that any re-weighting of the responses reaches (g centred)."""
    return float((g_PGJ @ direction_J).amax(1).mean())


def _single_direction(g_PGJ: Tensor, b_J: Tensor) -> Tensor | None:
    """The unit vector of a constraint that cannot be met alone, or None. At the limit itself lambda is infinite: refused too."""
    room = g_PGJ.amax(1).mean(0) - b_J
    if room.min() > TOLERANCE:
        return None
    return torch.eye(len(b_J), dtype=torch.float64)[room.argmin()]


def _newton_trial(x: Tensor, moments: DualMoments, cap: Tensor) -> Tensor:
    """Projected Newton with an active set (Bertsekas 1982): the change of x."""
    gradient = moments.gradient
    near = min(1e-3, float((x - (x - gradient).clamp(min=0).minimum(cap)).abs().max()))
    to_zero, to_cap = (x <= near) & (gradient > 0), (x >= cap - near) & (gradient < 0)
    free = ~(to_zero | to_cap)
    change = torch.where(to_zero, -x, torch.where(to_cap, cap - x, 0.0))
    change[free] = -_solve_psd(moments.hessian[free][:, free], gradient[free])
    return change


def _gradient_trial(x: Tensor, moments: DualMoments, cap: Tensor) -> Tensor:
    """Projected gradient with step 1 / (largest eigenvalue of the Hessian) (arXiv 2405.19544, Theorem 2): the change of x."""
    step = 1 / torch.linalg.eigvalsh(moments.hessian)[-1].clamp(min=1e-100)
    return (x - step * moments.gradient).clamp(min=0).minimum(cap) - x


STEPS = {"newton": (_newton_trial, 500), "pgd": (_gradient_trial, 50_000)}  # (change, most iterations)


def _descend(r, g, b, cap, start, *, method: str = "newton", certify: bool):
    """Minimise the dual over 0 <= x <= cap with Armijo backtracking along the projected change of `method`.

    If the thresholds cannot be met together the dual is unbounded below and the iterates go to infinity; since
    D(x) >= mean_p max_i x . h + mean_p min_i r - ln G, their own direction certifies it after finitely many steps. Where it
    converges, the tilted policy itself meets the thresholds. So the path decides feasibility exactly and needs no linear program.

    Returns: x, moments, KKT residual, iterations, certified direction or None.
    """
    zero = torch.zeros_like(b)
    trial_change, most = STEPS[method]

    def moments_at(x):
        return dual_moments(r, g, x, 1.0, utility_mean=zero, threshold=b)

    noise = 1e-14 * (1 + float(r.abs().max()))  # below this, differences of the value are rounding
    x = start.minimum(cap)
    moments = moments_at(x)
    for iteration in range(most):
        gradient = moments.gradient
        # x - clip(x - gradient) is the size of the projected gradient; the sharper residual counts |gradient| off the bounds.
        residual = torch.where(x <= 0, -gradient, torch.where(x >= cap, gradient, gradient.abs())).clamp(min=0).max().item()
        if residual <= TOLERANCE:
            break
        if certify and x.max() > 0:
            direction = x / x.sum()
            if _support(g, direction) - float(direction @ b) < -1e-12:
                return x, moments, residual, iteration, direction
        change = trial_change(x, moments, cap)
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


def _largest_multiple(g: Tensor, b: Tensor, direction: Tensor) -> tuple[float, Tensor]:
    """Multiples of b up to this one are supported, to 0.1 %, and the direction that shows it, given one with direction . b > 0."""
    multiple = _support(g, direction) / float(direction @ b)
    # Each round either finds the next lower multiple or shows 0.999 of this one to be supported (Dinkelbach's iteration).
    for _ in range(40 if len(b) > 1 else 0):
        target = 0.999 * multiple * b
        better = _single_direction(g, target)
        if better is None:
            better = _descend(torch.zeros_like(g[..., 0]), g, target, torch.full_like(b, math.inf), torch.zeros_like(b), certify=True)[-1]
        if better is None:
            break
        direction, multiple = better, _support(g, better) / float(better @ b)
    return multiple, direction


def _infeasible(g, b, direction, scale, mean, enumerated: bool) -> Infeasible:
    """The error with its certificate, in the caller's units (g, b, direction are in standard deviations)."""
    multiple, direction = _largest_multiple(g, b, direction)
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
    return Infeasible(message, best, v / v.sum(), multiple, enumerated)


def _show(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"
