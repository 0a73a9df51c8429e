"""Newton's method for the small smooth problems of the exact updates, and the sums that they share, in numpy."""

from collections.abc import Callable

import numpy as np

# Rounding is taken for convergence where a Newton step would gain less than this.
SMALLEST_GAIN = 1e-24


def minimise(derivatives: Callable, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """Newton with backtracking from theta: (value, theta). derivatives(theta) -> value, gradient, Hessian, a positive semi-definite
    stand-in for it where it is indefinite."""
    value, gradient, hessian, metric = derivatives(theta)
    for _ in range(200):
        eigenvalue, basis = np.linalg.eigh(hessian)
        if eigenvalue[0] < -1e-12 * abs(eigenvalue[-1]):
            eigenvalue, basis = np.linalg.eigh(metric)
        direction = -inverse_times(eigenvalue, basis, gradient)
        slope = gradient @ direction
        if -slope < SMALLEST_GAIN:
            break
        for halving in range(50):
            t = 0.5**halving
            trial = derivatives(theta + t * direction)
            # Below rounding the value tells nothing; the Newton step still shrinks the gradient.
            if trial[0] <= value + 1e-4 * t * slope + 1e-15 * (1 + abs(value)):
                break
        else:
            break
        theta, (value, gradient, hessian, metric) = theta + t * direction, trial
    return float(value), theta


def inverse_times(eigenvalue: np.ndarray, basis: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Smallest solution x of matrix x = vector for a positive semi-definite matrix (a table of logits has a constant too many)."""
    inverse = np.where(eigenvalue > 1e-12 * eigenvalue[-1], 1 / np.maximum(eigenvalue, 1e-300), 0)
    return basis @ (inverse * (basis.T @ vector))


def softmax(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax along axis 1 and its log-sum-exp, kept as an axis of length 1."""
    top = z.max(1, keepdims=True)
    weight = np.exp(z - top)
    total = weight.sum(1, keepdims=True)
    return weight / total, top + np.log(total)


def moment(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sum of weight [P, G] times the outer product of x [P, G, F] with itself, [F, F]."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows * weight.reshape(-1, 1)).T @ rows
