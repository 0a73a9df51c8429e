"""CAID (arXiv 2505.19387, Algorithm 2): alternate a policy update that maximises the Lagrangian with dual descent.

Where the paper is silent, this is decided: the multipliers start at the one-shot optimum, so the literal step at t = 0 is left out;
one adapter and its optimizer go on through all iterations; the reference stays the original model; labels are drawn afresh in every step;
the improvement is measured against each prompt's own reference samples; the dual step is a fifth of the inverse Hessian at the warm start,
with a cap on the change, as a policy of few steps lags behind lambda; the last iterate is the result, and no dual step follows it.
"""

import torch

from engine import dual, stages
from engine.config import CaidConfig


def train(config: CaidConfig, *, resume: str | None = None) -> stages.Result:
    """Run CAID; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with stages.open_job("caid", config, resume, n_stages=4 + 2 * config.iterations) as job:
        world = stages.World(job)
        return world.verdict(loop(world, config))


def loop(world: stages.World, config: CaidConfig) -> torch.Tensor:
    """Algorithm 2 in any world: returns the multipliers of the last policy, float64 [J]."""
    warm = world.solve_dual()
    lam_J = warm.lam
    for t in range(1, config.iterations + 1):
        world.update_policy(lam_J, t, config.slack_prompts)
        u = world.measure_slack(lam_J, t)
        if world.passes_max_kl(u, t) or t == config.iterations:
            break
        lam_J = dual.step(lam_J, u.slack_J, warm.hessian / config.dual_step, max_change=config.lam_max_change, lam_max=config.lam_max)
    return lam_J
