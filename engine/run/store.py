"""Records on disk, and the run that resumes from them.

A run is a fixed sequence of deterministic stages. Resuming is running the same program again: a stage whose
result is on disk is loaded instead of computed. A result and the metrics rows logged on the way are one file,
so one rename commits both, and a process killed at any moment leaves either the old state or the new one.

    RUN/config.json      algorithm, settings, versions, fingerprint of the model
    RUN/metrics.jsonl    the rows of all stages, in order
    RUN/timing.jsonl     seconds and speeds: the only file that differs between equal runs

    RUN/stages/NN-NAME.safetensors                     a stage's result: tensors, JSON, rows, checksum
    RUN/stages/NN-NAME.partial[.previous].safetensors  the last two states inside an unfinished stage
    RUN/stages/NN-NAME.DIGEST.shards                   tensors of one of these that several ranks wrote
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import UserError
from engine.files import write_whole
from engine.model.parallel import is_spread
from engine.ranks import ALONE, Ranks
from engine.run import shards
from engine.run.shards import Stored

RecordT = TypeVar("RecordT")


class Torn(ValueError):
    """A file is truncated, unreadable, does not match its checksum, or belongs to another run or stage."""


def pack(record: Any) -> tuple[dict[str, Tensor], Any]:
    """Splits a dataclass or a dict of tensors into (tensors by name, JSON tree that holds
    the rest and refers to them). Tensors that are spread over ranks are referred to alone.

    Raises: TypeError naming the field whose value is not a tensor, JSON, a tuple or a dataclass.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, Tensor) and is_spread(value):
            return {"__tensor__": name}
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
        if type(value) is list and all(type(item) is int for item in value):
            # Token ids are most of what is saved.
            return value.copy()
        if isinstance(value, list | tuple):
            items = [encode(item, f"{below}{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"__tuple__": items}
        if isinstance(value, dict) and all(
            isinstance(key, str) and not key.startswith("__") for key in value
        ):
            return {key: encode(item, below + key) for key, item in value.items()}
        raise TypeError(f"{name or 'record'}: cannot save a {type(value).__name__} with value {value!r}")

    return tensors, encode(record, "")


def _record_types(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _record_types(argument)


def unpack(cls: Any, tensors: Mapping[str, Tensor | Stored], meta: Any) -> Any:
    """Undoes `pack`; `cls` is the dataclass, or dict.

    Raises: TypeError when the tree holds another class or other fields.
    """

    def decode(value: Any, hint: Any) -> Any:
        if isinstance(value, list):
            return [decode(item, hint) if type(item) in (list, dict) else item for item in value]
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


def dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def sha256_of(tensors: Mapping[str, Tensor | Stored], text: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, Stored):
            tensor = tensor.whole()
        digest.update(dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    digest.update(text.encode())
    return digest.hexdigest()


def save(path: Path, record: Any, *, previous: Path | None = None, **meta: Any) -> str:
    """Writes `record` and `meta` (JSON) as one safetensors file, whole or not at all;
    equal content gives equal bytes.

    Returns: the SHA-256 over tensors and JSON, which the file also holds.
    Raises: UserError on a full disk (the older file stays), TypeError for values that cannot be saved.
    """
    tensors, tree = pack(record)
    content = {**meta, "record": tree}
    checksum = sha256_of(tensors, dumps(content))
    # One metadata key only: the order of several is not fixed by the format's writer.
    data = safetensors.torch.save(tensors, {"dualign": dumps({**content, "sha256": checksum})})
    write_whole(path, data, previous)
    return checksum


def read_whole(path: Path) -> tuple[dict[str, Tensor | Stored], dict]:
    """Tensors and JSON (record, sha256 and what `save` was given) of a whole file. Tensors in shards are not
    read, nor are these checked (`check_shards`).

    Raises: Torn, FileNotFoundError, UserError without permission.
    """
    try:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"]["dualign"])
        checksum = content.pop("sha256")
        text = dumps(content)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path}; make it readable") from error
    except (
        OSError,
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise Torn(f"{path} is damaged ({type(error).__name__})") from error
    if sha256_of(tensors, text) != checksum:
        raise Torn(f"{path} does not match its checksum")
    tensors |= shards.described(path, content["shards"]) if "shards" in content else {}
    return tensors, {**content, "sha256": checksum}


def check_shards(path: Path, content: dict, ranks: Ranks = ALONE) -> None:
    """Checks the files that a record's tensors are spread over. All ranks call it. Raises: Torn, on all.

    path, content: the record's file and its JSON.
    """
    if "shards" in content and (file := shards.wrong_file(ranks, path, content["shards"])):
        raise Torn(f"{file} is missing or does not match its checksum")


def unpack_file(path: Path, cls: type[RecordT], tensors: Mapping[str, Tensor | Stored], tree: Any) -> RecordT:
    try:
        return unpack(cls, tensors, tree)
    except TypeError as error:
        raise UserError(
            f"{path} {error}: another version of this program wrote it; resume with that version or "
            "start anew"
        ) from error


def load(path: Path, cls: type[RecordT], ranks: Ranks = ALONE) -> RecordT:
    """Loads the record that `save` wrote; all tensors are on the CPU, or in shards, of which each rank checks
    some.

    Raises: Torn; FileNotFoundError; UserError when the file is whole but holds another record.
    """
    tensors, content = read_whole(path)
    check_shards(path, content, ranks)
    return unpack_file(path, cls, tensors, content["record"])
