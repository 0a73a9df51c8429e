"""A run folder and its stages: each result is computed once, saved whole, and loaded when the run goes on."""

import fcntl
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from engine.errors import Interrupted, UserError
from engine.files import clear, is_there, make_folder, move_aside, whole_folder, write_whole, writing
from engine.ranks import ALONE, Ranks
from engine.run import shards
from engine.run.contents import Contents, read_contents, write_contents
from engine.run.display import Display, Progress
from engine.run.folder import RunFolder
from engine.run.rows import Row, RowT, SpeedRow, StageTimeRow, typed
from engine.run.shards import spread_tensors
from engine.run.store import RecordT, Torn, check_shards, dumps, read_whole, save, unpack_file
from engine.run.trackers import Trackers, check_trackers


def _append(path: Path, row: dict) -> None:
    text = dumps(row) + "\n"
    with writing(path, len(text)), open(path, "a", encoding="utf-8") as file:
        file.write(text)


class Stage:
    """A stage while it runs, as its function sees it: rows, timing, progress, partial results and the
    question whether to stop."""

    def __init__(self, run: "Run", number: int, name: str) -> None:
        self.name, self.number = name, number
        self.rows: list[dict] = []
        self._run = run
        stem = run.paths.stage_stem(number, name)
        self.stem = run.paths.stages / stem
        self.path = run.paths.stages / f"{stem}.safetensors"
        self.partial_path = run.paths.stages / f"{stem}.partial.safetensors"
        self.previous_path = run.paths.stages / f"{stem}.partial.previous.safetensors"

    def log(self, row: Row) -> None:
        """Logs one metrics row: seen in metrics.jsonl at once, kept when the stage
        or a partial of it is saved."""
        written = replace(row, stage=self.name).as_dict()
        self.rows.append(written)
        self._run.append(self._run.paths.metrics, written)

    def log_speed(self, row: SpeedRow) -> None:
        """Logs seconds and speeds, to timing.jsonl only."""
        self._run.append(self._run.paths.timing, replace(row, stage=self.name).as_dict())

    @property
    def paths(self) -> RunFolder:
        """The run folder that the stage belongs to."""
        return self._run.paths

    def progress(self, total: int, unit: str, what: str) -> Progress:
        """Opens a progress bar; `unit` is a plural such as "tokens"."""
        return self._run.display.progress(total, unit, what)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self._run.display.warn(text)

    def partial(self, cls: type[RecordT]) -> RecordT | None:
        """Loads the last whole partial of this stage, or None. The rows logged up to it
        replace those logged since."""
        for path in (self.partial_path, self.previous_path):
            try:
                record, content = self._run.read(path, cls, self.name)
            except FileNotFoundError:
                continue
            except Torn as error:
                self._run.display.warn(f"{error}; going back to the state before it")
                # Else the next save would move the damaged file over the good one.
                self._run.ranks.first(lambda path=path: clear(path))
                continue
            self.rows = content["rows"]
            self._run.align(self.rows)
            return record
        return None

    def save_partial(self, record: Any) -> None:
        """Commits a state inside the stage; the one before it is kept beside it.

        Raises: UserError on a full disk; the last partial stays.
        """
        self._run.save(self, self.partial_path, record, self.previous_path)

    @property
    def stopping(self) -> bool:
        """Tells whether Ctrl-C was pressed: then it is time to save a partial before `check_stop`. On several
        ranks it is what they have agreed on (`agree_to_stop`), as each sees the signal at another moment."""
        return self._run.stopping if self._run.ranks.size == 1 else self._run.agreed

    @property
    def wants_to_stop(self) -> bool:
        """Tells whether Ctrl-C was pressed as this rank sees it."""
        return self._run.stopping

    def agree_to_stop(self) -> None:
        """Notes that at least one rank wants to stop, where all ranks know it."""
        self._run.agreed = True

    def check_stop(self) -> None:
        """Checks that the run may go on. Raises: Interrupted when Ctrl-C was pressed."""
        self._run.check_stop()


class Run:
    """One run folder, locked by this process. Of several ranks rank 0 has the folder; the others go through
    the same stages, and get from it what the folder holds.

    >>> with Run.create("runs/a", "caid", {"seed": 0}, versions={"commit": "1f3"}, fingerprint="9c") as run:
    ...     units = run.stage("reference", Units, lambda stage: ...)

    As a context manager it starts the display and handles Ctrl-C: the first press lets the step end,
    the second stops at once.
    """

    def __init__(
        self,
        folder: Path,
        lock: IO[bytes] | None,
        contents: Contents,
        display: Display | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.folder, self.paths, self.contents = folder, RunFolder(folder), contents
        self.algorithm, self.config = contents.algorithm, contents.config
        self.versions, self.fingerprint = contents.versions, contents.fingerprint
        self.display = display or Display()
        self.stopping = self.agreed = False
        self._lock = lock
        self._rows: list[dict] = []
        self._names: list[str] = []
        self._open = False
        self._last_checksum = contents.inputs
        self._old_handlers: dict[int, Any] = {}
        # Trackers are for people: a config without the field has none.
        names = contents.config.get("trackers", ()) if ranks.is_first else ()
        self._trackers = Trackers(folder, names, contents.config, self.display.warn)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        algorithm: str,
        config: dict,
        *,
        versions: dict,
        fingerprint: str,
        inputs: Any = None,
        model_files: Mapping[str, Path | str] | None = None,
        display: Display | None = None,
    ) -> "Run":
        """Makes the folder and writes what the run is made from into it.

        `config`'s field "out" is left out, as it says nothing about the results. inputs: a record of what was
        read. model_files: files that are copied to RUN/model, or texts, by the names that they get there.

        Raises: UserError when the folder exists or cannot be made.
        """
        folder = Path(folder)
        if is_there(folder):
            raise UserError(
                f"run folder {folder} exists; choose another --out, or go on with --resume {folder}"
            )
        settings = {name: value for name, value in config.items() if name != "out"}
        check_trackers(settings.get("trackers", ()))
        # The folder appears whole, so that a kill before leaves none that could not be resumed.
        with whole_folder(folder) as partial:
            paths = RunFolder(partial)
            paths.stages.mkdir()
            for name, source in (model_files or {}).items():
                copy = paths.model / name
                make_folder(copy.parent)
                write_whole(copy, source.encode() if isinstance(source, str) else source.read_bytes())
            contents = write_contents(
                partial, algorithm, settings, fingerprint=fingerprint, versions=versions, inputs=inputs
            )
        run = cls(folder, cls._take_lock(folder), contents, display)
        return run

    @classmethod
    def resume(cls, folder: str | Path, *, fingerprint: str, display: Display | None = None) -> "Run":
        """Opens an existing run.

        Raises: UserError when it is missing, damaged, in use, or was made from another model.
        """
        folder = Path(folder)
        contents = read_contents(folder)
        check_model(folder, contents, fingerprint)
        run = cls(folder, cls._take_lock(folder), contents, display)
        run.paths.stages.mkdir(exist_ok=True)
        for left in folder.glob("adapters/.*.tmp"):  # a whole checkpoint, half written
            shutil.rmtree(left, ignore_errors=True)
        # Shards that a killed process began to write.
        for left in folder.glob(f"stages/*{shards.SUFFIX}.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        for left in [*folder.glob("*.tmp"), *folder.glob("stages/*.tmp")]:
            clear(left)
        timing = run.paths.timing
        move_aside(timing)
        if timing.exists() and timing.read_bytes()[-1:] not in (b"", b"\n"):
            with writing(timing, 1), open(timing, "a") as file:
                file.write("\n")
        return run

    @classmethod
    def on(cls, ranks: Ranks, opened: Callable[[], "Run"], display: Display) -> "Run":
        """Returns on each rank the run that `opened` makes or opens on rank 0. Raises: what `opened` raises,
        on all."""
        if ranks.size == 1:
            return opened()
        own: list[Run] = []

        def open_it() -> tuple[Path, Contents]:
            own.append(opened())
            return own[0].folder, own[0].contents

        folder, contents = ranks.first(open_it)
        run = own[0] if own else cls(folder, None, contents, display, ranks)
        run.ranks = ranks
        return run

    @staticmethod
    def _take_lock(folder: Path) -> IO[bytes]:
        with writing(folder / ".lock", 0):
            lock = open(folder / ".lock", "ab")  # noqa: SIM115, the run holds it to its end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise UserError(
                f"run folder {folder} is in use by another process; wait for it to end, or stop it"
            ) from error
        return lock

    def stage(self, name: str, cls: type[RecordT], compute: Callable[[Stage], RecordT]) -> RecordT:
        """Returns the result of stage `name`: loaded if it is on disk and whole, else computed and saved.

        Both ways give equal records.

        Raises: Interrupted, UserError, and what `compute` raises.
        """
        assert re.fullmatch(r"[\w/-]+", name) and name not in self._names, (
            f"stage name {name!r} is used twice or no file name"
        )
        assert not self._open, f"stage {name} inside stage {self._names[-1]}"
        self.check_stop()
        self._names.append(name)
        stage = Stage(self, len(self._names), name)
        if found := self._found(stage, cls):
            self.display.stage(stage.number, name, loaded=True)
            record, committed = found
            self._commit(stage, committed)
            return record
        self.display.stage(stage.number, name)
        self.align([])
        self._open, start = True, time.monotonic()
        try:
            result = compute(stage)
            self.save(stage, stage.path, result)
            # Read back, so that a first run and a resumed one go on from the same objects.
            record, committed = self.ranks.first(lambda: self._read(stage.path, cls, stage.name))
        except KeyboardInterrupt:
            self._time(stage, start)
            raise
        finally:
            self._open = False
        self._commit(stage, committed)
        self.align([])
        self._time(stage, start)
        return record

    def _found(self, stage: Stage, cls: type[RecordT]) -> tuple[RecordT, dict] | None:
        """Returns the result of a stage that is on disk, with its rows and checksum; None where it has to be
        computed. All ranks call it."""
        try:
            record, content = self.read(stage.path, cls, stage.name)
        except FileNotFoundError:
            kept = stage.partial_path, stage.previous_path
            if self.ranks.first(lambda: self._forget(stage, keep=kept)):
                self.display.warn(f"{stage.path} is missing; computing it and all later stages again")
        except Torn as error:
            self.display.warn(f"{error}; computing it and all later stages again")
            self.ranks.first(lambda: self._forget(stage))
        else:
            return record, content
        return None

    def save(self, stage: Stage, path: Path, record: Any, previous: Path | None = None) -> None:
        """Commits a record of a stage at `path`, with the rows so far; all ranks call it. What is spread over
        them goes to shards first. previous: where a file that stands at `path` goes."""
        spread = spread_tensors(record)
        beside = {"shards": shards.write(self.ranks, spread, stage.stem)} if spread else {}

        def saved() -> None:
            save(path, record, previous=previous, rows=stage.rows, **beside, **self.origin(stage.name))
            self._sweep(stage)

        self.ranks.first(saved)

    def _sweep(self, stage: Stage) -> None:
        """Deletes the shards that no record of a stage names."""
        found = list(stage.path.parent.glob(f"{stage.stem.name}.*{shards.SUFFIX}"))
        named = set()
        for path in (stage.path, stage.partial_path, stage.previous_path) if found else ():
            with suppress(Torn, FileNotFoundError):
                named.add(read_whole(path)[1].get("shards", {}).get("folder"))
        for folder in found:
            if folder.name not in named:
                shards.remove(folder)

    def append(self, path: Path, row: dict) -> None:
        """Adds a row to a file of rows, on rank 0."""
        if self.ranks.is_first:
            _append(path, row)

    def rows(self, cls: type[RowT]) -> list[RowT]:
        """Returns the rows of one kind that the stages have committed so far, in order."""
        return typed(self._rows, cls, self.folder)

    def origin(self, name: str) -> dict:
        """Returns what ties a file of stage `name` to this run: the model,
        and the checksum of the stage before it."""
        return {"stage": name, "fingerprint": self.fingerprint, "after": self._last_checksum}

    def read(self, path: Path, cls: type[RecordT], name: str) -> tuple[RecordT, dict]:
        """Reads a stage's file, whole or partial, with its rows and checksum; all ranks call it.

        Raises: Torn also when it comes from another run, stage or earlier result.
        """
        record, content = self.ranks.first(lambda: self._read(path, cls, name))
        check_shards(path, content, self.ranks)
        return record, content

    def _read(self, path: Path, cls: type[RecordT], name: str) -> tuple[RecordT, dict]:
        """Reads a stage's file on this rank, but not its shards."""
        tensors, content = read_whole(path)
        if {key: content.get(key) for key in self.origin(name)} != self.origin(name):
            raise Torn(f"{path} does not follow from the stages before it")
        record = unpack_file(path, cls, tensors, content["record"])
        return record, {key: content[key] for key in ("rows", "sha256", "shards") if key in content}

    def align(self, rows: list[dict]) -> None:
        """Makes metrics.jsonl hold exactly the committed rows and then `rows`."""
        if not self.ranks.is_first:
            return
        path = self.paths.metrics
        move_aside(path)
        data = "".join(dumps(row) + "\n" for row in self._rows + rows).encode()
        if not path.exists() or path.read_bytes() != data:
            write_whole(path, data)

    def check_stop(self) -> None:
        """Checks that the run may go on. Raises: Interrupted when Ctrl-C was pressed."""
        if self.stopping or self.agreed:
            raise Interrupted(f"stopped; go on with --resume {self.folder}")

    def _commit(self, stage: Stage, content: dict) -> None:
        self._rows += content["rows"]
        self._last_checksum = content["sha256"]
        if self.ranks.is_first:
            for path in (stage.previous_path, stage.partial_path):
                clear(path)
            self._sweep(stage)
        self._trackers.write(content["rows"])

    def _forget(self, stage: Stage, keep: tuple[Path, ...] = ()) -> int:
        """Deletes the stage's files and all later ones; returns how many. The last go first,
        so that a kill leaves no gap. Shards of what is kept stay until something else is saved."""
        numbered = [
            (int(path.name.split("-")[0]), path)
            for path in stage.path.parent.iterdir()
            if re.match(r"\d+-", path.name)
        ]
        stale = [
            path
            for number, path in sorted(numbered, reverse=True)
            if number >= stage.number and path not in keep
        ]
        folders = [path for path in stale if path.name.endswith(shards.SUFFIX)]
        for path in stale:
            if path not in folders:
                clear(path)
        for path in folders:
            if not (keep and path.name.startswith(f"{stage.stem.name}.")):
                shards.remove(path)
        return len(stale) - len(folders)

    def _time(self, stage: Stage, start: float) -> None:
        self.append(
            self.paths.timing,
            StageTimeRow(stage=stage.name, seconds=round(time.monotonic() - start, 3)).as_dict(),
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        # A SIGTERM of torchrun may come of an error that another rank has told already.
        if number != signal.SIGINT or not self.ranks.is_first:
            return
        self.display.notice("finishing the current step, press Ctrl-C again to stop at once")

    def __enter__(self) -> "Run":
        self.display.__enter__()
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            # torchrun passes SIGTERM on, of a scheduler or because another rank has ended.
            for number in (signal.SIGINT,) if self.ranks.size == 1 else (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.align([])
        finally:
            self.close()
            self.display.__exit__(kind, error, trace)

    def close(self) -> None:
        """Releases the lock and restores the previous handlers of signals."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()
        self._trackers.close()
        if self._lock is not None:
            self._lock.close()


def check_model(folder: Path, contents: Contents, fingerprint: str) -> None:
    """Checks that a run was made from the model with this fingerprint.

    Raises: UserError when it was another one.
    """
    if contents.fingerprint != fingerprint:
        raise UserError(
            f"{folder} was trained from another model (sha {contents.fingerprint[:12]}, here sha "
            f"{fingerprint[:12]}); put the original back"
        )
