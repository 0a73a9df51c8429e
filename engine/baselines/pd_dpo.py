"""Our reading of PD-DPO (arXiv 2510.05703, known from its abstract): DPO on the reward once; then, at each lambda, DPO on safety from and
against that policy with coefficient beta / lambda; a step of projected dual descent; repeat.

Decided here: the slack is the measured one, not a binary feedback; no exploration bonus; where all multipliers are 0 the reward's policy
itself is the iterate; several costs are joined as in `engine.sacpo`.
"""

import torch

from engine import dual
from engine.config import PdDpoConfig
from engine.records import Target
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World


def train(config: PdDpoConfig, *, resume: str | None = None) -> Result:
    """Run PD-DPO; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("pd_dpo", config, resume, n_stages=4 + 2 * config.iterations) as job:
        world = World(job)
        world.check_thresholds()
        return world.verdict(*loop(world, config))


def loop(world: World, config: PdDpoConfig):
    """PD-DPO in any world: returns the last policy and its multipliers, float64 [J]."""
    scores = world.scores
    lam_J = torch.full((scores.utility_PGJ.shape[2],), config.lam_init, dtype=torch.float64)
    helpful = world.fit(Target(lam_J=torch.zeros_like(lam_J), score_PG=scores.reward_PG, coefficient=config.beta), 0)
    policy, used_J = helpful, torch.zeros_like(lam_J)
    for t in range(1, config.iterations + 1):
        before, total = (policy, used_J), float(lam_J.sum())
        if total > 0:
            safety_PG = scores.utility_PGJ @ (lam_J / total)
            policy = world.fit(Target(lam_J=lam_J, score_PG=safety_PG, coefficient=config.beta / total, start=helpful, anchor=helpful), t)
        else:
            policy = world.adopt(helpful, lam_J, t)
        used_J = lam_J
        u = world.measure_slack(policy, lam_J, t)
        if world.passes_max_kl(u, t):
            return before
        if t < config.iterations:
            lam_J = dual.step(lam_J, u.slack_J, config.dual_rate, max_change=config.lam_max_change, lam_max=config.lam_max)
    return policy, lam_J
