"""`python -m bench.verdict`: how often verdicts err, exactly at the boundary of a constraint, and what they
take.

Writes docs/verdict-simulation.md with its tables and its picture, and docs/verdict-simulation.json, which
keeps the tables of each part: `--part` makes some of them again. `--part multipliers` prints the table of
docs/multipliers.md alone. The exit code is 1 where something that
ought to hold does not. Needs no GPU and no model, and takes minutes on two CPU cores.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench.verdict.page import NAME, write
from bench.verdict.parts import OF_PAGE, PARTS, compute
from bench.verdict.sizes import Sizes, quick
from engine.command import run_command
from engine.errors import UserError


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code, 1 where something that ought to hold does not."""
    parser = argparse.ArgumentParser(prog="python -m bench.verdict", description=__doc__)
    parser.add_argument(
        "--part", nargs="+", choices=list(PARTS), default=OF_PAGE, help="only these; default: all of the page"
    )
    parser.add_argument("--replications", type=int, default=0, help="verdicts of each cell; default: 4000")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--quick", action="store_true", help="few cells and replications, for a test")
    parser.add_argument("--out", default="", help="folder of the page; default: docs, with --quick a new one")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    return run_command(lambda _, standing: _verdict(options), arguments)


def _verdict(options: argparse.Namespace) -> int:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1.")
    if options.replications < 0:
        raise UserError(f"--replications {options.replications}: must be at least 1, or 0 for the default.")
    make = quick if options.quick else Sizes
    asked = {"replications": options.replications} if options.replications else {}
    sizes = make(seed=options.seed, **asked)
    # Few cells must not replace the committed page.
    out = Path(options.out or (tempfile.mkdtemp(prefix="verdict-") if options.quick else "docs"))
    console, wrong, written = Console(), [], None
    for part, found in compute(options.part, sizes, options.workers):
        for table in found.tables.values():
            table.show(console)
        wrong += found.wrong
        if part in OF_PAGE:
            write(part, found, sizes, out)
            written = out / f"{NAME}.md"
    for statement in wrong:
        console.print(f"does not hold: {statement}", markup=False)
    if written:
        console.print(f"{written}, its picture and its .json are written", markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
