"""PeCAN (arXiv 2405.19544, Algorithm 2): MoCAN on log-ratios of policies that were aligned to preferences (`engine.stages.preference`).

Decided here: the last alignment learns from the reference's samples, as MoCAN's does; the paper's learns from the pairs of the preference
set, which --pairs with that file does.
"""

from engine import mocan
from engine.config import PecanConfig, pairs_file
from engine.stages.job import open_job
from engine.stages.preference import PreferenceWorld
from engine.stages.protocol import Result


def train(config: PecanConfig, *, resume: str | None = None) -> Result:
    """Run PeCAN; returns the run folder, the held-out verdict and the multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("pecan", config, resume, n_stages=7 + len(config.cost) + bool(pairs_file(config))) as job:
        world = PreferenceWorld(job)
        return world.verdict(*mocan.loop(world, config))
