"""Sampling against its floor and its rivals: n responses to each prompt, of a fixed number of new
tokens, or ended by stop tokens.

The floor is the bare matrix products of the same work, each by the faster of torch.mm and the engine's
`linear`: a prefill of the prompts, and for every further token the layers and the head at all rows that are
left. A second floor counts bytes and flops (bench/run/floors.py).
"""

import contextlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro

from bench.run import engines, floors, llamacpp, shapes
from bench.run.candidates import add_rivals, timed
from bench.run.options import Device, Dtype, KeepPages, Model, Repeats, Save, Shape
from bench.run.origin import origin
from bench.run.products import Ways, bare_products, layer_matrices
from bench.run.tables import (
    Table,
    candidate_table,
    engine_title,
    floor_shares,
    ratio_and_memory,
    times,
    token_rate,
)
from bench.run.work import TEMPERATURE, Responses, Work, random_work, real_work, responses_of
from engine.model.decoder import Decoder
from engine.policy.forward import LogprobGap, logprob_gap
from engine.run.machine import keep_freed_memory

N = 8  # responses to each prompt


@dataclass(frozen=True)
class Rollout:
    """Sampling, against its floors, transformers' generate and continuous batching, and vLLM and llama.cpp
    where they are installed."""

    model: Model = ""
    shape: Shape = ""
    rows: int = 64
    """Responses sampled side by side, a multiple of 8: groups of 8 share a prompt."""
    real: Annotated[
        bool,
        tyro.conf.arg(
            help="The quickstart's prompts, and responses that end where the model ends them; else random "
            "prompts, and no stop token."
        ),
    ] = False
    prompt: int = 64
    """Tokens of each random prompt."""
    new: int = 64
    """New tokens of each response; with --real the most."""
    dtype: Dtype = "float32"
    device: Device = "cpu"
    rivals: bool = True
    """Other engines too, and in 16 bits our own with one prompt at a time, not the floors alone."""
    keep_pages: KeepPages = True
    repeats: Repeats = 5
    save: Save = True


def run(config: Rollout) -> dict:
    """Measures; returns the line of results.jsonl."""
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    if config.keep_pages:
        keep_freed_memory()
    if config.real and config.shape:
        raise SystemExit("--real: random weights never end a response; give a --model instead of a --shape.")
    with contextlib.ExitStack() as stack:
        # Only other engines read a random model from its folder.
        opened = shapes.opened(config.model, config.shape, dtype, device, saved=config.rivals)
        name, folder, model = stack.enter_context(opened)
        if config.real:
            work = real_work(folder, config.rows, N, config.new)
        else:
            work = random_work(model.config.vocab_size, config.rows, N, config.prompt, config.new)
        difference = gap(model, work)
        if dtype == torch.float32 and not difference.max <= 1e-4:
            raise SystemExit(f"{difference}: more than 1e-4; nothing is timed")
        steps = {"dualign": ours(model, work)}
        # Seeds are fixed, so every call of one candidate returns the same responses.
        responses = {"dualign": steps["dualign"]()}
        makers = _rivals(folder, model, work, stack) if config.rivals else {}
        answers, not_run = add_rivals(steps, makers)
        responses |= answers
        for candidate, answer in responses.items():
            work.check(candidate, answer)
        products, needed = floor(model, work, responses["dualign"])
        lengths = [len(response) for response in responses["dualign"]]
        prompts = [len(prompt) for prompt in work.prompts]
        parts = floors.sampling(model.config, dtype.itemsize, prompts, N, lengths)
        measured = timed(steps, products, config.repeats, device, needed=needed, parts=parts, dtype=dtype)
    for row in measured["candidates"]:
        row["tokens"] = sum(map(len, responses[row["name"]]))
        for share in ("floor_share", "computed_share"):
            row[share] *= row["tokens"] / sum(lengths)
        if not config.real:
            row["step_s"] = row["median_s"] / config.new
        # Torch sees none of the memory of these.
        if row["name"] in ("llama.cpp", "vLLM"):
            row["extra_bytes"] = None
    return {
        "case": "rollout",
        "shape": name,
        "rows": config.rows,
        "real": config.real,
        "prompt": None if config.real else config.prompt,
        "new": config.new,
        "dtype": config.dtype,
        "keep_pages": config.keep_pages,
        "logprob_gap": asdict(difference),
        "tokens": sum(lengths),
        "parting": parting(model, work) if config.rivals and dtype == torch.bfloat16 else None,
        **measured,
        "not_run": not_run,
        **origin(device),
    }


def _rivals(
    folder: Path, model: Decoder, work: Work, stack: contextlib.ExitStack
) -> dict[str, Callable[[], Callable[[], Responses]]]:
    """Returns name -> how to make the step of the other engines; `stack` holds what has to be closed."""
    stock = engines.stock(folder, model.dtype, model.device)
    makers = {
        "transformers generate": lambda: engines.transformers_generate(stock, work),
        "transformers continuous batching": lambda: engines.continuous_batching(stock, work),
    }
    if engines.vllm_serves(model.device):
        makers["vLLM"] = lambda: engines.vllm(folder, model.dtype, work)
    on_cpu = model.device.type == "cpu" and model.dtype == torch.float32
    if find_spec("llama_cpp") and on_cpu and llamacpp.serves(model.config, model.raw_config):
        makers["llama.cpp"] = lambda: stack.enter_context(llamacpp.rival(folder, model, work))
    return makers


def table(line: dict) -> Table:
    """Returns the table of a line."""
    columns = times()
    if not line.get("real"):
        columns["ms per step"] = lambda c: f"{1000 * c['median_s'] / line['new']:.2f}"
    columns |= floor_shares(line) | ratio_and_memory(line, "time of a token / ours") | token_rate(line)
    return candidate_table(line, engine_title(line), columns)


def ours(model: Decoder, work: Work) -> Callable[[], Responses]:
    """Returns a step of `engine.rollout.generate`."""
    return lambda: responses_of(work.sampled(model))


def floor(model: Decoder, work: Work, responses: Responses) -> tuple[dict[str, Ways], dict[str, float]]:
    """Returns the products that sampling the responses needs, and how often it needs each.

    They are a prefill of all prompts, the layers for every token that another one follows, and the head for
    every token. Products are timed for a few numbers of rows, and others lie on the line between these.
    """
    layers = layer_matrices(model)
    products = {"prefill": bare_products(layers, sum(map(len, work.prompts)))}
    needed: Counter[str] = Counter(prefill=1)
    tried = [work.rows]
    if work.stop:
        tried = sorted({max(1, work.rows >> k) for k in range(work.rows.bit_length())})
    for step in range(work.new):
        going = sum(len(response) > step for response in responses)
        for rows, share in _between(tried, going) if going else ():
            for name, matrices in (("layers", layers), ("head", [model.head_weight])):
                if name == "head" or step:
                    key = f"{name} of {rows} rows"
                    needed[key] += share
                    products.setdefault(key, bare_products(matrices, rows))
    return products, dict(needed)


def _between(points: list[int], x: int) -> list[tuple[int, float]]:
    """Returns the neighbours of x among sorted points, and their weights on the line through x."""
    above = bisect_left(points, x)
    if points[above] == x:
        return [(x, 1.0)]
    low, high = points[above - 1], points[above]
    share = (x - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def parting(model: Decoder, work: Work) -> tuple[float, float | None]:
    """Returns the share of the responses that differ between one prompt at a time and all at once, and their
    mean number of equal tokens before."""
    differs = work.sampled(model).tokens != work.sampled(model, max_rows=work.n).tokens
    parted = differs.any(1)
    if not parted.any():
        return 0.0, None
    return float(parted.double().mean()), float(differs[parted].int().argmax(1).double().mean())


def gap(model: Decoder, work: Work) -> LogprobGap:
    """Returns how far the sampler's log-probs are from those of the training forward."""
    rollouts = work.sampled(model)
    return logprob_gap(model, work.groups(rollouts), rollouts, temperature=TEMPERATURE)
