"""Our reading of C-DPO (arXiv 2403.02475, known from its abstract): DPO at lambda from the reference, a step of dual descent, and again.

Decided here: lambda is projected on lambda >= 0; each policy starts anew at the reference; the last one is the result.
"""

import torch

from engine import dual
from engine.config import CdpoConfig
from engine.records import Target
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World


def train(config: CdpoConfig, *, resume: str | None = None) -> Result:
    """Run C-DPO; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("cdpo", config, resume, n_stages=3 + 2 * config.iterations) as job:
        world = World(job)
        world.check_thresholds()
        return world.verdict(*loop(world, config))


def loop(world: World, config: CdpoConfig):
    """C-DPO in any world: returns the last policy and its multipliers, float64 [J]."""
    lam_J, policy = torch.full((world.scores.utility_PGJ.shape[2],), config.lam_init, dtype=torch.float64), None
    used_J = lam_J
    for t in range(1, config.iterations + 1):
        score_PG = world.scores.reward_PG + world.scores.utility_PGJ @ lam_J
        before = policy, used_J
        policy, used_J = world.fit(Target(lam_J=lam_J, score_PG=score_PG, coefficient=config.beta), t), lam_J
        u = world.measure_slack(policy, lam_J, t)
        if world.passes_max_kl(u, t):
            return before
        if t < config.iterations:
            lam_J = dual.step(lam_J, u.slack_J, config.dual_rate, max_change=config.lam_max_change, lam_max=config.lam_max)
    return policy, lam_J
