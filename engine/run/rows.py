"""Reading the rows of metrics.jsonl and timing.jsonl."""

import json
from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


def _json_lines(path: Path) -> Iterator[dict]:
    if not path.exists():
        raise UserError(f"{path} does not exist: {path.parent} is no run folder; name the folder that --out made.")
    # A running or killed process may leave a last line without its end.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        if line:
            try:
                yield json.loads(line)
            except ValueError as error:
                if path.name == TIMING:  # a killed process cut this line and a resumed one went on below it
                    continue
                raise UserError(f"{path} line {number} is no JSON: resume the run to have the file repaired.") from error


def read_rows(folder: str | Path, kind: str | None = None) -> list[dict]:
    """The metrics rows of a run, or those of one kind, in order.

    Raises: UserError when there are none to read.
    """
    return [row for row in _json_lines(Path(folder) / METRICS) if kind is None or row["kind"] == kind]


def read_timing(folder: str | Path) -> list[dict]:
    """The rows of timing.jsonl, in order; the seconds and speeds of interrupted attempts are among them."""
    return list(_json_lines(Path(folder) / TIMING))


def time_table(folder: str | Path) -> list[tuple[str, float, float]]:
    """Where the time went: (stage, seconds, share of all stages), in order; the time of interrupted attempts is included.

    Raises: UserError when the folder holds no timing.jsonl.
    """
    seconds: dict[str, float] = {}
    for row in read_timing(folder):
        if row["kind"] == "stage":
            seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    total = sum(seconds.values())
    return [(stage, s, s / total if total > 0 else 0.0) for stage, s in seconds.items()]
