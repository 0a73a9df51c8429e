"""The papers' statements on one exact problem: everything measured, then left and right side of each bound.

Numbers of lemmas and theorems are those of arXiv 2505.19387 (CAID); "CAN" is arXiv 2405.19544. Forms of a statement:

- printed: the bound as the paper has it, with B(lambda) = (M + beta + M |lambda|_1) nu.
- corrected: the bound that follows from the paper's own proof, where the printed one differs.
- sharp: with the measured gap D - D_p in place of B, or an order or equality that the proofs rest on. The printed bounds are loose by one
  to two orders of magnitude, so only the sharp forms can fail when something is broken.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.theory.exact_stages import ExactWorld, Update, local_maxima, make, maximiser, soft
from bench.theory.optima import Optima, Policy
from engine import caid, cdpo, dual, mocan
from engine.config import CaidConfig, CdpoConfig, MocanConfig
from engine.records import Target

# What scipy's searches leave of an exact equality.
ROUNDING = 1e-7


@dataclass(frozen=True, kw_only=True)
class Point:
    """One lambda: the dual over all policies and over the class, and how far pi*(lambda) is from the class.

    The proofs use assumption A3 at pi*(lambda) only, so nu is measured there; its supremum over all policies would be near 2.
    """

    lam: np.ndarray
    dual: float
    dual_in_class: float
    nu: float

    @property
    def gap(self) -> float:
        return self.dual - self.dual_in_class


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A policy in a problem. bend: largest curvature of D from lambda in the direction in which the policy's E h is off."""

    lam: np.ndarray
    value: float  # E r - beta KL
    slack: np.ndarray  # E h
    bend: float


@dataclass(frozen=True, kw_only=True)
class Stochastic:
    """A run of dual descent with constant step, noisy slacks and policies that may miss the maximiser."""

    kind: str
    eta: float
    steps: int
    square: float  # S^2: largest E |u|^2 seen
    eps_app: float  # largest D_p(lambda) - L(policy, lambda) seen
    best: Point
    policy: Measured
    start_distance: float  # |lambda_0 - lambda*_p|


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the bounds need of one problem."""

    J: int
    eps: float
    seed: int
    beta: float
    M: float
    L: float  # L_D: largest eigenvalue of D's Hessian in a box around every lambda used
    mu: float  # mu*_D: smallest one on the segments from lambda* to lambda*_p and to the best iterates
    primal: float  # P*
    kl: float  # of pi* to the reference
    primal_in_class: float  # P_p*
    kink: bool
    assumptions: dict[str, bool]  # A1 to A7 but A3, which defines nu
    star: Point
    in_class: Point  # at lambda*_p
    tighter: Point | None  # at lambda*_nu; None where assumption A4 fails
    others: tuple[Point, ...]  # at 0 and 3 lambda*
    optimum: Measured  # pi*
    untrained: Measured  # the class's maximiser at lambda = 0
    tilted_slack: np.ndarray  # E h under pi*(lambda*_p)
    multi_shot: Measured | None  # the class's maximiser at lambda*_p, by scipy; None at a kink, where it is not unique
    caid_off: tuple[float, float]  # CAID's last iterate from lambda*: |lambda - lambda*_p| and the slack it misses 0 by (largest entries)
    one_shot: Measured  # MoCAN's policy
    off_along_h: Measured  # pi*(lambda* + small): off from pi* along h alone, where the proofs' inequalities are tight
    off_gap: float  # D(lambda*) - L of that policy
    stochastic: tuple[Stochastic, ...]
    G: float  # sup |g|, per prompt centred at the middle of its range
    taylor: float  # error of CAN's expansion about 0 at a step, over that at half of it, on the base 2
    taylor_of_wrong_sign: float  # the same with the gradient's sign flipped
    chord: float  # largest D(middle) - mean of D at both ends, over random segments
    descent: "Descent"
    maxima: int  # largest number of distinct local maxima that the starts of a maximisation found


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Projected gradient from 3 lambda*, CAN's Theorem 2; tau is |lambda*| / 2."""

    steps: int  # to 1e-6, with step 1 / top
    steps_as_printed: int  # with step beta / G
    top: float  # largest curvature on the path
    mu: float  # smallest one within tau of lambda*
    log: float  # max(ln(tau / 1e-6), 0)
    distance: float  # (|lambda_0 - lambda*| / tau)^2


@dataclass(frozen=True)
class Bound:
    """left <= right, up to rounding."""

    name: str
    form: str
    left: float
    right: float

    @property
    def holds(self) -> bool:
        return bool(self.left <= self.right + ROUNDING)

    @property
    def ratio(self) -> float:
        """left / right; nan where both are rounding."""
        return self.left / self.right if self.right > 10 * ROUNDING else math.nan


def measure(seed: int, J: int, eps: float, *, scale: float = 1.0, beta: float = 1.0, b: float | tuple[float, ...] = 0.3) -> Facts:
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
        return Measured(lam=p.lam, value=policy.value, slack=policy.slack, bend=bend(optima, p.lam, off, p.dual - policy.lagrangian(p.lam)))

    star = point(lam_star)
    in_class = at(optima, lam_p, dual_p)
    others = (point(0 * lam_star), point(3 * lam_star))
    config = CaidConfig(beta=problem.beta, iterations=24, dual_step=1.0, lam_max=1e3)
    world = ExactWorld(problem, config, maximiser)
    _, lam = caid.loop(world, config)
    slack = world.history[-1].slack_J
    caid_off = float(np.abs(lam.numpy() - lam_p).max()), float(torch.where(lam > 0, slack, slack.clamp(max=0)).abs().max())
    maxima = max(distinct(local_maxima(world, target)) for target, _ in world.fitted[-3:])
    world = ExactWorld(problem, MocanConfig(beta=problem.beta), maximiser)
    theta, _ = mocan.loop(world, world.config)
    one = measured(optima.policy(problem.log_ratio_PY(theta).numpy()), star)
    hessian = optima.hessian(lam_star)
    top, axes = np.linalg.eigh(hessian)
    runs = tuple(stochastic(problem, optima, in_class, float(0.3 / top[-1]), kind, update) for kind, update in UPDATES.items())

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
        problem.utility_PYJ.numpy() - (problem.utility_PYJ.amax(1, keepdim=True) + problem.utility_PYJ.amin(1, keepdim=True)).numpy() / 2
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


UPDATES: dict[str, Update] = {"exact maximiser": maximiser, "soft labels": soft}


def stochastic(problem, optima: Optima, in_class: Point, eta: float, kind: str, update: Update, steps: int = 15) -> Stochastic:
    """C-DPO's loop is dual descent with a constant step; its slacks come from 16 draws a prompt."""
    config = CdpoConfig(beta=problem.beta, iterations=steps, dual_rate=eta, lam_init=0.0, lam_max_change=1e9, lam_max=1e9)
    world = ExactWorld(problem, config, update, slack_draws=16, seed=1)
    cdpo.loop(world, config)
    square, eps_app, points = 0.0, 0.0, []
    for iterate in world.history:
        pi = problem.policy_PY(iterate.theta)
        spread = (pi[..., None] * problem.shifted_PYJ.square()).sum(1) - (pi[..., None] * problem.shifted_PYJ).sum(1).square()
        exact = problem.slack_J(iterate.theta)
        square = max(square, float(exact.square().sum() + spread.sum() / (16 * len(pi) ** 2)))
        score = problem.reward_PY + problem.utility_PYJ @ iterate.lam_J
        target = Target(lam_J=iterate.lam_J, score_PG=score, coefficient=problem.beta, start=iterate.theta)
        reached = problem.lagrangian(iterate.theta, iterate.lam_J)
        highest = reached if update is maximiser else problem.lagrangian(maximiser(world, target, 0), iterate.lam_J)
        eps_app = max(eps_app, highest - reached)
        points.append((highest, iterate))
    highest, iterate = min(points, key=lambda pair: pair[0])
    lam = iterate.lam_J.numpy()
    best = at(optima, lam, max(highest, optima.dual_in_class(lam)))
    policy = Measured(lam=best.lam, value=problem.value(iterate.theta), slack=problem.slack_J(iterate.theta).numpy(), bend=0.0)
    return Stochastic(
        kind=kind, eta=eta, steps=steps, square=square, eps_app=eps_app, best=best, policy=policy,
        start_distance=float(np.linalg.norm(in_class.lam)),
    )  # fmt: skip


def distinct(found: list[tuple[float, torch.Tensor]]) -> int:
    """How many different local maxima there are among (value, theta)."""
    values = np.array([value for value, _ in found])
    return 1 + int((-np.diff(values) > 1e-7).sum())


def at(optima: Optima, lam: np.ndarray, dual_in_class: float) -> Point:
    return Point(lam=lam, dual=optima.dual(lam), dual_in_class=dual_in_class, nu=optima.gap_of_class(optima.tilted(lam)))


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
        return abs(optima.dual(lam + d) - optima.dual(lam) - sign * optima.tilted(lam).slack @ d - d @ optima.hessian(lam) @ d / 2)

    return math.log2(error(0.4) / error(0.2))


def chord(optima: Optima, lams: list[np.ndarray]) -> float:
    """Largest D(middle) - mean of D at both ends, over 100 random segments in the box around all lams: at most 0 for a convex D."""
    rng, J = np.random.default_rng(3), len(lams[0])
    a, b = rng.uniform(np.min(lams, axis=0), np.max(lams, axis=0), (2, 100, J))
    return max(optima.dual((x + y) / 2) - (optima.dual(x) + optima.dual(y)) / 2 for x, y in zip(a, b, strict=True))


def descend(optima: Optima, lam_star: np.ndarray, scale: float, printed_step: float) -> Descent:
    """By the engine's dual step without its cap. scale: of the utilities, as in `measure`."""
    start, tau = 3 * lam_star, float(np.linalg.norm(lam_star)) / 2
    line = [lam_star + t * (start - lam_star) for t in np.linspace(0, 1, 21)]
    around = [lam_star + tau * u for u in np.vstack([np.eye(len(start)), -np.eye(len(start))])]
    top = largest_curvature(optima, [*line, *around], scale)
    mu = min(
        smallest_on_segment(optima, lam_star, p) for p in (*around, lam_star + tau * (start - lam_star) / np.linalg.norm(start - lam_star))
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


def bounds(f: Facts) -> list[Bound]:
    """Left and right side of every statement that applies to this problem."""

    def B(*points: Point) -> float:
        lam, nu = np.max([p.lam for p in points], axis=0), max(p.nu for p in points)
        return (f.M + f.beta + f.M * np.abs(lam).sum()) * nu

    def norm1(lam: np.ndarray) -> float:
        return float(np.abs(lam).sum())

    P, D_p, p = f.primal, f.in_class.dual_in_class, f.in_class
    L_hat = f.L + f.L**2 / f.mu
    # Lemma 4 and the theorems that rest on it compare in norm; the gap at lambda*_p stands for B there.
    found = [
        Bound("order: P_p* <= D_p*", "sharp", f.primal_in_class, D_p),
        Bound("order: D_p* <= P*", "sharp", D_p, P),
        Bound("duality: |D* - P*| = 0", "sharp", abs(f.star.dual - P), 0.0),
        Bound("gap(lambda*) <= P* - D_p*", "sharp", f.star.gap, P - D_p),
        Bound("Thm 2: P* - D_p* <= gap(lambda*_p)", "sharp", P - D_p, p.gap),
        Bound("Thm 2: P* - D_p* <= B(lambda*_p)", "printed", P - D_p, B(p)),
        Bound("Lemma 4 with D(lambda*_p) - D*", "sharp", *_lengths(f, p.dual - f.star.dual)),
        Bound("Lemma 4 with gap(lambda*_p)", "sharp", *_lengths(f, p.gap)),
        Bound("Lemma 4 with B", "printed", *_lengths(f, B(p))),
    ]
    off = f.off_along_h
    u, r = float(np.linalg.norm(off.slack - f.optimum.slack)), abs(off.value - f.optimum.value)
    width = math.sqrt(2 * off.bend * f.off_gap)
    found += [
        Bound("Lemma 5 off along h alone", "sharp", u**2, width**2),
        Bound("Thm 4, R-OPT, off along h alone", "printed, gap for B", r, width + f.off_gap),
        Bound("Thm 4, R-OPT, off along h alone, with |lambda*|_1", "sharp", r, norm1(f.star.lam) * width + f.off_gap),
    ]
    points = [f.star, p, *f.others, *([] if f.tighter is None else [f.tighter]), *(s.best for s in f.stochastic)]
    worst = max(points, key=lambda x: x.gap / max(B(x), 1e-300))
    found += [
        Bound("Lemma 3: 0 <= D - D_p", "sharp", max(-x.gap for x in points), 0.0),
        Bound("Lemma 3: D - D_p <= B", "printed", worst.gap, B(worst)),
    ]
    if f.tighter is not None:
        found += [
            Bound("Thm 1: D_p* - P_p* <= B(lambda*_nu)", "printed", D_p - f.primal_in_class, B(f.tighter)),
            Bound("Thm 2: D_p* - P* <= B(lambda*_nu)", "printed", D_p - P, B(f.tighter)),
        ]
    if (m := f.multi_shot) is not None:
        off = float(np.linalg.norm(m.slack - f.tilted_slack))
        u, r = float(np.abs(m.slack - f.optimum.slack).max()), abs(m.value - f.optimum.value)
        found += [
            Bound("Lemma 5 with gap(lambda*_p)", "sharp", off**2, 2 * m.bend * p.gap),
            Bound("Lemma 5 with B", "printed", off**2, 2 * f.L * B(p)),
            Bound(
                "Thm 3, U-OPT, with gap", "sharp", u, math.sqrt(2 * f.L * max(p.gap, 0)) + f.L * float(np.linalg.norm(p.lam - f.star.lam))
            ),
            Bound("Thm 3, U-OPT", "printed", u, 2 * math.sqrt(L_hat * B(p))),
            Bound("Thm 3: R-OPT = P* - D_p*", "sharp", abs(r - (P - D_p)), 1e-5),
        ]
        if f.tighter is not None:
            found.append(Bound("Thm 3, R-OPT", "printed", r, 2 * norm1(p.lam) * math.sqrt(L_hat * B(p)) + B(f.tighter)))
    one = f.one_shot
    u, r = float(np.abs(one.slack - f.optimum.slack).max()), abs(one.value - f.optimum.value)
    width = math.sqrt(2 * f.L * max(f.star.gap, 0))
    found += [
        Bound("Lemma 5 at lambda* with gap", "sharp", float(((one.slack - f.optimum.slack) ** 2).sum()), 2 * one.bend * f.star.gap),
        Bound("Thm 4, U-OPT, with gap", "sharp", u, width),
        Bound("Thm 4, U-OPT", "printed", u, math.sqrt(2 * f.L * B(f.star))),
        Bound("Thm 4, R-OPT, with gap", "printed, gap for B", r, width + f.star.gap),
        Bound("Thm 4, R-OPT, with gap and |lambda*|_1", "sharp", r, norm1(f.star.lam) * width + f.star.gap),
        Bound("Thm 4, R-OPT", "printed", r, math.sqrt(2 * f.L * B(f.star)) + B(f.star)),
        Bound("Thm 4, R-OPT, with |lambda*|_1", "corrected", r, norm1(f.star.lam) * math.sqrt(2 * f.L * B(f.star)) + B(f.star)),
    ]
    for s in f.stochastic:
        noise = s.eta * s.square / 2 + s.eps_app
        b = B(s.best)
        u, r = float(np.abs(s.policy.slack - f.optimum.slack).max()), abs(s.policy.value - f.optimum.value)
        found += [
            Bound(
                f"Lemma 8 after {s.steps} steps, {s.kind}", "sharp", s.best.dual_in_class - D_p,
                noise + s.start_distance**2 / (2 * s.eta * s.steps),
            ),
            Bound(f"Thm 5, lower side, with gap, {s.kind}", "sharp", P - s.best.dual_in_class, s.best.gap),
            Bound(f"Thm 5, lower side, {s.kind}", "printed", P - s.best.dual_in_class, b),
            Bound(f"Thm 6, U-OPT, {s.kind}", "printed", u, 2 * math.sqrt(L_hat * b + 2 / f.mu * noise)),
            Bound(f"Thm 6, U-OPT, {s.kind}", "corrected", u, 2 * math.sqrt(L_hat * b + f.L**2 / f.mu * noise)),
        ]  # fmt: skip
        if f.tighter is not None:
            far = B(f.tighter, s.best)
            found += [
                Bound(f"Thm 5, upper side, {s.kind}", "printed", s.best.dual_in_class - P, noise + B(f.tighter)),
                Bound(f"Thm 6, R-OPT, {s.kind}", "printed", r, 2 * norm1(s.best.lam) * math.sqrt(L_hat * b + 2 / f.mu * noise) + far),
                Bound(
                    f"Thm 6, R-OPT, {s.kind}", "corrected", r, 2 * norm1(s.best.lam) * math.sqrt(L_hat * b + f.L**2 / f.mu * noise) + far
                ),
            ]
    d = f.descent
    found += [
        Bound("CAN Thm 1: D is convex", "sharp", f.chord, 0.0),
        Bound("CAN Thm 1: 3 - order of the error", "sharp", 3 - f.taylor, 0.35),
        Bound("CAN Thm 1: largest curvature <= G / beta", "printed", f.L, f.G / f.beta),
        Bound("CAN Thm 1: largest curvature <= G^2 / beta", "corrected", f.L, f.G**2 / f.beta),
        Bound("CAN Thm 2: steps to 1e-6", "printed", d.steps_as_printed, f.G / f.beta / d.mu * (2 * d.log + d.distance)),
        Bound("CAN Thm 2: steps to 1e-6", "corrected", d.steps, d.top / d.mu * (2 * d.log + d.distance)),
    ]
    return found


def _lengths(f: Facts, gap: float) -> tuple[float, float]:
    return float(np.linalg.norm(f.in_class.lam - f.star.lam)), math.sqrt(2 / f.mu * max(gap, 0))


def _moved(f: Facts, name: str, **changes) -> Facts:
    return replace(f, **{name: replace(getattr(f, name), **changes)})


def _runs(f: Facts, change: Callable[[Stochastic], Stochastic]) -> Facts:
    return replace(f, stochastic=tuple(change(run) for run in f.stochastic))


def _policies(f: Facts, change: Callable[[Measured], Measured]) -> Facts:
    return replace(f, one_shot=change(f.one_shot), multi_shot=None if f.multi_shot is None else change(f.multi_shot))


def _half_gap(point: Point) -> Point:
    return replace(point, dual=point.dual_in_class + point.gap / 2)


# The same facts with one sign or factor wrong. Together they turn every statement red but those of `LOOSE`.
BROKEN: dict[str, Callable[[Facts], Facts]] = {
    "the KL's sign in P*": lambda f: replace(f, primal=f.primal + 2 * f.beta * f.kl),
    "the KL twice in P*": lambda f: replace(f, primal=f.primal - f.beta * f.kl),
    "P_p* without the KL's weight": lambda f: replace(f, primal_in_class=f.primal_in_class + f.beta * f.kl),
    "D_p* lower by a tenth of the gap": lambda f: _moved(f, "in_class", dual_in_class=f.in_class.dual_in_class - f.in_class.gap / 10),
    "gap(lambda*_p) halved": lambda f: replace(f, in_class=_half_gap(f.in_class)),
    "gap(lambda*) doubled": lambda f: _moved(f, "star", dual_in_class=f.star.dual - 2 * f.star.gap),
    "the gap's sign at lambda*": lambda f: _moved(f, "star", dual_in_class=f.star.dual + f.star.gap),
    "mu*_D 1.5 times too large": lambda f: replace(f, mu=1.5 * f.mu),
    "lambda*_p 10 times too large": lambda f: _moved(f, "in_class", lam=10 * f.in_class.lam),
    "the factor 2 of Lemma 5 left out": lambda f: _moved(f, "off_along_h", bend=f.off_along_h.bend / 2),
    "policies that have not seen lambda": lambda f: _policies(f, lambda p: replace(p, value=f.untrained.value, slack=f.untrained.slack)),
    "the KL's sign in the policies' value": lambda f: _policies(f, lambda p: replace(p, value=p.value + 2 * f.beta * f.kl)),
    "the dual step's sign, which keeps lambda at 0": lambda f: _runs(f, lambda run: replace(run, best=f.others[0])),
    "the gap of the runs' best iterate halved": lambda f: _runs(f, lambda run: replace(run, best=_half_gap(run.best))),
    "the sign of D": lambda f: replace(f, chord=-f.chord),
    "the Hessian weighted by pi / reference": lambda f: replace(f, L=10 * f.L),
    "the gradient's sign in CAN's expansion": lambda f: replace(f, taylor=f.taylor_of_wrong_sign),
    "a tenth of CAN's dual step": lambda f: _moved(
        f, "descent", steps=10 * f.descent.steps, steps_as_printed=10 * f.descent.steps_as_printed
    ),
}  # fmt: skip

# Cannot fail: B is so wide that no break above reaches it.
LOOSE = (
    "Thm 2: D_p* - P* <= B(lambda*_nu)", "Lemma 3: D - D_p <= B", "Thm 1: D_p* - P_p* <= B(lambda*_nu)", "Lemma 5 with B", "Thm 3, U-OPT",
    "Thm 3, R-OPT", "Thm 4, U-OPT", "Thm 4, R-OPT", "Thm 4, R-OPT, with |lambda*|_1",
    *(f"{name}, {kind}" for kind in UPDATES for name in ("Thm 5, upper side", "Thm 6, U-OPT", "Thm 6, R-OPT")),
)  # fmt: skip


def flipped_sign_of_the_slack(seed: int) -> tuple[float, float]:
    """(|slack| after 12 iterations of CAID from 3 lambda*, the same where the world returns the slack with the wrong sign)."""
    problem = make(seed, eps=0.1)
    config = CaidConfig(beta=problem.beta, iterations=12, dual_step=1.0)
    ends = []
    for sign in (1, -1):
        world = ExactWorld(problem, config, maximiser)
        world.lam_init = 3 * world.solve_dual().lam
        right = world.measure_slack
        world.measure_slack = lambda *a, right=right, sign=sign: replace(slack := right(*a), slack_J=sign * slack.slack_J)
        caid.loop(world, config)
        ends.append(float(world.history[-1].slack_J.abs().max()))
    return ends[0], ends[1]
