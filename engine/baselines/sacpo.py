"""SACPO (arXiv 2404.11049): DPO on the reward, then DPO on safety from and against the policy that it gave.

The second stage's policy is proportional to the first one's times exp(lambda g / beta), the Lagrangian's maximiser at that lambda. With
several costs the labels of the second stage come from sum_j lambda_j g_j / sum_j lambda_j, and its coefficient is beta / sum_j lambda_j.
lambda is given, not solved for.

Decided here: labels come from score models instead of people, in both stages by DPO (the paper also tries KTO in the second); weights of
the two stages are not averaged (P-SACPO).
"""

import torch

from engine.config import SacpoConfig
from engine.records import Target
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World


def train(config: SacpoConfig, *, resume: str | None = None) -> Result:
    """Run SACPO; returns the run folder, the held-out verdict and the multipliers given. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("sacpo", config, resume, n_stages=5) as job:
        world = World(job)
        return world.verdict(*loop(world, config))


def loop(world: World, config: SacpoConfig):
    """Both stages in any world: returns the policy and the multipliers, float64 [J]."""
    lam_J = torch.tensor(config.lam, dtype=torch.float64)
    helpful = world.fit(Target(lam_J=torch.zeros_like(lam_J), score_PG=world.scores.reward_PG, coefficient=config.beta), 1)
    safety_PG = world.scores.utility_PGJ @ (lam_J / lam_J.sum())
    stage_two = Target(lam_J=lam_J, score_PG=safety_PG, coefficient=config.beta / float(lam_J.sum()), start=helpful, anchor=helpful)
    return world.fit(stage_two, 2), lam_J
