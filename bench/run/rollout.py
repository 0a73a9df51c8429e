"""Sampling against its floor and its rivals: n responses to each prompt, of a fixed number of new tokens, or ended by stop tokens.

The floor is the bare matrix products of the same work, each by the faster of torch.mm and what the engine calls: a prefill of the prompts,
and for every further token the layers and the head at all rows that are left. Rivals run what they offer on the same weights:
transformers' `generate` and its continuous batching, vLLM, and llama.cpp (bench/run/llamacpp.py).
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.data import load_prompts, shipped_prompts
from engine.model import Decoder
from engine.packing import Group
from engine.records import Rollouts
from engine.rollout import generate
from engine.score import LogprobGap, logprob_gap
from engine.stages import stop_tokens
from kernels.products import linear
from kernels.sampling import combine

TEMPERATURE = 0.7
Responses = list[list[int]]  # tokens of each response, prompt-major, the stop token included


@dataclass(frozen=True)
class Work:
    """What is asked of everyone."""

    prompts: list[list[int]]
    n: int  # responses to each prompt
    new: int  # most new tokens of a response; exactly these many without stop tokens
    stop: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """All responses."""
        return len(self.prompts) * self.n

    def check(self, name: str, made: Responses) -> None:
        """Raises: SystemExit where `made` is not what was asked for."""
        least = 1 if self.stop else self.new
        if len(made) != self.rows or not all(least <= len(x) <= self.new for x in made):
            raise SystemExit(
                f"{name} made {len(made)} responses of {min(map(len, made))} to {max(map(len, made))} tokens; nothing is timed"
            )


def random_work(vocabulary: int, rows: int, n: int, prompt: int, new: int) -> Work:
    """Prompts of `prompt` random tokens, and responses of a fixed length."""
    g = torch.Generator().manual_seed(0)
    return Work(torch.randint(vocabulary // 2, (rows // n, prompt), generator=g).tolist(), n, new)


def real_work(folder: Path, rows: int, n: int, new: int) -> Work:
    """The quickstart's prompts, from end to end of them, and responses that end where the model ends them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = load_prompts(shipped_prompts("train"), tokenizer, system=RunConfig.system, max_prompt_tokens=512)
    chosen = [i * len(prompts) // (rows // n) for i in range(rows // n)]
    return Work([prompts.token_ids[i] for i in chosen], n, new, stop_tokens(folder, tokenizer))


def _sampled(model: Decoder, work: Work, max_rows: int | None = None) -> Rollouts:
    return generate(
        model, work.prompts, n=work.n, max_new_tokens=work.new, temperature=TEMPERATURE, stop_token_ids=work.stop, seed=int(combine(0)),
        max_rows=max_rows or work.rows,
    )  # fmt: skip


def _responses(made: Rollouts) -> Responses:
    """Without the padding."""
    return [row[:length] for row, length in zip(made.tokens.tolist(), made.length.tolist(), strict=True)]


def _cut(rows: list[list[int]], work: Work) -> Responses:
    """Rows without what stands behind their stop token."""
    ends = (next((i + 1 for i, token in enumerate(row) if token in work.stop), len(row)) for row in rows)
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def ours(model: Decoder, work: Work) -> Callable[[], Responses]:
    """`engine.rollout.generate`."""

    return lambda: _responses(_sampled(model, work))


def stock(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The same checkpoint as transformers loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def transformers_generate(model: torch.nn.Module, work: Work) -> Callable[[], Responses]:
    """`generate` with n return sequences."""
    longest = max(map(len, work.prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in work.prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in work.prompts], device=model.device)
    options = dict(do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=work.new, pad_token_id=0)
    options |= dict(eos_token_id=list(work.stop)) if work.stop else dict(min_new_tokens=work.new)

    @torch.inference_mode()
    def step() -> Responses:
        torch.manual_seed(0)
        made = model.generate(tokens, attention_mask=mask, num_return_sequences=work.n, **options)
        return _cut(made[:, longest:].tolist(), work)

    return step


def continuous_batching(model: torch.nn.Module, work: Work) -> Callable[[], Responses]:
    """`generate_batch`, each prompt n times, with room for all of them at once."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    options = dict(do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=work.new, pad_token_id=0)
    options |= dict(eos_token_id=list(work.stop) or -1)
    requests = [prompt for prompt in work.prompts for _ in range(work.n)]
    longest = max(map(len, work.prompts)) + work.new
    # Left to itself it takes most of the machine's memory and fills it in every call.
    room = ContinuousBatchingConfig(
        page_size=64, num_blocks=len(requests) * (longest // 64 + 1) + 1, max_batch_tokens=max(len(requests), 2048),
        max_requests_per_batch=len(requests),
    )  # fmt: skip

    def step() -> Responses:
        torch.manual_seed(0)
        made = model.generate_batch(requests, generation_config=GenerationConfig(**options), continuous_batching_config=room)
        return _cut([x.generated_tokens for x in made.values()], work)

    return step


def vllm(folder: Path, dtype: torch.dtype, work: Work) -> Callable[[], Responses]:
    """vLLM's `LLM.generate` with n responses to each prompt, which is computed once in every call."""
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = max(map(len, work.prompts)) + work.new
    # Other candidates hold memory too; rows of a seeded request are sampled one by one, so only where lengths hang on it.
    engine = LLM(
        str(folder), dtype=str(dtype).removeprefix("torch."), skip_tokenizer_init=True, max_model_len=longest, max_num_seqs=work.rows,
        enable_prefix_caching=True, gpu_memory_utilization=0.4, seed=0,
    )  # fmt: skip
    params = SamplingParams(
        n=work.n, temperature=TEMPERATURE, max_tokens=work.new, ignore_eos=True, stop_token_ids=list(work.stop), detokenize=False,
        seed=0 if work.stop else None,
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in work.prompts]

    def step() -> Responses:
        engine.reset_prefix_cache()
        return [list(made.token_ids) for x in engine.generate(prompts, params, use_tqdm=False) for made in x.outputs]

    return step


def vllm_serves(device: torch.device) -> bool:
    """Whether vLLM is installed, in a build for the device."""
    if not find_spec("vllm"):
        return False
    from vllm.platforms import current_platform

    return current_platform.device_type == device.type


def floor(model: Decoder, work: Work, made: Responses) -> tuple[dict[str, dict[str, Callable[[], object]]], dict[str, float]]:
    """(product -> who does it -> step, how often each is needed) to sample `made`: a prefill of all prompts, the layers for every token
    that another one follows, the head for every token. Products are timed for a few numbers of rows, others on the line between these."""
    layers = [w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    products = {"prefill": bare_products(layers, sum(map(len, work.prompts)))}
    often: Counter[str] = Counter(prefill=1)
    tried = [work.rows] if not work.stop else sorted({max(1, work.rows >> k) for k in range(work.rows.bit_length())})
    for step in range(work.new):
        going = sum(len(response) > step for response in made)
        for rows, share in _between(tried, going) if going else ():
            for name, matrices in (("layers", layers), ("head", [model.head_weight])):
                if name == "head" or step:
                    key = f"{name} of {rows} rows"
                    often[key] += share
                    products.setdefault(key, bare_products(matrices, rows))
    return products, dict(often)


def _between(points: list[int], x: int) -> list[tuple[int, float]]:
    """The neighbours of x among sorted points, and their weights on the line through x."""
    above = bisect_left(points, x)
    if points[above] == x:
        return [(x, 1.0)]
    low, high = points[above - 1], points[above]
    share = (x - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def bare_products(matrices: list[Tensor], tokens: int, backward: bool = False) -> dict[str, Callable[[], object]]:
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


def parting(model: Decoder, work: Work) -> tuple[float, float | None]:
    """Share of the responses that differ between one prompt at a time and all at once, and their mean number of equal tokens before."""
    differs = _sampled(model, work).tokens != _sampled(model, work, work.n).tokens
    parted = differs.any(1)
    return float(parted.double().mean()), float(differs[parted].int().argmax(1).double().mean()) if parted.any() else None


def gap(model: Decoder, work: Work) -> LogprobGap:
    """Of the sampler's log-probs to those of the training forward."""
    made, n = _sampled(model, work), work.n
    responses = _responses(made)
    groups = [Group(prompt, responses[p * n : (p + 1) * n], list(range(p * n, (p + 1) * n))) for p, prompt in enumerate(work.prompts)]
    return logprob_gap(model, groups, made, temperature=TEMPERATURE)
