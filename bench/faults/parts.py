"""The parts of the program, each with its list of cases."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.faults import changes, damage, disks, kills, ranks
from bench.faults.cases import Case
from bench.faults.inputs import cases as malformed
from bench.faults.slots import Slot


class Part(NamedTuple):
    """A part of the program."""

    cases: Callable[[Slot, int, Sequence[str]], list[Case]]  # of a seed, for some of the commands
    default: int  # how many cases are chosen where nothing else is said; 0: all
    commands: tuple[str, ...]  # that are disturbed; none where all start from the inputs

    def first(self, commands: Sequence[str]) -> list[str]:
        """Returns the undisturbed commands from whose results the cases are listed."""
        return [name for name in commands if name in self.commands]


# All together take about ten minutes on two cores that have nothing else to do, `ranks` two to three of them.
PARTS = {
    "kills": Part(kills.cases, 140, kills.KILLED),
    "damage": Part(damage.cases, 180, tuple(damage.COMPARED)),
    "changes": Part(changes.cases, 60, ()),
    "inputs": Part(malformed.cases, 450, ()),
    "ranks": Part(ranks.cases, 0, ranks.KILLED),
    "disks": Part(disks.cases, 40, kills.KILLED),
}
