"""The parts of the program, each with its list of cases."""

from bench.faults import changes, damage, disks, kills
from bench.faults.inputs import cases as malformed

# part -> (its cases, how many of them are chosen by default, so that all take about ten minutes on two cores,
# and the undisturbed commands from whose results the cases are listed)
PARTS = {
    "kills": (kills.cases, 260, kills.KILLED),
    "damage": (damage.cases, 420, damage.BASES),
    "changes": (changes.cases, 0, ()),
    "inputs": (malformed.cases, 0, ()),
    "disks": (disks.cases, 100, kills.KILLED),
}
