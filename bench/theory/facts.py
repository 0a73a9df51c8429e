"""Records of all that the papers' bounds need to know of one exact problem."""

from dataclasses import dataclass

import numpy as np

# Scipy's searches leave this much of an exact equality.
ROUNDING = 1e-7


@dataclass(frozen=True, kw_only=True)
class Point:
    """One lambda: the dual over all policies and over the class, and how far pi*(lambda) is from the class.

    The proofs use assumption A3 at pi*(lambda) only, so nu is measured there;
    its supremum over all policies would be near 2.
    """

    lam: np.ndarray
    dual: float
    dual_in_class: float
    nu: float

    @property
    def gap(self) -> float:
        """Returns D - D_p."""
        return self.dual - self.dual_in_class


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A policy in a problem."""

    lam: np.ndarray
    value: float  # E r - beta KL
    slack: np.ndarray  # E h
    bend: float  # largest curvature of D from lambda in the direction in which the policy's E h is off


@dataclass(frozen=True, kw_only=True)
class Stochastic:
    """A run of dual descent with a constant step, noisy slacks and policies that may miss the maximiser."""

    kind: str
    eta: float
    steps: int
    square: float  # S^2: the largest E |u|^2 of the run
    eps_app: float  # the largest D_p(lambda) - L(policy, lambda) of the run
    best: Point
    policy: Measured
    start_distance: float  # |lambda_0 - lambda*_p|


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Projected gradient descent from 3 lambda* (CAN's Theorem 2); tau is |lambda*| / 2."""

    steps: int  # to 1e-6, with step 1 / top
    steps_as_printed: int  # with step beta / G
    top: float  # largest curvature on the path
    mu: float  # smallest one within tau of lambda*
    log: float  # max(ln(tau / 1e-6), 0)
    distance: float  # (|lambda_0 - lambda*| / tau)^2


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that the bounds need to know of one problem."""

    J: int
    eps: float
    seed: int
    beta: float
    M: float
    L: float  # L_D: largest eigenvalue of D's Hessian in a box around every lambda used
    mu: float  # mu*_D: smallest one on the segments from lambda* to lambda*_p and to the best iterates
    primal: float  # P*
    kl: float  # KL(pi* || reference)
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
    # The class's maximiser at lambda*_p, by scipy; None at a kink, where it is not unique.
    multi_shot: Measured | None
    # From CAID's last iterate, which starts at lambda*: |lambda - lambda*_p|, and the slack by which it
    # misses 0 (largest entries).
    caid_off: tuple[float, float]
    one_shot: Measured  # MoCAN's policy
    # pi*(lambda* + small) is off from pi* along h alone, where the proofs' inequalities are tight.
    off_along_h: Measured
    off_gap: float  # D(lambda*) - L of that policy
    stochastic: tuple[Stochastic, ...]
    G: float  # sup |g|, per prompt centred at the middle of its range
    taylor: float  # error of CAN's expansion about 0 at a step, over that at half of it, on the base 2
    taylor_of_wrong_sign: float  # the same with the gradient's sign flipped
    chord: float  # largest D(middle) - mean of D at both ends, over random segments
    descent: Descent
    maxima: int  # largest number of distinct local maxima that the starts of a maximisation reached
