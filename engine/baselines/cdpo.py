"""Our reading of C-DPO (arXiv 2403.02475, known from its abstract): DPO at lambda from the reference, a step
of dual descent, and again.

Decided here: lambda is projected on lambda >= 0; each policy starts anew at the reference;
the last one is the result.
"""

import torch

from engine import dual
from engine.config import CdpoConfig
from engine.ranks import ALONE, Ranks
from engine.records import Target, lagrangian
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: CdpoConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs C-DPO; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder
    of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("cdpo", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: CdpoConfig):
    """Runs C-DPO; returns the last policy and its multipliers, float64 [J]."""
    stages.sample_reference()
    stages.check_thresholds()
    lam_J, u = torch.full((stages.n_constraints,), config.lam_init, dtype=torch.float64), None
    for t in range(1, config.iterations + 1):
        if u is not None:
            lam_J = dual.step(
                lam_J, u.slack_J, config.dual_rate, max_change=config.lam_max_change, lam_max=config.lam_max
            )
        policy = stages.fit(Target(lam_J=lam_J, score=lagrangian(lam_J), coefficient=config.beta), t)
        u = stages.measure_slack(policy, lam_J, t)
        if u is None:
            break
    return stages.kept
