"""Interleaved timing, peak memory, and the line that says where a figure comes from."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "cut-cross-entropy", "trl", "llama-cpp-python", "vllm")


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of each candidate: median, p20 and p80 over `repeats` rounds in which every candidate runs once, after one round that is
    not counted. A machine whose speed drifts then changes all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeats + 1):
        for name, step in candidates.items():
            seconds = _seconds(step, device)
            if round_:
                times[name].append(seconds)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median, p20 and p80."""
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
    """Most bytes that the step held at once beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    used = peak = 0
    for event in events:
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def origin(device: torch.device) -> dict[str, object]:
    """Machine, versions, commit and date."""
    root = Path(__file__).resolve().parent.parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "driver": _driver() if device.type == "cuda" else "",
        "versions": found,
        "python": platform.python_version(),
        "commit": commit,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    wide = "AVX-512" if "avx512f" in text else "AVX2" if "avx2" in text else "no AVX"
    return f"{names[0] if names else platform.processor()} ({wide})"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[0]
