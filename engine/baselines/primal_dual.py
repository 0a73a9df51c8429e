"""Primal-dual policy gradient (PPO-Lagrangian, arXiv 2310.12773) without a critic: advantages within the responses of a prompt.

Each iteration samples the policy afresh, takes clipped policy-gradient steps on the score r + lambda . g - beta ln(policy / reference),
measures the slack on other prompts, and descends ln lambda: ln lambda <- ln lambda - rate lambda u. Decided here: the KL is in the score,
of the policy that sampled, so that the gradient is the Lagrangian's own; the advantage is not divided by 1 + lambda; RLOO advantages
without scaling are the faithful form, "group_norm" standardises reward and utilities per prompt before they are combined, which changes the
objective and the meaning of lambda.
"""

import torch

from engine.config import PrimalDualConfig
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World


def train(config: PrimalDualConfig, *, resume: str | None = None) -> Result:
    """Run primal-dual policy gradient; returns the run folder, the held-out verdict and the last multipliers. `resume`: a run folder.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("primal_dual", config, resume, n_stages=3 + 2 * config.iterations) as job:
        world = World(job)
        world.check_thresholds()
        return world.verdict(*loop(world, config))


def loop(world: World, config: PrimalDualConfig):
    """The alternation in any world: returns the last policy and its multipliers, float64 [J]."""
    lam_J, policy = torch.full((world.scores.utility_PGJ.shape[2],), config.lam_init, dtype=torch.float64), None
    used_J = lam_J
    for t in range(1, config.iterations + 1):
        before = policy, used_J
        policy, used_J = world.ascend(policy, lam_J, t), lam_J
        u = world.measure_slack(policy, lam_J, t)
        if world.passes_max_kl(u, t):
            return before
        if t < config.iterations:
            lam_J = descend(lam_J, u.slack_J, config)
    return policy, lam_J


def descend(lam_J: torch.Tensor, slack_J: torch.Tensor, config: PrimalDualConfig) -> torch.Tensor:
    """ln lambda <- ln lambda - rate lambda slack, with the cap on the change of lambda. float64 [J]."""
    factor = (-config.dual_rate * lam_J * slack_J).exp().clamp(1 / config.lam_max_change, config.lam_max_change)
    return (lam_J * factor).clamp(max=config.lam_max)
