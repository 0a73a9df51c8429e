"""Reading the rows of metrics.jsonl and timing.jsonl."""

from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError
from engine.files import read_json_lines

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


def _lines(path: Path, *, skip_damaged: bool = False) -> Iterator[dict]:
    if not path.exists():
        raise UserError(f"{path} does not exist: {path.parent} is no run folder; name the folder that --out made.")
    return read_json_lines(path, cure="resume the run to have the file repaired", skip_damaged=skip_damaged)


def read_rows(folder: str | Path, kind: str | None = None) -> list[dict]:
    """The metrics rows of a run, or those of one kind, in order.

    Raises: UserError when there are none to read.
    """
    return [row for row in _lines(Path(folder) / METRICS) if kind is None or row["kind"] == kind]


def read_timing(folder: str | Path) -> list[dict]:
    """The rows of timing.jsonl, in order; the seconds and speeds of interrupted attempts are among them."""
    return list(_lines(Path(folder) / TIMING, skip_damaged=True))


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
