"""Watches the file operations of a command, and kills it or fills its disk at a chosen one."""

import builtins
import errno
import io
import mmap
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

NAMES = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "unlink"}
# Called before an operation, with its kind and file; of a write also with its size and with what does half.
Act = Callable[[str, str, int, Callable[[], object]], None]


class Counter:
    """Counts operations and written bytes, and lists the writes, in memory that the child shares with its
    parent."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2**20)

    def read(self) -> tuple[int, int]:
        """Returns the number of operations and of bytes so far."""
        return struct.unpack("qq", self._memory[:16])

    def writes(self) -> list[tuple[int, str]]:
        """Returns of each write its number among the operations, counted from 1, and the name of its file."""
        (end,) = struct.unpack("q", self._memory[16:24])
        lines = self._memory[24 : 24 + end].decode().splitlines()
        return [(int(n), name) for n, _, name in (line.partition(" ") for line in lines)]

    def __call__(self, kind: str, file: str, size: int, half: Callable[[], object]) -> None:
        operations, n_bytes = self.read()
        (end,) = struct.unpack("q", self._memory[16:24])
        line = f"{operations + 1} {os.path.basename(file)}\n".encode() if kind == "write" else b""
        self._memory[24 + end : 24 + end + len(line)] = line
        self._memory[:24] = struct.pack("qqq", operations + 1, n_bytes + size, end + len(line))


class KillAt:
    """Kills this process at its n-th operation, counted from 1; in the middle of it where it is a write."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, kind: str, file: str, size: int, half: Callable[[], object]) -> None:
        self.left -= 1
        if self.left == 0:
            half()
            os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """Has room for so many bytes of all files together; further writes fail half-way, as on a full disk."""

    def __init__(self, n_bytes: int) -> None:
        self.left = n_bytes

    def __call__(self, kind: str, file: str, size: int, half: Callable[[], object]) -> None:
        if size > self.left:
            if self.left:
                half()
            self.left = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= size


def nothing() -> None:
    """Does nothing: an operation that is no write has no half."""


def watch(folder: Path, act: Act) -> None:
    """Calls `act` before every file operation of this process below `folder`, from now on."""
    root = f"{folder}{os.sep}"
    real_open, real_fsync, real_write = builtins.open, os.fsync, os.write
    within = _Within(root)

    def hook(event: str, arguments: tuple) -> None:
        if event in NAMES and within(arguments[0]):
            act(NAMES[event], os.fsdecode(arguments[0]), 0, nothing)

    class WatchedFile(io.FileIO):
        def write(self, data) -> int:
            _write(act, self.name, lambda part: io.FileIO.write(self, part), data)
            return super().write(data)

    def watched_open(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
    ):
        writes = any(letter in mode for letter in "wax+")
        if not writes or not isinstance(file, str | os.PathLike) or not within(file):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        act("open", os.fspath(file), 0, nothing)
        raw = WatchedFile(os.fspath(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)

    def fsync(handle) -> None:
        act("fsync", _name(handle), 0, nothing)
        real_fsync(handle)

    def write(handle: int, data: bytes) -> int:
        if handle > 2:
            _write(act, _name(handle), lambda part: real_write(handle, part), data)
        return real_write(handle, data)

    builtins.open = io.open = watched_open
    os.fsync, os.write = fsync, write
    # A copy is then made of reads and writes.
    shutil._USE_CP_SENDFILE = False
    _watch_safetensors(act)
    sys.addaudithook(hook)


class _Within:
    """Tells whether a path is below the folder; names that are relative to an open folder count as such."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __call__(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(path)
        return os.path.abspath(name).startswith(self.root)


def _write(act: Act, file: str, write: Callable[[bytes], object], data) -> None:
    """Says that `data` is about to be written."""
    data = bytes(data)
    act("write", file, len(data), lambda: write(data[: len(data) // 2]))


def _name(handle: int) -> str:
    """Returns the file of a handle."""
    return os.readlink(f"/proc/self/fd/{handle}")


def _watch_safetensors(act: Act) -> None:
    """Lets safetensors' writer of files, which is no Python, go through a watched file."""
    if "safetensors.torch" not in sys.modules:
        return
    import safetensors.torch

    real = safetensors.torch.save_file

    def save_file(tensors, filename, metadata=None) -> None:
        with open(filename, "wb") as file:
            file.write(safetensors.torch.save(tensors, metadata=metadata))

    safetensors.torch.save_file = save_file
    for name, module in list(sys.modules.items()):
        if name.startswith("engine.") and getattr(module, "save_file", None) is real:
            module.save_file = save_file
