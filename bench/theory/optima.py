"""The optima of an exact problem by scipy alone: nothing here uses the engine's solver,
the Newton method of the updates, or torch.

Names follow arXiv 2505.19387: P* and D* over all policies, P_p* and D_p* over the class, lambda* and
lambda*_p their multipliers.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import linprog, minimize
from scipy.special import log_softmax, logsumexp, softmax

from bench.theory.problem import Problem

# D_p has a kink where no policy that maximises the Lagrangian meets the optimality conditions within this.
KINK = 1e-5
MEMBERS = 16384


@dataclass(frozen=True)
class Policy:
    """A policy with its value E r - beta KL and its slack E h."""

    log_ratio: np.ndarray  # [P, Y]
    value: float
    slack: np.ndarray  # [J]
    theta: np.ndarray | None = None

    def lagrangian(self, lam: np.ndarray) -> float:
        """Returns value + lambda . slack."""
        return self.value + float(self.slack @ lam)


class Optima:
    """Closed forms, and searches by scipy, for one problem."""

    def __init__(self, problem: Problem) -> None:
        """Stores the problem's arrays; the searches run when they are asked for."""
        self.problem = problem
        self.r, self.h = problem.reward_PY.numpy(), problem.shifted_PYJ.numpy()
        self.phi, self.beta = problem.features_PYF.numpy(), problem.beta
        self.P, self.Y, self.J = self.h.shape
        # M of assumption A3 bounds |r| and |h|.
        self.M = max(np.abs(self.r).max(), np.abs(self.h).max())
        # Every later search starts at the best of these maximisers as well.
        self.maximisers: list[Policy] = []

    def at_beta(self, beta: float) -> "Optima":
        """Returns the optima of the same problem with another beta, which shares the members of the class."""
        other = Optima(replace(self.problem, beta=beta))
        other.members = self.members
        return other

    def policy(self, z: np.ndarray, theta: np.ndarray | None = None) -> Policy:
        """Returns the policy proportional to exp z [P, Y]."""
        log_ratio = log_softmax(z, axis=1) + math.log(self.Y)
        pi = np.exp(log_ratio) / self.Y
        value = float((pi * self.r).sum(1).mean()) - self.beta * float((pi * log_ratio).sum(1).mean())
        return Policy(log_ratio, value, (pi[..., None] * self.h).sum(1).mean(0), theta)

    def kl(self, policy: Policy) -> float:
        """Returns E KL(policy || reference) in nats."""
        return float((np.exp(policy.log_ratio) / self.Y * policy.log_ratio).sum(1).mean())

    def tilted(self, lam: np.ndarray) -> Policy:
        """Returns pi*(lambda), the maximiser of the Lagrangian over all policies."""
        return self.policy((self.r + self.h @ lam) / self.beta)

    def dual(self, lam: np.ndarray) -> float:
        """Returns D(lambda) = beta E ln E_ref exp((r + lambda . h) / beta)."""
        log_sum_P = logsumexp((self.r + self.h @ lam) / self.beta, axis=1)
        return float(self.beta * (log_sum_P - math.log(self.Y)).mean())

    def hessian(self, lam: np.ndarray) -> np.ndarray:
        """Returns the Hessian of D: the mean covariance of h under pi*(lambda), over beta."""
        pi = softmax((self.r + self.h @ lam) / self.beta, axis=1)
        centred = self.h - (pi[..., None] * self.h).sum(1, keepdims=True)
        return np.einsum("py,pyi,pyj->ij", pi, centred, centred) / (self.P * self.beta)

    def solve_dual(self, tighter: float = 0.0) -> np.ndarray | None:
        """Minimises D(lambda) - tighter x sum(lambda) over lambda >= 0; None where b + tighter cannot be met,
        so that there is no minimum."""

        def function(lam):
            return self.dual(lam) - tighter * lam.sum(), self.tilted(lam).slack - tighter

        lam = minimize(
            function,
            np.full(self.J, 0.5),
            jac=True,
            bounds=[(0, 1e3)] * self.J,
            method="L-BFGS-B",
            options={"ftol": 1e-16, "gtol": 1e-11, "maxiter": 1000, "maxfun": 5000},
        ).x
        return None if lam.max() > 200 else lam

    @cached_property
    def members(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Draws theta [S, F] of members of the class in random directions, in rising order of size, and lists
        their log-ratios and probabilities, parts of [S, P, Y].

        With few features the landscape has few hills, but some lie far out, where policies are nearly
        one-hot; so sizes go from 0.1 to 300.
        """
        theta_SF = np.random.default_rng(1).normal(size=(MEMBERS, self.phi.shape[2]))
        sizes_S = 10 ** np.linspace(-1, math.log10(300), MEMBERS)
        theta_SF *= sizes_S[:, None] / np.linalg.norm(theta_SF, axis=1, keepdims=True)
        parts = []
        for part in np.split(theta_SF, 16):
            log_ratio = log_softmax(np.einsum("pyf,sf->spy", self.phi, part), axis=2) + math.log(self.Y)
            parts.append((log_ratio, np.exp(log_ratio) / self.Y))
        return theta_SF, parts

    @cached_property
    def cloud(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns theta [S, F] of the members with their values [S] and slacks [S, J]."""
        theta_SF, parts = self.members
        value_S = [(pi * (self.r - self.beta * log_ratio)).sum(2).mean(1) for log_ratio, pi in parts]
        slack_SJ = [np.einsum("spy,pyj->sj", pi, self.h) / self.P for _, pi in parts]
        return theta_SF, np.concatenate(value_S), np.concatenate(slack_SJ)

    def best_in_class(self, lam: np.ndarray) -> Policy:
        """Maximises the Lagrangian over theta by BFGS.

        The searches start at the tilt's theta, at the best maximisers of earlier calls,
        and at the best of small, middle and large size in the cloud, unless these lie near the best so far
        or too low to lead above it.
        """
        score, worth = self.r + self.h @ lam, 1 + np.abs(lam).sum()

        def function(theta):
            z = self.phi @ theta
            pi = softmax(z, axis=1)
            inner = score - self.beta * z
            mean = (pi * inner).sum(1, keepdims=True)
            value = float((mean[:, 0] + self.beta * (logsumexp(z, axis=1) - math.log(self.Y))).mean())
            return -value, -(np.einsum("py,pyf->f", pi * (inner - mean), self.phi) / self.P)

        def ascend(theta: np.ndarray) -> Policy:
            theta = minimize(function, theta, jac=True, method="BFGS", options={"gtol": 1e-10}).x
            return self.policy(self.phi @ theta, theta)

        best = ascend(np.resize(np.concatenate(([1.0], lam)) / self.beta, self.phi.shape[2]))
        theta_SF, value_S, slack_SJ = self.cloud
        shells = zip(np.array_split(theta_SF, 3), np.array_split(value_S + slack_SJ @ lam, 3), strict=True)
        starts = [(value.max(), theta[value.argmax()]) for theta, value in shells]
        starts += [(policy.lagrangian(lam), policy.theta) for policy in self.maximisers]
        for value, theta in sorted(starts, key=lambda pair: -pair[0])[:4]:
            far = np.linalg.norm(theta - best.theta) > 0.3 * (1 + np.linalg.norm(best.theta))
            if value > best.lagrangian(lam) - 0.3 * worth and far:
                best = max(best, ascend(theta), key=lambda policy: policy.lagrangian(lam))
        self.maximisers.append(best)
        return best

    def dual_in_class(self, lam: np.ndarray) -> float:
        """Returns D_p(lambda)."""
        return self.best_in_class(lam).lagrangian(lam)

    def solve_dual_in_class(self, *starts: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Returns (lambda*_p, D_p*, whether D_p has a kink there).

        Quasi-Newton searches run from each of `starts`. The optimality conditions of a convex function
        certify their end; where they fail, cutting planes follow, whose lower and upper values then meet.
        """
        visited: list[np.ndarray] = []

        def function(lam):
            visited.append(lam.copy())
            policy = self.best_in_class(lam)
            return policy.lagrangian(lam), policy.slack

        def lowest() -> tuple[np.ndarray, Policy]:
            # D_p(lambda) >= value + lambda . slack of every policy, so later searches correct one
            # that ended at a lower hill.
            lam = min(visited, key=lambda lam: max(policy.lagrangian(lam) for policy in self.maximisers))
            return lam, max(self.maximisers, key=lambda policy: policy.lagrangian(lam))

        options = {"ftol": 1e-16, "gtol": 1e-10, "maxfun": 40}
        box = [(0, 100)] * self.J
        for start in starts:
            minimize(function, start, jac=True, bounds=box, method="L-BFGS-B", options=options)
        lam, policy = lowest()
        if np.abs(np.where(lam > 0, policy.slack, np.minimum(policy.slack, 0))).max() < KINK:
            return lam, policy.lagrangian(lam), False
        for _ in range(60):
            # The linear program minimises the largest of the lines value + lambda . slack.
            lines = linprog(
                [0.0] * self.J + [1.0],
                A_ub=np.array([[*p.slack, -1.0] for p in self.maximisers]),
                b_ub=[-p.value for p in self.maximisers],
                bounds=[*box, (None, None)],
            )
            value, _ = function(lines.x[:-1])
            # This is the linear program's tolerance.
            if value - lines.fun < 1e-7:
                break
        lam, policy = lowest()
        return lam, policy.lagrangian(lam), True

    def solve_primal(self) -> Policy:
        """Solves the constrained problem over all policies, by SLSQP on a table of logits."""

        def parts(z):
            z = z.reshape(self.P, self.Y)
            log_ratio = log_softmax(z, axis=1) + math.log(self.Y)
            return np.exp(log_ratio) / self.Y, self.r - self.beta * log_ratio

        def value(z):
            pi, inner = parts(z)
            mean = (pi * inner).sum(1, keepdims=True)
            # The value is in units of beta and summed over the prompts:
            # a slope far below 1 stops the search too early.
            return -float(mean.sum()) / self.beta, -(pi * (inner - mean) / self.beta).ravel()

        def slack(z):
            pi, _ = parts(z)
            return (pi[..., None] * self.h).sum(1).mean(0)

        def slope(z):
            pi, _ = parts(z)
            centred = self.h - (pi[..., None] * self.h).sum(1, keepdims=True)
            return (pi[..., None] * centred / self.P).reshape(-1, self.J).T

        z = minimize(
            value,
            np.zeros(self.r.size),
            jac=True,
            method="SLSQP",
            constraints={"type": "ineq", "fun": slack, "jac": slope},
            options={"ftol": 1e-15, "maxiter": 500},
        ).x
        return self.policy(z.reshape(self.P, self.Y))

    def solve_primal_in_class(self, near: np.ndarray) -> Policy:
        """Solves the constrained problem over theta by SLSQP from several starts; returns the best end that
        meets the constraints to 1e-9."""
        n = len(near)

        def value(theta):
            z = self.phi @ theta
            pi = softmax(z, axis=1)
            inner = self.r - self.beta * z
            mean = (pi * inner).sum(1, keepdims=True)
            value = float((mean[:, 0] + self.beta * logsumexp(z, axis=1)).mean())
            return -value, -np.einsum("py,pyf->f", pi * (inner - mean), self.phi) / self.P

        best = None
        theta_SF, value_S, slack_SJ = self.cloud
        feasible = np.where(slack_SJ.min(1) >= 0, value_S, -math.inf)
        around = near + np.random.default_rng(2).normal(0, 0.5 + np.abs(near).max(), (6, n))
        for start in (near, np.zeros(n), theta_SF[feasible.argmax()], *around):
            theta = minimize(
                value,
                start,
                jac=True,
                method="SLSQP",
                constraints={"type": "ineq", "fun": self._slack_in_class, "jac": self._slope_in_class},
                options={"ftol": 1e-15, "maxiter": 300},
            ).x
            candidate = self.policy(self.phi @ theta, theta)
            if candidate.slack.min() > -1e-9 and (best is None or candidate.value > best.value):
                best = candidate
        assert best is not None, "no policy of the class was found that meets the constraints"
        return best

    def _slack_in_class(self, theta: np.ndarray) -> np.ndarray:
        """Returns E h [J] under the policy of theta."""
        return (softmax(self.phi @ theta, axis=1)[..., None] * self.h).sum(1).mean(0)

    def _slope_in_class(self, theta: np.ndarray) -> np.ndarray:
        """Returns the derivative [J, F] of `_slack_in_class`."""
        pi = softmax(self.phi @ theta, axis=1)
        centred = self.h - (pi[..., None] * self.h).sum(1, keepdims=True)
        return np.einsum("py,pyj,pyf->jf", pi, centred, self.phi) / self.P

    def largest_slack_in_class(self, start: np.ndarray) -> float:
        """Maximises min_i E h_i over theta (assumptions A4, A7), from below:
        the best local maximum with entries up to 300."""
        n = len(start)

        # x is theta with one number more, the smallest slack, which is maximised.
        def objective(x):
            return -x[-1], np.append(np.zeros(n), -1.0)

        def slack(x):
            return self._slack_in_class(x[:-1]) - x[-1]

        def slope(x):
            return np.hstack((self._slope_in_class(x[:-1]), -np.ones((self.J, 1))))

        best = -math.inf
        theta_SF, _, slack_SJ = self.cloud
        for theta in (start, np.concatenate(([0.0], np.ones(n - 1))), theta_SF[slack_SJ.min(1).argmax()]):
            end = minimize(
                objective,
                np.append(theta, slack(np.append(theta, 0.0)).min()),
                jac=True,
                method="SLSQP",
                bounds=[(-300, 300)] * n + [(None, None)],
                constraints={"type": "ineq", "fun": slack, "jac": slope},
                options={"ftol": 1e-10, "maxiter": 300},
            ).x
            best = max(best, float(slack(np.append(end[:-1], 0.0)).min()))
        return best

    def gap_of_class(self, policy: Policy) -> float:
        """Returns nu at this policy: how near the class comes in mean L1 distance and in mean difference of
        KL, the larger of both.

        It is an upper estimate, the better of two members of the class, the moment projection and the reverse
        one. It takes means over x where the paper has the largest x: the proofs integrate over x, so the
        bounds hold with the mean and are sharper.
        """
        aim = np.exp(policy.log_ratio) / self.Y

        def forward(theta):
            z = self.phi @ theta
            value = -float((aim * log_softmax(z, axis=1)).sum(1).mean())
            return value, np.einsum("py,pyf->f", softmax(z, axis=1) - aim, self.phi) / self.P

        def reverse(theta):
            log_p = log_softmax(self.phi @ theta, axis=1)
            p = np.exp(log_p)
            inner = log_p - policy.log_ratio
            mean = (p * inner).sum(1, keepdims=True)
            return float(mean.mean()), np.einsum("py,pyf->f", p * (inner - mean), self.phi) / self.P

        options = {"gtol": 1e-11}
        first = minimize(forward, np.zeros(self.phi.shape[2]), jac=True, method="BFGS", options=options).x
        second = minimize(reverse, first, jac=True, method="BFGS", options=options).x
        return min(self._distance(policy, self.policy(self.phi @ theta)) for theta in (first, second))

    def _distance(self, a: Policy, b: Policy) -> float:
        p, q = np.exp(a.log_ratio) / self.Y, np.exp(b.log_ratio) / self.Y
        kl = (p * a.log_ratio).sum(1) - (q * b.log_ratio).sum(1)
        return float(max(np.abs(p - q).sum(1).mean(), np.abs(kl).mean()))
