"""How certain the multipliers are: their intervals, and what few responses do to them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.dual.problem import check_problem, in_brackets, solve_psd, within_std
from engine.dual.solver import Solution, tilted_improvement
from engine.dual.steps import step
from engine.errors import UserError
from engine.intervals import float64, t_quantile

# From so many responses per prompt on, with so large a mean share of them effective, an interval is said to
# be of the true multiplier. `bench/verdict/multipliers.py` measures how often it holds it.
FEWEST = 8
ENOUGH = 0.4


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided interval for each multiplier, float64 [J]."""

    lam: Tensor  # the multipliers that it is about, where `of_truth` with the bias of G responses taken out
    low: Tensor
    high: Tensor
    se: Tensor  # standard error
    # Whether they are those that unlimited responses would give; else those at G responses per prompt.
    of_truth: bool

    def of(self, j: int) -> "Interval":
        """Returns the interval of multiplier j alone."""
        part = {name: getattr(self, name)[j : j + 1] for name in ("lam", "low", "high", "se")}
        return Interval(**part, of_truth=self.of_truth)


def said(lam_J: Tensor, interval: Interval, G: int) -> str:
    """Says multipliers and their intervals, and what these are of.

    lam_J: of `solve`, from G responses per prompt.
    """
    rows = zip(interval.lam, interval.se, interval.low, interval.high, strict=True)
    ranges = ", ".join(f"{lam:.3f} {_range(se, low, high)}" for lam, se, low, high in rows)
    if interval.of_truth:
        solved = ", ".join(f"{lam:.3f}" for lam in lam_J.tolist())
        return f"{solved}, true lambda {ranges} (95 %, the bias of {G} responses taken out)"
    return f"{ranges} (95 % over prompts, at {G} responses each; the bias of few responses is not in it)"


def _range(se: Tensor, low: Tensor, high: Tensor) -> str:
    return "(not identified)" if se.isinf() else f"[{float(low):.3f}, {float(high):.3f}]"


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
    """Computes intervals of the multipliers that unlimited prompts and responses would give.

    `solve`'s lambda makes mean_p u_p(lambda) = 0 on the constraints above 0, with prompt p's part of the
    gradient

        u_p = sum_i w_pi g_pi - mean_i g_pi - b,    or sum_i w_pi g_pi - level with `absolute`

    As sum_i w_pi g_pi is a ratio of two means over G responses, it moves less than its limit does, and lambda
    comes out too large. `unbiased_improvement` takes that bias out of each u_p, to order 1 / G. The interval
    stands around one Newton step from `solution.lam` with the corrected gradient and the dual's Hessian H, by
    the delta method, clustered by prompt:

        lambda - H^-1 mean_p u_p,    Var(lambda) = H^-1 Cov_p(u_p) / P H^-1

    with Student's quantiles of P - 1 degrees of freedom. H is of G responses too, and too small: step and
    interval are somewhat long, which makes up for what is left of the bias. In simulation
    (`bench/verdict/multipliers.py`) intervals of 95 % hold the true multiplier in at least 90 %.

    Where the responses are not enough for that (`enough_responses`), nothing is taken out: u_p and the
    interval are of the multipliers that unlimited prompts with G responses each would give, and `of_truth` is
    False. Never in the interval: that units were estimated, and tails that the responses do not show.

    The mean that an improvement is measured from comes from the same samples, and as all prompts have G
    responses it is a mean over prompts as well.

    A constraint at 0 with room is treated as if it alone were let go below 0: its Newton step ends at a value
    below 0 with a standard error, and the interval is [0, max(0, value + t se)]. It is [0, 0] where the room
    is clear, and passes continuously into that of an active constraint.

    Where H is singular over the constraints without clear room, as for two equal utilities,
    only some sums of multipliers are determined. A multiplier that is not has the standard error inf
    and the interval [0, inf], "not identified".

    Raises: UserError for fewer than 2 prompts, for a solution of other scores, and for one held by lam_max.
    """
    reward, utility, threshold = check_problem(reward_PG, utility_PGJ, threshold_J, beta, math.inf, False)
    P, hessian, scale = len(reward), solution.hessian, within_std(utility)
    if P < 2:
        raise UserError(f"{P} prompt(s): an interval over prompts needs at least 2.")
    _check_solution(reward, utility, threshold, beta, solution, scale, absolute)
    lam, required_PJ = solution.lam, threshold - (utility.mean(1) if absolute else 0.0)
    of_truth = enough_responses(solution.ess, reward.shape[1])
    if of_truth:
        u_PJ = unbiased_improvement(reward, utility, lam, beta) - required_PJ
        lam = step(lam, u_PJ.mean(0), hessian, max_change=math.inf)
    else:
        u_PJ = tilted_improvement(reward, utility, lam, beta)[1] - required_PJ
    gradient = u_PJ.mean(0) + hessian @ (lam - solution.lam)
    covariance = torch.cov(u_PJ.T).reshape(len(lam), len(lam)) / P
    centre, se = torch.zeros_like(lam), torch.zeros_like(lam)
    for j in range(len(lam)):
        if not _identified(hessian, scale, (lam > 0) | (gradient <= 1e-6 * scale), j):
            se[j] = math.inf
            continue
        free = lam > 0
        free[j] = True
        unit = torch.eye(len(lam), dtype=torch.float64)[j, free]
        row = solve_psd(hessian[free][:, free], unit)
        centre[j] = lam[j] - row @ gradient[free]
        se[j] = (row @ covariance[free][:, free] @ row).clamp(min=0).sqrt()
    reach = t_quantile((1 + level) / 2, P - 1) * se
    return Interval(
        lam=lam,
        low=(centre - reach).clamp(min=0),
        high=(centre + reach).clamp(min=0),
        se=se,
        of_truth=of_truth,
    )


def unbiased_improvement(reward_PG, utility_PGJ, lam_J, beta: float) -> Tensor:
    """Predicts the improvement of each prompt's mean utilities at lambda, float64 [P, J], as
    `tilted_improvement` does, with the bias of G responses taken out to order 1 / G.

    This is Quenouille's jackknife over a prompt's responses,

        G m - (G - 1) mean_i m_i - mean_i g_i,    m_i = m - w_i / (1 - w_i) (g_i - m)

    with m the tilted mean of all responses and m_i that of all but the i-th. Needs G >= 2.
    """
    reward, utility, lam = float64(reward_PG), float64(utility_PGJ), float64(lam_J)
    utility = utility - utility.mean(1, keepdim=True)
    tilted_PG, G = (reward + utility @ lam) / beta, reward.shape[1]
    top_P1 = tilted_PG.argmax(1, keepdim=True)

    def mean_under(weight_PG: Tensor) -> Tensor:
        return torch.einsum("pg,pgj->pj", weight_PG, utility)

    weight_PG = tilted_PG.softmax(1)
    mean_PJ = mean_under(weight_PG)
    # Of the largest weight 1 - w may vanish, so the mean without it is taken anew.
    odds_PG = (weight_PG / (1 - weight_PG)).scatter(1, top_P1, 0.0)
    moved_PJ = mean_under(odds_PG) - odds_PG.sum(1, keepdim=True) * mean_PJ
    moved_PJ += mean_PJ - mean_under(tilted_PG.scatter(1, top_P1, -math.inf).softmax(1))
    return mean_PJ + (G - 1) / G * moved_PJ


def _check_solution(reward, utility, threshold, beta, solution: Solution, scale, absolute: bool) -> None:
    """Raises UserError for a solution of another problem, or of one that lam_max holds."""
    lam, gradient = solution.lam, solution.gradient
    expected = tilted_improvement(reward, utility, lam, beta)[1].mean(0) - threshold
    expected += utility.mean((0, 1)) if absolute else 0.0
    if ((expected - gradient).abs() > 1e-6 * scale).any():
        raise UserError(
            f"lambda {in_brackets(lam)}: solved from other scores, thresholds or beta than these; "
            "give the same to both."
        )
    if ((lam > 0) & (gradient < -1e-6 * scale)).any():
        raise UserError(
            f"lambda {in_brackets(lam)}: stopped by lam_max, where it has no interval; raise lam_max."
        )


def _identified(hessian: Tensor, scale: Tensor, active: Tensor, j: int) -> bool:
    """Tells whether the Hessian over the `active` constraints and j determines multiplier j.

    It does where every change of multiplier j changes the gradient.
    """
    chosen = active.clone()
    chosen[j] = True
    eigenvalue, basis = torch.linalg.eigh((hessian / scale[:, None] / scale)[chosen][:, chosen])
    flat = eigenvalue <= 1e-9 * eigenvalue[-1]
    return float(basis[int(chosen[:j].sum()), flat].square().sum()) < 1e-9


def enough_responses(ess_P: Tensor, G: int) -> bool:
    """Tells whether G responses, of effective numbers `ess_P`, are enough to take their bias out."""
    return G >= FEWEST and float(float64(ess_P).mean()) >= ENOUGH * G


def ess_warning(ess_P: Tensor, G: int) -> str | None:
    """Warns in one line where the mean effective number of responses is below G / 4.

    lambda is over-estimated then. In one case 8 responses a prompt, of an effective size of 1.4, gave lambda
    0.39, and 4 of them 0.57. Returns None where no warning is due.
    """
    ess = float(float64(ess_P).mean())
    if ess >= G / 4:
        return None
    return (
        f"The tilted weights rest on {ess:.1f} of {G} responses per prompt, so lambda is over-estimated: "
        "raise beta or sample more."
    )
