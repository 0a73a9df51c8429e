"""Files and folders that appear whole or not at all; JSON and lines of JSON; the one boundary for reading and
the one for writing, beyond which no OSError goes."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import NotWritten, UserError

HASHED_BLOCK = 1 << 22  # bytes that are read at a time to hash a file
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)
# The advice for a place, and whether the same command can go on once it was followed.
ADVICE: dict[int | None, tuple[str, bool]] = {
    errno.EFBIG: ("raise the limit on the size of files (ulimit -f)", True),
    errno.ENAMETOOLONG: ("choose a shorter name", False),
    errno.ELOOP: ("name a place without links that lead in a circle", False),
    errno.ENOTDIR: ("a file stands where a folder should be, so name another place", False),
    errno.ENOENT: ("name a place in a folder that exists", False),
    **dict.fromkeys(FORBIDDEN, ("make it writable", True)),
    **dict.fromkeys(IN_THE_WAY, ("move away what stands there", True)),
}


@contextmanager
def reading(path: Path | str, *, cure: str) -> Iterator[None]:
    """Turns whatever fails while a file is read into a UserError of one line.

    That is every OSError, text that is no UTF-8, and what `json` raises. `cure` ends the message:
    what the user does about it.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{shown(path)}: does not exist; {cure}.") from error
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({reason(error)}); {cure}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}: not UTF-8 text (byte {error.start}); {cure}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(path)}: not valid JSON ({one_line(error)}); {cure}.") from error


@contextmanager
def writing(path: Path, n_bytes: int = 0) -> Iterator[None]:
    """Turns every OSError while `path` is made, written or renamed into a `NotWritten` of one line.

    n_bytes: how much room it needs.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            needs = f"needs {n_bytes / 1e6:.1f} MB, {_free_bytes(path) / 1e6:.1f} MB free"
            message = f"disk full while saving {shown(path)} ({needs}); free space"
            raise NotWritten(message, again=True) from error
        advice, again = ADVICE.get(error.errno, ("look at that disk, or name another place", True))
        raise NotWritten(f"cannot write {shown(path)} ({reason(error)}); {advice}", again=again) from error


def _free_bytes(path: Path) -> int:
    """Measures the room on the disk that `path` lies on or would lie on; 0 where that is unknown."""
    for folder in path.absolute().parents:
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def reason(error: OSError) -> str:
    """Says in a few words why the system refused."""
    return one_line(error.strerror or error)


def one_line(text: object) -> str:
    """Returns the first line of a text or an exception that holds anything; else the exception's type."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0] if lines else type(text).__name__


def escaped(text: str) -> str:
    """Returns a text in which characters that cannot be printed, such as line ends, are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(path: Path | str) -> str:
    """Returns a path for a message of one line: line ends and bytes that are no text are escaped, and a name
    beyond what a file system takes is cut in its middle."""
    text = escaped(str(path))
    return text if len(text) <= 300 else f"{text[:120]}...{text[-120:]}"


def is_file(path: Path | str) -> bool:
    """Tells whether a file stands there. Unlike `Path.is_file` it raises nothing, whatever the name is."""
    return os.path.isfile(path)


def is_folder(path: Path | str) -> bool:
    """Tells whether a folder stands there. Unlike `Path.is_dir` it raises nothing, whatever the name is."""
    return os.path.isdir(path)


def is_there(path: Path | str) -> bool:
    """Tells whether anything stands there, also a link that leads nowhere. It raises nothing."""
    return os.path.lexists(path)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, unless it is there. Raises: NotWritten."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Puts `data` at `path` in one step; with `previous`, the file that stood at `path` moves there.

    Raises: NotWritten, a UserError, on a full disk, without permission or at a name
    that cannot be; the older file stays.
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
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, contents: dict) -> None:
    """Writes a JSON file, whole or not at all; equal contents give equal bytes."""
    write_whole(path, json_bytes(contents))


def json_bytes(contents: dict) -> bytes:
    """Returns what `write_json` writes."""
    return (json.dumps(contents, sort_keys=True, indent=1) + "\n").encode()


def append_line(path: Path, text: str) -> None:
    """Appends a line to a file that several processes may append to.

    A last line that a killed process has cut is ended first, and a line that does not fit on the disk is
    taken back.

    Raises: NotWritten.
    """
    data = text.encode() + b"\n"
    with writing(path, len(data)), open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file releases it
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                data = b"\n" + data
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def clear(path: Path) -> None:
    """Removes a file, if there is one.

    A folder that stands in its place is moved aside, so that nothing in it is lost.
    """
    move_aside(path)
    path.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """Hashes a file by large blocks. Raises: OSError."""
    with open(path, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256", _bufsize=HASHED_BLOCK).hexdigest()


def move_aside(path: Path) -> None:
    """Renames a folder that stands where a file should be; nothing else is touched."""
    if path.is_dir() and not path.is_symlink():
        number = 1
        while (aside := path.with_name(f"{path.name}.moved-aside-{number}")).exists():
            number += 1
        path.rename(aside)


def sync_files(folder: Path) -> None:
    """Waits until all files in a folder, and below it, are on the disk, and their names."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk: fsync of a file alone does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(out: Path, *, otherwise: Callable[[], Path] | None = None) -> Iterator[Path]:
    """Gives a temporary folder to write into and renames it to `out` at the end.

    After an error or Ctrl-C the temporary folder is removed, and there is no `out`. What a killed process
    left of a folder of this name is removed at the start; where its process lives, it stays.
    otherwise: called where `out` has appeared in the meantime, for the name to take instead; then the names
    differ in numbers, and what killed processes left of any of them is removed.

    Raises: UserError where no folder can be made there, or where `out` has appeared in the meantime.
    """
    name = re.escape(out.name)
    with _temporary(out, name if otherwise is None else re.sub(r"\d+", r"\\d+", name)) as partial:
        yield partial
        while True:
            try:
                partial.rename(out)
                sync_folder(out.parent)
                return
            except OSError as error:
                if otherwise is None or error.errno not in (*IN_THE_WAY, errno.ENOTDIR):
                    raise _cannot_be_made(out, error) from error
                out = otherwise()


@contextmanager
def whole_files(out: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Gives a temporary folder to write the files `names` into; they stand in the folder `out` at the end.

    Where `out` is there, they replace its files of these names, and the others stay. After an error or Ctrl-C
    `out` is as before. Leftovers of killed processes are removed as by `whole_folder`.

    Raises: UserError at once where files of these names cannot be written.
    """
    check_out(out, names)
    place = out / "partial" if is_there(out) else out
    with _temporary(place, re.escape(place.name)) as partial:
        yield partial
        with writing(out):
            if not is_there(out):
                partial.rename(out)
                sync_folder(out.parent)
                return
            for name in names:
                os.replace(partial / name, out / name)
            sync_folder(out)


def check_out(out: Path, names: tuple[str, ...]) -> None:
    """Refuses a folder --out in which files of these names cannot be written. Raises: UserError."""
    if is_there(out) and not is_folder(out):
        what = "a file" if is_file(out) else "no folder"
        raise UserError(f"--out {shown(out)}: that is {what}; name a folder.")
    for name in names:
        if is_folder(out / name):
            raise UserError(f"--out {shown(out)}: {shown(out / name)} is a folder; name another one.")
    above = next(path for path in (out, *out.absolute().parents) if is_there(path))
    if not (is_folder(above) and os.access(above, os.W_OK | os.X_OK)):
        raise UserError(f"--out {shown(out)}: no folder can be made in {shown(above)}; name another one.")


@contextmanager
def _temporary(out: Path, name: str) -> Iterator[Path]:
    """Makes a temporary folder beside what will be `out`, and removes it at the end.

    name: a regular expression for the names whose leftovers are removed first.
    """
    _remove_leftovers(out.parent, name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = _make_locked(out)
    except OSError as error:
        raise _cannot_be_made(out, error) from error
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _make_locked(out: Path) -> tuple[Path, int]:
    """Makes the temporary folder for `out`; returns it, and the handle whose lock says that its process
    lives."""
    number = os.getpid()
    while True:
        folder = out.with_name(f".{out.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1  # that of a process on another machine, or where no lock tells
            continue
        # Until it is locked, another process may take the folder for a dead one's and remove it.
        with suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            _lock(handle)
            if is_folder(folder) and os.path.samestat(os.fstat(handle), os.stat(folder)):
                return folder, handle
            os.close(handle)


def _lock(handle: int) -> bool:
    """Takes the lock of an open folder; returns whether it was free. Some network disks have no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_leftovers(parent: Path, name: str) -> None:
    """Removes the temporary folders of killed processes; name: a regular expression for what they were
    to be."""
    try:
        found = [entry.path for entry in os.scandir(parent) if re.fullmatch(rf"\.{name}-\d+", entry.name)]
    except OSError:
        return
    for left in found:
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _lock(handle):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def _cannot_be_made(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {shown(out)}: cannot be made ({reason(error)}); name another place.")


def parse_json(text: str | bytes) -> Any:
    """Parses JSON.

    Raises: ValueError for whatever is wrong with it, also a key that stands twice in an object, nesting that
    is too deep, and a number with more digits than Python reads.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except ValueError as error:
        if "int_max_str_digits" in str(error):
            raise ValueError(f"a number of more than {sys.get_int_max_str_digits()} digits") from error
        raise


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict:
    contents = dict(pairs)
    if len(contents) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {double[:60]!r} stands twice")
    return contents


def read_json(path: Path, *, cure: str) -> dict:
    """Reads the object in a JSON file. `cure` ends the error message:
    what the user does about a damaged file.

    Raises: UserError where the file cannot be read, is not JSON, or is not one object.
    """
    with reading(path, cure=cure):
        contents = parse_json(path.read_bytes().decode())
    if not isinstance(contents, dict):
        raise UserError(f"{shown(path)}: a JSON {type(contents).__name__}, not an object; {cure}.")
    return contents


def read_json_lines(path: Path, *, cure: str, skip_damaged: bool = False) -> Iterator[dict]:
    """Yields the object on each line of a file; empty lines are skipped.

    A running or killed process may leave a last line without its end: that line is left out. A killed process
    may also have cut a line that a resumed one went on below; `skip_damaged` leaves such lines out, and every
    other line that is not an object.
    `cure` ends the error message: what the user does about a damaged line.

    Raises: UserError where the file cannot be read, or naming the first line that is not an object.
    """
    with reading(path, cure=cure):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode())
        except ValueError as error:
            if skip_damaged or number == len(lines):
                continue
            what = (
                f"not UTF-8 text (byte {error.start})"
                if isinstance(error, UnicodeDecodeError)
                else f"not JSON ({one_line(error)})"
            )
            raise UserError(f"{shown(path)}: line {number} is {what}; {cure}.") from error
        if isinstance(row, dict):
            yield row
        elif not skip_damaged:
            raise UserError(
                f"{shown(path)}: line {number} is a JSON {type(row).__name__}, not an object; {cure}."
            )
