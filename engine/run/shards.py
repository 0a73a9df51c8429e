"""Tensors that are spread over ranks, on disk: a safetensors file for each rank, beside the record that they
belong to.

PyTorch's distributed checkpoints write the files (`torch.distributed.checkpoint`). That leaves no mark of a
save that is whole, and a byte that has changed is loaded as if nothing were. So a folder of shards counts
only where a record names it, with the digests of its files, and the record is written last.

RUN/stages/NN-NAME.DIGEST.shards/shard-00001-model-00001-of-00001.safetensors
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import UserError
from engine.files import one_line, sha256_of_file, shown, sync_folder, writing
from engine.model.parallel import first_row, is_spread, rows_here
from engine.ranks import Ranks, connected

SUFFIX = ".shards"
_OFFSETS = "DCP_SHARDING_INFO"  # where the writer notes of which row of the whole tensor a shard begins


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder of shards. It is read where its values go (`read_into`)."""

    folder: Path
    name: str  # in the files
    dtype: torch.dtype
    shape: tuple[int, ...]

    def whole(self) -> Tensor:
        """Reads all of it."""
        value = torch.empty(self.shape, dtype=self.dtype)
        _read(self.folder, {self.name: (value, 0)})
        return value


def spread_tensors(record: Any, name: str = "") -> dict[str, Tensor]:
    """Finds the tensors of a record that are spread over ranks, by the names that `engine.run.store.pack`
    gives them."""
    if isinstance(record, Tensor):
        return {name: record} if is_spread(record) else {}
    below = f"{name}." if name else ""
    if is_dataclass(record) and not isinstance(record, type):
        parts = {f.name: getattr(record, f.name) for f in fields(record)}
    else:
        parts = record if isinstance(record, dict) else {}
    return {key: value for part in parts for key, value in spread_tensors(parts[part], below + part).items()}


def write(ranks: Ranks, tensors: Mapping[str, Tensor], stem: Path) -> dict:
    """Writes tensors as a new folder whose name begins with `stem`, each rank its rows. All ranks call it.

    Returns what a record says of the folder, as JSON: its name, the SHA-256 of each file, and dtype and shape
    of each tensor. Equal tensors of as many ranks give equal files and an equal name.
    Raises: UserError on a full or closed disk, on all ranks; LostRank.
    """
    # Half a second's import, for these runs alone.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    folder = stem.with_name(f"{stem.name}{SUFFIX}.tmp")
    ranks.first(lambda: _make_anew(folder))
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with connected():
            dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        if isinstance(reason, KeyboardInterrupt):  # a second Ctrl-C, which reaches all ranks by this
            raise KeyboardInterrupt from error
        raise UserError(
            f"{shown(folder)}: rank {rank} cannot write its shard ({one_line(reason)}); free space, or look "
            "at that disk."
        ) from error
    # Its own file, which another machine may not see yet; of ranks with the same rows one writes them.
    written = folder.glob(f"shard-{ranks.rank + 1:05d}-*")
    digests: dict[str, str] = {}
    for own in ranks.gather({file.name: _digest(file) for file in written}):
        digests |= own
    whole = stem.with_name(f"{stem.name}.{_short(digests)}{SUFFIX}")
    record = {
        "folder": whole.name,
        "files": digests,
        "tensors": {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in tensors.items()},
    }
    # The record before may name a folder of the same content, which then stays as it is.
    stands = ranks.first(whole.exists) and wrong_file(ranks, whole, record) is None
    ranks.first(lambda: remove(folder) if stands else _put(folder, whole))
    return record


def described(path: Path, shards: dict) -> dict[str, Stored]:
    """Returns the tensors of the folder that a record at `path` names, by name; shards: as `write` returned
    it."""
    folder = path.parent / shards["folder"]
    return {
        name: Stored(folder, name, getattr(torch, dtype), tuple(shape))
        for name, (dtype, shape) in shards["tensors"].items()
    }


def wrong_file(ranks: Ranks, path: Path, shards: dict) -> Path | None:
    """Returns a file of the folder that a record at `path` names which is missing, not as it was written, or
    none of its own; None where all are whole. Each rank reads some; all call it.

    Raises: UserError without permission, on all ranks.
    """
    folder, files = path.parent / shards["folder"], shards["files"]
    wrong: list[Path | UserError] = []
    if ranks.is_first:
        wrong += [file for file in sorted(folder.glob("*.safetensors")) if file.name not in files]
    for name in sorted(files)[ranks.rank :: ranks.size]:
        try:
            if not _is(folder / name, files[name]):
                wrong.append(folder / name)
        except UserError as error:
            wrong.append(error)
    found = [one for own in ranks.gather(wrong) for one in own]
    for error in found:
        if isinstance(error, UserError):
            raise error
    return next(iter(found), None)


@torch.no_grad()
def read_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor | Stored]) -> None:
    """Copies values into tensors of the same names, in place; of a target that is spread over ranks, each
    rank its rows, whatever the ranks were that wrote them."""
    stored: dict[Path, dict[str, tuple[Tensor, int]]] = {}
    for name, target in targets.items():
        value, rows = values[name], rows_here(target)
        start = first_row(target) if is_spread(target) else 0
        if isinstance(value, Stored):
            stored.setdefault(value.folder, {})[value.name] = rows, start
        elif is_spread(value):
            rows.copy_(rows_here(value))
        else:
            rows.copy_(value[start : start + len(rows)] if is_spread(target) else value)
    for folder, wanted in stored.items():
        _read(folder, wanted)


def _read(folder: Path, wanted: Mapping[str, tuple[Tensor, int]]) -> None:
    """Copies rows of tensors out of a folder of shards. wanted: where they go, by the tensor's name, and the
    number of their first row in the whole tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            offsets = json.loads(opened.metadata()[_OFFSETS])
            for name in sorted(wanted.keys() & set(opened.keys())):
                target, start = wanted[name]
                piece, at = opened.get_slice(name), offsets[name]["saved_offsets"][0]
                first, end = max(start, at), min(start + len(target), at + piece.get_shape()[0])
                if first < end:
                    target[first - start : end - start].copy_(piece[first - at : end - at])


def remove(folder: Path) -> None:
    """Deletes a folder of shards. Raises: NotWritten."""
    with writing(folder):
        shutil.rmtree(folder)


def _make_anew(folder: Path) -> None:
    if folder.exists():  # half written by a process that was killed
        remove(folder)
    with writing(folder):
        folder.mkdir()


def _put(folder: Path, whole: Path) -> None:
    """Gives a folder its name; one that stands there is damaged."""
    if whole.exists():
        remove(whole)
    with writing(whole):
        folder.rename(whole)
        sync_folder(whole.parent)


def _digest(file: Path) -> str:
    """Brings the keys of a file's header in order, which the writer leaves to chance, and returns the SHA-256
    of the file."""
    with writing(file), open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, (file, len(text), size)
        stream.seek(8)
        stream.write(text.ljust(size))
        stream.flush()
        os.fsync(stream.fileno())
    return sha256_of_file(file)


def _is(file: Path, digest: str) -> bool:
    """Tells whether a file has a digest. Raises: UserError without permission, as the file may be whole."""
    try:
        return sha256_of_file(file) == digest
    except PermissionError as error:
        raise UserError(f"cannot read {shown(file)}; make it readable") from error
    except OSError:
        return False


def _short(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]
