"""MoCAN (arXiv 2405.19544, Algorithm 1): solve the smooth dual once from reference samples, then align once at that lambda.

Decided here: the dual is solved by projected Newton steps, which end at the optimum of the paper's projected gradient; the policy is fitted
in the label form of `config.labels`, and labels that are drawn are drawn afresh in every step, not once and frozen; where the paper allows
pairs of any policy, the update learns from the samples that the dual is solved on, or from those of a file (--pairs).
"""

from engine.config import MocanConfig, pairs_file
from engine.records import Target
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World


def train(config: MocanConfig, *, resume: str | None = None) -> Result:
    """Run MoCAN; returns the run folder, the held-out verdict and the multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("mocan", config, resume, n_stages=5 + bool(pairs_file(config))) as job:
        world = World(job)
        return world.verdict(*loop(world, config))


def loop(world: World, config: MocanConfig):
    """Algorithm 1 in any world: returns the policy and the multipliers, float64 [J]."""
    lam_J = world.solve_dual().lam
    score_PG = world.scores.reward_PG + world.scores.utility_PGJ @ lam_J
    return world.fit(Target(lam_J=lam_J, score_PG=score_PG, coefficient=config.beta), 1), lam_J
