"""Measures the facts of one exact problem: solves it by scipy and runs the algorithms' loops in it."""

import math
from dataclasses import replace

import numpy as np
import torch

from bench.theory.exact_stages import ExactWorld, Update
from bench.theory.facts import Descent, Facts, Measured, Point, Stochastic
from bench.theory.optima import Optima, Policy
from bench.theory.problem import make
from bench.theory.updates import local_maxima, maximiser, soft
from engine import caid, cdpo, dual, mocan
from engine.config import CaidConfig, CdpoConfig, MocanConfig
from engine.records import Target

UPDATES: dict[str, Update] = {"exact maximiser": maximiser, "soft labels": soft}


def measure(
    seed: int,
    J: int,
    eps: float,
    *,
    scale: float = 1.0,
    beta: float = 1.0,
    b: float | tuple[float, ...] = 0.3,
) -> Facts:
    """Make a problem, solve it by scipy, run the loops in it. scale: of the utilities and thresholds, which only changes units."""
    problem = make(seed, J=J, eps=eps, beta=beta, b=b)
    problem = replace(problem, utility_PYJ=scale * problem.utility_PYJ, b_J=scale * problem.b_J)
    optima = Optima(problem)
    lam_star = optima.solve_dual()
    # Not from lambda*, which at nu = 0 is the answer.
    starts = (0 * lam_star, 3 * lam_star) if eps == 0 else (0 * lam_star,)
    lam_p, dual_p, kink = optima.solve_dual_in_class(*starts)
    primal, best = optima.solve_primal(), optima.best_in_class(lam_p)
    largest = optima.largest_slack_in_class(best.theta)

    def point(lam: np.ndarray) -> Point:
        return at(optima, lam, optima.dual_in_class(lam))

    def measured(policy: Policy, p: Point) -> Measured:
        off = policy.slack - optima.tilted(p.lam).slack
        return Measured(
            lam=p.lam,
            value=policy.value,
            slack=policy.slack,
            bend=bend(optima, p.lam, off, p.dual - policy.lagrangian(p.lam)),
        )

    star = point(lam_star)
    in_class = at(optima, lam_p, dual_p)
    others = (point(0 * lam_star), point(3 * lam_star))
    config = CaidConfig(beta=problem.beta, iterations=24, dual_step=1.0, lam_max=1e3)
    world = ExactWorld(problem, config, maximiser)
    _, lam = caid.loop(world, config)
    slack = world.history[-1].slack_J
    caid_off = (
        float(np.abs(lam.numpy() - lam_p).max()),
        float(torch.where(lam > 0, slack, slack.clamp(max=0)).abs().max()),
    )
    maxima = max(distinct(local_maxima(world, target)) for target, _ in world.fitted[-3:])
    world = ExactWorld(problem, MocanConfig(beta=problem.beta), maximiser)
    theta, _ = mocan.loop(world, world.config)
    one = measured(optima.policy(problem.log_ratio_PY(theta).numpy()), star)
    hessian = optima.hessian(lam_star)
    top, axes = np.linalg.eigh(hessian)
    runs = tuple(
        stochastic(problem, optima, in_class, float(0.3 / top[-1]), kind, update)
        for kind, update in UPDATES.items()
    )

    visited = [star, in_class, *others, *(run.best for run in runs)]
    tighter = tightened(optima, star.nu, largest)
    mu = min(smallest_on_segment(optima, lam_star, end) for end in (lam_p, *(run.best.lam for run in runs)))
    g, shift = problem.utility_PYJ, optima.M * star.nu
    assumptions = {
        "A1": bool((torch.linalg.matrix_rank(g) == J).all() and (g == 0).all(dim=2).any(dim=1).all()),
        "A2": optima.solve_dual(1e-3 * scale) is not None,
        "A4": tighter is not None,
        "A5": bool(mu > 0),
        "A6": optima.solve_dual(shift) is not None,
        "A7": bool(largest > shift),
    }
    near = 0.01 / scale * axes[:, -1]
    off = optima.tilted(lam_star + near)
    middle = (
        problem.utility_PYJ.numpy()
        - (problem.utility_PYJ.amax(1, keepdim=True) + problem.utility_PYJ.amin(1, keepdim=True)).numpy() / 2
    )
    radius = float(np.linalg.norm(middle, axis=2).max())
    return Facts(
        J=J, eps=eps, seed=seed, beta=problem.beta, M=optima.M,
        L=largest_curvature(optima, [p.lam for p in visited], scale),
        mu=mu, assumptions=assumptions,
        primal=primal.value, kl=optima.kl(primal), primal_in_class=optima.solve_primal_in_class(best.theta).value, kink=kink,
        star=star, in_class=in_class, tighter=None if tighter is None else point(tighter), others=others,
        optimum=Measured(lam=lam_star, value=primal.value, slack=primal.slack, bend=0.0), tilted_slack=optima.tilted(lam_p).slack,
        untrained=measured(optima.best_in_class(0 * lam_star), others[0]),
        multi_shot=None if kink else measured(best, in_class), caid_off=caid_off, one_shot=one,
        off_along_h=Measured(
            lam=lam_star, value=off.value, slack=off.slack,
            bend=max(np.linalg.eigvalsh(optima.hessian(lam_star + t * near))[-1] for t in np.linspace(0, 1, 5)),
        ),
        off_gap=star.dual - off.lagrangian(lam_star),
        stochastic=runs, G=radius,
        taylor=taylor(optima, 0 * lam_star, near),
        taylor_of_wrong_sign=taylor(optima, 0 * lam_star, near, sign=-1),
        chord=chord(optima, [p.lam for p in visited]), descent=descend(optima, lam_star, scale, optima.beta / radius), maxima=maxima,
    )  # fmt: skip


def stochastic(
    problem, optima: Optima, in_class: Point, eta: float, kind: str, update: Update, steps: int = 15
) -> Stochastic:
    """C-DPO's loop is dual descent with a constant step; its slacks come from 16 draws a prompt."""
    config = CdpoConfig(
        beta=problem.beta, iterations=steps, dual_rate=eta, lam_init=0.0, lam_max_change=1e9, lam_max=1e9
    )
    world = ExactWorld(problem, config, update, slack_draws=16, seed=1)
    cdpo.loop(world, config)
    square, eps_app, points = 0.0, 0.0, []
    for iterate in world.history:
        pi = problem.policy_PY(iterate.theta)
        spread = (pi[..., None] * problem.shifted_PYJ.square()).sum(1) - (
            pi[..., None] * problem.shifted_PYJ
        ).sum(1).square()
        exact = problem.slack_J(iterate.theta)
        square = max(square, float(exact.square().sum() + spread.sum() / (16 * len(pi) ** 2)))
        score = problem.reward_PY + problem.utility_PYJ @ iterate.lam_J
        target = Target(lam_J=iterate.lam_J, score_PG=score, coefficient=problem.beta, start=iterate.theta)
        reached = problem.lagrangian(iterate.theta, iterate.lam_J)
        highest = (
            reached if update is maximiser else problem.lagrangian(maximiser(world, target, 0), iterate.lam_J)
        )
        eps_app = max(eps_app, highest - reached)
        points.append((highest, iterate))
    highest, iterate = min(points, key=lambda pair: pair[0])
    lam = iterate.lam_J.numpy()
    best = at(optima, lam, max(highest, optima.dual_in_class(lam)))
    policy = Measured(
        lam=best.lam,
        value=problem.value(iterate.theta),
        slack=problem.slack_J(iterate.theta).numpy(),
        bend=0.0,
    )
    return Stochastic(
        kind=kind, eta=eta, steps=steps, square=square, eps_app=eps_app, best=best, policy=policy,
        start_distance=float(np.linalg.norm(in_class.lam)),
    )  # fmt: skip


def distinct(found: list[tuple[float, torch.Tensor]]) -> int:
    """How many different local maxima there are among (value, theta)."""
    values = np.array([value for value, _ in found])
    return 1 + int((-np.diff(values) > 1e-7).sum())


def at(optima: Optima, lam: np.ndarray, dual_in_class: float) -> Point:
    return Point(
        lam=lam,
        dual=optima.dual(lam),
        dual_in_class=dual_in_class,
        nu=optima.gap_of_class(optima.tilted(lam)),
    )


def tightened(optima: Optima, nu: float, largest: float) -> np.ndarray | None:
    """lambda*_nu = argmin D(lambda) - M nu |lambda|_1 with nu the class's gap at its own policy; None where the class has no policy with
    E h >= M nu (assumption A4)."""
    for _ in range(20):
        lam = optima.solve_dual(optima.M * nu) if largest > optima.M * nu else None
        if lam is None:
            return None
        there = optima.gap_of_class(optima.tilted(lam))
        if there <= nu * (1 + 1e-6):
            return lam
        nu = there
    return None


def bend(optima: Optima, lam: np.ndarray, off: np.ndarray, gap: float) -> float:
    """Largest second derivative of D along lam + t v, v the direction of `off`, for t up to sqrt(2 gap / that): the proof of Lemma 5 needs
    L_D no further."""
    length = np.linalg.norm(off)
    if length < 1e-12 or gap <= 0:
        return float(np.linalg.eigvalsh(optima.hessian(lam))[-1])
    v, largest, t = off / length, 0.0, 0.0
    for _ in range(4000):
        largest = max(largest, float(v @ optima.hessian(lam + t * v) @ v))
        if t * t * largest >= 2 * gap:
            break
        t += 0.02 * math.sqrt(2 * gap / largest)
    return largest


def largest_curvature(optima: Optima, lams: list[np.ndarray], scale: float) -> float:
    """Largest eigenvalue of D's Hessian at 300 points of the box around all lams, one unit wider."""
    low, high = np.min(lams, axis=0) - 1 / scale, np.max(lams, axis=0) + 1 / scale
    points = np.random.default_rng(0).uniform(low, high, (300, len(low)))
    return float(max(np.linalg.eigvalsh(optima.hessian(p))[-1] for p in (*points, *lams)))


def smallest_on_segment(optima: Optima, a: np.ndarray, b: np.ndarray) -> float:
    """Smallest eigenvalue of D's Hessian at 33 points between a and b."""
    return float(min(np.linalg.eigvalsh(optima.hessian(a + t * (b - a)))[0] for t in np.linspace(0, 1, 33)))


def taylor(optima: Optima, lam: np.ndarray, step: np.ndarray, sign: int = 1) -> float:
    """log2 of (error of CAN's second-order expansion at 0.4 steps / at 0.2 steps): 3 for an error of third order."""

    def error(t: float) -> float:
        d = t * step
        return abs(
            optima.dual(lam + d)
            - optima.dual(lam)
            - sign * optima.tilted(lam).slack @ d
            - d @ optima.hessian(lam) @ d / 2
        )

    return math.log2(error(0.4) / error(0.2))


def chord(optima: Optima, lams: list[np.ndarray]) -> float:
    """Largest D(middle) - mean of D at both ends, over 100 random segments in the box around all lams: at most 0 for a convex D."""
    rng, J = np.random.default_rng(3), len(lams[0])
    a, b = rng.uniform(np.min(lams, axis=0), np.max(lams, axis=0), (2, 100, J))
    return max(
        optima.dual((x + y) / 2) - (optima.dual(x) + optima.dual(y)) / 2 for x, y in zip(a, b, strict=True)
    )


def descend(optima: Optima, lam_star: np.ndarray, scale: float, printed_step: float) -> Descent:
    """By the engine's dual step without its cap. scale: of the utilities, as in `measure`."""
    start, tau = 3 * lam_star, float(np.linalg.norm(lam_star)) / 2
    line = [lam_star + t * (start - lam_star) for t in np.linspace(0, 1, 21)]
    around = [lam_star + tau * u for u in np.vstack([np.eye(len(start)), -np.eye(len(start))])]
    top = largest_curvature(optima, [*line, *around], scale)
    mu = min(
        smallest_on_segment(optima, lam_star, p)
        for p in (*around, lam_star + tau * (start - lam_star) / np.linalg.norm(start - lam_star))
    )

    def steps(size: float) -> int:
        lam = torch.tensor(start)
        for n in range(5000):
            if np.linalg.norm(lam.numpy() - lam_star) <= 1e-6 / scale:
                return n
            lam = dual.step(lam, torch.tensor(optima.tilted(lam.numpy()).slack), size, max_change=math.inf)
        return 5000

    return Descent(
        steps=steps(1 / top), steps_as_printed=steps(printed_step), top=top, mu=mu, log=max(math.log(tau * scale / 1e-6), 0),
        distance=float((np.linalg.norm(start - lam_star) / tau) ** 2),
    )  # fmt: skip
