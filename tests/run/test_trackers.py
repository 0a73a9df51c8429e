"""Metrics rows on their way to trackers: TensorBoard, W&B, MLflow and Trackio, each of which may be absent
or fail."""

import errno
import importlib.machinery
import io
import json
import math
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from engine.errors import UserError
from engine.run.display import Display
from engine.run.rows import Row
from engine.run.run import Run


@dataclass(frozen=True, kw_only=True)
class XRow(Row):
    KIND = "x"

    v: float


@dataclass(frozen=True, kw_only=True)
class ZRow(Row):
    KIND = "z"

    loss: float


@dataclass(frozen=True, kw_only=True)
class LongZRow(ZRow):
    lam: list[float]
    text: str
    nan: float


FIRST = LongZRow(loss=0.5, lam=[1, 2.0], text="x", nan=float("nan"))
# tag, value and number of each scalar of the rows that `go_on` logs
EXPECTED = [
    ["z/lam/0", 1.0, 0],
    ["z/lam/1", 2.0, 0],
    ["z/loss", 0.5, 0],
    ["z/loss", 0.25, 1],
    ["x/v", 3.0, 0],
]


def begin(folder: Path, *trackers: str, display: Display | None = None) -> Run:
    settings = {"trackers": trackers, "seed": 7}
    return Run.create(folder, "caid", settings, versions={}, fingerprint="f", display=display)


def go_on(run: Run, stages: str = "ab") -> None:
    with run:
        if "a" in stages:
            run.stage("a", dict, lambda stage: stage.log(FIRST) or {})
        if "b" in stages:
            run.stage("b", dict, lambda stage: stage.log(ZRow(loss=0.25)) or stage.log(XRow(v=3)) or {})


def put(monkeypatch: pytest.MonkeyPatch, name: str, **contents) -> None:
    """Puts a module in the place of a package."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class FakeEvents:
    """Stands for the three modules of tensorboard that are used; an event is a line of JSON, and from the
    call `full_from` on the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.full_from = 0, math.inf

        @dataclass(kw_only=True)
        class Summary:
            value: list = field(default_factory=list)

            def Value(*, tag: str, simple_value: float) -> tuple[str, float]:
                return tag, simple_value

        @dataclass(kw_only=True)
        class Event:
            wall_time: float
            step: int = 0
            file_version: str = ""
            summary: Summary = field(default_factory=Summary)

            def SerializeToString(self) -> bytes:
                return json.dumps([[*pair, self.step] for pair in self.summary.value]).encode()

        class RecordWriter:
            def __init__(writer, file: IO[bytes]) -> None:
                writer.file, writer.flush = file, file.flush

            def write(writer, data: bytes) -> None:
                self.calls += 1
                if self.calls >= self.full_from:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                writer.file.write(data + b"\n")

        for name, made in (
            ("compat.proto.event_pb2", Event),
            ("compat.proto.summary_pb2", Summary),
            ("summary.writer.record_writer", RecordWriter),
        ):
            put(monkeypatch, f"tensorboard.{name}", **{made.__name__: made})
        put(monkeypatch, "tensorboard")

    @staticmethod
    def written(run: Path) -> list[list]:
        (file,) = (run / "tensorboard").iterdir()
        assert "tfevents" in file.name, "TensorBoard looks for files by this word"
        return [scalar for line in file.read_text().splitlines() for scalar in json.loads(line)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_before_the_run_begins(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=f"--trackers {name} needs .* pip install {name}"):
        begin(tmp_path / "run", name)
    assert not list(tmp_path.iterdir())


def test_tensorboard(tmp_path, monkeypatch):
    events, folder = FakeEvents(monkeypatch), tmp_path / "r"
    go_on(begin(folder, "tensorboard"))
    assert events.written(folder) == EXPECTED
    (folder / "tensorboard" / "older").write_text("")
    go_on(Run.resume(folder, fingerprint="f"))
    assert events.written(folder) == EXPECTED


@pytest.mark.parametrize("full_from", [1, 4])
def test_a_disk_without_room_for_events_stops_these_and_not_the_run(tmp_path, monkeypatch, full_from):
    events, folder, out = FakeEvents(monkeypatch), tmp_path / "r", io.StringIO()
    events.full_from = full_from
    with begin(folder, "tensorboard", display=(display := Display(file=out))) as run:
        for name in ("a", "b", "c"):
            run.stage(name, dict, lambda stage: stage.log(ZRow(loss=0.25)) or stage.log(XRow(v=3)) or {})
    assert len(run.rows(ZRow)) == 3
    (said,) = [line for line in out.getvalue().splitlines() if "warning" in line]
    assert "disk full while saving" in said
    assert said.endswith("the run goes on without it, and --resume sends the rest")
    assert events.calls == full_from, "no more is tried"
    # A file in the place of the folder stops the events alike.
    (folder / "tensorboard").rename(tmp_path / "aside")
    (folder / "tensorboard").write_text("a note")
    out.truncate(0)
    with Run.resume(folder, fingerprint="f", display=display) as run:
        run.stage("a", dict, lambda stage: {})
    assert out.getvalue().count("cannot write") == 1 and (folder / "tensorboard").read_text() == "a note"


class FakeService:
    """Stands for wandb, trackio and MLflow's client: keeps [tag, value, row] of what it is given, by run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: dict[str, list] = {}
        self.settings: list[dict] = []
        self.closed = 0
        self.fails_from = math.inf

        def note(run_id: str, tag: str, value: float, row: float) -> None:
            if sum(map(len, self.runs.values())) >= self.fails_from:
                raise ConnectionError("no route to host\nand so on")
            self.runs[run_id].append([tag, value, row])

        class Client:
            def __init__(run, id: str) -> None:
                run.id = id

            def define_metric(run, tags: str, step_metric: str) -> None:
                assert step_metric == tags.replace("*", "row")

            def log(run, scalars: dict) -> None:
                (row,) = (value for tag, value in scalars.items() if tag.endswith("/row"))
                for tag, value in scalars.items():
                    if not tag.endswith("/row"):
                        note(run.id, tag, value, row)

            def finish(run) -> None:
                self.closed += 1

        def init(*, config: dict, name: str, id: str | None = None, resume: str, **others) -> Client:
            assert resume == "allow" and others["project"] == "dualign"
            if (id or name) not in self.runs:
                self.settings.append(config)
            self.runs.setdefault(id or name, [])
            return Client(id or name)

        class MlflowClient:
            def get_experiment_by_name(client, name: str):
                return types.SimpleNamespace(experiment_id="7") if self.runs else None

            def create_experiment(client, name: str) -> str:
                return "7"

            def create_run(client, experiment: str, run_name: str):
                assert experiment == "7"
                self.runs["m1"] = []
                self.settings.append({})
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))

            def log_param(client, run_id: str, name: str, value: str) -> None:
                self.settings[-1][name] = value

            def log_metric(client, run_id: str, tag: str, value: float, step: int) -> None:
                note(run_id, tag, value, step)

            def set_terminated(client, run_id: str) -> None:
                self.closed += 1

        put(monkeypatch, "wandb", init=init)
        put(monkeypatch, "trackio", init=init)
        put(monkeypatch, "mlflow")
        put(monkeypatch, "mlflow.tracking", MlflowClient=MlflowClient)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_service_gets_every_row_once(tmp_path, monkeypatch, name):
    service, folder = FakeService(monkeypatch), tmp_path / "r"
    go_on(begin(folder, name), "a")
    go_on(Run.resume(folder, fingerprint="f"))
    go_on(Run.resume(folder, fingerprint="f"))
    (rows,) = service.runs.values()
    assert [row for row in rows if not math.isnan(row[1])] == EXPECTED
    assert service.closed == 3 and str(service.settings[0]["seed"]) == "7" and len(service.settings) == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_service_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, name):
    service, folder, out = FakeService(monkeypatch), tmp_path / "r", io.StringIO()
    service.fails_from = 3
    go_on(begin(folder, name, display=Display(file=out)))
    (said,) = [line for line in out.getvalue().splitlines() if "warning" in line]
    assert f"--trackers {name}: ConnectionError: no route to host" in said
    service.fails_from = math.inf
    go_on(Run.resume(folder, fingerprint="f"))
    (rows,) = service.runs.values()
    assert [row for row in rows if not math.isnan(row[1])][-2:] == EXPECTED[-2:]
    assert (Run.resume(folder, fingerprint="f").paths.metrics).read_text().count("\n") == 3
