"""How do the defaults do on rewards and costs that nobody tuned them for?

    python -m bench.foreign                          all pairs, thresholds and rules (resumable; days)
    python -m bench.foreign --pairs 0 3 -- FLAGS     some pairs, with flags of engine.train

The reference's samples are drawn once for each seed, by the first run. `--out` keeps the runs; a run that is
done is only read, and one whose measures stand in the file of `--measures` is not made again, so that
machines and days can share out the study. Pairs, rules and measures are in bench/foreign/pairs.py.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from bench.foreign.pairs import PAIRS, RULES, THRESHOLDS
from bench.foreign.runs import Asked, keep, kept, read, summary, table, train
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
    measures = given.measures or given.out / "measures.jsonl"
    rows, failed = kept(measures), []
    wanted = [
        Asked(PAIRS[number], b, seed, rules)
        for seed, number, b, rules in product(given.seeds, given.pairs, given.thresholds, given.rules)
    ]
    samples: dict[int, Path] = {}
    for asked in wanted:
        if asked.key in rows:
            continue
        folder = given.out / asked.name
        try:
            train(folder, asked, given.flags, samples.get(asked.seed))
        except UserError as error:
            failed.append(str(error))
            print(error, flush=True)
            continue
        samples.setdefault(asked.seed, folder)
        rows[asked.key] = read(folder, asked)
        keep(measures, rows[asked.key])
        print(table([rows[asked.key]]).splitlines()[-1], flush=True)
    found = [rows[asked.key] for asked in wanted if asked.key in rows]
    if found:
        print(table(found))
    for rules in given.rules:
        if alike := [row for row in found if row["rules"] == rules]:
            print(f"{rules}: {summary(alike)}")
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
    add("--rules", nargs="+", default=list(RULES), choices=list(RULES), help="which rules of training")
    add("--out", type=Path, default=Path("runs/foreign"), help="folder of the runs")
    add("--measures", type=Path, metavar="FILE", help="all measures; default: measures.jsonl in --out")
    add("flags", nargs="*", help="flags of engine.train for all runs, behind --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
