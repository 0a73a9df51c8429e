"""PeCAN (arXiv 2405.19544, Algorithm 2): MoCAN on log-ratios of policies that were aligned
to preferences (`engine.stages.preference`).

Decided here: the last alignment learns from the reference's samples, as MoCAN's does; the paper's learns from
the pairs of the preference set, which --pairs with that file does.
"""

from engine import mocan
from engine.config import PecanConfig
from engine.ranks import ALONE, Ranks
from engine.stages.protocol import Result
from engine.stages.run import open_stages


def train(config: PecanConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs PeCAN; returns the run folder, the held-out verdict and the multipliers.
    `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("pecan", config, resume, ranks) as stages:
        return stages.verdict(*mocan.loop(stages, config))
