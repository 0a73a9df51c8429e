"""SafeDPO (arXiv 2505.20065): a hard constraint without a multiplier.

Pairs of one safe and one unsafe response are won by the safe one, with an offset in the margin; pairs of two
safe ones by the reward's label; pairs of two unsafe ones are dropped.

Decided here: labels, and what is unsafe, come from score models instead of people; a response is unsafe where
a cost lies above its `unsafe_above`, on the prompts that its constraint is about (--cost-on). What a
constraint asks for is used by the verdict alone.
"""

import torch
from torch import Tensor

from engine.config import SafeDpoConfig
from engine.constraints import unsafe_above
from engine.ranks import ALONE, Ranks
from engine.records import Score, Scored, Target
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages

# More than any difference of rewards, so that sigmoid(score difference) is 1 for a safe
# response against an unsafe one.
SURE = 1e3


def train(config: SafeDpoConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs SafeDPO; returns the run folder, the held-out verdict and no multipliers (zeros). `resume`: the
    folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("safe_dpo", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: SafeDpoConfig):
    """Runs SafeDPO; returns the policy and zeros [J]."""
    stages.sample_reference()
    above_J = torch.tensor(unsafe_above(config), dtype=torch.float64)

    def unsafe(scored: Scored) -> Tensor:
        """Marks responses of which a cost lies above its number, where its constraint is
        about that prompt; bool [P, G]."""
        return ((scored.cost_PGJ > above_J) & (scored.weight_PJ[:, None] > 0)).any(dim=2)

    target = Target(
        lam_J=torch.zeros(stages.n_constraints, dtype=torch.float64),
        score=lambda scored: Score.plain(scored.reward_PG - SURE * unsafe(scored)),
        coefficient=config.beta,
        # A safe winner's margin counts from the offset on: beta (rho_w - rho_l) - (h_l - h_w) offset.
        shift=lambda scored: -config.offset * unsafe(scored).double(),
        dropped=unsafe,
    )
    return stages.fit(target, 1), target.lam_J
