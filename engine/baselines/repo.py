"""Our reading of RePO (arXiv 2410.19933, known from its abstract): the constraint holds prompt by prompt,
E_x [violation(x)]+ <= 0.

Primal-dual policy gradient as in `engine.primal_dual`, but the penalty counts only on prompts whose sampled
responses miss the threshold, and lambda rises with the mean rectified violation. It can only rise; the cap on
its change and lam_max bound it.

Decided here: with --cost-mean or --cost-rate a prompt's own level is compared with the limit, E_x [E_y c -
d]+; with --threshold, which the paper does not have, its improvement over its own reference samples is; the
step of lambda is on ln lambda, as in `engine.primal_dual`.
"""

import torch
from torch import Tensor

from engine.baselines.primal_dual import descend
from engine.config import RepoConfig
from engine.ranks import ALONE, Ranks
from engine.records import Score, Scored, ScoreRule
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: RepoConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs RePO; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder
    of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("repo", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: RepoConfig):
    """Runs RePO; returns the last policy and its multipliers, float64 [J]."""
    stages.sample_reference()
    stages.check_thresholds()
    lam_J = torch.full((stages.n_constraints,), config.lam_init, dtype=torch.float64)
    policy = u = None
    for t in range(1, config.iterations + 1):
        if u is not None:
            lam_J = descend(lam_J, -u.violation_J, config)
        policy = stages.ascend(policy, lam_J, rectified(lam_J), t)
        u = stages.measure_slack(policy, lam_J, t)
        if u is None:
            break
    return stages.kept


def rectified(lam_J: Tensor) -> ScoreRule:
    """Builds the score r + lambda . g in which lambda counts only on prompts whose samples miss the aim."""

    def score(scored: Scored) -> Score:
        missed_PJ = scored.missing_PJ > 0
        return Score(
            reward_PG=scored.reward_PG, utility_PGJ=scored.counted_PGJ * missed_PJ[:, None], lam_J=lam_J
        )

    return score
