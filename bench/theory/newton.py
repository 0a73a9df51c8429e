"""Newton's method for the small smooth problems of the exact updates, and the sums
that they share, in numpy."""

from collections.abc import Callable

import numpy as np

# A Newton step that would gain less than this is taken for rounding, and the search ends.
SMALLEST_GAIN = 1e-24


def minimise(derivatives: Callable, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """Minimises by Newton steps with backtracking, starting at theta; returns (value, theta).

    derivatives(theta) returns the value, the gradient, the Hessian, and a positive semi-definite matrix that
    stands in for the Hessian where that is indefinite.
    """
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
            # Below rounding the value says nothing; the Newton step still shrinks the gradient.
            if trial[0] <= value + 1e-4 * t * slope + 1e-15 * (1 + abs(value)):
                break
        else:
            break
        theta, (value, gradient, hessian, metric) = theta + t * direction, trial
    return float(value), theta


def inverse_times(eigenvalue: np.ndarray, basis: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Returns the smallest x with matrix x = vector, for a positive semi-definite matrix given
    by its eigenvalues and basis.

    The matrix may be singular: a table of logits has one constant per prompt too many.
    """
    inverse = np.where(eigenvalue > 1e-12 * eigenvalue[-1], 1 / np.maximum(eigenvalue, 1e-300), 0)
    return basis @ (inverse * (basis.T @ vector))


def softmax(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the softmax along axis 1, and its log-sum-exp with that axis kept as one of length 1."""
    top = z.max(1, keepdims=True)
    weight = np.exp(z - top)
    total = weight.sum(1, keepdims=True)
    return weight / total, top + np.log(total)


def moment(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sums weight [P, G] times the outer product of x [P, G, F] with itself: [F, F]."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows * weight.reshape(-1, 1)).T @ rows
