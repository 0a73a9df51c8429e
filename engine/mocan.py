"""MoCAN (arXiv 2405.19544, Algorithm 1): solve the smooth dual once from reference samples,
then align once at that lambda.

Decided here: the dual is solved by projected Newton steps, which end at the optimum of the paper's projected
gradient; the policy is fitted in the label form of `config.labels`, and labels that are drawn are drawn
afresh in every step, unless "sampled-once" freezes them as the paper's code does; where the paper allows
pairs of any policy, the update learns from the samples that the dual is solved on, or from those of a file
(--pairs).
"""

from engine.config import MocanConfig
from engine.ranks import ALONE, Ranks
from engine.records import Target, lagrangian
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: MocanConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs MoCAN; returns the run folder, the held-out verdict and the multipliers.
    `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("mocan", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: MocanConfig):
    """Runs Algorithm 1; returns the policy and the multipliers, float64 [J]."""
    stages.sample_reference()
    lam_J = stages.solve_dual().lam
    return stages.fit(Target(lam_J=lam_J, score=lagrangian(lam_J), coefficient=config.beta), 1), lam_J
