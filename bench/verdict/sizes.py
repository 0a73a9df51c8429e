"""How much is simulated, and what a simulated share of verdicts says."""

import math
import zlib
from dataclasses import dataclass

from torch import Generator

# Of all verdicts: the error that each may have.
ALPHA = 0.05
# A share of false verdicts is above what is allowed where it is by more standard errors of the simulation.
ERRORS = 2.33


@dataclass(frozen=True)
class Sizes:
    """How many verdicts of each cell are drawn, and which cells."""

    replications: int = 4000
    seed: int = 0
    prompts: tuple[int, ...] = (8, 20, 32, 96, 192, 512)
    responses: tuple[int, ...] = (1, 2, 6, 16)
    chunk: int = 250  # verdicts that are drawn at once
    looks: tuple[int, ...] = (1, 2, 3, 5, 10)
    slow: int = 1000  # replications of what resamples each verdict

    def generator(self, name: str) -> Generator:
        """Returns the random numbers of a cell or a loss."""
        return Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))

    def chunks(self) -> list[int]:
        """Returns how many verdicts to draw at once, until there are enough."""
        whole, rest = divmod(self.replications, self.chunk)
        return [self.chunk] * whole + [rest] * bool(rest)


def quick(seed: int = 0, replications: int = 250) -> Sizes:
    """Returns few cells, for a test."""
    return Sizes(replications, seed, (8, 20, 96), (1, 6), looks=(1, 3), slow=50)


def too_often(share: float, replications: int, errors: float = ERRORS) -> bool:
    """Tells whether a simulated share of false verdicts lies above `ALPHA` by more than chance.

    >>> too_often(0.057, 4000), too_often(0.059, 4000)
    (False, True)
    """
    return share > ALPHA + errors * math.sqrt(ALPHA * (1 - ALPHA) / replications)
