"""Files and folders that appear whole or not at all; JSON and lines of JSON."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError


def write_whole(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Puts `data` at `path` in one step; with `previous`, the file that stood at `path` moves there.

    Raises: UserError on a full disk or without permission; the older file stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, len(data)):
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
        sync_folder(path.parent)


def write_json(path: Path, contents: dict) -> None:
    """Writes a JSON file, whole or not at all; equal contents give equal bytes."""
    write_whole(path, (json.dumps(contents, sort_keys=True, indent=1) + "\n").encode())


def append_json(path: Path, row: dict) -> None:
    """Appends an object to a file of JSON lines, under a lock.

    A last line that a killed process cut is ended first.
    Raises: UserError on a full or closed disk.
    """
    text = json.dumps(row, sort_keys=True) + "\n"
    with writing(path, len(text)), open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())


@contextmanager
def writing(path: Path, n_bytes: int) -> Iterator[None]:
    """Turns the OSError of a full or write-protected disk into a UserError that says how to go on."""
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
            raise UserError(
                f"cannot write {path} ({error.strerror}); make it writable and resume with --resume {run}"
            ) from error
        raise


def clear(path: Path) -> None:
    """Removes a file, if there is one.

    A folder that stands in its place is moved aside, so that nothing in it is lost.
    """
    if path.is_dir() and not path.is_symlink():
        number = 1
        while (aside := path.with_name(f"{path.name}.moved-aside-{number}")).exists():
            number += 1
        path.rename(aside)
    else:
        path.unlink(missing_ok=True)


def sync_files(folder: Path) -> None:
    """Waits until all files in a folder are on the disk, and their names."""
    for file in folder.iterdir():
        sync_folder(file)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk: fsync of a file alone does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a temporary folder to write into and renames it to `out` at the end.

    After an error or Ctrl-C the temporary folder is removed, and there is no `out`.
    Raises: UserError where no folder can be made there, or where `out` has appeared in the meantime.
    """
    partial = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _cannot_be_made(out, error) from error
    try:
        yield partial
        try:
            partial.rename(out)
        except OSError as error:
            raise _cannot_be_made(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cannot_be_made(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {out}: cannot be made ({error.strerror}); name another place.")


def read_json(path: Path, *, cure: str) -> dict:
    """Reads the object in a JSON file. `cure` ends the error message:
    what the user does about a damaged file.

    Raises: UserError where the file cannot be read, is not JSON, or is not one object.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {cure}.") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path}: a JSON {type(contents).__name__}, not an object; {cure}.")
    return contents


def read_json_lines(path: Path, *, cure: str, skip_damaged: bool = False) -> Iterator[dict]:
    """Yields the object on each line of a file; empty lines are skipped.

    A running or killed process may leave a last line without its end: that line is left out. A killed process
    may also have cut a line that a resumed one went on below; `skip_damaged` leaves such lines out, too.
    `cure` ends the error message: what the user does about a damaged line.

    Raises: UserError naming the first line that is not an object.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if skip_damaged or number == len(lines):
                continue
            raise UserError(f"{path}: line {number} is not JSON ({error}); {cure}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is a JSON {type(row).__name__}, not an object; {cure}.")
        yield row
