"""The stages of the algorithms in an exact world (`engine.stages.protocol.Stages`): every response is listed,
policies are log-linear, and expectations are exact.

The algorithms' loops run in it unchanged. An iterate is a vector theta
(`bench.theory.problem`), None the reference.

    problem = make(seed=0, J=1, eps=0.3)
    world = ExactStages(problem, CaidConfig(beta=problem.beta), maximiser)
    theta, lam_J = caid.loop(world, world.config)

The way a policy is updated is an argument, one of those in `bench.theory.updates`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bench.theory.newton import inverse_times
from bench.theory.problem import Problem
from engine import dual
from engine.config import PrimalDualConfig, RunConfig
from engine.records import ScaledScores, Score, Scored, ScoredTarget, ScoreRule, Target
from engine.stages.protocol import Result, Slack


@dataclass(frozen=True, kw_only=True)
class Iterate:
    """A measured policy, with what the algorithm's loop knew of it."""

    lam_J: Tensor
    theta: Tensor
    slack_J: Tensor  # as measured; exact without slack_draws


class ExactStages:
    """The stages of one run on one problem.

    `history` holds the measured iterates, `fitted` every (target, theta) of the updates by `fit`. An iterate
    is a float64 vector theta [F], None the reference.
    """

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
        """Stores the arguments and draws the responses that updates see.

        lam_init: multipliers [J] in place of the one-shot ones of `solve_dual`.
        draws: responses per prompt that updates and `solve_dual` see, drawn from the reference, or from the
          policy in `ascend`. With None they see each of the Y responses once, and all moments are exact.
        slack_draws: responses per prompt, drawn from the policy, in a measured slack;
          None measures it exactly.
        ascent_rate: natural-gradient step of `ascend`; 1 jumps to the maximiser where the class has it.
        """
        assert config.beta == problem.beta
        self.problem, self.config, self.update, self.lam_init = problem, config, update, lam_init
        self.draws, self.slack_draws, self.ascent_rate, self.seed = draws, slack_draws, ascent_rate, seed
        self.history: list[Iterate] = []
        self.fitted: list[tuple[Target, Tensor]] = []
        self._kept: tuple[Tensor | None, Tensor] | None = None
        P, Y = problem.reward_PY.shape
        self.index_PG = torch.arange(Y).expand(P, Y)
        if draws is not None:
            self.index_PG = torch.randint(Y, (P, draws), generator=self.generator(0))

    def generator(self, purpose: int) -> torch.Generator:
        """Returns random numbers for a purpose: 0 draws the responses,
        t > 0 an update's labels, t < 0 a slack."""
        return torch.Generator().manual_seed((1_000_003 * self.seed + purpose) % 2**63)

    def gather(self, values_PY: Tensor) -> Tensor:
        """Picks from [P, Y, ...] the responses that updates see, [P, G, ...]."""
        return values_PY[torch.arange(len(values_PY))[:, None], self.index_PG]

    @property
    def scores(self) -> ScaledScores:
        """Returns the scores of the responses that updates see."""
        utility_PGJ = self.gather(self.problem.utility_PYJ)
        reference = -math.log(self.problem.reward_PY.shape[1])
        return ScaledScores(
            reward_PG=self.gather(self.problem.reward_PY),
            utility_PGJ=utility_PGJ,
            audit_PGA=utility_PGJ[..., :0],
            ref_logprob_PG=torch.full(utility_PGJ.shape[:2], reference, dtype=torch.float64),
        )

    def solve_dual(self) -> dual.Solution:
        """Solves the dual on these scores with the engine's solver."""
        scores, problem, config = self.scores, self.problem, self.config
        solution = dual.solve(
            scores.reward_PG,
            scores.utility_PGJ,
            problem.b_J,
            problem.beta,
            enumerated=self.index_PG.shape == problem.reward_PY.shape,
            lam_max=config.lam_max,
            force=config.force,
        )
        return solution if self.lam_init is None else replace(solution, lam=self.lam_init)

    @property
    def n_constraints(self) -> int:
        return len(self.problem.b_J)

    @property
    def kept(self) -> tuple[Tensor | None, Tensor]:
        assert self._kept is not None, "an iterate is kept when its slack is measured"
        return self._kept

    def sample_reference(self) -> None:
        """Does nothing: the responses were drawn, or are all listed."""

    def check_thresholds(self) -> None:
        """Does nothing: the theory is about thresholds that some policy meets."""

    def keep(self, theta: Tensor | None, lam_J: Tensor) -> None:
        self._kept = theta, lam_J

    def verdict(self, theta: Tensor | None, lam_J: Tensor) -> Result:
        raise NotImplementedError("an exact problem has no prompts to hold out")

    def scored(self) -> Scored:
        """Returns the scores that rules see: a cost is the negated utility, and every
        constraint is about every prompt."""
        scores = self.scores
        return Scored(
            reward_PG=scores.reward_PG,
            utility_PGJ=scores.utility_PGJ,
            weight_PJ=torch.ones_like(scores.utility_PGJ[:, 0]),
            cost_PGJ=-scores.utility_PGJ,
        )

    def fit(self, target: Target, iteration: int) -> Tensor:
        """Fits theta to the target by `update`."""
        theta = self.update(self, target.on(self.scored()), iteration)
        self.fitted.append((target, theta))
        return theta

    def adopt(self, theta: Tensor, lam_J: Tensor, iteration: int) -> Tensor:
        """Returns theta itself: nothing has to be written."""
        return theta

    def ascend(self, start: Tensor | None, lam_J: Tensor, score: ScoreRule, iteration: int) -> Tensor:
        """Takes `config.steps` natural-gradient steps on score - beta ln(pi / reference), without PPO's clip.

        theta <- theta + rate / beta x (E Cov(features))^-1 E Cov(features, score).
        The moments, also those that "group_norm" takes, are those of the policy at that step,
        or of `draws` responses from it with leave-one-out baselines.
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
                seen, weight, leave_one_out = self.index_PG, pi, 1.0
            else:
                seen = torch.multinomial(pi, self.draws, replacement=True, generator=generator)
                weight = torch.full(seen.shape, 1 / self.draws, dtype=torch.float64)
                # This factor turns the mean over all draws into the mean over the other draws.
                leave_one_out = self.draws / (self.draws - 1)
            utility_PGJ = problem.utility_PYJ[row, seen]
            scored = Scored(
                reward_PG=problem.reward_PY[row, seen],
                utility_PGJ=utility_PGJ,
                weight_PJ=torch.ones_like(utility_PGJ[:, 0]),
                cost_PGJ=-utility_PGJ,
                missing_PJ=-(weight[..., None] * problem.shifted_PYJ[row, seen]).sum(1),
            )
            parts = score(scored)
            if config.advantage == "group_norm":
                parts = standardised(parts, weight)
            score_PG = parts.total_PG - problem.beta * problem.log_ratio_PY(theta)[row, seen]
            advantage = leave_one_out * (score_PG - (weight * score_PG).sum(1, keepdim=True))
            centred = phi - (pi[..., None] * phi).sum(1, keepdim=True)
            gradient = torch.einsum("pg,pg,pgf->f", weight, advantage, centred[row, seen]) / len(pi)
            metric = torch.einsum("py,pyf,pyh->fh", pi, centred, centred) / len(pi)
            direction = inverse_times(*np.linalg.eigh(metric.numpy()), gradient.numpy())
            theta = theta + self.ascent_rate / problem.beta * torch.from_numpy(direction)
        return theta

    def measure_slack(self, theta: Tensor, lam_J: Tensor, iteration: int) -> Slack | None:
        """Measures E g - E_ref g - b of the policy, on each prompt exactly or as
        the mean of `slack_draws` draws."""
        problem, pi = self.problem, self.problem.policy_PY(theta)
        if self.slack_draws is None:
            slack_PJ = (pi[..., None] * problem.shifted_PYJ).sum(1)
            se_J = torch.zeros_like(problem.b_J)
        else:
            generator = self.generator(-iteration)
            drawn = torch.multinomial(pi, self.slack_draws, replacement=True, generator=generator)
            slack_PGJ = problem.shifted_PYJ[torch.arange(len(pi))[:, None], drawn]
            slack_PJ = slack_PGJ.mean(1)
            # The problem has no other prompts, so only the draws are random.
            se_J = (slack_PGJ.var(1) / self.slack_draws).sum(0).sqrt() / len(pi)
        slack_J = slack_PJ.mean(0)
        self.history.append(Iterate(lam_J=lam_J, theta=theta, slack_J=slack_J))
        if self._kept is None:
            self.keep(None, lam_J)
        if problem.kl(theta) > self.config.max_kl:
            return None
        self.keep(theta, lam_J)
        return Slack(
            improvement_J=slack_J + problem.b_J,
            se_J=se_J,
            slack_J=slack_J,
            violation_J=(-slack_PJ).clamp(min=0).mean(0),
            reward=float(((pi - 1 / pi.shape[1]) * problem.reward_PY).sum(1).mean()),
            reward_se=0.0,
            kl=problem.kl(theta),
            kl_se=0.0,
        )


def standardised(score: Score, share_PG: Tensor) -> Score:
    """Shifts and scales reward and utilities to mean 0 and population standard deviation 1 on each prompt; 0
    where all are equal. share: of each response in its prompt's means."""

    def mean(x_PGC: Tensor) -> Tensor:
        return (share_PG[..., None] * x_PGC).sum(1, keepdim=True)

    x_PGC = torch.cat((score.reward_PG[..., None], score.utility_PGJ), dim=2)
    x_PGC = x_PGC - mean(x_PGC)
    deviation = mean(x_PGC.square()).sqrt()
    x_PGC = torch.where(deviation > 0, x_PGC / deviation, 0)
    return Score(reward_PG=x_PGC[..., 0], utility_PGJ=x_PGC[..., 1:], lam_J=score.lam_J)


# (world, target, number of the update, which keys its random numbers) -> theta
Update = Callable[[ExactStages, ScoredTarget, int], Tensor]


def preferred(world: ExactStages) -> Problem:
    """Returns the problem as PeCAID and PeCAN see it: reward and utilities are beta x log-ratios
    of policies aligned to each alone.

    The world's update aligns them from what it sees; without an update they are the exact tilts. The factor
    beta keeps them in the units of the scores, where the engine divides by their standard deviation.
    """
    problem, scores = world.problem, world.scores

    def log_ratio_PY(score_PY: Tensor, score_PG: Tensor, number: int) -> Tensor:
        if world.update is None:
            return (score_PY / problem.beta).log_softmax(1) + math.log(score_PY.shape[1])
        target = ScoredTarget(score=Score.plain(score_PG), coefficient=problem.beta)
        return problem.log_ratio_PY(world.update(world, target, number))

    reward_PY = log_ratio_PY(problem.reward_PY, scores.reward_PG, 10_001)
    utilities = [
        log_ratio_PY(problem.utility_PYJ[..., j], scores.utility_PGJ[..., j], 10_002 + j)
        for j in range(len(problem.b_J))
    ]
    return replace(
        problem,
        reward_PY=problem.beta * reward_PY,
        utility_PYJ=problem.beta * torch.stack(utilities, dim=2),
    )
