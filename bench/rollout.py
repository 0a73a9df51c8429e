"""Sampling against its floor and its rivals: prompts of one length, n responses to each, a fixed number of new tokens (no stop token).

The floor is the bare matrix products of the same work, each by the faster of torch.mm and what the engine calls: a prefill of the prompts,
and for every further token the layers and the head at all rows. Rivals run what they offer on the same weights: transformers' `generate`
and its continuous batching.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.model import Decoder
from engine.packing import Group
from engine.rollout import generate
from engine.score import LogprobGap, logprob_gap
from kernels.products import linear
from kernels.sampling import combine

TEMPERATURE = 0.7


def prompts(vocabulary: int, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` random tokens."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary // 2, (count, length), generator=g).tolist()


def ours(model: Decoder, asked: list[list[int]], n: int, new: int) -> Callable[[], Tensor]:
    """`engine.rollout.generate`; returns the tokens [rows, new]."""
    return lambda: (
        generate(model, asked, n=n, max_new_tokens=new, temperature=TEMPERATURE, seed=int(combine(0)), max_rows=n * len(asked)).tokens
    )


def stock(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The same checkpoint as transformers loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def transformers_generate(model: torch.nn.Module, asked: list[list[int]], n: int, new: int) -> Callable[[], Tensor]:
    """`generate` with n return sequences; returns the tokens [rows, new]."""
    tokens = torch.tensor(asked, device=model.device)
    options = dict(do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)

    @torch.inference_mode()
    def step() -> Tensor:
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), num_return_sequences=n, **options)[:, tokens.shape[1] :]

    return step


def continuous_batching(model: torch.nn.Module, asked: list[list[int]], n: int, new: int) -> Callable[[], Tensor]:
    """`generate_batch`, each prompt n times, with room for all of them at once; returns the tokens [rows, new]."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    options = dict(do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    requests = [prompt for prompt in asked for _ in range(n)]
    longest = max(map(len, asked)) + new
    # Left to itself it takes most of the machine's memory and fills it in every call.
    room = ContinuousBatchingConfig(
        page_size=64, num_blocks=len(requests) * (longest // 64 + 1) + 1, max_batch_tokens=max(len(requests), 2048),
        max_requests_per_batch=len(requests),
    )  # fmt: skip

    def step() -> Tensor:
        made = model.generate_batch(requests, generation_config=GenerationConfig(**options), continuous_batching_config=room)
        return torch.tensor([x.generated_tokens for x in made.values()])

    return step


def floor(model: Decoder, asked: list[list[int]], n: int) -> dict[str, dict[str, Callable[[], object]]]:
    """product -> who does it -> step: a prefill of all prompts, the layers for one token of every row, the head for every row."""
    layers = [w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return {
        "prefill": products(layers, sum(map(len, asked))),
        "layers": products(layers, n * len(asked)),
        "head": products([model.head_weight], n * len(asked)),
    }


def products(matrices: list[Tensor], tokens: int, backward: bool = False) -> dict[str, Callable[[], object]]:
    """Products of `tokens` rows with frozen matrices [N, K]: x W', or of the gradients with W where `backward`."""
    turned = [w if backward else w.t() for w in matrices]
    shapes = {tuple(w.shape) for w in turned}
    x = {k: torch.randn(tokens, k, dtype=turned[0].dtype, device=turned[0].device) for k, _ in shapes}
    out = {(k, n): x[k].new_empty(tokens, n) for k, n in shapes}

    def by_mm() -> None:
        for w in turned:
            torch.mm(x[w.shape[0]], w, out=out[tuple(w.shape)])

    @torch.no_grad()
    def by_linear() -> None:
        for w in turned:
            linear(x[w.shape[0]], w.t())

    return {"torch.mm": by_mm, "kernels.products": by_linear}


def gap(model: Decoder, asked: list[list[int]], n: int, new: int) -> LogprobGap:
    """Of the sampler's log-probs to those of the training forward."""
    made = generate(model, asked, n=n, max_new_tokens=new, temperature=TEMPERATURE, seed=int(combine(0)))
    groups = [Group(prompt, made.tokens[p * n : (p + 1) * n].tolist(), list(range(p * n, (p + 1) * n))) for p, prompt in enumerate(asked)]
    return logprob_gap(model, groups, made, temperature=TEMPERATURE, memory_budget_bytes=2**28)
