"""Another implementation of `engine.stages.World`: every response is listed, the policy is log-linear, expectations are exact.

The algorithms' own loops run in it. An iterate is a float64 vector theta [F], None the reference, which is uniform over Y responses:

    log pi(y | x) = features(x, y) . theta - ln Z(x)

    problem = make(seed=0, J=1, eps=0.3)
    world = ExactWorld(problem, CaidConfig(beta=problem.beta), maximiser)
    theta, lam_J = caid.loop(world, world.config)

How a policy update is done is an argument: `maximiser` is the exact argmax of the Lagrangian over theta, to which the papers' theorems
apply; `soft`, `sampled`, `regression`, `listwise` and `single` minimise the loss of a label form, over all responses (the population) or,
with `draws`, over that many responses drawn from the reference for each prompt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from engine import dual
from engine.config import PrimalDualConfig, RunConfig
from engine.records import Scores, Target
from engine.stages import Slack

# Rounding is taken for convergence where a Newton step would gain less than this.
SMALLEST_GAIN = 1e-24


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A constrained problem with P prompts and Y equally likely responses of the reference, and the class of its policies.

    reward: lies symmetrically about 0 on each prompt; utility: 0 at response 0 of each prompt (assumption A1 of arXiv 2505.19387).
    """

    reward_PY: Tensor  # float64
    utility_PYJ: Tensor  # float64
    b_J: Tensor  # float64: required improvement over the reference
    beta: float
    features_PYF: Tensor  # float64

    @property
    def shifted_PYJ(self) -> Tensor:
        """h = g - E_ref g - b; the constraint is E h >= 0."""
        return self.utility_PYJ - self.utility_PYJ.mean(1, keepdim=True) - self.b_J

    def log_ratio_PY(self, theta: Tensor | None) -> Tensor:
        """ln pi / reference; both are normalised."""
        if theta is None:
            return torch.zeros_like(self.reward_PY)
        z = self.features_PYF @ theta
        return z - z.logsumexp(1, keepdim=True) + math.log(z.shape[1])

    def policy_PY(self, theta: Tensor | None) -> Tensor:
        """pi(y | x)."""
        return self.log_ratio_PY(theta).exp() / self.reward_PY.shape[1]

    def slack_J(self, theta: Tensor | None) -> Tensor:
        """E h."""
        return (self.policy_PY(theta)[..., None] * self.shifted_PYJ).sum(1).mean(0)

    def kl(self, theta: Tensor | None) -> float:
        """E KL(pi || reference), nats."""
        return float((self.policy_PY(theta) * self.log_ratio_PY(theta)).sum(1).mean())

    def value(self, theta: Tensor | None) -> float:
        """The objective of the constrained problem: E r - beta KL(pi || reference)."""
        return float((self.policy_PY(theta) * self.reward_PY).sum(1).mean()) - self.beta * self.kl(theta)

    def lagrangian(self, theta: Tensor | None, lam_J: Tensor) -> float:
        """E[r + lambda . h] - beta KL(pi || reference)."""
        return self.value(theta) + float(self.slack_J(theta) @ lam_J)

    @cached_property
    def cloud(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """theta [2048, F] of seeded members of the class, of all sizes from 0.1 to 300 in rising order: their policies [2048, P Y] and mean
        KL [2048]. Some maxima of a Lagrangian lie far out, where policies are nearly one-hot."""
        phi = self.features_PYF.numpy()
        theta_SF = np.random.default_rng(7).normal(size=(2048, phi.shape[2]))
        theta_SF *= 10 ** np.linspace(-1, math.log10(300), 2048)[:, None] / np.linalg.norm(theta_SF, axis=1, keepdims=True)
        z_PYS = phi @ theta_SF.T
        pi, log_Z = _softmax(z_PYS)
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
    """A seeded problem whose utilities pull against the reward (correlation about -0.45), both in within-prompt standard deviations.

    features = (r, g) + eps x standard normal noise: at eps = 0 every tilt exp((r + lambda . g) / beta) is in the class (no
    parametrisation gap), and the noise is the same for all eps > 0. `tabular`: one parameter for each response instead.
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
        reward_PY=reward_PY, utility_PYJ=utility_PYJ, b_J=torch.tensor(b, dtype=torch.float64).expand(J).clone(), beta=beta,
        features_PYF=features_PYF,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Iterate:
    """A measured policy: what an algorithm's loop knew of it."""

    lam_J: Tensor
    theta: Tensor
    slack_J: Tensor  # as measured; exact without slack_draws


class ExactWorld:
    """See the module. `history` holds the measured iterates, `fitted` every (target, theta) of the updates by `fit`."""

    def __init__(
        self,
        problem: Problem,
        config: RunConfig,
        update: "Update | None" = None,
        *,
        lam_init: Tensor | None = None,
        draws: int | None = None,
        slack_draws: int | None = None,
        ascent_rate: float = 0.2,
        seed: int = 0,
    ) -> None:
        """lam_init [J] replaces the one-shot multipliers of `solve_dual`.

        draws: responses per prompt that updates and `solve_dual` see, drawn from the reference, or from the policy in `ascend` (None: each
        of the Y once, all moments exact). slack_draws: responses per prompt, drawn from the policy, in a measured slack (None: exact).
        ascent_rate: natural-gradient step of `ascend`; 1 jumps to the maximiser where the class has it.
        """
        assert config.beta == problem.beta
        self.problem, self.config, self.update, self.lam_init = problem, config, update, lam_init
        self.draws, self.slack_draws, self.ascent_rate, self.seed = draws, slack_draws, ascent_rate, seed
        self.history: list[Iterate] = []
        self.fitted: list[tuple[Target, Tensor]] = []
        P, Y = problem.reward_PY.shape
        self.index_PG = torch.arange(Y).expand(P, Y)
        if draws is not None:
            self.index_PG = torch.randint(Y, (P, draws), generator=self.generator(0))

    def generator(self, purpose: int) -> torch.Generator:
        """Random numbers of the world's seed and a purpose: 0 the draws, t > 0 an update's labels, t < 0 a slack."""
        return torch.Generator().manual_seed((1_000_003 * self.seed + purpose) % 2**63)

    def gather(self, values_PY: Tensor) -> Tensor:
        """[P, Y, ...] at the responses that updates see, [P, G, ...]."""
        return values_PY[torch.arange(len(values_PY))[:, None], self.index_PG]

    @property
    def scores(self) -> Scores:
        """Of the responses that updates see."""
        utility_PGJ, reference = self.gather(self.problem.utility_PYJ), -math.log(self.problem.reward_PY.shape[1])
        return Scores(
            reward_PG=self.gather(self.problem.reward_PY), utility_PGJ=utility_PGJ, audit_PGA=utility_PGJ[..., :0],
            ref_logprob_PG=torch.full(utility_PGJ.shape[:2], reference, dtype=torch.float64),
        )  # fmt: skip

    def solve_dual(self) -> dual.Solution:
        """The real solver on these scores."""
        scores, problem = self.scores, self.problem
        enumerated = self.index_PG.shape == problem.reward_PY.shape
        solution = dual.solve(
            scores.reward_PG, scores.utility_PGJ, problem.b_J, problem.beta, enumerated=enumerated, lam_max=self.config.lam_max,
            force=self.config.force,
        )  # fmt: skip
        return solution if self.lam_init is None else replace(solution, lam=self.lam_init)

    def unsafe(self, above: Sequence[float]) -> Tensor:
        """bool [P, G]: responses of which a cost, the negated utility, lies above its number here."""
        return (self.scores.utility_PGJ < -torch.tensor(above, dtype=torch.float64)).any(dim=2)

    def fit(self, target: Target, iteration: int) -> Tensor:
        """theta by `update`."""
        theta = self.update(self, target, iteration)
        self.fitted.append((target, theta))
        return theta

    def adopt(self, theta: Tensor, lam_J: Tensor, iteration: int) -> Tensor:
        """theta itself."""
        return theta

    def ascend(self, start: Tensor | None, lam_J: Tensor, iteration: int, *, rectified: bool = False) -> Tensor:
        """`config.steps` natural-gradient steps on r + lambda . g - beta ln(pi / reference), without PPO's clip.

        theta <- theta + rate / beta x (E Cov(features))^-1 E Cov(features, score). The score's moments are those of the policy at that
        step, or of `draws` responses from it with leave-one-out baselines; with group_norm reward and utilities are standardised per prompt
        by them. `rectified`: lambda counts only on prompts that miss b.
        """
        problem, config = self.problem, self.config
        assert isinstance(config, PrimalDualConfig)
        phi = problem.features_PYF
        theta = torch.zeros(phi.shape[2], dtype=torch.float64) if start is None else start
        generator = self.generator(iteration)
        row = torch.arange(len(phi))[:, None]
        for _ in range(config.steps):
            pi = problem.policy_PY(theta)
            if self.draws is None:
                seen, weight, own = self.index_PG, pi, 1.0
            else:
                seen = torch.multinomial(pi, self.draws, replacement=True, generator=generator)
                # A mean over the other draws, not over all.
                weight, own = torch.full(seen.shape, 1 / self.draws, dtype=torch.float64), self.draws / (self.draws - 1)
            r, g = problem.reward_PY[row, seen], problem.utility_PYJ[row, seen]
            lam_PJ = lam_J.expand(len(pi), -1)
            if rectified:
                lam_PJ = lam_J * ((weight[..., None] * problem.shifted_PYJ[row, seen]).sum(1) < 0)
            if config.advantage == "group_norm":
                r, g = standardised(r[..., None], weight)[..., 0], standardised(g, weight)
            score = r + (g * lam_PJ[:, None]).sum(2) - problem.beta * problem.log_ratio_PY(theta)[row, seen]
            advantage = own * (score - (weight * score).sum(1, keepdim=True))
            centred = phi - (pi[..., None] * phi).sum(1, keepdim=True)
            gradient = torch.einsum("pg,pg,pgf->f", weight, advantage, centred[row, seen]) / len(pi)
            metric = torch.einsum("py,pyf,pyh->fh", pi, centred, centred) / len(pi)
            direction = _inverse(*np.linalg.eigh(metric.numpy()), gradient.numpy())
            theta = theta + self.ascent_rate / problem.beta * torch.from_numpy(direction)
        return theta

    def measure_slack(self, theta: Tensor, lam_J: Tensor, iteration: int) -> Slack:
        """E g - E_ref g - b of the policy, per prompt exact or the mean of `slack_draws` draws."""
        problem, pi = self.problem, self.problem.policy_PY(theta)
        if self.slack_draws is None:
            slack_PJ = (pi[..., None] * problem.shifted_PYJ).sum(1)
            se_J = torch.zeros_like(problem.b_J)
        else:
            drawn = torch.multinomial(pi, self.slack_draws, replacement=True, generator=self.generator(-iteration))
            slack_PGJ = problem.shifted_PYJ[torch.arange(len(pi))[:, None], drawn]
            slack_PJ = slack_PGJ.mean(1)
            # These prompts are all there are: only the draws are random.
            se_J = (slack_PGJ.var(1) / self.slack_draws).sum(0).sqrt() / len(pi)
        slack_J = slack_PJ.mean(0)
        self.history.append(Iterate(lam_J=lam_J, theta=theta, slack_J=slack_J))
        reward = float(((pi - 1 / pi.shape[1]) * problem.reward_PY).sum(1).mean())
        return Slack(
            improvement_J=slack_J + problem.b_J, se_J=se_J, slack_J=slack_J, violation_J=(-slack_PJ).clamp(min=0).mean(0), reward=reward,
            reward_se=0.0, kl=problem.kl(theta), kl_se=0.0,
        )  # fmt: skip

    def passes_max_kl(self, slack: Slack, iteration: int) -> bool:
        """Whether the policy is further than max_kl from the reference."""
        return slack.kl > self.config.max_kl


Update = Callable[[ExactWorld, Target, int], Tensor]


def preferred(world: ExactWorld) -> Problem:
    """What PeCAID and PeCAN see of the world's problem: reward and utilities are beta x log-ratios of policies aligned to each alone.

    Aligned by the world's update from what it sees, or the exact tilts where it has none. beta keeps them in the units of the scores, where
    the engine divides by their standard deviation.
    """
    problem, scores = world.problem, world.scores

    def log_ratio_PY(score_PY: Tensor, score_PG: Tensor, number: int) -> Tensor:
        if world.update is None:
            return (score_PY / problem.beta).log_softmax(1) + math.log(score_PY.shape[1])
        target = Target(lam_J=torch.zeros_like(problem.b_J), score_PG=score_PG, coefficient=problem.beta)
        return problem.log_ratio_PY(world.update(world, target, number))

    ratios = [log_ratio_PY(problem.reward_PY, scores.reward_PG, 10_001)]
    for j in range(len(problem.b_J)):
        ratios.append(log_ratio_PY(problem.utility_PYJ[..., j], scores.utility_PGJ[..., j], 10_002 + j))
    return replace(problem, reward_PY=problem.beta * ratios[0], utility_PYJ=problem.beta * torch.stack(ratios[1:], dim=2))


def standardised(values_PYJ: Tensor, pi_PY: Tensor) -> Tensor:
    """Zero mean and unit standard deviation on each prompt under pi; 0 where all are equal."""
    centred = values_PYJ - (pi_PY[..., None] * values_PYJ).sum(1, keepdim=True)
    deviation = (pi_PY[..., None] * centred.square()).sum(1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0)


def maximiser(world: ExactWorld, target: Target, number: int) -> Tensor:
    """argmax over theta of E[score + shift] - coefficient KL(pi || anchor): the best local maximum found from several starts.

    The starts: target.start (or 0), the least-squares fit of the tilt, and the best small, middle and large member of the problem's cloud.
    Needs every response's score.
    """
    return local_maxima(world, target)[0][1]


def local_maxima(world: ExactWorld, target: Target) -> list[tuple[float, Tensor]]:
    """(value, theta) from each start of `maximiser`, best first."""
    phi, score, c = world.problem.features_PYF.numpy(), _tilt_PG(world, target), target.coefficient
    P = len(phi)

    def derivatives(theta: np.ndarray):
        z = phi @ theta
        pi, log_Z = _softmax(z)
        inner = score - c * z
        mean = (pi * inner).sum(1, keepdims=True)
        centred = phi - (pi[..., None] * phi).sum(1, keepdims=True)
        weight = pi * (inner - mean)
        metric = c * _moment(pi, centred) / P
        gradient = np.tensordot(weight, centred, 2) / P
        return -(mean.mean() + c * log_Z.mean()), -gradient, metric - _moment(weight, centred) / P, metric

    centred = (phi - phi.mean(1, keepdims=True)).reshape(-1, phi.shape[2])
    fitted = np.linalg.lstsq(centred, (score - score.mean(1, keepdims=True)).ravel() / c)[0]
    starts = [_start(world, target), fitted]
    # A table of logits makes the problem concave: one start would do.
    if phi.shape[2] < score.size:
        theta_SF, pi_SN, kl_S = world.problem.cloud
        value_S = pi_SN @ score.ravel() / P - c * kl_S
        starts += [theta[value.argmax()] for theta, value in zip(np.array_split(theta_SF, 3), np.array_split(value_S, 3), strict=True)]
    found = [minimise(derivatives, x) for x in starts]
    return sorted(((-value, torch.from_numpy(theta)) for value, theta in found), key=lambda pair: -pair[0])


def soft(world: ExactWorld, target: Target, number: int) -> Tensor:
    """Bradley-Terry with expected labels: cross-entropy of sigmoid(score difference), over all pairs of a prompt's responses."""
    return _bradley_terry(world, target, expit(_pairs(world, target)[1]))


def sampled(world: ExactWorld, target: Target, number: int) -> Tensor:
    """Bradley-Terry with labels drawn afresh for each update, as in the papers; its population minimiser is that of `soft`."""
    chance = expit(_pairs(world, target)[1])
    drawn = torch.rand(len(chance), generator=world.generator(number), dtype=torch.float64).numpy()
    return _bradley_terry(world, target, (drawn < chance).astype(float))


def regression(world: ExactWorld, target: Target, number: int) -> Tensor:
    """Least squares of coefficient x log-ratio differences on score differences, over all pairs of a prompt's responses."""
    difference, score, offset = _pairs(world, target)
    return torch.from_numpy(np.linalg.lstsq(target.coefficient * difference, score + offset)[0])


def listwise(world: ExactWorld, target: Target, number: int) -> Tensor:
    """Cross-entropy of a prompt's responses: softmax(score / coefficient), times the anchor, against the softmax of log-ratios."""
    phi = world.gather(world.problem.features_PYF).numpy()
    aim, _ = _softmax(_tilt_PG(world, target) / target.coefficient)
    P = len(phi)

    def derivatives(theta: np.ndarray):
        z = phi @ theta
        p, log_Z = _softmax(z)
        hessian = _moment(p, phi - (p[..., None] * phi).sum(1, keepdims=True)) / P
        return (log_Z - (aim * z).sum(1, keepdims=True)).mean(), np.tensordot(p - aim, phi, 2) / P, hessian, hessian

    return torch.from_numpy(minimise(derivatives, _start(world, target))[1])


def single(world: ExactWorld, target: Target, number: int) -> Tensor:
    """Single-response regression (DRO, arXiv 2405.19107) of coefficient x log-ratio on score - V.

    V is the group's: coefficient x log-mean-exp of score / coefficient over the prompt's responses. Were V fitted with theta, this would
    be `regression`: the sum of squares over all pairs is that about the mean.
    """
    phi, c = world.problem.features_PYF.numpy(), target.coefficient
    own = world.gather(world.problem.features_PYF).numpy()
    tilt = _tilt_PG(world, target)
    aim = tilt - c * _softmax(tilt / c)[1] + c * math.log(tilt.shape[1])
    Y, n = phi.shape[1], tilt.size

    def derivatives(theta: np.ndarray):
        pi, log_Z = _softmax(phi @ theta)
        mean = (pi[..., None] * phi).sum(1, keepdims=True)
        residual = c * (own @ theta - log_Z + math.log(Y)) - aim
        slope = c * (own - mean)
        square = _moment(np.ones_like(residual), slope) / n
        bend = c * _moment(residual.sum(1, keepdims=True) * pi, phi - mean) / n
        return (residual**2).sum() / (2 * n), np.tensordot(residual, slope, 2) / n, square - bend, square

    return torch.from_numpy(minimise(derivatives, _start(world, target))[1])


def minimise(derivatives: Callable, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """Newton with backtracking from theta: (value, theta). derivatives(theta) -> value, gradient, Hessian, a positive semi-definite
    stand-in for it where it is indefinite."""
    value, gradient, hessian, metric = derivatives(theta)
    for _ in range(200):
        eigenvalue, basis = np.linalg.eigh(hessian)
        if eigenvalue[0] < -1e-12 * abs(eigenvalue[-1]):
            eigenvalue, basis = np.linalg.eigh(metric)
        direction = -_inverse(eigenvalue, basis, gradient)
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


def _inverse(eigenvalue: np.ndarray, basis: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Smallest solution x of matrix x = vector for a positive semi-definite matrix (a table of logits has a constant too many)."""
    inverse = np.where(eigenvalue > 1e-12 * eigenvalue[-1], 1 / np.maximum(eigenvalue, 1e-300), 0)
    return basis @ (inverse * (basis.T @ vector))


def _softmax(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax along axis 1 and its log-sum-exp, kept as an axis of length 1."""
    top = z.max(1, keepdims=True)
    weight = np.exp(z - top)
    total = weight.sum(1, keepdims=True)
    return weight / total, top + np.log(total)


def _moment(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sum of weight [P, G] times the outer product of x [P, G, F] with itself, [F, F]."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows * weight.reshape(-1, 1)).T @ rows


def _start(world: ExactWorld, target: Target) -> np.ndarray:
    return np.zeros(world.problem.features_PYF.shape[2]) if target.start is None else target.start.numpy()


def _tilt_PG(world: ExactWorld, target: Target) -> np.ndarray:
    """What coefficient x ln(pi / reference) shall be, up to a constant per prompt, at the responses that updates see."""
    tilt = target.score_PG if target.shift_PG is None else target.score_PG + target.shift_PG
    if target.anchor is not None:
        tilt = tilt + target.coefficient * target.anchor_share * world.gather(world.problem.log_ratio_PY(target.anchor))
    return tilt.numpy()


def _pairs(world: ExactWorld, target: Target) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all pairs [K] within the prompts that are not dropped: feature differences [K, F], score differences [K], and what the margin
    coefficient x (features . theta) is offset by [K]."""
    phi, score = world.gather(world.problem.features_PYF).numpy(), target.score_PG.numpy()
    offset = _tilt_PG(world, target) - score
    i, j = np.triu_indices(phi.shape[1], 1)
    kept = np.ones((len(phi), len(i)), dtype=bool)
    if target.dropped_PG is not None:
        dropped = target.dropped_PG.numpy()
        kept = ~(dropped[:, i] & dropped[:, j])
    return (phi[:, i] - phi[:, j])[kept], (score[:, i] - score[:, j])[kept], (offset[:, i] - offset[:, j])[kept]


def _bradley_terry(world: ExactWorld, target: Target, label_K: np.ndarray) -> Tensor:
    difference, _, offset = _pairs(world, target)
    c, K = target.coefficient, len(label_K)

    def derivatives(theta: np.ndarray):
        margin = c * (difference @ theta) - offset
        chance = expit(margin)
        hessian = c * c * _moment(chance * (1 - chance), difference) / K
        return (np.logaddexp(0, margin) - label_K * margin).mean(), c * (chance - label_K) @ difference / K, hessian, hessian

    return torch.from_numpy(minimise(derivatives, _start(world, target))[1])
