"""The project's tests on a GPU, maybe under compute-sanitizer, as a table of counts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from bench.gpu.steps import Figure, Step, table
from bench.run.origin import ROOT

HEADER = ["", "exit code", "passed", "failed", "skipped", "s"]


def tests(
    name: str,
    seconds: float,
    arguments: list[str],
    tool: tuple[str, ...] = (),
    *,
    limit_s: float | None = None,
    figures: Callable[[list[dict]], list[Figure]] = lambda lines: [],
) -> Step:
    """Returns a step that runs pytest, under `tool` where it is given, and counts; after `limit_s` pytest is
    asked to stop, and what it has done by then counts."""

    def lines(device: torch.device, folder: Path = Path("/tmp")) -> list[dict]:
        report = folder / f"{name.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)
        begun = time.monotonic()
        command = [*tool, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        # The sanitizer sees a tensor's bounds only where each has memory of its own.
        bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {}
        # Started from the background of a shell, pytest would ignore that it is asked to stop.
        heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | bare, preexec_fn=heeds)
        stopped_s = None
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            stopped_s = limit_s
            process.send_signal(signal.SIGINT)
            process.wait()
        counts = counted(report, stopped_s)
        row = [name, process.returncode, *counts[:3], time.monotonic() - begun]
        return [table(f"Tests: {name}", HEADER, [row], counts.notes, device=device)]

    return Step(name, seconds, lines, figures)


class Counts(NamedTuple):
    """The outcome of a test run."""

    passed: int
    failed: int
    skipped: int
    notes: tuple[str, ...]  # each failure, and how many tests were skipped for each reason


def counted(report: Path, stopped_s: float | None = None) -> Counts:
    """Counts the tests of a JUnit report. stopped_s: seconds after which pytest was asked to stop."""
    passed, failed, reasons = 0, [], {}
    notes = [] if stopped_s is None else [f"stopped after {stopped_s:.0f} s"]
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((e for e in case if e.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if case.get("name") is None:
            continue  # the test in which pytest was stopped
        if problem is not None:
            test = f"{case.get('classname')}::{case.get('name')}"
            failed.append(f"failed: {test}: {(problem.get('message') or '').splitlines()[:1]}")
        elif skipped is not None:
            reasons[skipped.get("message")] = reasons.get(skipped.get("message"), 0) + 1
        else:
            passed += 1
    notes += [*failed, *(f"{count} skipped: {reason}" for reason, count in reasons.items())]
    return Counts(passed, len(failed), sum(reasons.values()), tuple(notes))
