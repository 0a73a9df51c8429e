"""Times candidates in turn, and measures their peak memory."""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    candidates: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Returns the seconds of each candidate: median, p20 and p80 over `repeats` rounds,
    after one round that is not counted.

    Every candidate runs once in a round, so a machine whose speed drifts changes all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeats + 1):
        for name, step in candidates.items():
            seconds = _seconds(step, device)
            if round_:
                times[name].append(seconds)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Returns median, p20 and p80."""
    values = sorted(values)
    return {
        "median": statistics.median(values),
        "p20": values[round(0.2 * (len(values) - 1))],
        "p80": values[round(0.8 * (len(values) - 1))],
    }


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Returns the most bytes that the step held at once, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak
