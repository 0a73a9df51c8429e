"""Disturbs every command and looks whether anything goes wrong in silence: `python -m bench.faults`.

Kills at file operations and at random moments; every file of a run and of a sweep damaged in six ways before
each command that reads it; inputs changed between start and resume, and before an evaluation; malformed
inputs; full disks. Every case runs on a tiny random model, in a fork with a time limit, and ends as one of

    clean      the files are those of the undisturbed command, byte for byte (timing apart)
    refused    exit code 2 and one line that names the file or value and a cure, with nothing lost
    wrong      exit code 0 with other files, work lost or blocked, leftovers, an unclear refusal
    traceback  a traceback, another exit code, or a signal
    hang       the time limit

It takes about ten minutes on two cores. A line of every case stands in FOLDER/results.jsonl, so that --resume
FOLDER goes on. The exit code is 0 where no case is wrong, a traceback or a hang.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

# Before numpy is imported: a fork inherits no threads.
os.environ |= {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
}  # fmt: skip

from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402

from bench.faults.cases import Case, chosen  # noqa: E402
from bench.faults.children import prepare  # noqa: E402
from bench.faults.outcome import BAD, OUTCOMES  # noqa: E402
from bench.faults.parts import PARTS  # noqa: E402
from bench.faults.runner import Result, in_slots, run_cases  # noqa: E402
from bench.faults.slots import Slot  # noqa: E402


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code, 1 where a case is wrong, a traceback or a hang."""
    options = _options(arguments)
    console = Console()
    out = options.resume or options.out or Path(tempfile.mkdtemp(prefix="faults-"))
    out.mkdir(parents=True, exist_ok=True)
    settings = _settings(options, out)
    slots = [Slot(out / f"slot-{i}") for i in range(1 if options.case else settings["workers"])]
    console.print(f"in {out}: preparing", markup=False)
    prepare()
    part = options.case.partition("/")[0] or settings["part"]
    # The lists of cases are made from what the undisturbed commands left.
    first = [name for name, (_, _, needs) in PARTS.items() if part in (name, "all") for name in needs]
    in_slots(slots, lambda slot: [slot.make(name) for name in first])
    listed = cases_of(settings, slots[0], options.case)
    if options.case and not listed:
        print(
            f"error: --case {options.case}: no such case; a line of results.jsonl names each.",
            file=sys.stderr,
        )
        return 2
    needs = list(dict.fromkeys(need for case in listed for need in case.needs))
    in_slots(slots, lambda slot: [slot.make(need) for need in needs])
    results = out / ("case.jsonl" if options.case else "results.jsonl")
    if options.case:
        results.unlink(missing_ok=True)
    done = run_cases(listed, slots, results, console)
    show(done, settings, console)
    if options.case:
        console.print(f"its folder: {slots[0].work}, what it printed: {slots[0].work}.err", markup=False)
    return 1 if any(result.outcome in BAD for result in done) else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--part", choices=[*PARTS, "all"], default="all", help="kills, damage, changes, inputs or disks")
    add(
        "--cases",
        type=int,
        help="cases of each part, a seeded choice; 0 takes all; default: ten minutes' worth",
    )
    add("--seed", type=int, default=0, help="seed of the moments, damages, sizes and of the choice")
    add("--workers", type=int, default=2, help="cases side by side")
    add("--case", default="", help="runs this one case again, by its name in the results")
    add("--out", type=Path, help="folder to work in; default: a temporary one")
    add("--resume", type=Path, help="folder of an earlier call: goes on with its settings")
    return parser.parse_args(arguments)


def _settings(options: argparse.Namespace, out: Path) -> dict:
    """Returns the settings, those of the folder where it has some."""
    file = out / "faults.json"
    if options.resume and file.is_file():
        return json.loads(file.read_text())
    settings = {name: getattr(options, name) for name in ("part", "cases", "seed", "workers")}
    file.write_text(json.dumps(settings))
    return settings


def cases_of(settings: dict, slot: Slot, only: str = "") -> list[Case]:
    """Lists the chosen cases; with `only`, the one of that name."""
    listed = []
    slot.folder.mkdir(parents=True, exist_ok=True)
    for name, (cases, default, _) in PARTS.items():
        if only:
            if only.partition("/")[0] == name:
                listed += [case for case in cases(slot, settings["seed"]) if case.name == only]
        elif settings["part"] in (name, "all"):
            at_most = default if settings["cases"] is None else settings["cases"]
            listed += chosen(cases(slot, settings["seed"]), settings["seed"], at_most)
    return listed


def show(results: list[Result], settings: dict, console: Console) -> None:
    """Prints the counts of each part, and how to repeat each case that went wrong."""
    table = Table("part", *OUTCOMES, box=None)
    for part in [name for name in PARTS if any(_part(result) == name for result in results)]:
        counts = [sum(_part(r) == part and r.outcome == kind for r in results) for kind in OUTCOMES]
        table.add_row(part, *map(str, counts))
    console.print(table)
    for kind in BAD:
        for result in results:
            if result.outcome == kind:
                console.print(f"{kind}: {escape(result.case)}: {escape(result.detail)}", soft_wrap=True)
                repeat = f"    python -m bench.faults --seed {settings['seed']} --case '{result.case}'"
                console.print(repeat, markup=False, soft_wrap=True)


def _part(result: Result) -> str:
    return result.case.partition("/")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
