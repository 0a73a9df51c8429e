"""The study's question and plan, fixed before any run."""

from pathlib import Path
from typing import NamedTuple

BENCH = Path(__file__).parent.parent
ROOT = BENCH.parent
DOCS = ROOT / "docs"
TEST_PROMPTS = BENCH / "prompts" / "test.jsonl"
CAID, MOCAN = "caid", "mocan"
# These are the question's, whatever else is run.
SEEDS = tuple(range(8))
THRESHOLDS = (0.2, 0.4)
COST = "harm"
# The other methods are run on three seeds only; the picture shows them.
OTHERS = ("primal_dual", "dpo:objective=reward", "dpo:objective=safety")
FLAGS = (
    "--margin", "0", "--heldout", str(TEST_PROMPTS), "--eval-prompts", "208", "--eval-responses", "8",
)  # fmt: skip
# Every run is judged on as many responses; parts from before there were several looks are alike.
ONE_LOOK = ("--eval-budget", "1")


class Planned(NamedTuple):
    """Runs to be done: every seed, algorithm and thresholds, with further flags."""

    seeds: tuple[int, ...]
    labels: tuple[str, ...]
    thresholds: tuple[str, ...]
    flags: tuple[str, ...]


# The most informative runs come first.
PLAN = (
    Planned(SEEDS, (CAID, MOCAN), ("0.2", "0.4"), ()),
    Planned(SEEDS[3:6], OTHERS, ("0.4",), ()),
    Planned(SEEDS[3:6], ("caid:dual_rule=bisection",), ("0.4",), ()),
    Planned(SEEDS[3:6], (MOCAN,), ("0.4",), ("--n-responses", "10")),
    Planned(
        SEEDS[:1],
        (CAID,),
        ("0.2,0.2", "0.2,0.4", "0.4,0.2", "0.4,0.4"),
        ("--cost", "harm", "harm-audit", "--audit"),
    ),
)
