"""Steps that find out one thing each, and leave one JSON line when they end, so that a part
goes on where it was cut off."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.run import floors
from bench.run.measure import interleaved
from bench.run.origin import origin
from engine.files import append_line

LIMIT_S = 8.5 * 60  # no step begins that is expected to end later
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """One thing to find out; `seconds` is a guess, which decides whether the step still fits."""

    name: str
    seconds: float
    lines: Callable[[torch.device], list[dict]]


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


def go_on(steps: list[Step], path: Path, device: torch.device, limit_s: float = LIMIT_S) -> int:
    """Runs the steps that `path` does not hold yet, at least one, those that failed last;
    returns how many are left."""
    begun, records = time.monotonic(), read(path)
    failed = [r["step"] for r in records if "failed" in r]
    done = {r["step"] for r in records if "lines" in r}
    todo = sorted((s for s in steps if s.name not in done), key=lambda s: s.name in failed)
    left = len(todo)
    for number, step in enumerate(todo):
        if number and time.monotonic() - begun + step.seconds > limit_s:
            needs = f"about {step.seconds:.0f} s, which do not fit any more"
            print(f"{step.name}: {needs}; the same command goes on with it")
            break
        record = _tried(step, device)
        append_line(path, json.dumps(record))
        outcome = record.get("failed", "done").splitlines()[-1]
        print(f"{step.name}: {outcome} after {record['seconds']:.0f} s", flush=True)
        left -= "lines" in record
        if "CUDA error" in record.get("failed", ""):
            print("the GPU takes no more from this process; the same command goes on with the next step")
            break
    return left


def _tried(step: Step, device: torch.device) -> dict:
    """Runs a step; returns its record, with its lines or with its error."""
    begun = time.monotonic()
    try:
        outcome = {"lines": step.lines(device)}
    except (Exception, SystemExit) as error:
        outcome = {"failed": "".join(traceback.format_exception(error))}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"step": step.name, "seconds": time.monotonic() - begun, **outcome}


def read(path: Path) -> list[dict]:
    """Reads the records of a part, none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
