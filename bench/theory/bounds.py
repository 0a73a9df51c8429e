"""The papers' statements on one exact problem: everything measured, then left and right side of each bound.

Numbers of lemmas and theorems are those of arXiv 2505.19387 (CAID); "CAN" is arXiv 2405.19544. Forms of a statement:

- printed: the bound as the paper has it, with B(lambda) = (M + beta + M |lambda|_1) nu.
- corrected: the bound that follows from the paper's own proof, where the printed one differs.
- sharp: with the measured gap D - D_p in place of B, or an order or equality that the proofs rest on. The printed bounds are loose by one
  to two orders of magnitude, so only the sharp forms can fail when something is broken.
"""

import math
from dataclasses import dataclass

import numpy as np

from bench.theory.facts import ROUNDING, Facts, Point


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
        Bound(
            "Thm 4, R-OPT, off along h alone, with |lambda*|_1",
            "sharp",
            r,
            norm1(f.star.lam) * width + f.off_gap,
        ),
    ]
    points = [
        f.star,
        p,
        *f.others,
        *([] if f.tighter is None else [f.tighter]),
        *(s.best for s in f.stochastic),
    ]
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
                "Thm 3, U-OPT, with gap",
                "sharp",
                u,
                math.sqrt(2 * f.L * max(p.gap, 0)) + f.L * float(np.linalg.norm(p.lam - f.star.lam)),
            ),
            Bound("Thm 3, U-OPT", "printed", u, 2 * math.sqrt(L_hat * B(p))),
            Bound("Thm 3: R-OPT = P* - D_p*", "sharp", abs(r - (P - D_p)), 1e-5),
        ]
        if f.tighter is not None:
            found.append(
                Bound("Thm 3, R-OPT", "printed", r, 2 * norm1(p.lam) * math.sqrt(L_hat * B(p)) + B(f.tighter))
            )
    one = f.one_shot
    u, r = float(np.abs(one.slack - f.optimum.slack).max()), abs(one.value - f.optimum.value)
    width = math.sqrt(2 * f.L * max(f.star.gap, 0))
    found += [
        Bound(
            "Lemma 5 at lambda* with gap",
            "sharp",
            float(((one.slack - f.optimum.slack) ** 2).sum()),
            2 * one.bend * f.star.gap,
        ),
        Bound("Thm 4, U-OPT, with gap", "sharp", u, width),
        Bound("Thm 4, U-OPT", "printed", u, math.sqrt(2 * f.L * B(f.star))),
        Bound("Thm 4, R-OPT, with gap", "printed, gap for B", r, width + f.star.gap),
        Bound("Thm 4, R-OPT, with gap and |lambda*|_1", "sharp", r, norm1(f.star.lam) * width + f.star.gap),
        Bound("Thm 4, R-OPT", "printed", r, math.sqrt(2 * f.L * B(f.star)) + B(f.star)),
        Bound(
            "Thm 4, R-OPT, with |lambda*|_1",
            "corrected",
            r,
            norm1(f.star.lam) * math.sqrt(2 * f.L * B(f.star)) + B(f.star),
        ),
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
                Bound(
                    f"Thm 5, upper side, {s.kind}", "printed", s.best.dual_in_class - P, noise + B(f.tighter)
                ),
                Bound(
                    f"Thm 6, R-OPT, {s.kind}",
                    "printed",
                    r,
                    2 * norm1(s.best.lam) * math.sqrt(L_hat * b + 2 / f.mu * noise) + far,
                ),
                Bound(
                    f"Thm 6, R-OPT, {s.kind}",
                    "corrected",
                    r,
                    2 * norm1(s.best.lam) * math.sqrt(L_hat * b + f.L**2 / f.mu * noise) + far,
                ),
            ]
    d = f.descent
    found += [
        Bound("CAN Thm 1: D is convex", "sharp", f.chord, 0.0),
        Bound("CAN Thm 1: 3 - order of the error", "sharp", 3 - f.taylor, 0.35),
        Bound("CAN Thm 1: largest curvature <= G / beta", "printed", f.L, f.G / f.beta),
        Bound("CAN Thm 1: largest curvature <= G^2 / beta", "corrected", f.L, f.G**2 / f.beta),
        Bound(
            "CAN Thm 2: steps to 1e-6",
            "printed",
            d.steps_as_printed,
            f.G / f.beta / d.mu * (2 * d.log + d.distance),
        ),
        Bound("CAN Thm 2: steps to 1e-6", "corrected", d.steps, d.top / d.mu * (2 * d.log + d.distance)),
    ]
    return found


def _lengths(f: Facts, gap: float) -> tuple[float, float]:
    return float(np.linalg.norm(f.in_class.lam - f.star.lam)), math.sqrt(2 / f.mu * max(gap, 0))
