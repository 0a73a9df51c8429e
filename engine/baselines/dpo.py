"""DPO (arXiv 2305.18290) on one score alone, the reward or safety.

Decided here: labels come from that score instead of people; safety is the sum of the utilities, each in its
unit, on the prompts that its constraint is about.
"""

import torch

from engine.config import DpoConfig
from engine.ranks import ALONE, Ranks
from engine.records import Target, lagrangian, utilities_alone
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: DpoConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs DPO; returns the run folder, the held-out verdict and the weights of the utilities. `resume`: the
    folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("dpo", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: DpoConfig):
    """Runs DPO; returns the policy and the weights of the utilities, float64 [J]:
    0 for the reward, 1 for safety."""
    stages.sample_reference()
    safety = config.objective == "safety"
    lam_J = torch.full((stages.n_constraints,), float(safety), dtype=torch.float64)
    score = utilities_alone(lam_J) if safety else lagrangian(lam_J)
    return stages.fit(Target(lam_J=lam_J, score=score, coefficient=config.beta), 1), lam_J
