"""Constrained problems in which every response is listed, with log-linear policies."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bench.theory.newton import softmax


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A constrained problem with P prompts, Y equally likely responses of the reference
    to each, and a class of policies.

    A policy is a float64 vector theta [F], None the reference: log pi(y | x) = features(x, y) . theta - ln
    Z(x). The reward lies symmetrically about 0 on each prompt, and the utility is 0 at response 0 of each
    prompt (assumption A1 of arXiv 2505.19387).
    """

    reward_PY: Tensor  # float64
    utility_PYJ: Tensor  # float64
    b_J: Tensor  # float64: required improvement over the reference
    beta: float
    features_PYF: Tensor  # float64

    @property
    def shifted_PYJ(self) -> Tensor:
        """Returns h = g - E_ref g - b; the constraint is E h >= 0."""
        return self.utility_PYJ - self.utility_PYJ.mean(1, keepdim=True) - self.b_J

    def log_ratio_PY(self, theta: Tensor | None) -> Tensor:
        """Returns ln pi / reference; both policies are normalised."""
        if theta is None:
            return torch.zeros_like(self.reward_PY)
        z = self.features_PYF @ theta
        return z - z.logsumexp(1, keepdim=True) + math.log(z.shape[1])

    def policy_PY(self, theta: Tensor | None) -> Tensor:
        """Returns pi(y | x)."""
        return self.log_ratio_PY(theta).exp() / self.reward_PY.shape[1]

    def slack_J(self, theta: Tensor | None) -> Tensor:
        """Returns E h."""
        return (self.policy_PY(theta)[..., None] * self.shifted_PYJ).sum(1).mean(0)

    def kl(self, theta: Tensor | None) -> float:
        """Returns E KL(pi || reference) in nats."""
        return float((self.policy_PY(theta) * self.log_ratio_PY(theta)).sum(1).mean())

    def value(self, theta: Tensor | None) -> float:
        """Returns the objective of the constrained problem, E r - beta KL(pi || reference)."""
        return float((self.policy_PY(theta) * self.reward_PY).sum(1).mean()) - self.beta * self.kl(theta)

    def lagrangian(self, theta: Tensor | None, lam_J: Tensor) -> float:
        """Returns E[r + lambda . h] - beta KL(pi || reference)."""
        return self.value(theta) + float(self.slack_J(theta) @ lam_J)

    @cached_property
    def cloud(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws theta [2048, F] of seeded members of the class, in rising order of size, with their policies
        [2048, P Y] and mean KL [2048]. Sizes go from 0.1 to 300, as some maxima of a Lagrangian lie far out,
        where policies are nearly one-hot.
        """
        phi = self.features_PYF.numpy()
        theta_SF = np.random.default_rng(7).normal(size=(2048, phi.shape[2]))
        sizes_S = 10 ** np.linspace(-1, math.log10(300), 2048)
        theta_SF *= sizes_S[:, None] / np.linalg.norm(theta_SF, axis=1, keepdims=True)
        z_PYS = phi @ theta_SF.T
        pi, log_Z = softmax(z_PYS)
        kl_S = ((pi * z_PYS).sum(1) - log_Z[:, 0]).mean(0) + math.log(phi.shape[1])
        return theta_SF, pi.reshape(-1, 2048).T.copy(), kl_S


def make(
    seed: int,
    *,
    J: int = 1,
    eps: float = 0.0,
    P: int = 6,
    Y: int = 10,
    b: float | tuple[float, ...] = 0.3,
    beta: float = 1.0,
    tabular: bool = False,
) -> Problem:
    """Makes a seeded problem whose utilities pull against the reward (correlation about -0.45), both in
    within-prompt standard deviations.

    The features are (r, g) + eps x standard normal noise. At eps = 0 every tilt exp((r + lambda . g) / beta)
    is in the class (no parametrisation gap), and the noise is the same for all eps > 0. With `tabular` each
    response has a parameter instead.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    reward_PY = normal(P, Y)
    utility_PYJ = normal(P, Y, J) - 0.5 * reward_PY[..., None]
    reward_PY = reward_PY / reward_PY.var(1, correction=0).mean().sqrt()
    utility_PYJ = utility_PYJ / utility_PYJ.var(1, correction=0).mean(0).sqrt()
    reward_PY = reward_PY - (reward_PY.amax(1, keepdim=True) + reward_PY.amin(1, keepdim=True)) / 2
    utility_PYJ = utility_PYJ - utility_PYJ[:, :1]
    features_PYF = torch.cat((reward_PY[..., None], utility_PYJ), dim=2) + eps * normal(P, Y, 1 + J)
    if tabular:
        features_PYF = torch.eye(P * Y, dtype=torch.float64).view(P, Y, P * Y)
    return Problem(
        reward_PY=reward_PY,
        utility_PYJ=utility_PYJ,
        b_J=torch.tensor(b, dtype=torch.float64).expand(J).clone(),
        beta=beta,
        features_PYF=features_PYF,
    )
