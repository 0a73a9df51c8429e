"""Metrics rows as TensorBoard events."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

from engine.files import writing


class TensorBoard:
    """Writes scalars into a fresh FOLDER/tensorboard (`engine.run.trackers.Tracker`).

    Older events there are removed: a resumed run writes all rows again, none twice. The time stands in them,
    so they are not equal between equal runs. TensorBoard's own writer has a queue and a thread, which ends
    with a traceback on a full disk; so the records are written here.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: NotWritten where the folder cannot be made."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._recorder = Event, Summary, RecordWriter
        self._path = folder / "tensorboard" / f"events.out.tfevents.{int(time.time())}"
        self._waiting = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        with writing(self._path):
            shutil.rmtree(self._path.parent, ignore_errors=True)
            self._path.parent.mkdir()
            self._file = open(self._path, "wb")  # noqa: SIM115, open until the run ends
        self.flush()

    def log(self, scalars: dict[str, float], kind: str, step: int) -> None:
        for tag, scalar in scalars.items():
            summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=scalar)])
            self._waiting.append(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Writes what was logged. Raises: NotWritten on a full disk."""
        events, self._waiting = self._waiting, []
        with writing(self._path):
            records = self._recorder(self._file)
            for event in events:
                records.write(event.SerializeToString())
            records.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
