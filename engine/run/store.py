"""Records on disk, and the run that resumes from them.

A run is a fixed sequence of deterministic stages. Resuming is running the same program again: a stage whose result is on disk is loaded
instead of computed. A result and the metrics rows logged on the way are one file, so one rename commits both, and a process killed
at any moment leaves either the old state or the new one.

    RUN/config.json              algorithm, settings, versions, fingerprint of the model
    RUN/stages/NN-name.safetensors                     a stage's result (the whole state: tensors, JSON, rows, checksum)
    RUN/stages/NN-name.partial[.previous].safetensors  the last two states inside an unfinished stage
    RUN/metrics.jsonl            the rows of all stages, in order
    RUN/timing.jsonl             seconds and speeds: the only file that differs between equal runs
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, TypeVar, get_args, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import Interrupted, UserError
from engine.run.display import METRICS, TIMING, Display, Progress, TensorBoard, tensorboard_writer

RecordT = TypeVar("RecordT")


class Torn(ValueError):
    """A file is truncated, unreadable, does not match its checksum, or belongs to another run or stage."""


def pack(record: Any) -> tuple[dict[str, Tensor], Any]:
    """A dataclass or a dict of tensors -> (tensors by name, JSON tree that holds the rest and refers to them).

    Raises: TypeError naming the field whose value is not a tensor, JSON, a tuple or a dataclass.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            assert name not in tensors and name != "__metadata__", name
            # Clones: safetensors refuses tensors that share memory.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"__tensor__": name}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"__float__": repr(float(value))}
        if value is None or isinstance(value, bool | int | str):
            return value
        below = f"{name}." if name else ""
        if is_dataclass(value) and not isinstance(value, type):
            return {
                "__record__": type(value).__name__,
                "fields": {f.name: encode(getattr(value, f.name), below + f.name) for f in fields(value)},
            }
        if isinstance(value, list | tuple):
            items = [encode(item, f"{below}{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"__tuple__": items}
        if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: encode(item, below + key) for key, item in value.items()}
        raise TypeError(f"{name or 'record'}: cannot save a {type(value).__name__} with value {value!r}")

    return tensors, encode(record, "")


def _record_types(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _record_types(argument)


def unpack(cls: Any, tensors: dict[str, Tensor], meta: Any) -> Any:
    """The inverse of `pack`; `cls` is the dataclass, or dict.

    Raises: TypeError when the tree holds another class or other fields.
    """

    def decode(value: Any, hint: Any) -> Any:
        if isinstance(value, list):
            return [decode(item, hint) for item in value]
        if not isinstance(value, dict):
            return value
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        if "__float__" in value:
            return float(value["__float__"])
        if "__tuple__" in value:
            return tuple(decode(item, hint) for item in value["__tuple__"])
        if "__record__" in value:
            found = [kind for kind in _record_types(hint) if kind.__name__ == value["__record__"]]
            if not found or {f.name for f in fields(found[0])} != set(value["fields"]):
                raise TypeError(f"holds {value['__record__']}({', '.join(value['fields'])}), not {hint}")
            hints = get_type_hints(found[0])
            return found[0](**{name: decode(item, hints[name]) for name, item in value["fields"].items()})
        return {key: decode(item, hint) for key, item in value.items()}

    record = decode(meta, cls)
    if not isinstance(record, cls):
        raise TypeError(f"holds a {type(record).__name__}, not {cls}")
    return record


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(_dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    digest.update(text.encode())
    return digest.hexdigest()


@contextmanager
def _writing(path: Path, n_bytes: int) -> Iterator[None]:
    """Turn a full or closed disk into the user's error, with the cure."""
    try:
        yield
    except OSError as error:
        run = next((folder for folder in path.parents if (folder / "stages").is_dir()), path.parent)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"disk full while saving {path} (needs {n_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB free); "
                f"free space and resume with --resume {run}"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"cannot write {path} ({error.strerror}); make it writable and resume with --resume {run}") from error
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Put `data` at `path` in one step; what stood there goes to `previous` if that is given."""
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path, len(data)):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _append(path: Path, row: dict) -> None:
    text = _dumps(row) + "\n"
    with _writing(path, len(text)), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def save(path: Path, record: Any, *, previous: Path | None = None, **meta: Any) -> str:
    """Write `record` and `meta` (JSON) as one safetensors file, whole or not at all; equal content gives equal bytes.

    Returns: the SHA-256 over tensors and JSON, which the file also holds.
    Raises: UserError on a full disk (the older file stays), TypeError for values that cannot be saved.
    """
    tensors, tree = pack(record)
    content = {**meta, "record": tree}
    checksum = _checksum(tensors, _dumps(content))
    # One metadata key only: the order of several is not fixed by the format's writer.
    data = safetensors.torch.save(tensors, {"dualign": _dumps({**content, "sha256": checksum})})
    write_whole(path, data, previous)
    return checksum


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and JSON (record, sha256 and what `save` was given) of a whole file.

    Raises: Torn, FileNotFoundError, UserError without permission.
    """
    try:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"]["dualign"])
        checksum = content.pop("sha256")
        text = _dumps(content)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path}; make it readable") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Torn(f"{path} is damaged ({type(error).__name__})") from error
    if _checksum(tensors, text) != checksum:
        raise Torn(f"{path} does not match its checksum")
    return tensors, {**content, "sha256": checksum}


def _unpack_file(path: Path, cls: type[RecordT], tensors: dict[str, Tensor], tree: Any) -> RecordT:
    try:
        return unpack(cls, tensors, tree)
    except TypeError as error:
        raise UserError(f"{path} {error}: another version of this program wrote it; resume with that version or start anew") from error


def load(path: Path, cls: type[RecordT]) -> RecordT:
    """The record that `save` wrote; all tensors on the CPU.

    Raises: Torn; FileNotFoundError; UserError when the file is whole but holds another record.
    """
    tensors, content = _read(path)
    return _unpack_file(path, cls, tensors, content["record"])


def _plain(value: Any) -> Any:
    """A row's value as JSON: tensors and numpy values as numbers or lists, non-finite floats as null."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value), value
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"a row cannot hold {value!r}")


class Stage:
    """What a stage's function is given: rows, timing, progress, partial results and the question whether to stop."""

    def __init__(self, run: "Run", number: int, name: str) -> None:
        self.name, self.number = name, number
        self.rows: list[dict] = []
        self._run = run
        stem = f"{number:02d}-{name.replace('/', '-')}"
        self.path = run.folder / "stages" / f"{stem}.safetensors"
        self.partial_path = run.folder / "stages" / f"{stem}.partial.safetensors"
        self.previous_path = run.folder / "stages" / f"{stem}.partial.previous.safetensors"

    def row(self, kind: str, **values: Any) -> None:
        """Log one metrics row: seen in metrics.jsonl at once, kept when the stage or a partial of it is saved."""
        row = _plain({**values, "kind": kind, "stage": self.name})
        self.rows.append(row)
        _append(self._run.folder / METRICS, row)

    def timing(self, **values: Any) -> None:
        """Log seconds or speeds, to timing.jsonl only."""
        _append(self._run.folder / TIMING, _plain({**values, "kind": "timing", "stage": self.name}))

    def progress(self, total: int, unit: str, what: str) -> Progress:
        """A progress bar; `unit` is a plural such as "tokens"."""
        return self._run.display.progress(total, unit, what)

    def partial(self, cls: type[RecordT]) -> RecordT | None:
        """The last whole partial of this stage, or None. The rows logged up to it replace those logged since."""
        for path in (self.partial_path, self.previous_path):
            try:
                record, content = self._run.read(path, cls, self.name)
            except FileNotFoundError:
                continue
            except Torn as error:
                self._run.display.warn(f"{error}; going back to the state before it")
                # Else the next save would move the damaged file over the good one.
                path.unlink()
                continue
            self.rows = content["rows"]
            self._run.align(self.rows)
            return record
        return None

    def save_partial(self, record: Any) -> None:
        """Commit a state inside the stage; the one before it is kept beside it.

        Raises: UserError on a full disk; the last partial stays.
        """
        save(self.partial_path, record, previous=self.previous_path, rows=self.rows, **self._run.origin(self.name))

    @property
    def stopping(self) -> bool:
        """Whether Ctrl-C was pressed: time to save a partial before `check_stop`."""
        return self._run.stopping

    def check_stop(self) -> None:
        """Raises: Interrupted when Ctrl-C was pressed."""
        self._run.check_stop()


class Run:
    """One run folder, locked by this process.

    >>> with Run.create("runs/a", "caid", {"seed": 0}, versions={"commit": "1f3"}, fingerprint="9c") as run:  # doctest: +SKIP
    ...     units = run.stage("reference", Units, lambda stage: ...)

    As a context manager it starts the display and handles Ctrl-C: the first press lets the step end, the second stops at once.
    """

    def __init__(self, folder: Path, lock: IO[bytes], contents: dict, display: Display | None, tensorboard: bool) -> None:
        self.folder = folder
        self.algorithm: str = contents["algorithm"]
        self.config: dict = contents["config"]
        self.versions: dict = contents["versions"]
        self.fingerprint: str = contents["fingerprint"]
        self.display = display or Display()
        self.stopping = False
        self._lock = lock
        self._rows: list[dict] = []
        self._names: list[str] = []
        self._open = False
        self._last_checksum = ""
        self._old_handler: Any = None
        self._tensorboard: TensorBoard | None = tensorboard_writer(folder) if tensorboard else None

    @classmethod
    def create(
        cls,
        folder: str | Path,
        algorithm: str,
        config: dict,
        *,
        versions: dict,
        fingerprint: str,
        display: Display | None = None,
        tensorboard: bool = False,
    ) -> "Run":
        """Make the folder and its config.json; `config`'s field "out" is left out, as it says nothing about the results.

        Raises: UserError when the folder exists or cannot be made.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(f"run folder {folder} exists; choose another --out, or go on with --resume {folder}") from error
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder} ({error.strerror}); choose another --out") from error
        try:
            lock = cls._take_lock(folder)
            (folder / "stages").mkdir()
            settings = _tuples({name: value for name, value in config.items() if name != "out"})
            contents = {"algorithm": algorithm, "config": settings, "fingerprint": fingerprint, "versions": versions}
            run = cls(folder, lock, contents, display, tensorboard)
            # config.json comes last: a folder that has it is complete.
            tree = {**contents, "config": pack(_lists(settings))[1]}
            whole = {**tree, "sha256": _checksum({}, _dumps(tree))}
            text = json.dumps(whole, sort_keys=True, allow_nan=False, indent=1)
            write_whole(folder / "config.json", (text + "\n").encode())
            _sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return run

    @classmethod
    def resume(cls, folder: str | Path, *, fingerprint: str, display: Display | None = None, tensorboard: bool = False) -> "Run":
        """Open an existing run.

        Raises: UserError when it is missing, damaged, in use, or was made from another model.
        """
        folder = Path(folder)
        contents = cls._read_contents(folder)
        cls.check_model(folder, fingerprint)
        run = cls(folder, cls._take_lock(folder), contents, display, tensorboard)
        (folder / "stages").mkdir(exist_ok=True)
        for left in folder.glob("adapters/.*.tmp"):  # a whole checkpoint, half written
            shutil.rmtree(left, ignore_errors=True)
        for left in [*folder.glob("*.tmp"), *folder.glob("stages/*.tmp")]:
            left.unlink()
        timing = folder / TIMING
        if timing.exists() and timing.read_bytes()[-1:] not in (b"", b"\n"):
            with _writing(timing, 1), open(timing, "a") as file:
                file.write("\n")
        return run

    @staticmethod
    def read_config(folder: str | Path) -> tuple[str, dict]:
        """(algorithm, settings) of a run; sequences come back as tuples.

        Raises: UserError when there is no whole config.json.
        """
        contents = Run._read_contents(Path(folder))
        return contents["algorithm"], contents["config"]

    @staticmethod
    def check_model(folder: str | Path, fingerprint: str) -> None:
        """Raises: UserError when the run was made from another model than the one with this fingerprint."""
        own = Run._read_contents(Path(folder))["fingerprint"]
        if own != fingerprint:
            raise UserError(f"{folder} was trained from another model (sha {own[:12]}, here sha {fingerprint[:12]}); put the original back")

    @staticmethod
    def _read_contents(folder: Path) -> dict:
        path = folder / "config.json"
        if not folder.is_dir():
            raise UserError(f"run folder {folder} does not exist; name the folder that --out made")
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            checksum = contents.pop("sha256")
            changed = _checksum({}, _dumps(contents)) != checksum
            contents["config"] = _tuples(unpack(dict, {}, contents["config"]))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} has no config.json, so it is no run folder or its run never began; start with another --out"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}); start a new run with another --out") from error
        if changed:
            raise UserError(f"{path} was changed after the run began; undo the change, or start a new run with another --out")
        return contents

    @staticmethod
    def _take_lock(folder: Path) -> IO[bytes]:
        with _writing(folder / ".lock", 0):
            lock = open(folder / ".lock", "ab")  # noqa: SIM115, the run holds it to its end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise UserError(f"run folder {folder} is in use by another process; wait for it to end, or stop it") from error
        return lock

    def stage(self, name: str, cls: type[RecordT], compute: Callable[[Stage], RecordT]) -> RecordT:
        """The result of stage `name`: loaded if it is on disk and whole, else computed and saved. Both ways give equal records.

        Raises: Interrupted, UserError, and what `compute` raises.
        """
        assert re.fullmatch(r"[\w/-]+", name) and name not in self._names, f"stage name {name!r} is used twice or no file name"
        assert not self._open, f"stage {name} inside stage {self._names[-1]}"
        self.check_stop()
        self._names.append(name)
        stage = Stage(self, len(self._names), name)
        try:
            record, content = self.read(stage.path, cls, name)
        except FileNotFoundError:
            if self._forget(stage, keep=(stage.partial_path, stage.previous_path)):
                self.display.warn(f"{stage.path} is missing; computing it and all later stages again")
        except Torn as error:
            self.display.warn(f"{error}; computing it and all later stages again")
            self._forget(stage)
        else:
            self.display.stage(stage.number, name, loaded=True)
            self._commit(stage, content)
            return record
        self.display.stage(stage.number, name)
        self.align([])
        self._open, start = True, time.monotonic()
        try:
            result = compute(stage)
            save(stage.path, result, rows=stage.rows, **self.origin(name))
        except KeyboardInterrupt:
            self._time(stage, start)
            raise
        finally:
            self._open = False
        # Read back, so that a first run and a resumed one go on from the same objects.
        record, content = self.read(stage.path, cls, name)
        self._commit(stage, content)
        self.align([])
        self._time(stage, start)
        return record

    def origin(self, name: str) -> dict:
        """What ties a file of stage `name` to this run: the model, and the checksum of the stage before it."""
        return {"stage": name, "fingerprint": self.fingerprint, "after": self._last_checksum}

    def read(self, path: Path, cls: type[RecordT], name: str) -> tuple[RecordT, dict]:
        """A stage's file, whole or partial, and its JSON. Raises: Torn also when it comes from another run, stage or earlier result."""
        tensors, content = _read(path)
        if {key: content.get(key) for key in self.origin(name)} != self.origin(name):
            raise Torn(f"{path} does not follow from the stages before it")
        return _unpack_file(path, cls, tensors, content["record"]), content

    def align(self, rows: list[dict]) -> None:
        """Make metrics.jsonl hold exactly the committed rows and then `rows`."""
        path = self.folder / METRICS
        data = "".join(_dumps(row) + "\n" for row in self._rows + rows).encode()
        if not path.exists() or path.read_bytes() != data:
            write_whole(path, data)

    def check_stop(self) -> None:
        """Raises: Interrupted when Ctrl-C was pressed."""
        if self.stopping:
            raise Interrupted(f"stopped; go on with --resume {self.folder}")

    def _commit(self, stage: Stage, content: dict) -> None:
        self._rows += content["rows"]
        self._last_checksum = content["sha256"]
        for path in (stage.previous_path, stage.partial_path):
            path.unlink(missing_ok=True)
        if self._tensorboard is not None:
            self._tensorboard.write(content["rows"])

    def _forget(self, stage: Stage, keep: tuple[Path, ...] = ()) -> int:
        """Delete the stage's files and all later ones; returns how many. The last go first, so that a kill leaves no gap."""
        numbered = [(int(path.name.split("-")[0]), path) for path in stage.path.parent.iterdir() if re.match(r"\d+-", path.name)]
        stale = [path for number, path in sorted(numbered, reverse=True) if number >= stage.number and path not in keep]
        for path in stale:
            path.unlink()
        return len(stale)

    def _time(self, stage: Stage, start: float) -> None:
        _append(self.folder / TIMING, {"kind": "stage", "stage": stage.name, "seconds": round(time.monotonic() - start, 3)})

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.display.notice("finishing the current step, press Ctrl-C again to stop at once")

    def __enter__(self) -> "Run":
        self.display.__enter__()
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGINT, self._on_sigint)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.align([])
        finally:
            self.close()
            self.display.__exit__(kind, error, trace)

    def close(self) -> None:
        """Give the folder and Ctrl-C back."""
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
            self._old_handler = None
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lock.close()


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
