"""Metrics rows as TensorBoard events."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from engine.errors import NotWritten, UserError
from engine.files import writing


def _scalars(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | int | float):
        yield tag, float(value)
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _scalars(f"{tag}/{key}", item)


class TensorBoard:
    """Writes rows as scalars named kind/field; a list's elements are kind/field/0, kind/field/1.

    The events are in a fresh FOLDER/tensorboard. Older ones there are removed: a resumed run writes all rows
    again, none twice. The time stands in them, so they are not equal between equal runs.

    Where they cannot be written, that is said once through `warn`, and the run goes on without them.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Raises: UserError when the package is missing."""
        self._event, self._summary, self._recorder = _library()
        self._warn, self._count = warn, {}
        self._file: IO[bytes] | None = None
        self._path = folder / "tensorboard" / f"events.out.tfevents.{int(time.time())}"
        try:
            with writing(self._path):
                shutil.rmtree(self._path.parent, ignore_errors=True)
                self._path.parent.mkdir()
                self._file = open(self._path, "wb")  # noqa: SIM115, open until the run ends
                self._write([self._event(wall_time=time.time(), file_version="brain.Event:2")])
        except NotWritten as error:
            self._give_up(error)

    def write(self, rows: list[dict]) -> None:
        """Adds `rows`; the horizontal axis counts the rows of each kind."""
        if self._file is None:
            return
        events = []
        for row in rows:
            step = self._count.get(row["kind"], 0)
            self._count[row["kind"]] = step + 1
            for field, value in row.items():
                if field not in ("kind", "stage"):
                    for tag, scalar in _scalars(f"{row['kind']}/{field}", value):
                        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=scalar)])
                        events.append(self._event(wall_time=time.time(), step=step, summary=summary))
        try:
            with writing(self._path):
                self._write(events)
        except NotWritten as error:
            self._give_up(error)

    def close(self) -> None:
        """Closes the file; all rows are in it already."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _write(self, events: list) -> None:
        records = self._recorder(self._file)
        for event in events:
            records.write(event.SerializeToString())
        records.flush()

    def _give_up(self, error: NotWritten) -> None:
        self.close()
        self._warn(f"{error}; the run goes on without TensorBoard events, and --resume writes them all")


def check_tensorboard() -> None:
    """Checks that the package is there. Raises: UserError when it is missing."""
    _library()


def _library() -> tuple[type, type, type]:
    """Returns what TensorBoard's files are made with; its writer with a queue and a thread of its own dies
    with a traceback on a full disk."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return Event, Summary, RecordWriter
