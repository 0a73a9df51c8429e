"""Our reading of PD-DPO (arXiv 2510.05703, known from its abstract): DPO on the reward once;
then, at each lambda, DPO on safety from and against that policy with coefficient beta / lambda;
a step of projected dual descent; repeat.

Decided here: the slack is the measured one, not a binary feedback; no exploration bonus; where all
multipliers are 0 the reward's policy itself is the iterate; several costs are joined as in `engine.sacpo`.
"""

import torch

from engine import dual
from engine.config import PdDpoConfig
from engine.ranks import ALONE, Ranks
from engine.records import Target, lagrangian, utilities_alone
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: PdDpoConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs PD-DPO; returns the run folder, the held-out verdict and the last multipliers. `resume`: the
    folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("pd_dpo", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: PdDpoConfig):
    """Runs PD-DPO; returns the last policy and its multipliers, float64 [J]."""
    stages.sample_reference()
    stages.check_thresholds()
    lam_J = torch.full((stages.n_constraints,), config.lam_init, dtype=torch.float64)
    none_J = torch.zeros_like(lam_J)
    helpful = stages.fit(Target(lam_J=none_J, score=lagrangian(none_J), coefficient=config.beta), 0)
    stages.keep(helpful, none_J)
    u = None
    for t in range(1, config.iterations + 1):
        if u is not None:
            lam_J = dual.step(
                lam_J, u.slack_J, config.dual_rate, max_change=config.lam_max_change, lam_max=config.lam_max
            )
        if float(lam_J.sum()) > 0:
            policy = stages.fit(safety(lam_J, config.beta, helpful), t)
        else:
            policy = stages.adopt(helpful, lam_J, t)
        u = stages.measure_slack(policy, lam_J, t)
        if u is None:
            break
    return stages.kept


def safety(lam_J: torch.Tensor, beta: float, helpful) -> Target:
    """Builds the target of an alignment to sum_j lambda_j g_j / sum_j lambda_j from the policy of the reward,
    with coefficient beta / sum_j lambda_j."""
    total = float(lam_J.sum())
    share_J = lam_J / total
    return Target(
        lam_J=lam_J,
        score=utilities_alone(share_J),
        coefficient=beta / total,
        start=helpful,
        anchor=helpful,
    )
