"""A config's model, prompts and scorers, read and checked before the model's weights are loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from engine import model, quickstart
from engine.config import RunConfig
from engine.config.template import template_kwargs
from engine.data import dealing
from engine.data.chat import NO_KWARGS, check_known, end_of_turn
from engine.data.prompts import TextLimits, assert_disjoint, overlap, shipped_prompts
from engine.data.prompts import read_prompts as prompts_of
from engine.data.reading import Rules
from engine.data.samples_file import GivenSamples, read_samples
from engine.data.templates import check_kwargs, remarks, use_template
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.checkpoint import examine
from engine.model.folder import DTYPES, digests, read_json, resolve
from engine.model.slices import sliced
from engine.model.tokenizer import load_tokenizer
from engine.ranks import ALONE, Ranks
from engine.records import Prompts
from engine.run.folder import RunFolder
from engine.run.machine import keep_freed_memory, prepare_gpu
from engine.scorers.answers import Answers
from engine.scorers.base import Scorers
from engine.scorers.find import load_scorers, score_names, take_rows
from engine.stages.run_inputs import OwnedInputs, source_digests
from engine.stages.smoke import smoke_folder
from kernels.compiled import has_16_bit_products

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A run's model and prompts, read and checked; no weights are loaded yet."""

    device: torch.device
    dtype: torch.dtype
    folder: Path  # the model's Hugging Face folder
    texts: Path  # where tokenizer, chat templates and stop tokens were read: that folder, or a run's copy
    files: dict[str, str]  # the model's files that a run depends on, and their SHA-256
    fingerprint: str
    shape: ModelConfig
    tokenizer: object
    stop_token_ids: tuple[int, ...]
    limits: TextLimits
    train: Prompts
    heldout: Prompts
    given: GivenSamples | None  # responses of a file to the training prompts
    template: str  # the text of --template; "" without it
    began: str  # the time that the chat template is told, ISO 8601; "" where it asks for none
    sources: dict[str, dict[str, str]]  # flag -> file -> SHA-256 of what was read
    reading: list[str]  # says what the prompts were read as, and which rows were left out
    # Says what is unexpected in how prompts are written, or what has changed since the run began whose inputs
    # these are.
    notes: list[str]


def clock() -> datetime:
    """Returns the time that a template may be told."""
    return datetime.now().replace(microsecond=0)


def read_inputs(
    config: RunConfig,
    owned: OwnedInputs | None = None,
    ranks: Ranks = ALONE,
    *,
    now: datetime | None = None,
) -> Inputs:
    """Reads and checks a config's model and prompts; with `owned`, all but the weights come from that run.

    Each rank takes the GPU of its number on its machine. now: the time on rank 0, as ranks have clocks of
    their own; by default it is this process's.
    Raises: UserError, also where the weights are not those of that run, or cannot be cut into as many slices
    as ranks hold one model.
    """
    device = torch.device(_device(config.device))
    if device.type == "cuda" and ranks.size > 1:
        device = _own_gpu(ranks)
    dtype = DTYPES[_automatic(device, config.model) if config.dtype == "auto" else config.dtype]
    folder = model_folder(config.model)
    files, fingerprint = digests(folder), model.fingerprint(folder)
    notes = [] if owned is None else [*owned.check_model(folder, files), *owned.check_sources()]
    texts = folder if owned is None else RunFolder(owned.run).model
    shape = examine(folder).config
    sliced(shape, ranks.model_size)
    tokenizer, kwargs = load_tokenizer(texts), template_kwargs(config.chat_template_kwargs)
    template = "" if owned is None else owned.record.template
    if owned is None:
        if config.template:
            template, notes = use_template(tokenizer, config.template, kwargs)
        check_kwargs(tokenizer, kwargs)
    stop_token_ids = stop_tokens(texts, tokenizer, kwargs)
    unknown = [number for number in stop_token_ids if not 0 <= number < shape.vocab_size]
    if unknown:
        raise UserError(
            f"{folder}: end-of-sequence token {unknown[0]} is not among the {shape.vocab_size} of "
            "config.json's vocab_size; correct eos_token_id in generation_config.json, config.json or the "
            "tokenizer, or what the chat template writes behind an answer."
        )
    now = now or clock()
    if owned is not None and owned.record.began:
        now = datetime.fromisoformat(owned.record.began)
    limits = TextLimits(
        system=config.system,
        max_positions=shape.max_positions,
        max_new_tokens=config.max_new_tokens,
        vocab_size=shape.vocab_size,
        now=now,
        template_kwargs=kwargs,
    )
    if owned is None:
        train, heldout, given, reading = _prompts(config, folder, tokenizer, limits)
        notes += remarks(tokenizer, train.token_ids[0], kwargs, has_system=_has_system(config, train))
        began = now.isoformat() if asks_for_time(tokenizer) else ""
        sources = source_digests(config)
    else:
        record = owned.record
        train, heldout, began, reading = record.train, record.heldout, record.began, record.reading
        given = record.samples
        flags = ("--prompts", "--samples", "--heldout", "--template")
        sources = {flag: record.sources[flag] for flag in flags if flag in record.sources}
        files = record.model
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_16_bit_products():
        notes.append(
            "--dtype bfloat16: this processor has neither AVX512-BF16 nor AMX, without which bfloat16 is "
            "slower than float32; leave --dtype out to save time."
        )
    return Inputs(
        device=device,
        dtype=dtype,
        folder=folder,
        texts=texts,
        files=files,
        fingerprint=fingerprint,
        shape=shape,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        limits=limits,
        train=train,
        heldout=heldout,
        given=given,
        template=template,
        began=began,
        sources=sources,
        reading=reading,
        notes=notes,
    )


def _automatic(device: torch.device, name: str) -> str:
    """Returns the data type of --dtype auto. name: that of --model, "" for the default model."""
    # On a CPU the default model alone has been tried in bfloat16, seed by seed (README.md).
    fast = device.type == "cuda" or (not name and has_16_bit_products())
    return "bfloat16" if fast else "float32"


def asks_for_time(tokenizer) -> bool:
    """Tells whether a chat template of the tokenizer writes the time at which it is rendered."""
    templates = tokenizer.chat_template or ""
    texts = templates.values() if isinstance(templates, dict) else [templates]
    return any("strftime_now" in str(text) for text in texts)


def prepare_process(threads: int, ranks: Ranks = ALONE) -> None:
    """Sets the number of CPU threads (0: one for each core that the process may use, which it shares with the
    other ranks of its machine) and the allocator of this process, and how it
    multiplies on a GPU."""
    torch.set_num_threads(threads or max(1, _cores() // ranks.local_size))
    keep_freed_memory()
    prepare_gpu()


def model_folder(name: str) -> Path:
    """Finds the folder of --model: the quickstart model by default, `smoke` for a tiny random
    one, else a folder or hub id."""
    if name == "smoke":
        return smoke_folder()
    return resolve(name) if name else quickstart.model_folder()


def stop_tokens(folder: Path, tokenizer, kwargs: Mapping[str, Any] = NO_KWARGS) -> tuple[int, ...]:
    """Returns the end-of-sequence ids of tokenizer, generation_config.json and config.json together, as they
    disagree in many checkpoints, and the token with which the chat template ends an answer. kwargs: variables
    for that template.

    Raises: UserError naming a file whose ids are not whole numbers.
    """
    found = {tokenizer.eos_token_id, end_of_turn(tokenizer, kwargs)}
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


def read_prompts(
    source: str | list[str], tokenizer, limits: TextLimits, rules: Rules
) -> tuple[Prompts, list[str]]:
    """Reads prompts with a run's system line and longest response, and says what was read and left out;
    see `engine.data.prompts.read_prompts`. Raises: UserError."""
    prompts, said = prompts_of(
        source,
        tokenizer,
        rules,
        system=limits.system,
        now=limits.now,
        template_kwargs=limits.template_kwargs,
        max_prompt_tokens=limits.max_prompt_tokens,
    )
    for text, ids in zip(prompts.text, prompts.token_ids, strict=True):
        check_known(ids, limits.vocab_size, f"prompt {text[:60]!r}")
    return prompts, said


def rules_of(config: RunConfig, folder: Path, enough: int | None) -> Rules:
    """Returns how a run reads its data; see `Rules` for enough.

    folder: the policy's checkpoint. Raises: UserError where a scorer is not found.
    """
    return Rules(
        prompt_column=config.prompt_column,
        response_columns=config.response_columns,
        strict=config.strict,
        rows=take_rows((config.reward, *config.cost, *config.audit), folder),
        enough=enough,
        seed=config.seed,
    )


def scorers_of(config: RunConfig, inputs: Inputs, answers: Answers) -> Scorers:
    """Loads the scorers of a run. answers: of judges behind HTTP, known and to come. Raises: UserError."""
    return load_scorers(
        config.reward,
        config.cost,
        config.audit,
        folder=inputs.folder,
        trunk=inputs.fingerprint,
        device=inputs.device,
        dtype=inputs.dtype,
        now=inputs.limits.now,
        tokenizer=inputs.tokenizer,
        limits=inputs.limits,
        answers=answers,
        offload=config.offload_scorers,
    )


def _prompts(
    config: RunConfig, folder: Path, tokenizer, limits: TextLimits
) -> tuple[Prompts, Prompts, GivenSamples | None, list[str]]:
    """Reads training and held-out prompts, disjoint ones, and the responses of --samples to the former; says
    what was read and left out. Without --heldout a seeded fifth of the user's own prompts is held out."""
    given, n_heldout = None, config.looks()[-1].prompts

    def read(source: str | list[str], enough: int) -> tuple[Prompts, list[str]]:
        return read_prompts(source, tokenizer, limits, rules_of(config, folder, enough))

    def read_own(enough: int) -> tuple[Prompts, list[str]]:
        nonlocal given
        if not config.samples:
            return read(config.prompts or shipped_prompts("train"), enough)
        names, rules = score_names(config, folder), rules_of(config, folder, enough)
        given = read_samples(config.samples, names, tokenizer, limits, rules, config.n_responses)
        return given.prompts, [*given.reading]

    if config.heldout or config.judged_on_shipped:
        train, said = read_own(config.n_prompts)
        heldout, more = read(config.heldout or shipped_prompts("heldout"), n_heldout)
        said += more
    else:
        both, said = read_own(dealing.enough_to_split(config.n_prompts, n_heldout))
        train, heldout = (both.select(part) for part in dealing.split(both, config.seed))
    shared = [] if config.strict else overlap(train, heldout)
    if shared:
        out = set(shared)
        train = train.select([i for i in range(len(train)) if i not in out])
        note = f"{len(out)} training prompts are held-out ones too and were left out of the training"
        if not len(train):
            raise UserError(f"{note}; none is left, so give others with --prompts, --samples or --heldout.")
        said.append(note)
    assert_disjoint(train, heldout)
    return train, heldout, given and given.of(train), said


def _has_system(config: RunConfig, prompts: Prompts) -> bool:
    """Tells whether prompts have a system line, the run's or their own."""
    own = any(m["role"] == "system" for messages in prompts.conversations for m in messages)
    return bool(config.system) or own


def _cores() -> int:
    """Counts the cores that this process may run on (taskset and containers limit them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_gpu(ranks: Ranks) -> torch.device:
    """Returns the GPU of a rank, and makes it the process's current one. Raises: UserError where there are
    fewer GPUs than ranks."""
    if (found := torch.cuda.device_count()) < ranks.local_size:
        raise UserError(
            f"{ranks.local_size} ranks on a machine with {found} visible CUDA devices: start "
            f"--nproc-per-node {found}, or use --device cpu."
        )
    torch.cuda.set_device(ranks.local)
    return torch.device("cuda", ranks.local)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
