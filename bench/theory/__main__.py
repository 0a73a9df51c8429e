"""`python -m bench.theory`: the algorithms' loops and the papers' statements on problems
in which everything is enumerated.

Writes docs/theory.md with its tables and pictures, and docs/theory.json with the left and right
side of every bound. `--quick` takes few problems, for a test. Needs no GPU and no model,
and takes minutes on two CPU cores.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench.theory.page import write
from bench.theory.tasks import QUICK, Sizes, compute
from engine.command import run_command
from engine.errors import UserError


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code, 1 where a statement that must hold does not."""
    parser = argparse.ArgumentParser(prog="python -m bench.theory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few problems, for a test")
    parser.add_argument(
        "--out",
        default="",
        help="folder of the page, its pictures and the results file; default: docs, with --quick a new one",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    return run_command(lambda _, standing: _theory(options), arguments)


def _theory(options: argparse.Namespace) -> int:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1.")
    sizes = QUICK if options.quick else Sizes()
    # Few problems must not replace the committed page.
    out = Path(options.out or (tempfile.mkdtemp(prefix="theory-") if options.quick else "docs"))
    console = Console()
    wrong = write(compute(sizes, options.workers), out, console)
    for statement in wrong:
        console.print(f"does not hold: {statement}", markup=False)
    console.print(f"{out / 'theory.md'}, four pictures and theory.json are written", markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
