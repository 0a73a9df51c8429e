"""The optima of an exact problem by scipy alone: nothing here uses the engine's solver, the world's Newton method or torch.

Names follow arXiv 2505.19387: P* and D* over all policies, P_p* and D_p* over the class, lambda* and lambda*_p their multipliers.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linprog, minimize
from scipy.special import log_softmax, logsumexp, softmax

from bench.theory.problem import Problem

# A kink of D_p: no policy that maximises the Lagrangian meets the optimality conditions within this.
KINK = 1e-5


@dataclass(frozen=True)
class Policy:
    """A policy with its value E r - beta KL and its slack E h."""

    log_ratio: np.ndarray  # [P, Y]
    value: float
    slack: np.ndarray  # [J]
    theta: np.ndarray | None = None

    def lagrangian(self, lam: np.ndarray) -> float:
        return self.value + float(self.slack @ lam)


class Optima:
    """Closed forms, and searches by scipy, for one problem."""

    def __init__(self, problem: Problem) -> None:
        self.r, self.h, self.phi = (
            x.numpy() for x in (problem.reward_PY, problem.shifted_PYJ, problem.features_PYF)
        )
        self.beta = problem.beta
        self.P, self.Y, self.J = self.h.shape
        # M of assumption A3: a bound on |r| and |h|.
        self.M = max(np.abs(self.r).max(), np.abs(self.h).max())
        # Maximisers found so far; every later search starts at the best of them as well.
        self.found: list[Policy] = []

    def policy(self, z: np.ndarray, theta: np.ndarray | None = None) -> Policy:
        """The policy proportional to exp z [P, Y]."""
        log_ratio = log_softmax(z, axis=1) + math.log(self.Y)
        pi = np.exp(log_ratio) / self.Y
        kl = float((pi * log_ratio).sum(1).mean())
        return Policy(
            log_ratio,
            float((pi * self.r).sum(1).mean()) - self.beta * kl,
            (pi[..., None] * self.h).sum(1).mean(0),
            theta,
        )

    def kl(self, policy: Policy) -> float:
        """E KL(policy || reference), nats."""
        return float((np.exp(policy.log_ratio) / self.Y * policy.log_ratio).sum(1).mean())

    def tilted(self, lam: np.ndarray) -> Policy:
        """pi*(lambda), the maximiser of the Lagrangian over all policies."""
        return self.policy((self.r + self.h @ lam) / self.beta)

    def dual(self, lam: np.ndarray) -> float:
        """D(lambda) = beta E ln E_ref exp((r + lambda . h) / beta)."""
        return float(
            self.beta * (logsumexp((self.r + self.h @ lam) / self.beta, axis=1) - math.log(self.Y)).mean()
        )

    def hessian(self, lam: np.ndarray) -> np.ndarray:
        """Of D: mean covariance of h under pi*(lambda), over beta."""
        pi = softmax((self.r + self.h @ lam) / self.beta, axis=1)
        centred = self.h - (pi[..., None] * self.h).sum(1, keepdims=True)
        return np.einsum("py,pyi,pyj->ij", pi, centred, centred) / (self.P * self.beta)

    def solve_dual(self, tighter: float = 0.0) -> np.ndarray | None:
        """argmin over lambda >= 0 of D(lambda) - tighter x sum(lambda); None where it has none: b + tighter cannot be met."""

        def function(lam):
            return self.dual(lam) - tighter * lam.sum(), self.tilted(lam).slack - tighter

        found = minimize(
            function, np.full(self.J, 0.5), jac=True, bounds=[(0, 1e3)] * self.J, method="L-BFGS-B",
            options={"ftol": 1e-16, "gtol": 1e-11, "maxiter": 1000, "maxfun": 5000},
        )  # fmt: skip
        return None if found.x.max() > 200 else found.x

    @cached_property
    def cloud(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """theta [S, F] of 16384 members of the class in random directions, of all sizes from 0.1 to 300 in rising order, with their values
        [S] and slacks [S, J]. With few features the landscape has few hills, but some lie far out, where policies are nearly one-hot."""
        F = self.phi.shape[2]
        theta_SF = np.random.default_rng(1).normal(size=(16384, F))
        theta_SF *= 10 ** np.linspace(-1, math.log10(300), 16384)[:, None] / np.linalg.norm(
            theta_SF, axis=1, keepdims=True
        )
        value_S, slack_SJ = [], []
        for part in np.split(theta_SF, 16):
            log_ratio = log_softmax(np.einsum("pyf,sf->spy", self.phi, part), axis=2) + math.log(self.Y)
            pi = np.exp(log_ratio) / self.Y
            value_S.append((pi * (self.r - self.beta * log_ratio)).sum(2).mean(1))
            slack_SJ.append(np.einsum("spy,pyj->sj", pi, self.h) / self.P)
        return theta_SF, np.concatenate(value_S), np.concatenate(slack_SJ)

    def best_in_class(self, lam: np.ndarray) -> Policy:
        """The Lagrangian's maximiser over theta by BFGS: from the tilt's own theta, from the best maximisers found before, and from the
        best of small, middle and large size in the cloud, unless they lie near the best so far or too low to lead above it."""
        score, worth = self.r + self.h @ lam, 1 + np.abs(lam).sum()

        def function(theta):
            z = self.phi @ theta
            pi = softmax(z, axis=1)
            inner = score - self.beta * z
            mean = (pi * inner).sum(1, keepdims=True)
            gradient = np.einsum("py,pyf->f", pi * (inner - mean), self.phi) / self.P
            return -float(
                (mean[:, 0] + self.beta * (logsumexp(z, axis=1) - math.log(self.Y))).mean()
            ), -gradient

        def ascend(theta: np.ndarray) -> Policy:
            theta = minimize(function, theta, jac=True, method="BFGS", options={"gtol": 1e-10}).x
            return self.policy(self.phi @ theta, theta)

        best = ascend(np.resize(np.concatenate(([1.0], lam)) / self.beta, self.phi.shape[2]))
        theta_SF, value_S, slack_SJ = self.cloud
        shells = zip(np.array_split(theta_SF, 3), np.array_split(value_S + slack_SJ @ lam, 3), strict=True)
        starts = [(value.max(), theta[value.argmax()]) for theta, value in shells]
        starts += [(policy.lagrangian(lam), policy.theta) for policy in self.found]
        for value, theta in sorted(starts, key=lambda pair: -pair[0])[:4]:
            size = 1 + np.linalg.norm(best.theta)
            if value > best.lagrangian(lam) - 0.3 * worth and np.linalg.norm(theta - best.theta) > 0.3 * size:
                best = max(best, ascend(theta), key=lambda policy: policy.lagrangian(lam))
        self.found.append(best)
        return best

    def dual_in_class(self, lam: np.ndarray) -> float:
        """D_p(lambda)."""
        return self.best_in_class(lam).lagrangian(lam)

    def solve_dual_in_class(self, *starts: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """(lambda*_p, D_p*, whether D_p has a kink there): quasi-Newton from each of `starts`, certified by the optimality conditions of a
        convex function, else by cutting planes, whose lower and upper values then meet."""
        visited: list[np.ndarray] = []

        def function(lam):
            visited.append(lam.copy())
            policy = self.best_in_class(lam)
            return policy.lagrangian(lam), policy.slack

        def lowest() -> tuple[np.ndarray, Policy]:
            # D_p(lambda) >= value + lambda . slack of every policy: a search that ended at a lower hill is corrected by later ones.
            lam = min(visited, key=lambda lam: max(policy.lagrangian(lam) for policy in self.found))
            return lam, max(self.found, key=lambda policy: policy.lagrangian(lam))

        for start in starts:
            minimize(
                function, start, jac=True, bounds=[(0, 100)] * self.J, method="L-BFGS-B",
                options={"ftol": 1e-16, "gtol": 1e-10, "maxfun": 40},
            )  # fmt: skip
        lam, policy = lowest()
        if np.abs(np.where(lam > 0, policy.slack, np.minimum(policy.slack, 0))).max() < KINK:
            return lam, policy.lagrangian(lam), False
        for _ in range(60):
            # Minimise the largest of these lines.
            rows = np.array([[*p.slack, -1.0] for p in self.found])
            found = linprog(
                [0.0] * self.J + [1.0],
                A_ub=rows,
                b_ub=[-p.value for p in self.found],
                bounds=[(0, 100)] * self.J + [(None, None)],
            )
            value, _ = function(found.x[:-1])
            # The linear program's own tolerance.
            if value - found.fun < 1e-7:
                break
        lam, policy = lowest()
        return lam, policy.lagrangian(lam), True

    def solve_primal(self) -> Policy:
        """The constrained optimum over all policies, by SLSQP on a table of logits."""

        def parts(z):
            z = z.reshape(self.P, self.Y)
            log_ratio = log_softmax(z, axis=1) + math.log(self.Y)
            pi = np.exp(log_ratio) / self.Y
            inner = self.r - self.beta * log_ratio
            return pi, inner

        def value(z):
            pi, inner = parts(z)
            mean = (pi * inner).sum(1, keepdims=True)
            # In units of beta and summed over the prompts: a slope far below 1 stops the search too early.
            return -float(mean.sum()) / self.beta, -(pi * (inner - mean) / self.beta).ravel()

        def slack(z):
            pi, _ = parts(z)
            return (pi[..., None] * self.h).sum(1).mean(0)

        def slope(z):
            pi, _ = parts(z)
            centred = self.h - (pi[..., None] * self.h).sum(1, keepdims=True)
            return (pi[..., None] * centred / self.P).reshape(-1, self.J).T

        found = minimize(
            value, np.zeros(self.r.size), jac=True, method="SLSQP",
            constraints={"type": "ineq", "fun": slack, "jac": slope}, options={"ftol": 1e-15, "maxiter": 500},
        )  # fmt: skip
        return self.policy(found.x.reshape(self.P, self.Y))

    def solve_primal_in_class(self, near: np.ndarray) -> Policy:
        """The constrained optimum over theta by SLSQP from several starts, the best that meets the constraints to 1e-9."""
        n = len(near)

        def value(theta):
            z = self.phi @ theta
            pi = softmax(z, axis=1)
            inner = self.r - self.beta * z
            mean = (pi * inner).sum(1, keepdims=True)
            return -float((mean[:, 0] + self.beta * logsumexp(z, axis=1)).mean()), -np.einsum(
                "py,pyf->f", pi * (inner - mean), self.phi
            ) / self.P

        def slack(theta):
            return (softmax(self.phi @ theta, axis=1)[..., None] * self.h).sum(1).mean(0)

        def slope(theta):
            pi = softmax(self.phi @ theta, axis=1)
            centred = self.h - (pi[..., None] * self.h).sum(1, keepdims=True)
            return np.einsum("py,pyj,pyf->jf", pi, centred, self.phi) / self.P

        best = None
        theta_SF, value_S, slack_SJ = self.cloud
        feasible = np.where(slack_SJ.min(1) >= 0, value_S, -math.inf)
        rng = np.random.default_rng(2)
        for start in (
            near,
            np.zeros(n),
            theta_SF[feasible.argmax()],
            *(near + rng.normal(0, 0.5 + np.abs(near).max(), (6, n))),
        ):
            found = minimize(
                value, start, jac=True, method="SLSQP", constraints={"type": "ineq", "fun": slack, "jac": slope},
                options={"ftol": 1e-15, "maxiter": 300},
            )  # fmt: skip
            candidate = self.policy(self.phi @ found.x, found.x)
            if candidate.slack.min() > -1e-9 and (best is None or candidate.value > best.value):
                best = candidate
        assert best is not None, "no policy of the class was found that meets the constraints"
        return best

    def largest_slack_in_class(self, start: np.ndarray) -> float:
        """max over theta of min_i E h_i (assumptions A4, A7), from below: the best local maximum with entries up to 300."""
        n = len(start)

        def slack(x):
            return (softmax(self.phi @ x[:-1], axis=1)[..., None] * self.h).sum(1).mean(0) - x[-1]

        def slope(x):
            pi = softmax(self.phi @ x[:-1], axis=1)
            centred = self.h - (pi[..., None] * self.h).sum(1, keepdims=True)
            own = np.einsum("py,pyj,pyf->jf", pi, centred, self.phi) / self.P
            return np.hstack((own, -np.ones((self.J, 1))))

        best = -math.inf
        theta_SF, _, slack_SJ = self.cloud
        for theta in (start, np.concatenate(([0.0], np.ones(n - 1))), theta_SF[slack_SJ.min(1).argmax()]):
            first = np.append(theta, slack(np.append(theta, 0.0)).min())
            found = minimize(
                lambda x: (-x[-1], np.append(np.zeros(n), -1.0)), first, jac=True, method="SLSQP",
                bounds=[(-300, 300)] * n + [(None, None)],
                constraints={"type": "ineq", "fun": slack, "jac": slope}, options={"ftol": 1e-10, "maxiter": 300},
            )  # fmt: skip
            best = max(best, float(slack(np.append(found.x[:-1], 0.0)).min()))
        return best

    def gap_of_class(self, policy: Policy) -> float:
        """nu at this policy: how near the class comes in mean L1 distance and in mean difference of KL, the larger of both.

        The best of two members is taken, the moment projection and the reverse one, so it is an upper estimate. Means over x where the
        paper has the largest x: the proofs integrate over x, so the bounds hold with the mean and are sharper.
        """
        aim = np.exp(policy.log_ratio) / self.Y

        def forward(theta):
            z = self.phi @ theta
            return -float((aim * log_softmax(z, axis=1)).sum(1).mean()), np.einsum(
                "py,pyf->f", softmax(z, axis=1) - aim, self.phi
            ) / self.P

        def reverse(theta):
            z = self.phi @ theta
            log_p = log_softmax(z, axis=1)
            p = np.exp(log_p)
            inner = log_p - policy.log_ratio
            mean = (p * inner).sum(1, keepdims=True)
            return float(mean.mean()), np.einsum("py,pyf->f", p * (inner - mean), self.phi) / self.P

        first = minimize(
            forward, np.zeros(self.phi.shape[2]), jac=True, method="BFGS", options={"gtol": 1e-11}
        ).x
        second = minimize(reverse, first, jac=True, method="BFGS", options={"gtol": 1e-11}).x
        return min(self._distance(policy, self.policy(self.phi @ theta)) for theta in (first, second))

    def _distance(self, a: Policy, b: Policy) -> float:
        p, q = np.exp(a.log_ratio) / self.Y, np.exp(b.log_ratio) / self.Y
        kl = (p * a.log_ratio).sum(1) - (q * b.log_ratio).sum(1)
        return float(max(np.abs(p - q).sum(1).mean(), np.abs(kl).mean()))
