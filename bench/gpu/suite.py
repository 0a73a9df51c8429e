"""The project's tests on a GPU, maybe under compute-sanitizer, as a table of counts."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from bench.gpu.steps import Step, table
from bench.run.origin import ROOT


def tests(name: str, seconds: float, arguments: list[str], tool: tuple[str, ...] = ()) -> Step:
    """Returns a step that runs pytest, under `tool` where it is given, and counts."""

    def lines(device: torch.device, folder: Path = Path("/tmp")) -> list[dict]:
        report = folder / f"{name.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)
        begun = time.monotonic()
        command = [*tool, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        # The sanitizer sees a tensor's bounds only where each has memory of its own.
        bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {}
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | bare)
        counts = counted(report)
        row = [name, ended.returncode, counts.passed, counts.failed, counts.skipped, time.monotonic() - begun]
        header = ["", "exit code", "passed", "failed", "skipped", "s"]
        return [table(f"Tests: {name}", header, [row], counts.notes, device=device)]

    return Step(name, seconds, lines)


class Counts(NamedTuple):
    """The outcome of a test run."""

    passed: int
    failed: int
    skipped: int
    notes: tuple[str, ...]  # each failure, and how many tests were skipped for each reason


def counted(report: Path) -> Counts:
    """Counts the tests of a JUnit report."""
    passed, failed, reasons = 0, [], {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((e for e in case if e.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            test = f"{case.get('classname')}::{case.get('name')}"
            failed.append(f"failed: {test}: {(problem.get('message') or '').splitlines()[:1]}")
        elif skipped is not None:
            reasons[skipped.get("message")] = reasons.get(skipped.get("message"), 0) + 1
        else:
            passed += 1
    notes = (*failed, *(f"{count} skipped: {reason}" for reason, count in reasons.items()))
    return Counts(passed, len(failed), sum(reasons.values()), notes)
