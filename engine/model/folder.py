"""Hugging Face folders: find, check, read and write checkpoints."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.decoder import Decoder
from engine.model.low_rank import LowRank
from engine.model.names import to_hugging_face

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors names them
INDEX = "model.safetensors.index.json"
# A tokenizer, its chat templates and the end of an answer are read from these files of a model folder,
TEXT_FILES = {
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
}  # fmt: skip
# from those that match one of these patterns, and from the folder of named chat templates.
TEXT_PATTERNS = ("tokenizer.*", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja")
_BLOCK = 1 << 22  # bytes that are read at a time


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a safetensors file, as the file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


def load(
    path_or_id: str | Path, *, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
) -> Decoder:
    """Loads the decoder of a Hugging Face folder or hub id (safetensors only), its weights frozen.

    Raises: UserError naming the file and the tensor or switch that cannot be used.
    """
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise UserError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}.")
    folder = resolve(path_or_id)
    raw = read_config(folder)
    config = ModelConfig.from_json(raw, folder / "config.json")
    stored = check_weights(folder, config)
    model = Decoder(config, raw, DTYPES.get(dtype, dtype), torch.device(device))
    targets = to_hugging_face(model.state_dict(), config)
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(n for n, tensor in stored.items() if tensor.file == file):
                targets[name].copy_(tensors.get_tensor(name))
    return model


def check_weights(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """Returns the stored tensor of each weight that `config` asks for, by name. Only headers are read.

    Raises: UserError as `stored_tensors`, and naming a tensor that is missing, unknown,
    of another shape or of no floating dtype.
    """
    stored = stored_tensors(folder)
    if config.tied:
        stored.pop("lm_head.weight", None)
    wanted = to_hugging_face(Decoder(config, {}, torch.float32, torch.device("meta")).state_dict(), config)
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has unknown", extra)
        raise UserError(
            f"{folder}: the checkpoint {kind} tensor {names[0]} ({len(names)} in all); "
            "use a complete checkpoint."
        )
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{tensor.file}: tensor {name} has shape {tensor.shape}, config.json wants "
                f"{tuple(wanted[name].shape)}; use a config.json and weights that belong together."
            )
        if tensor.dtype not in STORED_DTYPES:
            raise UserError(
                f"{tensor.file}: tensor {name} is stored as {tensor.dtype}; use a checkpoint in "
                f"{', '.join(STORED_DTYPES)}, one that is not quantised."
            )
    return stored


def resolve(path_or_id: str | Path) -> Path:
    """Returns the local folder of a model: itself, or a hub id's files as huggingface_hub downloads them.

    Raises: UserError when neither works.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model {name}: no such folder, and not a hub id of the form owner/name; give an existing folder."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {name}: not a local folder, and the hub did not give it ({reason}); give a local folder."
        ) from error


def read_config(folder: Path) -> dict:
    """Reads config.json of a model folder. Raises: UserError when it is missing or malformed."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json; give a Hugging Face model folder.")
    return read_json(file)


def read_json(file: Path) -> dict:
    """Reads the object in a JSON file. Raises: UserError where it cannot be read, or is not one object."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(contents, dict):
        raise UserError(f"{file}: a JSON {type(contents).__name__}, not an object; fetch the file again.")
    return contents


def save(
    model: Decoder, folder: str | Path, *, adapter: LowRank | None = None, tokenizer_from: Path | None = None
) -> None:
    """Writes a Hugging Face folder (config.json, model.safetensors), with `adapter` merged if given.

    transformers and vLLM load it. The folder appears whole or not at all. Files of `tokenizer_from` other
    than weights and config are copied along.
    Raises: UserError when the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is {'not empty' if folder.is_dir() else 'a file'}; choose another folder."
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
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
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        for file in sorted(tokenizer_from.iterdir()) if tokenizer_from else []:
            other = file.name.startswith(("config.", "model.", "adapter_"))
            if file.is_file() and file.suffix in {".json", ".jinja", ".model", ".txt"} and not other:
                shutil.copyfile(file, temporary / file.name)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot be written ({error}); choose a folder with room for it."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fingerprint(folder: Path) -> str:
    """Computes a short hash of a checkpoint: config.json, and each file's size and samples of its bytes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted({tensor.file for tensor in stored_tensors(folder).values()}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
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
    weights = {tensor.file.relative_to(folder).as_posix() for tensor in stored_tensors(folder).values()}
    try:
        index = {INDEX} if (folder / INDEX).is_file() else set()
        names = sorted(weights | index | {"config.json"} | set(text_files(folder)))
        with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as threads:
            # The largest files are begun first.
            order = sorted(names, key=lambda name: -(folder / name).stat().st_size)
            found = dict(zip(order, threads.map(lambda name: _sha256(folder / name), order), strict=True))
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); "
            "make it readable or fetch the file again."
        ) from error
    return {name: found[name] for name in names}


def text_files(folder: Path) -> list[str]:
    """Lists the files of a model folder that its tokenizer, chat templates and stop tokens come from."""
    found = {name for name in TEXT_FILES if (folder / name).is_file()}
    for pattern in TEXT_PATTERNS:
        found |= {file.relative_to(folder).as_posix() for file in folder.glob(pattern) if file.is_file()}
    return sorted(found)


def _sha256(file: Path) -> str:
    with open(file, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256", _bufsize=_BLOCK).hexdigest()


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Finds every tensor of a checkpoint by name, from the headers of its safetensors files.

    Positions that were saved as weights are left out.

    Raises: UserError naming the file that is missing, truncated, a pickle,
    or that its index says otherwise of.
    """
    index = folder / INDEX
    if not index.is_file():
        file = folder / "model.safetensors"
        if not file.is_file():
            pickles = sorted(p.name for p in folder.glob("*.bin"))
            why = (
                f"only {pickles[0]}, a pickle, which is never executed" if pickles else "no model.safetensors"
            )
            raise UserError(f"{folder}: {why}; use a safetensors checkpoint.")
        return _header(file)
    weight_map = read_json(index).get("weight_map")
    if (
        not weight_map
        or not isinstance(weight_map, dict)
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise UserError(f"{index}: no weight_map that names the file of each tensor; fetch it again.")
    weight_map = {name: folder / file for name, file in weight_map.items() if _is_weight(name)}
    stored = {}
    for file in sorted(set(weight_map.values())):
        if not file.is_file():
            raise UserError(f"{folder}: {file.name} is missing, {index.name} names it; fetch it again.")
        header, named = _header(file), {name for name, place in weight_map.items() if place == file}
        for name in sorted(header.keys() ^ named):
            kind = "lacks" if name in named else "has unknown"
            raise UserError(f"{file}: it {kind} tensor {name}, by {index.name}; fetch the checkpoint again.")
        stored |= header
    return stored


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys() if _is_weight(name)}
            return {
                name: Stored(file=file, shape=tuple(part.get_shape()), dtype=part.get_dtype())
                for name, part in parts.items()
            }
    except Exception as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch it again.") from error


def _is_weight(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")
