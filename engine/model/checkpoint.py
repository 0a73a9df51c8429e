"""The safetensors files of a model folder: which they are, what they hold, and whether config.json fits them.

Only headers are read, except where a head that config.json ties to the embedding is stored beside it.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from safetensors import safe_open

from engine.errors import UserError
from engine.files import is_file, one_line, read_json, shown
from engine.model.architecture import ModelConfig
from engine.model.decoder import Decoder
from engine.model.names import to_hugging_face

STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors names them
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FETCH = "fetch the file again"
# Turns the pickles of a folder into a safetensors file.
CONVERT = (
    'python -c "import glob, torch, safetensors.torch as s; '
    "t = {k: v.clone() for f in sorted(glob.glob('pytorch_model*.bin')) "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}; "
    "s.save_file(t, 'model.safetensors', metadata={'format': 'pt'})\""
)
_LAYER = "model.layers."
_BLOCK = 1 << 24  # numbers of the embedding and the head that are compared at a time


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a safetensors file, as the file's header describes it."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder whose config.json and weights fit together."""

    config: ModelConfig
    raw_config: dict  # config.json, with tie_word_embeddings as the weights say
    stored: dict[str, Stored]  # by the name of the weight that it is loaded into
    remarks: tuple[str, ...]  # what the user should know, a sentence each


def examine(folder: Path) -> Checkpoint:
    """Reads config.json and the headers of the weights, and checks that they fit together.

    Raises: UserError as `read_config`, `ModelConfig.from_json` and `stored_tensors`; for an adapter in the
    folder; and naming a tensor that is missing, unknown, of another shape or of no floating dtype.
    """
    raw = read_config(folder)
    if is_file(folder / "adapter_config.json"):
        raise UserError(
            f"{shown(folder)}: an adapter and a model in one folder; merge the adapter into the model, "
            "or remove one of them."
        )
    return fitted(folder, raw, stored_tensors(folder))


def fitted(folder: Path, raw: dict, stored: dict[str, Stored]) -> Checkpoint:
    """Checks that a config.json and the tensors of a folder fit together.

    raw, stored: what `read_config` and `stored_tensors` give, or the part of it that is the decoder's.
    Raises: UserError as `examine`.
    """
    config, stored, remarks = ModelConfig.from_json(raw, folder / "config.json"), dict(stored), []
    if is_file(folder / WEIGHTS) and is_file(folder / INDEX):
        remarks.append(f"{shown(folder)}: the weights are those of {WEIGHTS}; {INDEX} is not used.")
    if config.tied and HEAD in stored:
        if EMBEDDING not in stored:
            stored[EMBEDDING] = stored.pop(HEAD)
        elif _equal(stored[EMBEDDING], stored[HEAD]):
            del stored[HEAD]
        else:
            config, raw = replace(config, tied=False), {**raw, "tie_word_embeddings": False}
            remarks.append(
                f"{shown(folder)}: the stored {HEAD} is used, as it differs from the embedding, "
                "though config.json says tie_word_embeddings true."
            )
    _check_names_and_shapes(folder, config, stored)
    return Checkpoint(config=config, raw_config=raw, stored=stored, remarks=tuple(remarks))


def _check_names_and_shapes(folder: Path, config: ModelConfig, stored: dict[str, Stored]) -> None:
    layers = {name.removeprefix(_LAYER).partition(".")[0] for name in stored if name.startswith(_LAYER)}
    absent = next((layer for layer in range(config.num_layers) if str(layer) not in layers), None)
    if absent is not None:
        raise UserError(
            f"{shown(folder)}: the checkpoint lacks tensor {_LAYER}{absent}.*, config.json wants "
            f"{config.num_layers} layers; use a complete checkpoint."
        )
    wanted = to_hugging_face(Decoder(config, {}, torch.float32, torch.device("meta")).state_dict(), config)
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has unknown", extra)
        raise UserError(
            f"{shown(folder)}: the checkpoint {kind} tensor {shown(names[0])} ({len(names)} in all); "
            "use a complete checkpoint."
        )
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{shown(tensor.file)}: tensor {name} has shape {tensor.shape}, config.json wants "
                f"{tuple(wanted[name].shape)}; use a config.json and weights that belong together."
            )
        if tensor.dtype not in STORED_DTYPES:
            raise UserError(
                f"{shown(tensor.file)}: tensor {name} is stored as {tensor.dtype}; use a checkpoint in "
                f"{', '.join(STORED_DTYPES)}, one that is not quantised."
            )


def _equal(first: Stored, second: Stored) -> bool:
    """Tells whether two stored tensors are equal, number for number, in a few megabytes of memory."""
    if first.shape != second.shape or len(first.shape) != 2:
        return False
    with safe_open(first.file, framework="pt") as one, safe_open(second.file, framework="pt") as other:
        slices, rows = (one.get_slice(first.name), other.get_slice(second.name)), first.shape[0]
        step = max(1, _BLOCK // max(1, first.shape[1]))
        for start in range(0, rows, step):
            a, b = (part[start : start + step] for part in slices)
            wide = torch.promote_types(a.dtype, b.dtype)
            if not torch.equal(a.to(wide), b.to(wide)):
                return False
    return True


def read_config(folder: Path) -> dict:
    """Reads config.json of a model folder. Raises: UserError when it is missing or malformed."""
    file = inside(folder, "config.json")
    if not is_file(file):
        if os.path.lexists(file):
            raise UserError(f"{shown(file)}: not a file that can be read; {FETCH}.")
        if is_file(folder / "adapter_config.json"):
            raise UserError(
                f"{shown(folder)}: an adapter, not a model; merge it into its model (merge_and_unload of "
                "PEFT) and give the merged folder."
            )
        raise UserError(f"{shown(folder)}: no config.json; give a Hugging Face model folder.")
    return read_json(file, cure=FETCH)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Finds every tensor of a checkpoint by name, from the headers of its safetensors files.

    model.safetensors counts before an index, as it does for transformers. Positions that were saved as
    weights are left out.

    Raises: UserError naming the file that is missing, truncated, a pickle or outside the folder,
    or that its index says otherwise of.
    """
    file, index = inside(folder, WEIGHTS), inside(folder, INDEX)
    if is_file(file):
        return _header(file)
    if not is_file(index):
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{shown(folder)}: only {shown(pickles[0])}, a pickle, which is never executed; use a "
                f"safetensors checkpoint, or make one in a copy of the folder elsewhere: {CONVERT}"
            )
        raise UserError(f"{shown(folder)}: no {WEIGHTS}; use a safetensors checkpoint.")
    weight_map = read_json(index, cure=FETCH).get("weight_map")
    if (
        not weight_map
        or not isinstance(weight_map, dict)
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise UserError(f"{shown(index)}: no weight_map that names the file of each tensor; fetch it again.")
    weight_map = {name: file for name, file in weight_map.items() if _is_weight(name)}
    stored = {}
    for part in sorted(set(weight_map.values())):
        file = inside(folder, part)
        if not is_file(file):
            raise UserError(
                f"{shown(folder)}: {shown(part)} is missing, {index.name} names it; fetch it again."
            )
        header, named = _header(file), {name for name, place in weight_map.items() if place == part}
        for name in sorted(header.keys() ^ named):
            kind = "lacks" if name in named else "has unknown"
            raise UserError(
                f"{shown(file)}: it {kind} tensor {shown(name)}, by {index.name}; fetch the checkpoint again."
            )
        stored |= header
    return stored


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a model folder. Raises: UserError where it `leads_out` of the folder."""
    if leads_out(folder, name):
        raise UserError(
            f"{shown(folder)}: {shown(name)} leads out of the folder; put a copy of the file into the folder."
        )
    return folder / name


def leads_out(folder: Path, name: str) -> bool:
    """Tells whether the name of a file is absolute or leaves its folder, or a link leads out of it.

    A hub's cache keeps its files as links to its blobs, which count as inside.

    Raises: UserError where no file can have the name.
    """
    relative = PurePosixPath(name)
    try:
        home, target = folder.resolve(), (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # such as a NUL in it, or a circle of links
        raise UserError(
            f"{shown(folder / name)}: no file can be there ({one_line(error)}); {FETCH}."
        ) from error
    places = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if relative.is_absolute() or ".." in relative.parts:
        return True
    return not any(target.is_relative_to(place) for place in places)


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys() if _is_weight(name)}
            return {
                name: Stored(file=file, name=name, shape=tuple(part.get_shape()), dtype=part.get_dtype())
                for name, part in parts.items()
            }
    except Exception as error:
        raise UserError(
            f"{shown(file)}: not a whole safetensors file ({one_line(error)}); fetch it again."
        ) from error


def _is_weight(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")
