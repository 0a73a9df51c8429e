"""Steps of the dual descent from measured slack: the next multipliers from those tried so far."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from engine.dual.problem import solve_psd
from engine.errors import UserError
from engine.intervals import float64


def step(
    lam_J: Tensor,
    slack_J: Tensor,
    eta: float | Tensor,
    *,
    max_change: float = 2.0,
    lam_max: float = math.inf,
    floor: float = 0.05,
) -> Tensor:
    """Takes one projected dual descent step: lambda <- [lambda - eta * slack]_+, float64 [J].

    This is arXiv 2505.19387, Algorithm 2, with slack = measured improvement - threshold. Each multiplier
    stays in [0, lam_max] and changes at most by the factor max_change, so that a policy that has not been
    trained out does not wind it up. At or below `floor` it may fall to 0 or rise to floor * max_change.

    `eta` is a number, or the Hessian H [J, J] of the dual. With the Hessian the change d minimises the dual's
    model slack . d + d . H d / 2 within these bounds, so that no multiplier makes up for a change of another
    one that the bounds cut off.

    Raises: UserError if slack or multipliers are not finite.
    """
    lam, slack = float64(lam_J), float64(slack_J)
    eta = float64(eta)
    if not (lam.isfinite().all() and slack.isfinite().all() and eta.isfinite().all()):
        values = f"lambda {lam.tolist()}, slack {slack.tolist()}, step {eta.tolist()}"
        raise UserError(f"dual step: {values} must be finite.")
    lower, upper = _bounds(lam, max_change, lam_max, floor)
    if eta.ndim:
        return _model_minimum(lam, slack, eta, lower, upper)
    return (lam - eta * slack).clamp(min=lower, max=upper)


def guarded_step(
    history: Sequence[tuple[Tensor, Tensor, Tensor]],
    hessian_JJ: Tensor,
    share: float,
    *,
    max_change: float = 2.0,
    lam_max: float = math.inf,
    floor: float = 0.05,
) -> Tensor:
    """Takes a `share` of the Newton step from the last row of `history`, shorter where policies were seen to
    answer more strongly than the Hessian says; float64 [J].

    history: rows (lambda, slack measured there, its standard errors), oldest first. A slack within its
    standard error counts as 0. Where no multiplier was lowered too far, this is `step` with hessian / share.

    A multiplier was lowered too far where a slack above its standard error lowered it, and the next slack lay
    below 0 by more than that. A policy that lags behind lambda does not do so by itself: it rises after
    lambda has fallen, too. Then (u_t - u_{t-1}) / (lambda_t - lambda_{t-1}) measures the curvature in that
    multiplier, and the Hessian is raised to it, never lowered, for all later steps. The step that follows is
    a whole one in that multiplier: back to where the line through the two slacks is 0.

    Raises: UserError as `step`; if history is empty.
    """
    if not history:
        raise UserError("dual step: history is empty; give at least one row (lambda, slack, standard error).")
    points = [tuple(float64(x) for x in row) for row in history]
    hessian = float64(hessian_JJ)
    too_far = torch.zeros(len(hessian), dtype=torch.bool)
    for (lam0, u0, se0), (lam1, u1, se1) in pairwise(points):
        too_far = (lam1 < lam0) & (u0 > se0) & (u1 < -se1)
        measured = torch.where(too_far, (u1 - u0) / (lam1 - lam0), 0.0)
        hessian = _scaled(hessian, (measured / hessian.diagonal().clamp(min=1e-100)).clamp(min=1))
    lam, slack, se = points[-1]
    return step(
        lam,
        slack.where(slack.abs() > se, 0.0),
        _scaled(hessian, torch.ones_like(lam).masked_fill(~too_far, 1 / share)),
        max_change=max_change,
        lam_max=lam_max,
        floor=floor,
    )


def _scaled(hessian_JJ: Tensor, factor_J: Tensor) -> Tensor:
    """Multiplies the curvature in each multiplier by a factor; correlations between them stay."""
    root = factor_J.sqrt()
    return root[:, None] * hessian_JJ * root


def resolved(slack_J: Tensor, se_J: Tensor) -> Tensor:
    """Shrinks a measured slack to what stands out of its noise, float64 [J].

        slack x max(0, 1 - (se / slack)^2)

    This is the positive-part shrinkage of James and Stein, one coordinate at a time. A slack within one
    standard error counts as 0 and moves no multiplier, one of three standard errors keeps 8/9 of itself, and
    one that is known exactly (se 0) keeps all. `optimistic_step`, `secant_step` and `bisection_step` shrink
    the slack themselves; `step` does not, so pass it the result of this function.

    Raises: UserError if a value is not finite.
    """
    slack, se = float64(slack_J), float64(se_J)
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
    """Takes a `step` on a forecast of the slack: lambda <- [lambda - eta (2 u_t - u_{t-1})]_+, float64 [J].

    This is the dual side of arXiv 2602.22146. Against a policy that follows lambda slowly, plain descent
    circles; the forecast damps it, so that the last iterate converges. history: rows (lambda, slack measured
    there, its standard errors), oldest first; with one row this is the plain step. The forecast is shrunk
    (`resolved`) by its standard error, sqrt(4 se_t^2 + se_{t-1}^2).

    Raises: UserError as `step`; if history is empty.
    """
    if not history:
        raise UserError("dual step: history is empty; give at least one row (lambda, slack, standard error).")
    lam, slack, se = (float64(x) for x in history[-1])
    if len(history) > 1:
        _, previous, previous_se = (float64(x) for x in history[-2])
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
    """Takes a quasi-Newton step from the last row of `history`, float64 [J].

    history: rows (lambda, slack measured there, its standard errors), oldest first. The slack is the dual's
    gradient, so its differences measure the curvature. Starting from `hessian_JJ`, the model H is corrected
    by each measured pair dlambda, du with Powell's damped BFGS update, which keeps it positive semi-definite.
    With one row this is `step`. The slack of the last row, from which the step is taken, is shrunk by its
    standard error (`resolved`).

    Noise: let n be the standard error of dlambda . du, and d the larger of |dlambda . du| and
    dlambda . H dlambda. The measured du then counts with weight 1 - (2 n / d)^2, and the model's H dlambda
    with the rest. Below two standard errors the model does not change at all, and the older end of the pair
    is kept until the multipliers have moved far enough to tell.

    Trust region: a point has passed the optimum where the slack is further from 0 than at the best point so
    far, by more than the noise, and asks for the way back. The next multipliers then lie within half that
    distance of the best point; each good step doubles the radius. Distances are in the metric of
    `hessian_JJ`. The bounds of `step` on each change hold as well.

    Raises: UserError if a value is not finite or history is empty.
    """
    points = [tuple(float64(x) for x in row) for row in history]
    metric = model = float64(hessian_JJ)
    if not points or not all(x.isfinite().all() for x in (model, *(x for point in points for x in point))):
        raise UserError(
            f"dual step: history {points} and Hessian {model.tolist()} must be finite, and history not empty."
        )
    anchor = best = points[0]
    radius = math.inf
    for point in points[1:]:
        model, anchor = _learned(model, anchor, point)
        way = point[0] - best[0]
        noise = float(solve_psd(metric, torch.diag(point[2] ** 2 + best[2] ** 2)).trace()) ** 0.5
        if (
            float(way @ point[1]) > 0
            and _distance_from_0(metric, point) > _distance_from_0(metric, best) + noise
        ):
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
    history: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    max_change: float = 2.0,
    lam_max: float = math.inf,
    floor: float = 0.05,
) -> Tensor:
    """Returns the middle of the bracket that `history` leaves for the lambda of one constraint, float64 [1].

    history: rows (lambda, slack measured there, its standard error), oldest first. The step uses only the
    sign of the slack. Without a bracket, lambda changes by the factor max_change. A later point overrules
    earlier ones on its other side, as a policy that lags behind lambda can close the bracket at the wrong
    place. A slack within one standard error of 0 has no sign: it leaves the bracket as it is, and where it is
    the last one, lambda stays.

    Raises: UserError if a value is not finite, history is empty or there is more than one constraint.
    """
    points = [tuple(float64(x) for x in row) for row in history]
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


def _learned(
    model: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Corrects the model by the pair (old, new), see `secant_step`.

    Returns the model and the older end of the next pair.
    """
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
    """Measures the slack that is still to be worked off, in the metric of the inverse Hessian."""
    lam, slack, _ = point
    open_slack = torch.where(lam > 0, slack, slack.clamp(max=0))
    return float(open_slack @ solve_psd(hessian, open_slack)) ** 0.5


def _model_minimum(lam: Tensor, slack: Tensor, hessian: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Finds the x in [lower, upper] that minimises slack . (x - lam) + (x - lam) . H (x - lam) / 2.

    The method is an active set: a coordinate that meets a bound is fixed there and the others are solved
    again; at the minimum over these, the fixed one that pulls hardest away from its bound is let go. Where H
    is singular the change is the shortest one, if there is a shortest.
    """
    x, at_lower, at_upper = lam.clamp(min=lower, max=upper), lam <= lower, lam >= upper
    fixed = (at_lower & (slack >= 0)) | (at_upper & (slack <= 0))
    # A few rounds are enough, as the model falls from one set's minimum to the next.
    for _ in range(20 * len(lam)):
        gradient = slack + hessian @ (x - lam)
        free, change = ~fixed, torch.zeros_like(x)
        change[free] = -solve_psd(hessian[free][:, free], gradient[free])
        room = torch.where(change > 0, upper - x, lower - x)
        share = torch.where(change.abs() > room.abs(), room / change, 1.0)
        if share.min() < 1:
            first = share == share.min()
            x = torch.where(first, torch.where(change > 0, upper, lower), x + share.min() * change)
            fixed = fixed | first
            continue
        x = x + change
        scale = hessian.diagonal().clamp(min=1e-100).sqrt()
        pull = torch.where(x <= lower, -1.0, 1.0) * (slack + hessian @ (x - lam)) / scale
        pull = torch.where(fixed & (lower < upper), pull, 0.0)
        if pull.max() <= 1e-12 * (slack.abs() / scale).max():
            break
        fixed[pull.argmax()] = False
    return x.clamp(min=lower, max=upper)


def _bounds(lam: Tensor, max_change: float, lam_max: float, floor: float) -> tuple[Tensor, Tensor]:
    """Returns the least and the largest next multipliers, see `step`."""
    lower = torch.where(lam > floor, lam / max_change, 0.0)
    return lower.clamp(max=lam_max), (lam.clamp(min=floor) * max_change).clamp(max=lam_max)
