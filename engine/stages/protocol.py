"""The records that the stages hand to the algorithms."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.verdict.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `train` returns: the run folder, the held-out verdict of the last iterate, and the multipliers it was trained with."""

    folder: Path
    evaluation: Evaluation
    lam: list[float]


@dataclass(frozen=True, kw_only=True)
class Slack:
    """On-policy improvements over the reference on prompts outside the iteration's pairs, in units, clustered by prompt."""

    improvement_J: Tensor
    se_J: Tensor
    slack_J: Tensor  # improvement - aim
    violation_J: Tensor  # mean over prompts of what each misses of the aim, 0 where it does not
    reward: float
    reward_se: float
    kl: float  # nats per response
    kl_se: float
