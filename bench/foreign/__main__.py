"""How do the defaults do on rewards and costs that nobody tuned them for?

    python -m bench.foreign                          all pairs at both thresholds (resumable; hours)
    python -m bench.foreign --pairs 0 3 -- FLAGS     some pairs, with flags of engine.train

The reference's samples are drawn once for each seed, by the first run. `--out` keeps the runs; a run that is
done is only read. The pairs and the measures are in bench/foreign/pairs.py.
"""

import argparse
import sys
from pathlib import Path

from bench.foreign.pairs import PAIRS, THRESHOLDS
from bench.foreign.runs import keep, name_of, read, summary, table, train
from engine.command import run_command
from engine.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    given = _parser().parse_args(words)
    return run_command(lambda _, standing: _study(given, standing), words)


def _study(given: argparse.Namespace, standing) -> None:
    standing.again = lambda: f"start the same command again, which goes on in {given.out}"
    given.out.mkdir(parents=True, exist_ok=True)
    rows, failed = [], []
    (given.out / "measures.jsonl").unlink(missing_ok=True)
    for seed in given.seeds:
        samples: Path | None = None
        for number in given.pairs:
            for b in given.thresholds:
                folder = given.out / name_of(PAIRS[number], b, seed)
                try:
                    train(folder, PAIRS[number], b, seed, given.flags, samples)
                except UserError as error:
                    failed.append(str(error))
                    print(error, flush=True)
                    continue
                samples = samples or folder
                rows.append(read(folder, PAIRS[number], b, seed))
                keep(given.out / "measures.jsonl", rows[-1])
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    if rows:
        print(table(rows))
        print(summary(rows))
    if failed:
        raise UserError(f"{len(failed)} runs failed; the first: {failed[0]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.foreign", description=__doc__.split("\n")[0])
    add = parser.add_argument
    numbers = range(len(PAIRS))
    add(
        "--pairs",
        type=int,
        nargs="+",
        default=list(numbers),
        choices=numbers,
        metavar="N",
        help="which pairs",
    )
    add("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="values of b")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds")
    add("--out", type=Path, default=Path("runs/foreign"), help="folder of the runs")
    add("flags", nargs="*", help="flags of engine.train for all runs, behind --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
