"""Ceilings of a card, and how near its kernels come: attention, small launches,
decode attention, sampling."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.steps import BF16, copy_rate, per_call, table
from bench.run import floors
from bench.run.measure import interleaved
from engine.model.attention import Layout, attend_packed
from kernels import decode_attention, sample


def ceilings(
    device: torch.device, rows: int = 8192, width: int = 4096, vocabulary: int = 151936, side: int = 8192
) -> list[dict]:
    """Measures the ceilings of a card: a copy, a square product, and the three products of a loss head with
    float32 and with 16-bit output."""
    copied = floors.probes(BF16, device)["copy"]
    s = per_call(lambda i: copied.step(), 4, device)
    measured = [["copy, GB/s", 1000 * s, copied.bytes / s / 1e9]]
    shapes = ((rows, width), (vocabulary, width), (rows, vocabulary))
    hidden, weight, z = (torch.randn(n, m, device=device).to(BF16) for n, m in shapes)
    a, b = (torch.randn(side, side, device=device).to(BF16) for _ in range(2))
    products = {
        f"{side} x {side} x {side}": (a, b),
        "logits, H W'": (hidden, weight.t()),
        "dH, G W": (z, weight),
        "dW, G' H": (z.t(), hidden),
    }
    for kind in (torch.float32, BF16):
        unit = f"{_short(kind)} output, Tflop/s"
        total_s = total = 0.0
        for name, (left, right) in products.items():
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            out = torch.empty(left.shape[0], right.shape[1], dtype=kind, device=device)
            s = per_call(lambda i, left=left, right=right, out=out: product(left, right, out), 4, device)
            measured.append([f"{name}, {unit}", 1000 * s, flops / s / 1e12])
            if left is not a:
                total_s, total = total_s + s, total + flops
            del out
        measured.append([f"the three, {unit}", 1000 * total_s, total / total_s / 1e12])
    head = f"loss head of {rows} rows x {width} x {vocabulary}"
    title = f"Ceilings: bfloat16 products of random numbers, {head}"
    return [table(title, ["", "ms", "rate"], measured, device=device)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Computes out = a b in the dtype of `out`."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class Heads(NamedTuple):
    """The heads of an attention layer."""

    query: int
    key: int  # as many as there are value heads
    width: int

    def __str__(self) -> str:
        return f"{self.query} / {self.key} heads of {self.width}"


def attention_kernels(
    device: torch.device, groups: int = 32, prompt: int = 256, response: int = 64
) -> list[dict]:
    """Measures packed attention by runs (GQA, runs with more keys than queries) against float64 on the grid:
    errors and times, both passes."""
    measured = []
    small = Layout.shared_prompt([37, 5], [[9, 0, 20], [3]])
    large = Layout.shared_prompt([prompt] * groups, [[response] * 8] * groups)
    names = ("out", "dQ", "dK", "dV")
    for heads in (Heads(14, 2, 64), Heads(32, 8, 64), Heads(12, 2, 128)):
        got = attention_step(small.to(device), heads, BF16, device)()
        exact = attention_step(small.to("cpu"), heads, torch.float64, torch.device("cpu"))()
        errors = [
            float((g.cpu().double() - e).abs().max() / e.abs().max()) for g, e in zip(got, exact, strict=True)
        ]
        step = attention_step(large.to(device), heads, BF16, device)
        times = interleaved({"": step}, 10, device)[""]
        measured.append([str(heads), *errors, 1000 * times["median"]])
    tokens = groups * (prompt + 8 * response)
    title = "Packed attention in bfloat16: largest relative errors against float64; "
    title += f"ms of both passes over {tokens} tokens"
    return [table(title, ["", *names, "ms"], measured, device=device)]


def attention_step(
    layout: Layout, heads: Heads, dtype: torch.dtype, device: torch.device
) -> Callable[[], list[Tensor]]:
    """Returns a step of packed attention on seeded random numbers: [out, dQ, dK, dV]."""
    g, tokens = torch.Generator().manual_seed(0), len(layout.position)

    def draw(count: int) -> Tensor:
        return torch.randn(tokens, count, heads.width, generator=g).to(BF16).to(device, dtype)

    leaves = [draw(count).requires_grad_() for count in (heads.query, heads.key, heads.key)]
    upstream = draw(heads.query)

    def step() -> list[Tensor]:
        out = attend_packed(*leaves, layout, None, None)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    return step


def launches(device: torch.device, calls: int = 500) -> list[dict]:
    """Measures the time between small kernels, launched by the host and replayed from a graph."""
    x = torch.zeros(64, device=device)
    eager = interleaved({"": lambda: [x.add_(1) for _ in range(calls)]}, 10, device)[""]["median"] / calls
    graph = per_call(lambda i: x.add_(1), calls, device)
    rows = [["launched by the host", 1e6 * eager], ["in a captured graph", 1e6 * graph]]
    return [table("Time of a kernel of 64 numbers", ["", "us"], rows, device=device)]


class Cache(NamedTuple):
    """The size of a cache in decode attention."""

    prompts: int = 32
    n: int = 8  # rows of each prompt
    longest: int = 256  # tokens of each prompt
    room: int = 512  # tokens of a row's response that fit
    layers: int = 8  # they take turns, so that a layer's cache is in no processor's cache

    @property
    def title(self) -> str:
        """Says what is attended to, in a title."""
        return f"Decode attention, {self.prompts} prompts of {self.longest} x {self.n} rows"


CACHE = Cache()


def decode(device: torch.device, cache: Cache = CACHE) -> list[dict]:
    """Measures GB/s of decode attention at the shapes of published models, with bytes
    counted as in the op's docstring."""
    measured, copied = [], copy_rate(device)
    for shape, heads in (
        ("qwen2.5-0.5b", Heads(14, 2, 64)),
        ("llama-3.2-1b", Heads(32, 8, 64)),
        ("qwen2.5-1.5b", Heads(12, 2, 128)),
        ("llama-3.1-8b", Heads(32, 8, 128)),
    ):
        for used in (1, cache.room // 2, cache.room):
            data = [decode_problem(cache, heads, used, device) for _ in range(cache.layers)]
            s = per_call(lambda i, data=data: decode_attention(**data[i]), cache.layers, device)
            tokens = cache.prompts * cache.longest + cache.prompts * cache.n * used
            moved = 2 * heads.key * heads.width * 2 * tokens
            measured.append([shape, used, 1e6 * s, moved / s / 1e9, 100 * moved / s / copied])
            del data
    header = ["shape", "own tokens", "us", "GB/s", "% of a copy"]
    return [table(f"{cache.title}, bfloat16", header, measured, device=device)]


def decode_problem(cache: Cache, heads: Heads, used: int, device: torch.device) -> dict[str, Tensor]:
    """Returns arguments of `decode_attention` in bfloat16, with `used` tokens in each row's response."""
    prompts, rows = cache.prompts, cache.prompts * cache.n
    shapes = {
        "query": (rows, heads.query, heads.width),
        "prompt_keys": (prompts, heads.key, cache.longest, heads.width),
        "prompt_values": (prompts, heads.key, cache.longest, heads.width),
        "own_keys": (rows, heads.key, cache.room, heads.width),
        "own_values": (rows, heads.key, cache.room, heads.width),
    }
    data = {name: torch.randn(shape, device=device, dtype=BF16) for name, shape in shapes.items()}
    whole = {
        "prompt_length": [cache.longest] * prompts,
        "owner_offsets": [cache.n * p for p in range(prompts + 1)],
        "used": [used],
    }
    return data | {name: torch.tensor(values, device=device) for name, values in whole.items()}


def sampling(device: torch.device, rows: int = 256) -> list[dict]:
    """Measures one token per row from real vocabularies; the logits are read once."""
    measured, key = [], torch.arange(rows, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    for columns, dtype in itertools.product((49152, 151936), (torch.float32, BF16)):
        logits = 3 * torch.randn(rows, columns, device=device).to(dtype)
        for options in ({}, {"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.9}):
            s = per_call(lambda i, x=logits, o=options: sample(x, key=key, step=step, **o), 3, device)
            what = f"{rows} x {columns}, {_short(dtype)}, {options or 'plain'}"
            measured.append([what, 1000 * s, logits.nbytes / s / 1e9])
    return [table("Sampling", ["", "ms", "GB/s of logits"], measured, device=device)]
