"""DPO (arXiv 2305.18290) on one score alone, the reward or safety.

Decided here: labels come from that score instead of people; safety is the sum of the utilities, each in its unit, on the prompts that its
constraint is about.
"""

import torch

from engine.config import DpoConfig
from engine.records import Target
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World


def train(config: DpoConfig, *, resume: str | None = None) -> Result:
    """Run DPO; returns the run folder, the held-out verdict and the weights of the utilities. `resume`: a run folder to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("dpo", config, resume, n_stages=4) as job:
        world = World(job)
        return world.verdict(*loop(world, config))


def loop(world: World, config: DpoConfig):
    """DPO in any world: returns the policy and the weights of the utilities, float64 [J]: 0 for the reward, 1 for safety."""
    scores, safety = world.scores, config.objective == "safety"
    lam_J = torch.full((scores.utility_PGJ.shape[2],), float(safety), dtype=torch.float64)
    score_PG = scores.utility_PGJ @ lam_J if safety else scores.reward_PG
    return world.fit(Target(lam_J=lam_J, score_PG=score_PG, coefficient=config.beta), 1), lam_J
