"""Hugging Face folders: find, check, read and write checkpoints."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine import files
from engine.errors import UserError
from engine.files import (
    is_file,
    is_folder,
    is_there,
    one_line,
    reading,
    sha256_of_file,
    shown,
    sync_files,
    whole_folder,
    writing,
)
from engine.model.checkpoint import (
    FETCH,
    INDEX,
    WEIGHTS,
    Checkpoint,
    examine,
    inside,
    read_config,
    stored_tensors,
)
from engine.model.decoder import Decoder
from engine.model.low_rank import LowRank
from engine.model.names import to_hugging_face
from engine.model.slices import part_of
from engine.ranks import ALONE, Ranks

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# A tokenizer, its chat templates and the end of an answer are read from these files of a model folder,
TEXT_FILES = {
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "tokenizer.json", "tokenizer.model",
}  # fmt: skip
# from those that match one of these patterns, and from the folder of named chat templates.
TEXT_PATTERNS = ("tokenizer.*", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Tells whether a name has the form of a repository on the hub, owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = to_stderr,
    slices: Ranks = ALONE,
) -> Decoder:
    """Loads the decoder of a Hugging Face folder or hub id (safetensors only), its weights frozen.

    say: called with a sentence where the weights are used otherwise than a file of the folder says.
    slices: the ranks that hold the decoder together; each reads its slice alone.
    Raises: UserError naming the file and the tensor or switch that cannot be used, such as weights that are
    not finite.
    """
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise UserError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}.")
    checkpoint = examine(resolve(path_or_id))
    for sentence in checkpoint.remarks:
        say(sentence)
    return filled(checkpoint, DTYPES.get(dtype, dtype), torch.device(device), slices)


def filled(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, slices: Ranks = ALONE
) -> Decoder:
    """Returns the decoder with the weights of a checkpoint, or a slice of it. Raises: UserError as `load`."""
    model = Decoder(checkpoint.config, checkpoint.raw_config, dtype, device, slices)
    targets = {}
    for name, target in to_hugging_face(model.state_dict(), model.layer_config).items():
        whole = checkpoint.stored[name].shape
        targets[name] = target, part_of(whole, tuple(target.shape), slices.rank)
    fill(checkpoint, targets)
    for layer in model.layers if slices.rank else ():
        # The first slice alone adds these to the sum.
        for bias in (layer.o_bias, layer.down_bias):
            if bias is not None:
                bias.zero_()
    return model


def fill(checkpoint: Checkpoint, targets: Mapping[str, tuple[Tensor, tuple[slice, ...] | None]]) -> None:
    """Copies tensors of a checkpoint, or only parts of them, into weights. Raises: UserError naming one that
    is not finite.

    targets: for each name of Hugging Face, where the tensor goes and which part of it; None: all.
    """
    stored = checkpoint.stored
    for file in sorted({stored[name].file for name in targets}):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in sorted(name for name in targets if stored[name].file == file):
                    target, part = targets[name]
                    if part is None:
                        value = opened.get_tensor(stored[name].name)
                    else:
                        value = opened.get_slice(stored[name].name)[part]
                    target.copy_(value)
                    if not _is_finite(target):
                        _refuse_values(file, name, value, target)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{shown(file)}: cannot be read ({one_line(error)}); {FETCH}.") from error


def _is_finite(values: Tensor) -> bool:
    """Tells whether all numbers are finite, in one pass that keeps nothing: a NaN becomes both extremes."""
    return bool(torch.stack(values.aminmax()).isfinite().all())


def _refuse_values(file: Path, name: str, value: Tensor, target: Tensor) -> NoReturn:
    bad = value[~value.isfinite()]
    if not len(bad):
        kept = str(target.dtype).removeprefix("torch.")
        raise UserError(
            f"{shown(file)}: tensor {name} holds {float(value.abs().max()):g}, which {kept} cannot; "
            "use --dtype bfloat16 or float32."
        )
    raise UserError(
        f"{shown(file)}: {len(bad)} of the {value.numel()} numbers of tensor {name} are not finite "
        f"({float(bad[0])}); use a checkpoint with finite weights."
    )


def resolve(path_or_id: str | Path) -> Path:
    """Returns the local folder of a model: itself, or a hub id's files as huggingface_hub downloads them.

    Raises: UserError when neither works.
    """
    folder = Path(path_or_id)
    if is_folder(folder):
        return folder
    name = str(path_or_id)
    if is_file(folder):
        raise UserError(f"model {shown(name)}: a file; give the folder that it is in.")
    if not is_hub_id(name):
        raise UserError(
            f"model {shown(name)}: no such folder, and not a hub id of the form owner/name; "
            "give an existing folder."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except Exception as error:
        raise UserError(
            f"model {name}: not a local folder, and the hub did not give it ({one_line(error)}); "
            "give a local folder."
        ) from error


def lasting_name(path_or_id: str, folder: Path) -> str:
    """Returns the name by which a model is found from everywhere: its hub id, or its absolute folder.

    folder: where `path_or_id` was found.
    """
    return path_or_id if is_hub_id(path_or_id) and not is_folder(path_or_id) else str(folder.resolve())


def read_json(file: Path) -> dict:
    """Reads the object in a JSON file. Raises: UserError where it cannot be read, or is not one object."""
    return files.read_json(file, cure=FETCH)


def save(
    model: Decoder,
    folder: str | Path,
    *,
    adapter: LowRank | None = None,
    tokenizer_from: Path | None = None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes a Hugging Face folder (config.json, model.safetensors), with `adapter` merged if given.

    transformers and vLLM load it. The folder appears whole or not at all, and is on the disk then. The
    `text_files` of `tokenizer_from` are copied along. beside: further files, by name.
    Raises: UserError when the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        free = not os.path.lexists(folder) or (is_folder(folder) and not os.listdir(folder))
    if not free:
        raise UserError(
            f"{shown(folder)} exists and is {'not empty' if is_folder(folder) else 'a file'}; "
            "choose another folder."
        )
    copies = text_files(tokenizer_from) if tokenizer_from else []
    merged = {} if adapter is None else adapter.deltas()
    tensors = {}
    for name, weight in to_hugging_face(model.state_dict(), model.config).items():
        delta = merged.get(name)
        tensors[name] = (
            (weight if delta is None else (weight.float() + delta.float()).to(weight.dtype))
            .contiguous()
            .cpu()
        )
    raw = {**model.raw_config, "dtype": str(model.dtype).removeprefix("torch.")}
    raw.pop("torch_dtype", None)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        with whole_folder(folder) as temporary, writing(folder, size):
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
            for name in copies:
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(tokenizer_from / name, temporary / name)
            for name, data in beside.items():
                (temporary / name).write_bytes(data)
            sync_files(temporary)
    except SafetensorError as error:
        raise UserError(
            f"{shown(folder)}: cannot be written ({one_line(error)}); choose a folder with room for it."
        ) from error


def fingerprint(folder: Path) -> str:
    """Computes a short hash of a checkpoint: config.json, and each file's size and samples of its bytes."""
    read_config(folder)
    with reading(folder / "config.json", cure=FETCH):
        digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted({tensor.file for tensor in stored_tensors(folder).values()}):
        with reading(file, cure=FETCH), open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"{file.name} {size}".encode())
            for block in range(64):
                stream.seek(size * block // 64)
                digest.update(stream.read(65536))
    return digest.hexdigest()[:16]


def digests(folder: Path) -> dict[str, str]:
    """Computes the SHA-256 of each file of a model folder that a run depends on, by relative name.

    They are config.json, the files of the tokenizer with its chat templates, generation_config.json, and the
    weights with their index. The files are hashed side by side, each by large blocks.

    Raises: UserError as `stored_tensors`, and where a file cannot be read.
    """
    read_config(folder)
    weights = {tensor.file.relative_to(folder).as_posix() for tensor in stored_tensors(folder).values()}
    index = set() if WEIGHTS in weights else {INDEX}
    names = sorted(weights | index | {"config.json"} | set(text_files(folder)))

    def sha256(name: str) -> str:
        with reading(folder / name, cure=FETCH):
            return sha256_of_file(folder / name)

    order = sorted(names, key=lambda name: name not in weights)  # the largest files are begun first
    with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as threads:
        found = dict(zip(order, threads.map(sha256, order), strict=True))
    return {name: found[name] for name in names}


def text_files(folder: Path) -> list[str]:
    """Lists the files of a model folder that its tokenizer, chat templates and stop tokens come from.

    Raises: UserError where one is a link that leads out of the folder.
    """
    return [name for name in _text_names(folder) if is_file(inside(folder, name))]


def check_text_files(folder: Path) -> None:
    """Refuses a model folder in which something else stands in the place of one of its `text_files`, such as
    a link that leads nowhere: a library would go on as if nothing were there.

    Raises: UserError, also where one is a link that leads out of the folder.
    """
    for name in _text_names(folder):
        if not is_file(inside(folder, name)):
            raise UserError(f"{shown(folder / name)}: not a file that can be read; {FETCH}.")


def _text_names(folder: Path) -> list[str]:
    """Lists what has the name of a text file; a folder that only matches a pattern may be called so for
    reasons of its own."""
    found = {name for name in TEXT_FILES if is_there(folder / name)}
    for pattern in TEXT_PATTERNS:
        found |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern) if not is_folder(path)}
    return sorted(found)
