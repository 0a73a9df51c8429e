"""The shape of the dual function D: its curvature, its second-order expansion,
and its convexity along chords."""

import math

import numpy as np

from bench.theory.optima import Optima


def bend(optima: Optima, lam: np.ndarray, off: np.ndarray, gap: float) -> float:
    """Returns the largest second derivative of D along lam + t v, with v the direction of `off`,
    for t up to sqrt(2 gap / that).

    The proof of Lemma 5 needs L_D no further.
    """
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
    """Returns the largest eigenvalue of D's Hessian at 300 points of the box
    around all lams, one unit wider."""
    low, high = np.min(lams, axis=0) - 1 / scale, np.max(lams, axis=0) + 1 / scale
    points = np.random.default_rng(0).uniform(low, high, (300, len(low)))
    return float(max(np.linalg.eigvalsh(optima.hessian(p))[-1] for p in (*points, *lams)))


def smallest_on_segment(optima: Optima, a: np.ndarray, b: np.ndarray) -> float:
    """Returns the smallest eigenvalue of D's Hessian at 33 points between a and b."""
    return float(min(np.linalg.eigvalsh(optima.hessian(a + t * (b - a)))[0] for t in np.linspace(0, 1, 33)))


def taylor(optima: Optima, lam: np.ndarray, step: np.ndarray, sign: int = 1) -> float:
    """Returns log2 of (error of CAN's second-order expansion at 0.4 steps / at 0.2 steps):
    3 for an error of third order."""

    def error(t: float) -> float:
        d = t * step
        first, second = sign * optima.tilted(lam).slack @ d, d @ optima.hessian(lam) @ d / 2
        return abs(optima.dual(lam + d) - optima.dual(lam) - first - second)

    return math.log2(error(0.4) / error(0.2))


def chord(optima: Optima, lams: list[np.ndarray]) -> float:
    """Returns the largest D(middle) - mean of D at both ends, over 100 random segments in the box around all
    lams: at most 0 for a convex D."""
    rng, J = np.random.default_rng(3), len(lams[0])
    a, b = rng.uniform(np.min(lams, axis=0), np.max(lams, axis=0), (2, 100, J))
    return max(
        optima.dual((x + y) / 2) - (optima.dual(x) + optima.dual(y)) / 2 for x, y in zip(a, b, strict=True)
    )
