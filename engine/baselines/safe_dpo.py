"""SafeDPO (arXiv 2505.20065): a hard constraint without a multiplier.

Pairs of one safe and one unsafe response are won by the safe one, with an offset in the margin; pairs of two safe ones by the reward's
label; pairs of two unsafe ones are dropped.

Decided here: labels, and what is unsafe, come from score models instead of people; a response is unsafe where a cost lies above its
`unsafe_above`, on the prompts that its constraint is about (--cost-on). What a constraint asks for is used by the verdict
alone.
"""

import torch

from engine.config import SafeDpoConfig
from engine.constraints import unsafe_above
from engine.records import Target
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World

# More than any difference of rewards, so that sigmoid(score difference) is 1 for a safe response against an unsafe one.
SURE = 1e3


def train(config: SafeDpoConfig, *, resume: str | None = None) -> Result:
    """Run SafeDPO; returns the run folder, the held-out verdict and no multipliers (zeros). `resume`: a run folder to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("safe_dpo", config, resume, n_stages=4) as job:
        world = World(job)
        return world.verdict(*loop(world, config))


def loop(world: World, config: SafeDpoConfig):
    """SafeDPO in any world: returns the policy and zeros [J]."""
    unsafe_PG = world.unsafe(unsafe_above(config))
    target = Target(
        lam_J=torch.zeros(world.scores.utility_PGJ.shape[2], dtype=torch.float64),
        score_PG=world.scores.reward_PG - SURE * unsafe_PG,
        coefficient=config.beta,
        # A safe winner's margin counts from the offset on: beta (rho_w - rho_l) - (h_l - h_w) offset.
        shift_PG=-config.offset * unsafe_PG.double(),
        dropped_PG=unsafe_PG,
    )
    return world.fit(target, 1), target.lam_J
