"""Measures the facts of one exact problem: solves it by scipy and runs the algorithms' loops in it."""

import math
from dataclasses import replace

import numpy as np
import torch

from bench.theory.curvature import bend, chord, largest_curvature, smallest_on_segment, taylor
from bench.theory.exact_stages import ExactStages, Update
from bench.theory.facts import Descent, Facts, Measured, Point, Stochastic
from bench.theory.optima import Optima, Policy
from bench.theory.problem import Problem, make
from bench.theory.updates import local_maxima, maximiser, soft
from engine import caid, dual, mocan
from engine.baselines import cdpo
from engine.config import CaidConfig, CdpoConfig, MocanConfig
from engine.records import Score, ScoredTarget

UPDATES: dict[str, Update] = {"exact maximiser": maximiser, "soft labels": soft}
SLACK_DRAWS = 16


def measure(
    seed: int,
    J: int,
    eps: float,
    *,
    scale: float = 1.0,
    beta: float = 1.0,
    b: float | tuple[float, ...] = 0.3,
) -> Facts:
    """Makes a problem, solves it by scipy and runs the loops in it.

    scale: a factor of the utilities and thresholds, which only changes units.
    """
    problem = make(seed, J=J, eps=eps, beta=beta, b=b)
    problem = replace(problem, utility_PYJ=scale * problem.utility_PYJ, b_J=scale * problem.b_J)
    optima = Optima(problem)
    lam_star = optima.solve_dual()
    # The search does not start at lambda*, which at nu = 0 is the answer.
    starts = (0 * lam_star, 3 * lam_star) if eps == 0 else (0 * lam_star,)
    lam_p, dual_p, kink = optima.solve_dual_in_class(*starts)
    primal, best = optima.solve_primal(), optima.best_in_class(lam_p)
    largest = optima.largest_slack_in_class(best.theta)

    star = point(optima, lam_star)
    in_class = point(optima, lam_p, dual_p)
    others = (point(optima, 0 * lam_star), point(optima, 3 * lam_star))
    caid_off, maxima = multi_shot(problem, lam_p)
    config = MocanConfig(beta=problem.beta)
    theta, _ = mocan.loop(ExactStages(problem, config, maximiser), config)
    one_shot = measured(optima, optima.policy(problem.log_ratio_PY(theta).numpy()), star)
    top, axes = np.linalg.eigh(optima.hessian(lam_star))
    runs = tuple(stochastic(optima, in_class, float(0.3 / top[-1]), kind) for kind in UPDATES)

    visited = [x.lam for x in (star, in_class, *others, *(run.best for run in runs))]
    lam_nu = tightened(optima, star.nu, largest)
    mu = min(smallest_on_segment(optima, lam_star, end) for end in (lam_p, *(run.best.lam for run in runs)))
    shift = optima.M * star.nu
    assumptions = {
        "A1": independent_utilities(problem),
        "A2": optima.solve_dual(1e-3 * scale) is not None,
        "A4": lam_nu is not None,
        "A5": bool(mu > 0),
        "A6": optima.solve_dual(shift) is not None,
        "A7": bool(largest > shift),
    }
    near = 0.01 / scale * axes[:, -1]
    off = optima.tilted(lam_star + near)
    off_bend = max(np.linalg.eigvalsh(optima.hessian(lam_star + t * near))[-1] for t in np.linspace(0, 1, 5))
    radius = utility_radius(problem)
    return Facts(
        J=J,
        eps=eps,
        seed=seed,
        beta=problem.beta,
        M=optima.M,
        L=largest_curvature(optima, visited, scale),
        mu=mu,
        primal=primal.value,
        kl=optima.kl(primal),
        primal_in_class=optima.solve_primal_in_class(best.theta).value,
        kink=kink,
        assumptions=assumptions,
        star=star,
        in_class=in_class,
        tighter=None if lam_nu is None else point(optima, lam_nu),
        others=others,
        optimum=Measured(lam=lam_star, value=primal.value, slack=primal.slack, bend=0.0),
        untrained=measured(optima, optima.best_in_class(0 * lam_star), others[0]),
        tilted_slack=optima.tilted(lam_p).slack,
        multi_shot=None if kink else measured(optima, best, in_class),
        caid_off=caid_off,
        one_shot=one_shot,
        off_along_h=Measured(lam=lam_star, value=off.value, slack=off.slack, bend=off_bend),
        off_gap=star.dual - off.lagrangian(lam_star),
        stochastic=runs,
        G=radius,
        taylor=taylor(optima, 0 * lam_star, near),
        taylor_of_wrong_sign=taylor(optima, 0 * lam_star, near, sign=-1),
        chord=chord(optima, visited),
        descent=descend(optima, lam_star, scale, optima.beta / radius),
        maxima=maxima,
    )


def point(optima: Optima, lam: np.ndarray, dual_in_class: float | None = None) -> Point:
    """Measures one lambda; `dual_in_class` is D_p(lambda) where it is known already."""
    return Point(
        lam=lam,
        dual=optima.dual(lam),
        dual_in_class=optima.dual_in_class(lam) if dual_in_class is None else dual_in_class,
        nu=optima.gap_of_class(optima.tilted(lam)),
    )


def measured(optima: Optima, policy: Policy, at: Point) -> Measured:
    """Records a policy that belongs to the lambda of `at`."""
    off = policy.slack - optima.tilted(at.lam).slack
    curvature = bend(optima, at.lam, off, at.dual - policy.lagrangian(at.lam))
    return Measured(lam=at.lam, value=policy.value, slack=policy.slack, bend=curvature)


def independent_utilities(problem: Problem) -> bool:
    """Returns whether assumption A1 holds: on each prompt the utilities are linearly independent,
    and all 0 at some response."""
    g = problem.utility_PYJ
    J = g.shape[2]
    return bool((torch.linalg.matrix_rank(g) == J).all() and (g == 0).all(dim=2).any(dim=1).all())


def utility_radius(problem: Problem) -> float:
    """Returns sup |g|, per prompt centred at the middle of its range."""
    g = problem.utility_PYJ
    middle = (g.amax(1, keepdim=True) + g.amin(1, keepdim=True)).numpy() / 2
    return float(np.linalg.norm(g.numpy() - middle, axis=2).max())


def multi_shot(problem: Problem, lam_p: np.ndarray) -> tuple[tuple[float, float], int]:
    """Runs CAID's loop; returns `Facts.caid_off` and `Facts.maxima`."""
    config = CaidConfig(beta=problem.beta, iterations=24, dual_step=1.0, lam_max=1e3)
    world = ExactStages(problem, config, maximiser)
    _, lam = caid.loop(world, config)
    slack = world.history[-1].slack_J
    missed = torch.where(lam > 0, slack, slack.clamp(max=0)).abs().max()
    maxima = max(distinct(local_maxima(world, target.on(world.scored()))) for target, _ in world.fitted[-3:])
    return (float(np.abs(lam.numpy() - lam_p).max()), float(missed)), maxima


def distinct(maxima: list[tuple[float, torch.Tensor]]) -> int:
    """Counts the different local maxima among (value, theta)."""
    values = np.array([value for value, _ in maxima])
    return 1 + int((-np.diff(values) > 1e-7).sum())


def stochastic(optima: Optima, in_class: Point, eta: float, kind: str, steps: int = 15) -> Stochastic:
    """Runs C-DPO's loop, which is dual descent with a constant step, on slacks from a few draws a prompt."""
    problem, update = optima.problem, UPDATES[kind]
    config = CdpoConfig(
        beta=problem.beta, iterations=steps, dual_rate=eta, lam_init=0.0, lam_max_change=1e9, lam_max=1e9
    )
    world = ExactStages(problem, config, update, slack_draws=SLACK_DRAWS, seed=1)
    cdpo.loop(world, config)
    square, eps_app, points = 0.0, 0.0, []
    for iterate in world.history:
        pi, h = problem.policy_PY(iterate.theta)[..., None], problem.shifted_PYJ
        spread = (pi * h.square()).sum(1) - (pi * h).sum(1).square()
        exact = problem.slack_J(iterate.theta)
        square = max(square, float(exact.square().sum() + spread.sum() / (SLACK_DRAWS * len(pi) ** 2)))
        reached = highest = problem.lagrangian(iterate.theta, iterate.lam_J)
        if update is not maximiser:
            score = problem.reward_PY + problem.utility_PYJ @ iterate.lam_J
            target = ScoredTarget(score=Score.plain(score), coefficient=problem.beta, start=iterate.theta)
            highest = problem.lagrangian(maximiser(world, target, 0), iterate.lam_J)
        eps_app = max(eps_app, highest - reached)
        points.append((highest, iterate))
    highest, iterate = min(points, key=lambda pair: pair[0])
    lam = iterate.lam_J.numpy()
    return Stochastic(
        kind=kind,
        eta=eta,
        steps=steps,
        square=square,
        eps_app=eps_app,
        best=point(optima, lam, max(highest, optima.dual_in_class(lam))),
        policy=Measured(
            lam=lam,
            value=problem.value(iterate.theta),
            slack=problem.slack_J(iterate.theta).numpy(),
            bend=0.0,
        ),
        start_distance=float(np.linalg.norm(in_class.lam)),
    )


def tightened(optima: Optima, nu: float, largest: float) -> np.ndarray | None:
    """Returns lambda*_nu = argmin D(lambda) - M nu |lambda|_1, with nu the class's gap at
    the policy of that lambda.

    It is None where the class has no policy with E h >= M nu (assumption A4).
    """
    for _ in range(20):
        lam = optima.solve_dual(optima.M * nu) if largest > optima.M * nu else None
        if lam is None:
            return None
        reached = optima.gap_of_class(optima.tilted(lam))
        if reached <= nu * (1 + 1e-6):
            return lam
        nu = reached
    return None


def descend(optima: Optima, lam_star: np.ndarray, scale: float, printed_step: float) -> Descent:
    """Descends by the engine's dual step without its cap; scale is that of the utilities, as in `measure`."""
    start, tau = 3 * lam_star, float(np.linalg.norm(lam_star)) / 2
    line = [lam_star + t * (start - lam_star) for t in np.linspace(0, 1, 21)]
    around = [lam_star + tau * u for u in np.vstack([np.eye(len(start)), -np.eye(len(start))])]
    top = largest_curvature(optima, [*line, *around], scale)
    towards = lam_star + tau * (start - lam_star) / np.linalg.norm(start - lam_star)

    def steps(size: float) -> int:
        lam = torch.tensor(start)
        for n in range(5000):
            if np.linalg.norm(lam.numpy() - lam_star) <= 1e-6 / scale:
                return n
            lam = dual.step(lam, torch.tensor(optima.tilted(lam.numpy()).slack), size, max_change=math.inf)
        return 5000

    return Descent(
        steps=steps(1 / top),
        steps_as_printed=steps(printed_step),
        top=top,
        mu=min(smallest_on_segment(optima, lam_star, p) for p in (*around, towards)),
        log=max(math.log(tau * scale / 1e-6), 0),
        distance=float((np.linalg.norm(start - lam_star) / tau) ** 2),
    )
