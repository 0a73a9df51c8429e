"""What the display prints on terminals and elsewhere, and what is read back from a run."""

import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.run.display import Display, duration
from engine.run.rows import (
    IterationRow,
    Row,
    SpeedRow,
    StageTimeRow,
    StepRow,
    plain,
    raw_rows,
    read_rows,
    read_timing,
    time_table,
)
from engine.run.run import Run, Stage
from tests.helpers import rows
from tests.helpers.rows import ITERATION, SPEED, STEP, write_metrics
from tests.helpers.runs import write


@dataclass(frozen=True, kw_only=True)
class XRow(Row):
    KIND = "x"

    v: float


@dataclass(frozen=True, kw_only=True)
class YRow(Row):
    KIND = "y"

    v: float


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines() -> None:
    clock, out = Clock(), io.StringIO()
    with Display(n_stages=3, file=out, clock=clock) as display:
        display.stage(2, "iteration-1/policy")
        with display.progress(100, "tokens", "rollout") as progress:
            for _ in range(10):
                clock.now += 4
                progress.advance(10)
        display.line("step 1 [red]loss[/red] 0.5 :smile:")
        display.warn("old file")
        display.stage(3, "dual", loaded=True)
    assert out.getvalue().splitlines() == [
        "stage 2 of 3: iteration-1/policy",
        "  rollout: 40/100 tokens, 2.5 tokens/s, 24 s left",
        "  rollout: 80/100 tokens, 2.5 tokens/s, 8 s left",
        "  rollout: 100 tokens in 40 s",
        "step 1 [red]loss[/red] 0.5 :smile:",
        "warning: old file",
        "stage 3 of 3: dual (loaded)",
    ]


def test_plain_progress_is_silent_when_quick_and_never_divides_by_zero() -> None:
    out = io.StringIO()
    with Display(file=out, clock=Clock()) as display, display.progress(0, "steps", "policy") as progress:
        progress.advance(0)
        assert str(progress) == "policy: 0/0 steps, 0.0 steps/s"
    assert out.getvalue() == ""


def test_long_lines_stay_one_line() -> None:
    out = io.StringIO()
    Display(file=out).line("x" * 300)
    assert out.getvalue() == "x" * 300 + "\n"


def test_table() -> None:
    out = io.StringIO()
    Display(file=out).table(
        [["reward", 1.25, "[0.1, 0.2]"], ["a rather long name", "-3", ""]], ["metric", "mean", "95 %"]
    )
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == [
        "metric              mean        95 %",
        "reward              1.25  [0.1, 0.2]",
        "a rather long name    -3",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (12000, "3 h 20 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("fails", [False, True])
def test_terminal(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:
                return
            if not data:
                return
            shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    clock, stdout = Clock(), sys.stdout

    def use() -> None:
        with os.fdopen(slave, "w") as terminal, Display(n_stages=9, file=terminal, clock=clock) as display:
            assert display.live
            display.stage(
                2, "iteration-1/policy with a name that is longer than the eighty columns of this terminal"
            )
            with display.progress(12345, "responses", "rollout of the training prompts") as progress:
                clock.now += 7
                progress.advance(1234)
                display.line("a permanent line")
                display.notice("finishing the current step")
                display._live.refresh()
                if fails:
                    raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    deadline = time.monotonic() + 10
    while b"\x1b[?25h" not in shown and time.monotonic() < deadline:
        time.sleep(0.01)
    reader.join(10)
    os.close(master)
    text = bytes(shown).decode()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"
    assert sys.stdout is stdout
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 80
    assert "a permanent line" in [line.strip() for line in lines]
    assert any(line.startswith("stage 2 of 9: iteration-1/policy") for line in lines)
    assert any(
        "1234/12345" in line and "176.3 responses/s" in line and "1 min 3 s left" in line for line in lines
    )
    assert any("finishing the current step" in line for line in lines)


def test_rows_and_time_table(tmp_path: Path) -> None:
    folder, slow = tmp_path / "run", replace(SPEED, sampling_s=1e9)

    def log(stage: Stage) -> dict:
        stage.log(XRow(v=1))
        stage.log(YRow(v=2))
        stage.log_speed(slow)
        return {}

    with Run.create(folder, "caid", {}, versions={}, fingerprint="f") as run:
        for name in ("a", "b"):
            run.stage(name, dict, log)
    assert read_rows(folder, YRow) == [YRow(stage=name, v=2) for name in ("a", "b")]
    values = [(kind, stage, v) for stage in ("a", "b") for kind, v in (("x", 1), ("y", 2))]
    assert raw_rows(folder) == [{"kind": kind, "stage": stage, "v": v} for kind, stage, v in values]
    assert read_timing(folder, SpeedRow) == [replace(slow, stage=name) for name in ("a", "b")]
    assert [stage for stage, _, _ in time_table(folder)] == ["a", "b"]
    assert all(seconds < 1e6 for _, seconds, _ in time_table(folder)), "the stages' seconds alone are counted"
    whole = [StageTimeRow(stage="a", seconds=1.0), replace(SPEED, stage="a", sampling_s=9.0)]
    again = [StageTimeRow(stage="b", seconds=6.0), StageTimeRow(stage="a", seconds=1.0)]
    first, second, third, fourth = (json.dumps(row.as_dict()) for row in [*whole, *again])
    cut = first[:12]
    (folder / "timing.jsonl").write_text("\n".join([first, cut, second, third, fourth, cut]))
    assert time_table(folder) == [("a", 2.0, 0.25), ("b", 6.0, 0.75)]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "y", "stage": "b", "v"')
    assert len(read_rows(folder, YRow)) == 2, "a row that is being written is left out"


def test_a_row_of_each_kind_is_read_as_it_was_logged(tmp_path: Path) -> None:
    """Tensors come back as lists; the stage that logs a row gives its own name."""
    logged = [row for row in vars(rows).values() if isinstance(row, Row) and row is not SPEED]
    assert len(logged) == 5
    with Run.create(tmp_path / "run", "caid", {}, versions={}, fingerprint="f") as run:
        run.stage("a", dict, lambda stage: [stage.log(row) for row in logged] and {})
        lam = torch.tensor([0.1, 0.2], dtype=torch.float64)
        computed = replace(ITERATION, lam=lam, kl_se=np.float64(0.5))
        run.stage("b", dict, lambda stage: stage.log(computed) or {})
    for row in logged:
        assert read_rows(tmp_path / "run", type(row))[0] == replace(row, stage="a")
    expected = replace(ITERATION, stage="b", lam=[0.1, 0.2], kl_se=0.5)
    assert read_rows(tmp_path / "run", IterationRow)[1] == expected
    # The steps of all kinds of updates can be read by what they share.
    (step,) = read_rows(tmp_path / "run", StepRow)
    assert (step.iteration, step.step, step.loss) == (STEP.iteration, STEP.step, STEP.loss)


def test_numbers_that_are_not_finite_are_read_as_none(tmp_path: Path) -> None:
    written = replace(ITERATION, kl=math.nan, slack=[math.inf, 0.5], slack_se=torch.tensor(math.nan))
    write_metrics(tmp_path, [written])
    (row,) = read_rows(tmp_path, IterationRow)
    assert row == replace(ITERATION, kl=None, slack=[None, 0.5], slack_se=None)


def test_a_row_that_lacks_a_field_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for name in ("stage", fields(ITERATION)[-1].name):
        lacking = {field: value for field, value in ITERATION.as_dict().items() if field != name}
        write(file, [ITERATION.as_dict(), lacking])
        said = f"{file}: a row of kind {ITERATION.KIND} has no {name}; another version of"
        with pytest.raises(UserError, match=re.escape(said)):
            read_rows(tmp_path, IterationRow)
    # Rows of other kinds are not looked at, and further fields do no harm.
    assert read_rows(tmp_path, YRow) == []
    write(tmp_path / "metrics.jsonl", [ITERATION.as_dict() | {"later": 1}])
    assert read_rows(tmp_path, IterationRow) == [ITERATION]


def test_a_damaged_row_of_the_timing_is_left_out(tmp_path: Path) -> None:
    whole = json.dumps(SPEED.as_dict()).encode()
    damaged = [
        whole.replace(b'"stage"', b'"stagg"'),
        whole.replace(b"kind", b"k\xffnd"),
        b"[1]",
        b"3",
        whole[:20],
    ]
    (tmp_path / "timing.jsonl").write_bytes(b"\n".join([*damaged, whole, *damaged]))
    assert read_timing(tmp_path, SpeedRow) == [SPEED]


def test_what_no_row_can_hold() -> None:
    assert plain({"a": (1, True, None, "x", [2.5, {}])}) == {"a": [1, True, None, "x", [2.5, {}]]}
    with pytest.raises(TypeError, match=re.escape("a row cannot hold {1}")):
        plain({"a": {1}})


def test_a_resumed_run_ends_a_cut_timing_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Run.create(folder, "caid", {}, versions={}, fingerprint="f").close()
    (folder / "timing.jsonl").write_text('{"kind": "stage", "sta')
    with Run.resume(folder, fingerprint="f") as run:
        run.stage("a", dict, lambda stage: {})
    assert [stage for stage, _, _ in time_table(folder)] == ["a"]


def test_reading_what_is_no_run(tmp_path: Path) -> None:
    for read, *cls in ((raw_rows,), (read_rows, IterationRow), (read_timing, SpeedRow)):
        with pytest.raises(UserError, match="is no run folder"):
            read(tmp_path, *cls)
    with pytest.raises(UserError, match="is no run folder"):
        time_table(tmp_path / "nothing")
