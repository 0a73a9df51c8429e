"""A config's model and prompts, read and checked before any weights are loaded."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import model, quickstart
from engine.config import RunConfig
from engine.data import dealing
from engine.data.chat import check_known
from engine.data.prompts import TextLimits, assert_disjoint, load_prompts, shipped_prompts
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.folder import DTYPES, check_weights, read_config, read_json, resolve
from engine.model.tokenizer import load_tokenizer
from engine.records import Prompts
from engine.run.machine import keep_freed_memory
from engine.stages.smoke import smoke_folder

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A run's model and prompts, read and checked; no weights are loaded yet."""

    device: torch.device
    dtype: torch.dtype
    folder: Path  # the model's Hugging Face folder
    fingerprint: str
    shape: ModelConfig
    tokenizer: object
    stop_token_ids: tuple[int, ...]
    limits: TextLimits
    train: Prompts
    heldout: Prompts


def read_inputs(config: RunConfig) -> Inputs:
    """Reads and checks a config's model and prompts. Raises: UserError."""
    device = torch.device(_device(config.device))
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[automatic if config.dtype == "auto" else config.dtype]
    folder = model_folder(config.model)
    fingerprint = model.fingerprint(folder)
    shape = ModelConfig.from_json(read_config(folder), folder / "config.json")
    check_weights(folder, shape)
    tokenizer = load_tokenizer(folder)
    stop_token_ids = stop_tokens(folder, tokenizer)
    unknown = [number for number in stop_token_ids if not 0 <= number < shape.vocab_size]
    if unknown:
        raise UserError(
            f"{folder}: end-of-sequence token {unknown[0]} is not among the {shape.vocab_size} of "
            "config.json's vocab_size; "
            "correct eos_token_id in generation_config.json, config.json or the tokenizer."
        )
    limits = TextLimits(
        system=config.system,
        max_positions=shape.max_positions,
        max_new_tokens=config.max_new_tokens,
        vocab_size=shape.vocab_size,
    )
    train, heldout = _prompts(config, tokenizer, limits)
    return Inputs(
        device=device,
        dtype=dtype,
        folder=folder,
        fingerprint=fingerprint,
        shape=shape,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        limits=limits,
        train=train,
        heldout=heldout,
    )


def prepare_process(threads: int) -> None:
    """Sets the number of CPU threads (0: one for each core that the process may use)
    and the allocator of this process."""
    torch.set_num_threads(threads or _cores())
    keep_freed_memory()


def model_folder(name: str) -> Path:
    """Finds the folder of --model: the quickstart model by default, `smoke` for a tiny random
    one, else a folder or hub id."""
    if name == "smoke":
        return smoke_folder()
    return resolve(name) if name else quickstart.model_folder()


def stop_tokens(folder: Path, tokenizer) -> tuple[int, ...]:
    """Returns the end-of-sequence ids of tokenizer, generation_config.json and config.json together: they
    disagree in many checkpoints.

    Raises: UserError naming a file whose ids are not whole numbers.
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if not all(number is None or type(number) is int for number in ids):
                raise UserError(
                    f"{folder / name}: eos_token_id is {ids!r:.60}; it must be a token id, or a list of them."
                )
            found |= set(ids)
    return tuple(sorted(found - {None}))


def read_prompts(source: str | list[str], tokenizer, limits: TextLimits, column: str = "prompt") -> Prompts:
    """Reads prompts with a run's system line and longest response;
    see `engine.data.prompts.load_prompts`. Raises: UserError."""
    prompts = load_prompts(
        source,
        tokenizer,
        column=column,
        system=limits.system,
        now=limits.now,
        max_prompt_tokens=limits.max_prompt_tokens,
    )
    for text, ids in zip(prompts.text, prompts.token_ids, strict=True):
        check_known(ids, limits.vocab_size, f"prompt {text[:60]!r}")
    return prompts


def _prompts(config: RunConfig, tokenizer, limits: TextLimits) -> tuple[Prompts, Prompts]:
    """Reads training and held-out prompts, disjoint ones. Without --heldout a seeded fifth
    of the user's --prompts is held out."""

    def read(source: str | list[str]) -> Prompts:
        return read_prompts(source, tokenizer, limits, config.prompt_column)

    train = read(config.prompts or shipped_prompts("train"))
    if config.heldout or not config.prompts:
        heldout = read(config.heldout or shipped_prompts("heldout"))
    else:
        chosen, held = dealing.split(train, config.seed)
        train, heldout = train.select(chosen), train.select(held)
    assert_disjoint(train, heldout)
    return train, heldout


def _cores() -> int:
    """Counts the cores that this process may run on (taskset and containers limit them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
