"""What the display prints on terminals and elsewhere, and what is read back from a run."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
import types
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.run.display import Display, duration
from engine.run.rows import read_rows, time_table
from engine.run.run import Run
from engine.run.tensorboard import tensorboard_writer


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
    Display(file=out).table([["reward", 1.25, "[0.1, 0.2]"], ["a rather long name", "-3", ""]], ["metric", "mean", "95 %"])
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == [
        "metric              mean        95 %",
        "reward              1.25  [0.1, 0.2]",
        "a rather long name    -3",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (12000, "3 h 20 min")])
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
            display.stage(2, "iteration-1/policy with a name that is longer than the eighty columns of this terminal")
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
    assert any("1234/12345" in line and "176.3 responses/s" in line and "1 min 3 s left" in line for line in lines)
    assert any("finishing the current step" in line for line in lines)


def test_rows_and_time_table(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Run.create(folder, "caid", {}, versions={}, fingerprint="f") as run:
        for name in ("a", "b"):
            run.stage(name, dict, lambda stage: stage.row("x", v=1) or stage.row("y", v=2) or stage.timing(seconds=1e9) or {})
    assert read_rows(folder, "y") == [{"kind": "y", "stage": s, "v": 2} for s in ("a", "b")]
    assert len(read_rows(folder)) == 4
    assert [stage for stage, _, _ in time_table(folder)] == ["a", "b"]
    (folder / "timing.jsonl").write_text(
        '{"kind": "stage", "stage": "a", "seconds": 1.0}\n{"kind": "sta\n{"kind": "timing", "stage": "a", "seconds": 9}\n'
        '{"kind": "stage", "stage": "b", "seconds": 6.0}\n{"kind": "stage", "stage": "a", "seconds": 1.0}\n{"kind": "st'
    )
    assert time_table(folder) == [("a", 2.0, 0.25), ("b", 6.0, 0.75)]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "y", "stage": "b", "v"')
    assert len(read_rows(folder, "y")) == 2, "a row that is being written is left out"


def test_a_resumed_run_ends_a_cut_timing_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Run.create(folder, "caid", {}, versions={}, fingerprint="f").close()
    (folder / "timing.jsonl").write_text('{"kind": "stage", "sta')
    with Run.resume(folder, fingerprint="f") as run:
        run.stage("a", dict, lambda stage: {})
    assert [stage for stage, _, _ in time_table(folder)] == ["a"]


def test_reading_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="is no run folder"):
        time_table(tmp_path / "nothing")


class FakeSummaryWriter:
    written: list = []

    def __init__(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "events").write_text("")

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append((tag, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tensorboard_writer(tmp_path)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Run.create(tmp_path / "run", "caid", {}, versions={}, fingerprint="f", tensorboard=True)
    assert not list(tmp_path.iterdir())

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FakeSummaryWriter))
    expected = [("step/lam/0", 1.0, 0), ("step/lam/1", 2.0, 0), ("step/loss", 0.5, 0), ("step/loss", 0.25, 1), ("dual/kkt", 3.0, 0)]
    for resumed in (False, True):
        monkeypatch.setattr(FakeSummaryWriter, "written", [])
        arguments = {"fingerprint": "f", "tensorboard": True}
        with (
            Run.resume(tmp_path / "r", **arguments) if resumed else Run.create(tmp_path / "r", "caid", {}, versions={}, **arguments) as run
        ):
            run.stage("a", dict, lambda stage: stage.row("step", loss=0.5, lam=[1, 2.0], text="x", nan=float("nan")) or {})
            run.stage("b", dict, lambda stage: stage.row("step", loss=0.25) or stage.row("dual", kkt=3) or {})
        assert FakeSummaryWriter.written == expected
