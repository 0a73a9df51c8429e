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

import numpy as np
import torch
from torch import Tensor

from bench.theory.newton import inverse_times
from bench.theory.problem import Problem
from engine import dual
from engine.config import PrimalDualConfig, RunConfig
from engine.records import Scores, Target
from engine.stages import Slack


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
        utility_PGJ, reference = (
            self.gather(self.problem.utility_PYJ),
            -math.log(self.problem.reward_PY.shape[1]),
        )
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

    def ascend(
        self, start: Tensor | None, lam_J: Tensor, iteration: int, *, rectified: bool = False
    ) -> Tensor:
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
                weight, own = (
                    torch.full(seen.shape, 1 / self.draws, dtype=torch.float64),
                    self.draws / (self.draws - 1),
                )
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
            direction = inverse_times(*np.linalg.eigh(metric.numpy()), gradient.numpy())
            theta = theta + self.ascent_rate / problem.beta * torch.from_numpy(direction)
        return theta

    def measure_slack(self, theta: Tensor, lam_J: Tensor, iteration: int) -> Slack:
        """E g - E_ref g - b of the policy, per prompt exact or the mean of `slack_draws` draws."""
        problem, pi = self.problem, self.problem.policy_PY(theta)
        if self.slack_draws is None:
            slack_PJ = (pi[..., None] * problem.shifted_PYJ).sum(1)
            se_J = torch.zeros_like(problem.b_J)
        else:
            drawn = torch.multinomial(
                pi, self.slack_draws, replacement=True, generator=self.generator(-iteration)
            )
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
    return replace(
        problem, reward_PY=problem.beta * ratios[0], utility_PYJ=problem.beta * torch.stack(ratios[1:], dim=2)
    )


def standardised(values_PYJ: Tensor, pi_PY: Tensor) -> Tensor:
    """Zero mean and unit standard deviation on each prompt under pi; 0 where all are equal."""
    centred = values_PYJ - (pi_PY[..., None] * values_PYJ).sum(1, keepdim=True)
    deviation = (pi_PY[..., None] * centred.square()).sum(1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0)
