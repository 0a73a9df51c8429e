"""Primal-dual policy gradient (PPO-Lagrangian, arXiv 2310.12773) without a critic:
advantages within the responses of a prompt.

Each iteration samples the policy afresh, takes clipped policy-gradient steps on the score r + lambda . g -
beta ln(policy / reference), measures the slack on other prompts, and descends ln lambda: ln lambda <- ln
lambda - rate lambda u. Decided here: the KL is in the score, of the policy that sampled, so that the gradient
is the Lagrangian's own; the advantage is not divided by 1 + lambda; RLOO advantages without scaling are the
faithful form, "group_norm" standardises reward and utilities per prompt before they are combined, which
changes the objective and the meaning of lambda; there a constraint about one kind of prompts counts on each
of them as one about all prompts does, not more.
"""

import torch
from torch import Tensor

from engine.config import PrimalDualConfig
from engine.ranks import ALONE, Ranks
from engine.records import lagrangian
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: PrimalDualConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs primal-dual policy gradient; returns the run folder, the held-out
    verdict and the last multipliers.

    `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("primal_dual", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: PrimalDualConfig):
    """Runs the alternation; returns the last policy and its multipliers, float64 [J]."""
    stages.sample_reference()
    stages.check_thresholds()
    lam_J = torch.full((stages.n_constraints,), config.lam_init, dtype=torch.float64)
    policy = u = None
    for t in range(1, config.iterations + 1):
        if u is not None:
            lam_J = descend(lam_J, u.slack_J, config)
        policy = stages.ascend(policy, lam_J, lagrangian(lam_J), t)
        u = stages.measure_slack(policy, lam_J, t)
        if u is None:
            break
    return stages.kept


def descend(lam_J: Tensor, slack_J: Tensor, config: PrimalDualConfig) -> Tensor:
    """Steps ln lambda <- ln lambda - rate lambda slack, with the cap on the change of lambda; float64 [J]."""
    factor = (
        (-config.dual_rate * lam_J * slack_J).exp().clamp(1 / config.lam_max_change, config.lam_max_change)
    )
    return (lam_J * factor).clamp(max=config.lam_max)
