"""Models in the user's cache: whole or not there, and checked by content each time they are asked for."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError
from engine.files import one_line, shown, sync_folder
from engine.quickstart.llama_folder import faults

OR_MODEL = "or pass --model FOLDER"


def cache_folder() -> Path:
    """Returns $XDG_CACHE_HOME/dualign, or ~/.cache/dualign.

    The latter where the variable is unset or not an absolute path, as its standard says.

    Raises: UserError where there is no home folder either.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "dualign"
    except RuntimeError as error:
        raise UserError(
            f"HOME is not set and this user has no home folder; "
            f"set XDG_CACHE_HOME to a folder that you can write, {OR_MODEL}."
        ) from error


def cached(
    folder: Path,
    make: Callable[[Path], None],
    progress: Callable[[str], None],
    *,
    needed: tuple[str, ...] = (),
    size: int,
) -> Path:
    """Returns a model's folder in the cache; makes it where it is missing or a file of it is damaged.

    Processes that come at the same time wait for the first one. The folder is made beside its place and
    renamed at the end, so that an interruption leaves nothing half done; what a killed process left is
    removed by the next one.

    make: writes the model into `model`, an empty folder in the folder that it is given.
    needed: files that the manifest has to list. size: how many bytes making it takes on the disk.
    Raises: UserError as `make`, and where the disk is full or the cache cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    whole = not faults(folder, needed)
    if whole and not os.path.lexists(partial):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock", progress):
            # The lock says that its process is dead.
            shutil.rmtree(partial, ignore_errors=True)
            if not whole and (wrong := faults(folder, needed)):
                if os.path.lexists(folder):
                    if not folder.is_dir():
                        raise NotADirectoryError(errno.ENOTDIR, f"{shown(folder)} is no folder")
                    progress(f"{shown(folder)}: {wrong[0]} is damaged or missing; the model is made again")
                _make(folder, partial, make)
    except OSError as error:
        if whole:
            return folder
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{shown(folder.parent)}: the disk is full; free {size / 1e6:.0f} MB, {OR_MODEL}."
            ) from error
        raise UserError(
            f"{shown(folder.parent)}: cannot write the model there ({one_line(error.strerror or error)}); "
            f"set XDG_CACHE_HOME to a folder that you can write, {OR_MODEL}."
        ) from error
    return folder


def _make(folder: Path, partial: Path, make: Callable[[Path], None]) -> None:
    try:
        (partial / "model").mkdir(parents=True)
        make(partial)
        if os.path.lexists(folder):
            folder.rename(partial / "broken")
        (partial / "model").rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Holds the one lock of a folder; the kernel releases it when the process dies, however it dies."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
