"""Tells what a threshold costs, from a file of scores and without training.

    python -m engine.dual SCORES.jsonl --cost harm --threshold 0.3

Prints the multipliers, their intervals and the predicted improvements, and writes dual.json, dual.png and, on
request, preference pairs. `scores_file.py` says what SCORES looks like.
"""

import sys

from engine.command import Standing, run_command
from engine.config.flags import parse_flags
from engine.dual.config import DualConfig, check

USAGE = """usage: python -m engine.dual SCORES.(jsonl|parquet) --threshold B [B ...] [flags]

SCORES has one row per response: prompt (text or a whole number), reward, one column per utility or cost,
and response where pairs are exported. Give the thresholds in the order of the --utility names, then of the
--cost names.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_command(_solve, argv)


def _solve(argv: list[str], standing: Standing) -> None:
    file, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    words = {"prog": "python -m engine.dual SCORES", "usage": USAGE, "first": "scores file"}
    config = parse_flags(DualConfig(), flags, **words)
    if config is None:
        return
    check(file, config)
    # Imported here, as it loads torch.
    from engine.dual.answer import answer

    answer(file, config)


if __name__ == "__main__":
    sys.exit(main())
