"""Measures what only a GPU can show, in six parts of under nine minutes each:
`python -m bench.gpu --part N --out FOLDER`.

Each step of a part leaves one JSON line in FOLDER/part-N.jsonl when it ends, so that the same command
goes on where it was cut off; a step that failed leaves its error and is tried again after the others.
`python -m bench.gpu --out FOLDER` adds the figures of the folder to bench/results.jsonl
and writes bench/RESULTS.md anew.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from bench.gpu.parts import PARTS
from bench.gpu.steps import go_on, read
from bench.run.results import add_new
from engine.command import run_command
from engine.errors import UserError


@dataclass(frozen=True)
class Options:
    """Measure one part on a GPU, or add its figures to bench/RESULTS.md."""

    out: Path
    """Folder of the JSON lines."""
    part: Annotated[
        int,
        tyro.conf.arg(
            help="1: bare products and the loss head, 2: tests, 3: what was not known, 4: configurations, "
            "5: rollout and training step, 6: whole iterations; 0 adds what the folder holds to "
            "bench/results.jsonl and bench/RESULTS.md."
        ),
    ] = 0


def collect(folder: Path) -> int:
    """Adds the lines of all parts in `folder` to bench/results.jsonl, each once, and writes bench/RESULTS.md;
    returns how many are new."""
    records = [record for part in sorted(folder.glob("part-*.jsonl")) for record in read(part)]
    return add_new([json.dumps(line, sort_keys=True) for r in records for line in r.get("lines", ())])


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code, 0 where every step is done."""
    options = tyro.cli(Options, args=arguments, prog="python -m bench.gpu")
    return run_command(lambda _, standing: _part(options), arguments)


def _part(options: Options) -> int:
    if options.part == 0:
        print(f"{collect(options.out)} new lines in bench/results.jsonl; bench/RESULTS.md is written")
        return 0
    if options.part not in PARTS:
        raise UserError(f"--part {options.part}: must be 1 to {len(PARTS)}, or 0.")
    if not torch.cuda.is_available():
        raise UserError("--part needs a GPU, and torch finds none here.")
    title, steps = PARTS[options.part]
    options.out.mkdir(parents=True, exist_ok=True)
    left = go_on(steps, options.out / f"part-{options.part}.jsonl", torch.device("cuda"))
    print(f"part {options.part}, {title}: {len(steps) - left} of {len(steps)} steps done")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
