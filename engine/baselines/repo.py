"""Our reading of RePO (arXiv 2410.19933, known from its abstract): the constraint holds prompt by prompt, E_x [violation(x)]+ <= 0.

Primal-dual policy gradient as in `engine.primal_dual`, but the penalty counts only on prompts whose sampled responses miss the threshold,
and lambda rises with the mean rectified violation. It can only rise; the cap on its change and lam_max bound it.

Decided here: with --cost-mean or --cost-rate a prompt's own level is compared with the limit, E_x [E_y c - d]+; with --threshold, which the
paper does not have, its improvement over its own reference samples is; the step of lambda is on ln lambda, as in `engine.primal_dual`.
"""

import torch

from engine.baselines.primal_dual import descend
from engine.config import RepoConfig
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World


def train(config: RepoConfig, *, resume: str | None = None) -> Result:
    """Run RePO; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("repo", config, resume, n_stages=3 + 2 * config.iterations) as job:
        world = World(job)
        world.check_thresholds()
        return world.verdict(*loop(world, config))


def loop(world: World, config: RepoConfig):
    """RePO in any world: returns the last policy and its multipliers, float64 [J]."""
    lam_J, policy = torch.full((world.scores.utility_PGJ.shape[2],), config.lam_init, dtype=torch.float64), None
    used_J = lam_J
    for t in range(1, config.iterations + 1):
        before = policy, used_J
        policy, used_J = world.ascend(policy, lam_J, t, rectified=True), lam_J
        u = world.measure_slack(policy, lam_J, t)
        if world.passes_max_kl(u, t):
            return before
        if t < config.iterations:
            lam_J = descend(lam_J, -u.violation_J, config)
    return policy, lam_J
