"""Steps that find out one thing each, and leave one JSON line when they end, so that a part
goes on where it was cut off."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bench.run import floors
from bench.run.measure import interleaved
from bench.run.origin import origin
from engine.files import append_line

LIMIT_S = 8.5 * 60  # a part ends then, and no step begins that is expected to end later
PATIENCE = 2  # a step is ended after so many times the seconds that were guessed
BF16 = torch.bfloat16


class Figure(NamedTuple):
    """A number that a step found out, beside what arithmetic had predicted for it."""

    name: str
    unit: str
    measured: float
    predicted: float | None = None  # none was made
    target: str = ""

    @property
    def ratio(self) -> float | None:
        """Returns measured / predicted."""
        return None if self.predicted is None else self.measured / self.predicted

    def __str__(self) -> str:
        told = "no prediction"
        if self.predicted is not None:
            told = f"predicted {self.predicted:.4g}, measured / predicted {self.ratio:.2f}"
        target = f", target {self.target}" if self.target else ""
        return f"{self.name} {self.measured:.4g} {self.unit}".rstrip() + f" ({told}{target})"


def _none(lines: list[dict]) -> list[Figure]:
    return []


@dataclass(frozen=True)
class Step:
    """One thing to find out; `seconds` is a guess, which decides whether the step still fits."""

    name: str
    seconds: float
    lines: Callable[[torch.device], list[dict]]
    figures: Callable[[list[dict]], list[Figure]] = _none  # of the lines, those to be seen at once


# Runs a step until at most that reading of the monotonic clock; returns the rest of its record.
Attempt = Callable[[Step, float], dict]


def table(
    title: str, header: list[str], rows: list[list], notes: tuple[str, ...] = (), *, device: torch.device
) -> dict:
    """Returns a line of results.jsonl that is shown as it stands, with numbers of four digits."""
    return {
        "case": "table",
        "shape": title,
        "header": header,
        "table": rows,
        "notes": list(notes),
        **origin(device),
    }


def per_call(call: Callable[[int], object], calls: int, device: torch.device, repeats: int = 15) -> float:
    """Returns the median seconds of one of call(0), ..., call(calls - 1).

    On a GPU they are replayed from one captured graph, so that no launch waits for the host.
    """
    if device.type != "cuda":
        times = interleaved({"": lambda: [call(i) for i in range(calls)]}, repeats, device)
        return times[""]["median"] / calls
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(calls):
            call(i)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return interleaved({"": graph.replay}, repeats, device)[""]["median"] / calls


def copy_rate(device: torch.device) -> float:
    """Returns the bytes a second of a copy of more than any cache holds, bytes read and bytes written."""
    probe = floors.probes(BF16, device)["copy"]
    return probe.bytes / per_call(lambda i: probe.step(), 4, device)


def go_on(
    steps: list[Step], path: Path, attempt: Attempt, end: float, clock: Callable[[], float] = time.monotonic
) -> int:
    """Runs the steps that `path` does not hold yet, those that failed last; returns how many are left.

    end: the reading of the clock at which all is over. A step that is not expected to end by then is named
    and left out, and the next one that fits begins.
    """
    records = read(path)
    failed = [r["step"] for r in records if "failed" in r]
    done = {r["step"] for r in records if "lines" in r}
    todo = sorted((s for s in steps if s.name not in done), key=lambda s: s.name in failed)
    left, late = len(todo), []
    for step in todo:
        begun = clock()
        if begun + step.seconds > end:
            late.append(step.name)
            continue
        outcome = attempt(step, min(begun + PATIENCE * step.seconds, end))
        seconds, figures = clock() - begun, outcome.pop("figures", [])
        record = {"step": step.name, "seconds": seconds, **outcome}
        record["figures"] = [figure._asdict() | {"ratio": figure.ratio} for figure in figures]
        append_line(path, json.dumps(record))
        said = outcome.get("failed", "done").splitlines()[-1]
        print(f"{step.name}, {seconds:.0f} s: {'; '.join(map(str, figures)) or said}", flush=True)
        left -= "lines" in outcome
    if late:
        print(f"not done, as no time is left: {', '.join(late)}; the same command goes on with them")
    return left


def tried(step: Step, device: torch.device) -> dict:
    """Runs a step; returns its lines and figures, or its error."""
    try:
        lines = step.lines(device)
        outcome = {"lines": lines, "figures": step.figures(lines)}
    except (Exception, SystemExit) as error:
        outcome = {"failed": "".join(traceback.format_exception(error))}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome


def read(path: Path) -> list[dict]:
    """Reads the records of a part, none where there is no file yet; a line that was cut off is none."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
