"""The papers' statements on one exact problem: left and right side of each bound.

Numbers of lemmas and theorems are those of arXiv 2505.19387 (CAID); "CAN" is arXiv 2405.19544.
A statement comes in these forms:

- printed: the bound as the paper has it, with B(lambda) = (M + beta + M |lambda|_1) nu.
- corrected: the bound that follows from the paper's proof, where the printed one differs.
- sharp: with the measured gap D - D_p in place of B, or an order or equality that the proofs rest on.
  The printed bounds are loose by one to two orders of magnitude, so only the sharp forms can fail
  when something is broken.
- printed, gap for B: a printed bound with the measured gap, which is known to fail.
"""

import math
from dataclasses import dataclass

import numpy as np

from bench.theory.facts import ROUNDING, Facts, Measured, Point, Stochastic


@dataclass(frozen=True)
class Bound:
    """left <= right, up to rounding."""

    name: str
    form: str
    left: float
    right: float

    @property
    def holds(self) -> bool:
        """Returns whether left <= right, up to rounding."""
        return bool(self.left <= self.right + ROUNDING)

    @property
    def ratio(self) -> float:
        """Returns left / right, nan where both are rounding."""
        return self.left / self.right if self.right > 10 * ROUNDING else math.nan


def all_bounds(f: Facts) -> list[Bound]:
    """Returns left and right side of every statement that applies to this problem."""
    bounds = [
        *_values(f),
        *_off_along_h(f),
        *_lemma_3(f),
        *_below_the_class(f),
        *_multi_shot(f),
        *_one_shot(f),
    ]
    for run in f.stochastic:
        bounds += _stochastic(f, run)
    return [*bounds, *_can(f)]


def _B(f: Facts, *points: Point) -> float:
    """Returns B at the largest lambda and nu of the points."""
    lam, nu = np.max([p.lam for p in points], axis=0), max(p.nu for p in points)
    return (f.M + f.beta + f.M * np.abs(lam).sum()) * nu


def _L_hat(f: Facts) -> float:
    return f.L + f.L**2 / f.mu


def _norm1(lam: np.ndarray) -> float:
    return float(np.abs(lam).sum())


def _errors(f: Facts, policy: Measured) -> tuple[float, float]:
    """Returns U-OPT and R-OPT: how far a policy's slack (largest entry) and value are from the optimum's."""
    off = float(np.abs(policy.slack - f.optimum.slack).max())
    return off, abs(policy.value - f.optimum.value)


def _values(f: Facts) -> list[Bound]:
    """Orders the optimal values, and bounds how far lambda*_p is from lambda*."""
    P, D_p, p = f.primal, f.in_class.dual_in_class, f.in_class
    away = float(np.linalg.norm(p.lam - f.star.lam))

    def lemma_4(gap: float) -> float:
        return math.sqrt(2 / f.mu * max(gap, 0))

    # Lemma 4 and the theorems that rest on it compare in norm; the gap at lambda*_p stands for B in it.
    return [
        Bound("order: P_p* <= D_p*", "sharp", f.primal_in_class, D_p),
        Bound("order: D_p* <= P*", "sharp", D_p, P),
        Bound("duality: |D* - P*| = 0", "sharp", abs(f.star.dual - P), 0.0),
        Bound("gap(lambda*) <= P* - D_p*", "sharp", f.star.gap, P - D_p),
        Bound("Thm 2: P* - D_p* <= gap(lambda*_p)", "sharp", P - D_p, p.gap),
        Bound("Thm 2: P* - D_p* <= B(lambda*_p)", "printed", P - D_p, _B(f, p)),
        Bound("Lemma 4 with D(lambda*_p) - D*", "sharp", away, lemma_4(p.dual - f.star.dual)),
        Bound("Lemma 4 with gap(lambda*_p)", "sharp", away, lemma_4(p.gap)),
        Bound("Lemma 4 with B", "printed", away, lemma_4(_B(f, p))),
    ]


def _off_along_h(f: Facts) -> list[Bound]:
    """Bounds a policy that is off along h alone, where the proofs' inequalities are tight."""
    off = f.off_along_h
    u, r = float(np.linalg.norm(off.slack - f.optimum.slack)), abs(off.value - f.optimum.value)
    width = math.sqrt(2 * off.bend * f.off_gap)
    norm = _norm1(f.star.lam)
    name = "Thm 4, R-OPT, off along h alone"
    return [
        Bound("Lemma 5 off along h alone", "sharp", u**2, width**2),
        Bound(name, "printed, gap for B", r, width + f.off_gap),
        Bound(f"{name}, with |lambda*|_1", "sharp", r, norm * width + f.off_gap),
    ]


def _lemma_3(f: Facts) -> list[Bound]:
    """Bounds D - D_p at every lambda of the problem, at the worst of them."""
    tighter = [] if f.tighter is None else [f.tighter]
    points = [f.star, f.in_class, *f.others, *tighter, *(run.best for run in f.stochastic)]
    worst = max(points, key=lambda x: x.gap / max(_B(f, x), 1e-300))
    return [
        Bound("Lemma 3: 0 <= D - D_p", "sharp", max(-x.gap for x in points), 0.0),
        Bound("Lemma 3: D - D_p <= B", "printed", worst.gap, _B(f, worst)),
    ]


def _below_the_class(f: Facts) -> list[Bound]:
    """Bounds what the class loses, where assumption A4 holds."""
    if f.tighter is None:
        return []
    D_p, B = f.in_class.dual_in_class, _B(f, f.tighter)
    return [
        Bound("Thm 1: D_p* - P_p* <= B(lambda*_nu)", "printed", D_p - f.primal_in_class, B),
        Bound("Thm 2: D_p* - P* <= B(lambda*_nu)", "printed", D_p - f.primal, B),
    ]


def _multi_shot(f: Facts) -> list[Bound]:
    """Bounds the class's maximiser at lambda*_p."""
    if f.multi_shot is None:
        return []
    policy, p, B = f.multi_shot, f.in_class, _B(f, f.in_class)
    off = float(np.linalg.norm(policy.slack - f.tilted_slack))
    u, r = _errors(f, policy)
    wide = math.sqrt(2 * f.L * max(p.gap, 0)) + f.L * float(np.linalg.norm(p.lam - f.star.lam))
    bounds = [
        Bound("Lemma 5 with gap(lambda*_p)", "sharp", off**2, 2 * policy.bend * p.gap),
        Bound("Lemma 5 with B", "printed", off**2, 2 * f.L * B),
        Bound("Thm 3, U-OPT, with gap", "sharp", u, wide),
        Bound("Thm 3, U-OPT", "printed", u, 2 * math.sqrt(_L_hat(f) * B)),
        Bound("Thm 3: R-OPT = P* - D_p*", "sharp", abs(r - (f.primal - p.dual_in_class)), 1e-5),
    ]
    if f.tighter is not None:
        wide = 2 * _norm1(p.lam) * math.sqrt(_L_hat(f) * B) + _B(f, f.tighter)
        bounds.append(Bound("Thm 3, R-OPT", "printed", r, wide))
    return bounds


def _one_shot(f: Facts) -> list[Bound]:
    """Bounds MoCAN's policy."""
    u, r = _errors(f, f.one_shot)
    square = float(((f.one_shot.slack - f.optimum.slack) ** 2).sum())
    width, norm, B = math.sqrt(2 * f.L * max(f.star.gap, 0)), _norm1(f.star.lam), _B(f, f.star)
    wide = math.sqrt(2 * f.L * B)
    return [
        Bound("Lemma 5 at lambda* with gap", "sharp", square, 2 * f.one_shot.bend * f.star.gap),
        Bound("Thm 4, U-OPT, with gap", "sharp", u, width),
        Bound("Thm 4, U-OPT", "printed", u, wide),
        Bound("Thm 4, R-OPT, with gap", "printed, gap for B", r, width + f.star.gap),
        Bound("Thm 4, R-OPT, with gap and |lambda*|_1", "sharp", r, norm * width + f.star.gap),
        Bound("Thm 4, R-OPT", "printed", r, wide + B),
        Bound("Thm 4, R-OPT, with |lambda*|_1", "corrected", r, norm * wide + B),
    ]


def _stochastic(f: Facts, run: Stochastic) -> list[Bound]:
    """Bounds the best iterate of a run of dual descent with noise."""
    kind, best, P = run.kind, run.best.dual_in_class, f.primal
    noise = run.eta * run.square / 2 + run.eps_app
    after = noise + run.start_distance**2 / (2 * run.eta * run.steps)
    B = _B(f, run.best)
    u, r = _errors(f, run.policy)
    printed = math.sqrt(_L_hat(f) * B + 2 / f.mu * noise)
    corrected = math.sqrt(_L_hat(f) * B + f.L**2 / f.mu * noise)
    bounds = [
        Bound(f"Lemma 8 after {run.steps} steps, {kind}", "sharp", best - f.in_class.dual_in_class, after),
        Bound(f"Thm 5, lower side, with gap, {kind}", "sharp", P - best, run.best.gap),
        Bound(f"Thm 5, lower side, {kind}", "printed", P - best, B),
        Bound(f"Thm 6, U-OPT, {kind}", "printed", u, 2 * printed),
        Bound(f"Thm 6, U-OPT, {kind}", "corrected", u, 2 * corrected),
    ]
    if f.tighter is not None:
        far, norm = _B(f, f.tighter, run.best), _norm1(run.best.lam)
        bounds += [
            Bound(f"Thm 5, upper side, {kind}", "printed", best - P, noise + _B(f, f.tighter)),
            Bound(f"Thm 6, R-OPT, {kind}", "printed", r, 2 * norm * printed + far),
            Bound(f"Thm 6, R-OPT, {kind}", "corrected", r, 2 * norm * corrected + far),
        ]
    return bounds


def _can(f: Facts) -> list[Bound]:
    """Checks CAN's Theorems 1 and 2: D is convex and smooth, and gradient descent converges."""
    d = f.descent
    path = 2 * d.log + d.distance
    printed = f.G / f.beta / d.mu * path
    return [
        Bound("CAN Thm 1: D is convex", "sharp", f.chord, 0.0),
        Bound("CAN Thm 1: 3 - order of the error", "sharp", 3 - f.taylor, 0.35),
        Bound("CAN Thm 1: largest curvature <= G / beta", "printed", f.L, f.G / f.beta),
        Bound("CAN Thm 1: largest curvature <= G^2 / beta", "corrected", f.L, f.G**2 / f.beta),
        Bound("CAN Thm 2: steps to 1e-6", "printed", d.steps_as_printed, printed),
        Bound("CAN Thm 2: steps to 1e-6", "corrected", d.steps, d.top / d.mu * path),
    ]
