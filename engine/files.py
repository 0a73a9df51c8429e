"""Files that appear whole or not at all, JSON among them."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError


def write_json(path: Path, contents: dict) -> None:
    """Write a JSON file, whole or not at all; equal contents give equal bytes."""
    write_whole(path, (json.dumps(contents, sort_keys=True, indent=1) + "\n").encode())


@contextmanager
def writing(path: Path, n_bytes: int) -> Iterator[None]:
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


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Put `data` at `path` in one step; what stood there goes to `previous` if that is given."""
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


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; after an error or Ctrl-C it is gone.

    Raises: UserError where it cannot be made, or `out` has come into being meanwhile.
    """
    partial = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another place.") from error
    try:
        yield partial
        try:
            partial.rename(out)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another place.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
