"""Disturbs every command and looks whether anything goes wrong in silence: `python -m bench.faults`.

Kills at file operations and at random moments, also of one rank of several; every file of a run and of a
sweep damaged in six ways before each command that reads it; inputs changed between start and resume, and
before an evaluation; malformed inputs; full disks. Every case runs on a tiny random model, in a fork with a
time limit, and ends as one of

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
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    "HF_HUB_OFFLINE": "1",
    "PIP_NO_INDEX": "1",
    "HF_DATASETS_OFFLINE": "1",
}

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
    workers = min(settings["workers"], len(options.case) or settings["workers"])
    slots = [Slot(out / f"slot-{i}") for i in range(workers)]
    console.print(f"in {out}: preparing", markup=False)
    prepare()
    slots[0].folder.mkdir(parents=True, exist_ok=True)
    slots[0].warm_up()
    asked = _asked(settings, options.case)
    first = [name for part, commands in asked.items() for name in PARTS[part].first(commands)]
    in_slots(slots, lambda slot: [slot.make(name) for name in first])
    listed = cases_of(settings, slots[0], asked, options.case)
    if len(listed) < len(options.case):
        unknown = [name for name in options.case if not any(case.name.startswith(name) for case in listed)]
        print(f"error: --case {unknown[0]}: no such case; results.jsonl names them.", file=sys.stderr)
        return 2
    needs = list(dict.fromkeys(need for case in listed for need in case.needs))
    in_slots(slots, lambda slot: [slot.make(need) for need in needs])
    results = out / ("case.jsonl" if options.case else "results.jsonl")
    if options.case:
        results.unlink(missing_ok=True)
    done = run_cases(listed, slots, results, console)
    show(done, settings, console)
    if len(options.case) == 1:
        console.print(f"its folder: {slots[0].work}, what it printed: {slots[0].work}.err", markup=False)
    return 1 if any(result.outcome in BAD for result in done) else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "--part",
        choices=[*PARTS, "all"],
        default="all",
        help="kills, damage, changes, inputs, ranks or disks",
    )
    add(
        "--cases",
        type=int,
        help="cases of each part, a seeded choice; 0 takes all; default: ten minutes' worth",
    )
    add("--seed", type=int, default=0, help="seed of the moments, damages, sizes and of the choice")
    add("--workers", type=int, default=2, help="cases side by side")
    add(
        "--case",
        nargs="+",
        default=[],
        help="runs these cases again, by their names in the results or by what the names begin with",
    )
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


def _asked(settings: dict, only: list[str]) -> dict[str, list[str]]:
    """Returns the parts, each with the commands whose cases are to be listed; `only`: names of cases."""
    if not only:
        parts = [name for name in PARTS if settings["part"] in (name, "all")]
        return {name: list(PARTS[name].commands) for name in parts}
    found: dict[str, list[str]] = {}
    for part, command, *_ in (f"{name}//".split("/") for name in only):
        if part in PARTS and command not in found.setdefault(part, []):
            found[part].append(command)
    return found


def cases_of(settings: dict, slot: Slot, asked: dict[str, list[str]], only: list[str]) -> list[Case]:
    """Lists the chosen cases; with `only`, the first ones whose names are these, or begin so."""
    listed, seed = [], settings["seed"]
    for name, commands in asked.items():
        part = PARTS[name]
        cases = part.cases(slot, seed, part.first(commands))
        if only:
            listed += [case for name in only for case in _named(cases, name)]
        else:
            listed += chosen(cases, seed, part.default if settings["cases"] is None else settings["cases"])
    return listed


def _named(cases: list[Case], name: str) -> list[Case]:
    exact = [case for case in cases if case.name == name]
    return exact or [case for case in cases if case.name.startswith(name)][:1]


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
