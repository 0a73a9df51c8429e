"""Trackers that a run's metrics rows are also written to: TensorBoard, W&B, MLflow and Trackio.

A tracker is for people: nothing is computed from it, and a run goes on where one fails. Rows become scalars
named kind/field; the elements of a list are kind/field/0, kind/field/1; the horizontal axis counts the rows
of each kind. RUN/trackers.jsonl keeps how many rows each service has, so that a resumed run sends none twice.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from engine.errors import UserError
from engine.files import append_line, one_line, read_json_lines
from engine.run.folder import RunFolder
from engine.run.tensorboard import TensorBoard

PROJECT = "dualign"
Scalars = dict[str, float]


class Tracker(Protocol):
    """One place that rows are written to."""

    def log(self, scalars: Scalars, kind: str, step: int) -> None:
        """Writes the scalars of the row number `step`, from 0, of its kind."""

    def flush(self) -> None:
        """Ends a group of rows that were logged together."""

    def close(self) -> None:
        """Ends the run there; nothing is logged any more."""


class Wandb:
    """A run of W&B, which WANDB_MODE=offline keeps in the run's folder."""

    def __init__(self, folder: Path, settings: dict, run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT, name=folder.name, id=run_id, resume="allow", dir=str(folder), config=settings
        )
        self.run_id = self._run.id
        self._kinds: set[str] = set()

    def log(self, scalars: Scalars, kind: str, step: int) -> None:
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/row")
        self._run.log({**scalars, f"{kind}/row": step})

    def flush(self) -> None:
        """Does nothing: the service sends rows by itself."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, settings: dict, run_id: str | None) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if run_id is None:
            experiment = self._client.get_experiment_by_name(PROJECT)
            number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
            run_id = self._client.create_run(number, run_name=folder.name).info.run_id
            for name, value in settings.items():
                self._client.log_param(run_id, name, str(value)[:500])
        self.run_id = run_id

    def log(self, scalars: Scalars, kind: str, step: int) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self.run_id, name, value, step=step)

    def flush(self) -> None:
        """Does nothing: every scalar is sent at once."""

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class Trackio:
    """A run of Trackio, on this machine unless TRACKIO_SPACE_ID names a space."""

    def __init__(self, folder: Path, settings: dict, run_id: str | None) -> None:
        import trackio

        # Its runs are known by their names, and two folders may have one name.
        self.run_id = run_id or f"{folder.name}-{uuid4().hex[:8]}"
        self._run = trackio.init(
            project=PROJECT, name=self.run_id, config=settings, resume="allow", embed=False
        )

    def log(self, scalars: Scalars, kind: str, step: int) -> None:
        self._run.log({**scalars, f"{kind}/row": step})

    def flush(self) -> None:
        """Does nothing: the service sends rows by itself."""

    def close(self) -> None:
        self._run.finish()


SERVICES: dict[str, Callable[[Path, dict, str | None], Any]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the package of each tracker is there. Raises: UserError naming one that is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"--trackers {name} needs the package {name}: pip install {name}.")


class Trackers:
    """All trackers of a run. One that fails is said once and left out from then on."""

    def __init__(
        self, folder: Path, names: Sequence[str], settings: dict, warn: Callable[[str], None]
    ) -> None:
        self._file, self._warn = RunFolder(folder).trackers, warn
        self._open: dict[str, Any] = {}
        self._count: dict[str, int] = {}  # rows of each kind so far
        self._given = 0  # rows so far
        noted = self._noted()
        self._sent = {name: row["rows"] for name, row in noted.items()}
        for name in dict.fromkeys(names):
            known = noted.get(name, {}).get("run")
            self._try(name, lambda name=name, known=known: self._start(name, folder, settings, known))

    def write(self, rows: list[dict]) -> None:
        """Writes rows to every tracker that has not had them yet."""
        numbered = []
        for row in rows:
            kind = row["kind"]
            step = self._count[kind] = self._count.get(kind, -1) + 1
            numbered.append((self._given, kind, step, dict(_scalars(row))))
            self._given += 1
        for name in list(self._open):
            new = [item for item in numbered if item[0] >= self._sent.get(name, 0)]
            if new:
                self._try(name, lambda name=name, new=new: self._send(name, new))

    def close(self) -> None:
        """Ends all of them."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _start(self, name: str, folder: Path, settings: dict, known: str | None) -> None:
        if name == "tensorboard":
            self._open[name] = TensorBoard(folder)
        else:
            self._open[name] = SERVICES[name](folder, settings, known)

    def _send(self, name: str, numbered: list[tuple[int, str, int, Scalars]]) -> None:
        tracker = self._open[name]
        for _, kind, step, scalars in numbered:
            tracker.log(scalars, kind, step)
        tracker.flush()
        # TensorBoard's events are written anew by a resumed run, as they lie in its folder.
        if name != "tensorboard":
            self._sent[name] = self._given
            append_line(self._file, json.dumps({"tracker": name, "run": tracker.run_id, "rows": self._given}))

    def _noted(self) -> dict[str, dict]:
        """Returns the last row of trackers.jsonl of each service."""
        if not self._file.is_file():
            return {}
        rows = read_json_lines(self._file, cure="make it readable", skip_damaged=True)
        return {row["tracker"]: row for row in rows if {"tracker", "run", "rows"} <= row.keys()}

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a service or its network raises
            self._open.pop(name, None)
            what = error if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
            self._warn(f"--trackers {name}: {what}; the run goes on without it, and --resume sends the rest")


def _scalars(row: dict) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a row by tag."""
    for field, value in row.items():
        if field not in ("kind", "stage"):
            yield from _numbers(f"{row['kind']}/{field}", value)


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | int | float):
        yield tag, float(value)
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(f"{tag}/{key}", item)
