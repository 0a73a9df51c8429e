"""How do the defaults do on rewards and costs that nobody tuned them for?

    python -m bench.foreign                          all pairs, thresholds and rules (resumable; hours)
    python -m bench.foreign --pairs 0 3 -- FLAGS     some pairs, with flags of engine.train
    python -m bench.foreign --pairs                  none: writes the page alone

The reference's samples are drawn once for each seed, by the first run. `--out` keeps the runs; a run that is
done is only read, and one whose measures stand in foreign.jsonl of `--docs` is not made again, so that
machines and days can share out the study. Pairs, rules and measures are in bench/foreign/pairs.py.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from bench.foreign.page import page_text, summary, table, trained
from bench.foreign.pairs import PAIRS, RULES, THRESHOLDS
from bench.foreign.picture import picture
from bench.foreign.runs import Asked, keep, kept, read, train
from engine.command import run_command
from engine.errors import UserError
from engine.files import write_whole

DOCS = Path(__file__).parent.parent.parent / "docs"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    given = _parser().parse_args(words)
    return run_command(lambda _, standing: _study(given, standing), words)


def _study(given: argparse.Namespace, standing) -> None:
    standing.again = lambda: f"start the same command again, which goes on in {given.out}"
    given.out.mkdir(parents=True, exist_ok=True)
    measures = given.docs / "foreign.jsonl"
    rows, failed = kept(measures), []
    wanted = [
        Asked(PAIRS[number], b, seed, rules)
        for seed, number, b, rules in product(given.seeds, given.pairs, given.thresholds, given.rules)
    ]
    samples: dict[int, Path] = {}
    for asked in wanted:
        if asked.key in rows:
            continue
        folder = given.out / asked.name / "run"  # side by side, runs would share the error of their verdicts
        try:
            train(folder, asked, given.flags, samples.get(asked.seed))
        except UserError as error:
            failed.append(str(error))
            print(error, flush=True)
            continue
        samples.setdefault(asked.seed, folder)
        rows[asked.key] = read(folder, asked)
        keep(measures, rows[asked.key])
        said = table(trained([rows[asked.key]]))[2:] or [f"refused before training: {asked.name}"]
        print(*said, flush=True)
    # Other processes may have added theirs.
    every = sorted(kept(measures).values(), key=_place)
    for rules in RULES:
        if alike := [row for row in trained(every) if row["rules"] == rules]:
            print(f"{rules}: {summary(alike)}")
    if trained(every):
        write_whole(given.docs / "foreign.png", picture(trained(every)))
        write_whole(given.docs / "foreign.md", page_text(every).encode())
        print(f"written: {given.docs / 'foreign.md'}")
    if failed:
        raise UserError(f"{len(failed)} runs failed; the first: {failed[0]}")


def _place(row: dict) -> tuple:
    """Orders runs as they are listed."""
    return [*map(str, PAIRS)].index(row["pair"]), row["b"], row["seed"], [*RULES].index(row["rules"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.foreign", description=__doc__.split("\n")[0])
    add = parser.add_argument
    numbers = range(len(PAIRS))
    add(
        "--pairs",
        type=int,
        nargs="*",
        default=list(numbers),
        choices=numbers,
        metavar="N",
        help="which pairs; none writes the page alone",
    )
    add("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="values of b")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds")
    add("--rules", nargs="+", default=list(RULES), choices=list(RULES), help="which rules of training")
    add("--out", type=Path, default=Path("runs/foreign"), help="folder of the runs")
    page = "folder of the page foreign.md, its picture, and foreign.jsonl, which holds all measures"
    add("--docs", type=Path, default=DOCS, help=page)
    add("flags", nargs="*", help="flags of engine.train for all runs, behind --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
