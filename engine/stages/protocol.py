"""Declares what an algorithm may ask of the stages of a run.

The algorithms' loops know nothing else, so that an enumerated world stands in for a real model where their
theory is checked. An iterate is whatever `fit`, `ascend` and `adopt` return; None is the reference.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from engine.config import RunConfig
from engine.dual.solver import Solution
from engine.records import ScoreRule, Target
from engine.verdict.evaluation import Evaluation

Iterate = Any


@dataclass(frozen=True, kw_only=True)
class Slack:
    """On-policy improvements over the reference on prompts outside the iteration's pairs,
    in units, clustered by prompt."""

    improvement_J: Tensor
    se_J: Tensor
    slack_J: Tensor  # improvement - aim
    violation_J: Tensor  # mean over prompts of what each misses of the aim, 0 where it does not
    reward: float
    reward_se: float
    kl: float  # nats per response
    kl_se: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result that `train` returns: the run folder, the held-out verdict of the kept iterate, and the
    multipliers it was trained with."""

    folder: Path
    evaluation: Evaluation
    lam: list[float]


class Stages(Protocol):
    """The stages of a run, in the order in which an algorithm asks for them."""

    @property
    def n_constraints(self) -> int:
        """J, the number of multipliers."""

    @property
    def kept(self) -> tuple[Iterate | None, Tensor]:
        """The result of a loop: the last iterate within --max-kl,
        and the multipliers that it was trained at."""

    def sample_reference(self) -> None:
        """Samples and scores the reference offline (arXiv 2505.19387, Algorithm 2, step 1);
        fixes units and aims."""

    def solve_dual(self) -> Solution:
        """Returns the one-shot multipliers from the reference's samples
        (arXiv 2405.19544, Algorithm 1, step 2).

        Raises: UserError for thresholds beyond what the samples support.
        """

    def check_thresholds(self) -> None:
        """Refuses the thresholds that `solve_dual` would refuse, for algorithms that do not solve
        the dual. Raises: UserError."""

    def fit(self, target: Target, iteration: int) -> Iterate:
        """Returns iterate `iteration`: the target fitted on pairs of responses (Algorithm 2, step 4)."""

    def ascend(self, start: Iterate | None, lam_J: Tensor, score: ScoreRule, iteration: int) -> Iterate:
        """Returns iterate `iteration`: policy-gradient steps from `start` on fresh samples of the policy,
        scored by the rule less beta x log-ratio, with advantages as the config says."""

    def adopt(self, policy: Iterate, lam_J: Tensor, iteration: int) -> Iterate:
        """Makes a policy that exists already iterate `iteration` too, without a step."""

    def measure_slack(self, policy: Iterate, lam_J: Tensor, iteration: int) -> Slack | None:
        """Returns the slack u(lambda) = mean(g - E_ref g) - aim of an iterate
        (Algorithm 2, step 2), and keeps the iterate.

        None where the policy is further from the reference than --max-kl: the loop ends,
        and the iterate kept before stays.
        """

    def keep(self, policy: Iterate | None, lam_J: Tensor) -> None:
        """Makes a policy the result of the loop, until another one is kept."""

    def verdict(self, policy: Iterate | None, lam_J: Tensor) -> Result:
        """Returns the verdict on prompts held out, with the report written."""


def stages_of(config: RunConfig) -> int:
    """Counts the stages of a run."""
    aligned = 2 + len(config.cost) if config.by_preference else 0
    pairs = bool(config.pairs_file)
    return 3 + pairs + aligned + config.solves_dual + config.policy_updates + config.measured_slacks
