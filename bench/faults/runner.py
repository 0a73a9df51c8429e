"""Runs cases side by side, each in a forked process, and keeps a line of each."""

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.faults.cases import Case
from bench.faults.outcome import BAD, HANG, OUTCOMES, TRACEBACK
from bench.faults.slots import Slot

CASE_LIMIT_S = 400.0  # of all commands of a case together


class Result(NamedTuple):
    """A line of the results."""

    case: str
    outcome: str
    detail: str
    seconds: float


def read_results(path: Path) -> list[Result]:
    """Reads the results so far; a line that a kill cut is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[result.case] = result
    return list(found.values())


def run_cases(cases: Sequence[Case], slots: Sequence[Slot], path: Path, console: Console) -> list[Result]:
    """Runs the cases that have no line in `path` yet, one in each slot; returns all results."""
    done = {result.case: result for result in read_results(path)}
    left = [case for case in cases if case.name not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Without a thread that redraws: the parent forks.
    with Progress(*columns, console=console, auto_refresh=False) as progress, open(path, "a") as file:
        bar = progress.add_task("cases", total=len(cases), completed=len(cases) - len(left))
        bad = sum(done[case.name].outcome in BAD for case in cases if case.name in done)
        for result in _results(left, slots):
            done[result.case] = result
            file.write(json.dumps(result._asdict()) + "\n")
            file.flush()
            bad += result.outcome in BAD
            said = f"{result.case.split('/')[0]}, {bad} bad"
            progress.update(bar, advance=1, description=said)
            progress.refresh()
    return [done[case.name] for case in cases if case.name in done]


def _results(cases: Sequence[Case], slots: Sequence[Slot]):
    """Yields the result of each case as it ends."""
    waiting, free, running = list(cases)[::-1], list(slots), {}
    try:
        while waiting or running:
            while waiting and free:
                case, slot = waiting.pop(), free.pop()
                running[_fork(lambda case=case, slot=slot: _write_result(case, slot))] = (
                    case,
                    slot,
                    time.monotonic(),
                )
            ended, _ = os.waitpid(-1, os.WNOHANG)
            if not ended:
                time.sleep(0.01)
                ended = _overdue(running)
                if not ended:
                    continue
            case, slot, start = running.pop(ended)
            free.append(slot)
            yield _read_result(case, slot, time.monotonic() - start)
    finally:
        for child in running:
            os.kill(child, 9)
            os.waitpid(child, 0)


def _overdue(running: dict) -> int:
    """Kills a case that is far beyond its time; returns its process, or 0."""
    for child, (_, _, start) in running.items():
        if time.monotonic() - start > CASE_LIMIT_S:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return child
    return 0


def _fork(work: Callable[[], None]) -> int:
    """Does `work` in a child; returns its process number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return child


def _write_result(case: Case, slot: Slot) -> None:
    """Runs a case and leaves its outcome in the slot's folder."""
    file = slot.folder / "result.json"
    file.unlink(missing_ok=True)
    try:
        outcome = case.run(slot)
        said = [outcome.kind, outcome.detail]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = [TRACEBACK, f"of this program, {Path(place.filename).name}:{place.lineno}: {error!r}"]
    file.write_text(json.dumps(said))


def _read_result(case: Case, slot: Slot, seconds: float) -> Result:
    """Reads what `_write_result` left."""
    try:
        kind, detail = json.loads((slot.folder / "result.json").read_text())
    except (OSError, ValueError):
        kind, detail = HANG, f"the case was killed after {seconds:.0f} s"
    assert kind in OUTCOMES
    return Result(case.name, kind, detail, round(seconds, 2))


def in_slots(slots: Sequence[Slot], work: Callable[[Slot], None]) -> None:
    """Does the same work in every slot, side by side. Raises: RuntimeError where it fails."""

    def each(slot: Slot) -> None:
        (slot.folder / "failed").write_text("")
        work(slot)
        (slot.folder / "failed").unlink()

    for slot in slots:
        slot.folder.mkdir(parents=True, exist_ok=True)
    children = [_fork(lambda slot=slot: each(slot)) for slot in slots]
    for child in children:
        os.waitpid(child, 0)
    if any((slot.folder / "failed").exists() for slot in slots):
        raise RuntimeError("an undisturbed command failed, see above; nothing was disturbed")
