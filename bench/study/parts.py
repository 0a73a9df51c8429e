"""Parts of the study: a sweep's runs, of which the table and the settings are kept under DOCS/study/."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.study.arms import costs_of
from bench.study.flags import Flags, options, shown, words
from bench.study.plan import FLAGS, ONE_LOOK
from engine import constraints
from engine.errors import UserError
from engine.files import read_json, write_json
from engine.run.rows import StageTimeRow, read_timing
from engine.sweep import pages
from engine.sweep.outcomes import finished, read_run
from engine.sweep.pages import write_table
from engine.sweep.plans import SweepConfig, config_class, configs_of
from engine.sweep.runs import run_sweep


class Part(NamedTuple):
    """A part as it is kept."""

    path: Path  # of the table; the settings stand beside it
    settings: dict
    rows: list[dict]


class Key(NamedTuple):
    """Everything that tells one run from another."""

    algorithm: str
    flags: tuple
    seed: int
    thresholds: tuple[float, ...]  # none of a method that knows no threshold

    def __str__(self) -> str:
        b = ", ".join(f"{b:g}" for b in self.thresholds)
        return f"the run of {self.algorithm} at seed {self.seed}" + (f" and b {b}" if b else "")


def read_parts(folder: Path) -> tuple[list[dict], list[dict], Flags]:
    """Returns the rows of all tables, the settings of each part, and the flags that all parts share.

    The other flags of a part are added to the names of its algorithms. Raises: UserError where two parts have
    the same run, or one was kept by an older version.
    """
    parts = _parts(folder)
    flags = [options(part.settings["flags"]) for part in parts]
    shared: Flags = {}
    if flags:
        shared = {k: v for k, v in flags[0].items() if all(f.get(k) == v for f in flags)}
    rows, seen = [], {}
    for part, part_flags in zip(parts, flags, strict=True):
        if "hours" not in part.settings:
            raise UserError(
                f"{part.path}: an older version wrote it; run its command again, which only reads runs that "
                "are done."
            )
        for key in _keys(part.settings, part.rows):
            if key in seen:
                raise UserError(f"{part.path}: {key} is in {seen[key]} too; delete one of the two.")
            seen[key] = part.path
        differing = words({k: v for k, v in part_flags.items() if k not in shared})
        for row in part.rows:
            row["algorithm"] = " ".join([row["algorithm"], *differing])
        rows += part.rows
    return rows, [part.settings for part in parts], shared


def _parts(folder: Path) -> list[Part]:
    """Reads the parts that are kept."""
    parts = []
    for path in sorted(folder.glob("part-*.csv")):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        settings = read_json(path.with_suffix(".json"), cure="run the part's command again")
        parts.append(Part(path, settings, rows))
    return parts


def _keys(settings: dict, rows: list[dict]) -> list[Key]:
    """Returns the keys of the runs of a part that have a verdict."""
    flags = tuple(sorted(options(settings["flags"]).items()))
    keys = []
    for r in rows:
        if not r["error"]:
            thresholds = () if knows_no_threshold(r["algorithm"]) else thresholds_of(r)
            keys.append(Key(r["algorithm"], flags, int(r["seed"]), thresholds))
    return keys


def thresholds_of(row: dict) -> tuple[float, ...]:
    """Returns b of each constraint of a run."""
    return tuple(float(row[f"{name} threshold"]) for name in costs_of(row))


def knows_no_threshold(label: str) -> bool:
    """Returns whether an algorithm knows no threshold."""
    return not config_class(label).has_thresholds


def part_name(
    labels: Sequence[str], thresholds: Sequence[str], seeds: Sequence[int], flags: Sequence[str]
) -> str:
    """Names the folder of a part's runs; the sign of a number stays, and a comma is told from a space."""
    bs = (b.replace(",", "_") for b in thresholds)
    parts = [*labels, "b", *bs, "seeds", *map(str, seeds), *(f.removeprefix("--") for f in flags)]
    return "-".join(re.sub("[^A-Za-z0-9._-]+", "-", part) for part in parts)


class Asked(NamedTuple):
    """A part that is to be run."""

    seeds: list[int]
    labels: tuple[str, ...]
    thresholds: tuple[str, ...]
    flags: tuple[str, ...]


def run_part(asked: Asked, out: Path, docs: Path) -> None:
    """Sweeps the seeds, or goes on with them, and keeps table and settings under DOCS/study/.
    Runs that are done are only read.

    Raises: UserError before any run, also where another part has one of them.
    """
    config = SweepConfig(
        out=str(out),
        algorithms=asked.labels,
        thresholds=asked.thresholds,
        seeds=tuple(asked.seeds),
        flags=(*FLAGS, *ONE_LOOK, *asked.flags),
    )
    settings = {
        "seeds": asked.seeds,
        "algorithms": asked.labels,
        "thresholds": asked.thresholds,
        "flags": shown((*FLAGS, *asked.flags)),
    }
    plans = configs_of(config, None)
    kept = docs / "study" / f"part-{out.name}.csv"
    _refuse_doubles(settings, plans, kept)
    if all(finished(plan) for plan in plans):
        outcomes = [read_run(plan) for plan in plans]
    else:
        outcomes = run_sweep(config, resume=(out / "sweep.json").is_file())
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_table(kept, pages.table(outcomes))
    timing = [row for path in out.glob("*/timing.jsonl") for row in read_timing(path.parent, StageTimeRow)]
    hours = sum(row.seconds for row in timing) / 3600
    versions = json.loads((plans[0].folder / "config.json").read_text())["versions"]
    write_json(kept.with_suffix(".json"), {**settings, "versions": versions, "hours": round(hours, 3)})


def _refuse_doubles(settings: dict, plans: list, kept: Path) -> None:
    """Raises UserError where another part than `kept` has one of the runs."""
    others = {
        key: part.path
        for part in _parts(kept.parent)
        if part.path != kept
        for key in _keys(part.settings, part.rows)
    }
    rows = []
    for p in plans:
        limits = constraints.limits(p.config, p.config.cost)
        row = {"algorithm": p.label, "seed": p.config.seed, "error": ""}
        rows.append(row | {f"{limit.name} threshold": limit.value for limit in limits})
    for key in _keys(settings, rows):
        if key in others:
            raise UserError(
                f"{key} is in {others[key]} already; leave it out, or delete that table and its .json."
            )
