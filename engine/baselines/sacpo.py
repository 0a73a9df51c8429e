"""SACPO (arXiv 2404.11049): DPO on the reward, then DPO on safety from and against the policy that it gave.

The second stage's policy is proportional to the first one's times exp(lambda g / beta), the Lagrangian's
maximiser at that lambda. With several costs the labels of the second stage come from sum_j lambda_j g_j /
sum_j lambda_j, and its coefficient is beta / sum_j lambda_j. lambda is given, not solved for.

Decided here: labels come from score models instead of people, in both stages by DPO (the paper also tries KTO
in the second); weights of the two stages are not averaged (P-SACPO).
"""

import torch

from engine.config import SacpoConfig
from engine.ranks import ALONE, Ranks
from engine.records import Target, lagrangian, utilities_alone
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: SacpoConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs SACPO; returns the run folder, the held-out verdict and the multipliers given. `resume`: the
    folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("sacpo", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: SacpoConfig):
    """Runs both stages; returns the policy and the multipliers, float64 [J]."""
    stages.sample_reference()
    lam_J = torch.tensor(config.lam, dtype=torch.float64)
    none_J = torch.zeros_like(lam_J)
    helpful = stages.fit(Target(lam_J=none_J, score=lagrangian(none_J), coefficient=config.beta), 1)
    share_J = lam_J / lam_J.sum()
    stage_two = Target(
        lam_J=lam_J,
        score=utilities_alone(share_J),
        coefficient=config.beta / float(lam_J.sum()),
        start=helpful,
        anchor=helpful,
    )
    return stages.fit(stage_two, 2), lam_J
