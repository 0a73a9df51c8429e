"""The least time that work takes on a machine: of each part the longer of its bytes at the memory's bandwidth
and its flops at the rate of matrix products, and the parts in turn. Both rates are measured in the rounds in
which the work itself is timed.

Counted are the flops of matrix products with weights, 2 for each weight and row, and the bytes that must pass
the memory between one part and the next: weights; keys and values, those of a prompt once for all its
responses; logits, written and read. The rest is left out, as it can be fused or is small: arithmetic of
attention, activations, norms and biases, sampling, and an adapter's products.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.model.architecture import ModelConfig


@dataclass(frozen=True)
class Part:
    """Work that nothing before or after it overlaps."""

    name: str
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Rates:
    """The bytes and flops that a machine does in a second."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Probe:
    """A step that does little but move bytes or multiply."""

    step: Callable[[], object]
    bytes: float = 0.0
    flops: float = 0.0


# Bytes that are copied and read, and rows and columns of the matrices that are multiplied.
PROBED = {"cuda": (2**30, 8192), "cpu": (2**28, 2048)}


def probes(dtype: torch.dtype, device: torch.device) -> dict[str, Probe]:
    """Returns a copy and a read of more than any cache holds, and a large product in `dtype`."""
    size, side = PROBED[device.type]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return {
        "copy": Probe(lambda: target.copy_(source), bytes=2 * size),
        "read": Probe(lambda: source.amax(), bytes=size),
        "product": Probe(lambda: torch.mm(a, b, out=out), flops=2 * side**3),
    }


def rates(probes: dict[str, Probe], times: dict[str, dict[str, float]]) -> Rates:
    """Returns the rates of the best probes; times: name -> {"median": seconds},
    of the probes and possibly of others."""
    return Rates(
        bytes_per_s=max(probe.bytes / times[name]["median"] for name, probe in probes.items()),
        flops_per_s=max(probe.flops / times[name]["median"] for name, probe in probes.items()),
    )


def seconds(parts: list[Part], on: Rates) -> dict[str, float]:
    """Returns name -> the least time of all parts of that name."""
    by_name: dict[str, float] = {}
    for part in parts:
        least = max(part.bytes / on.bytes_per_s, part.flops / on.flops_per_s)
        by_name[part.name] = by_name.get(part.name, 0.0) + least
    return by_name


def weights(c: ModelConfig) -> tuple[int, int]:
    """Counts the elements of the matrices that states are multiplied with:
    those of all layers, and those of the head."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.hidden_size * (2 * q + 2 * kv) + 3 * c.hidden_size * c.intermediate_size
    return c.num_layers * layer, c.vocab_size * c.hidden_size


def sampling(c: ModelConfig, itemsize: int, prompts: list[int], n: int, lengths: list[int]) -> list[Part]:
    """Lists the work of sampling n responses of `lengths` tokens (prompt-major) to each
    prompt of `prompts` tokens.

    The prompts pass the layers once, together. Then in each step every row that goes on draws a token, the
    first one of a group all from one row of logits, and in all steps but the first one token of each such row
    passes the layers. It reads its prompt's keys and values with its group, reads those of its response, and
    writes one more. Elements have `itemsize` bytes.
    """
    layers, head = weights(c)
    token = 2 * c.num_kv_heads * c.head_dim * itemsize  # keys and values of a token in one layer
    windows = Counter(c.window_of(layer) for layer in range(c.num_layers))
    prefilled = c.num_layers * token * sum(prompts)
    parts = [Part("prefill", layers * itemsize + prefilled, 2 * layers * sum(prompts))]
    for step in range(max(lengths)):
        going = [sum(length > step for length in lengths[p * n : (p + 1) * n]) for p in range(len(prompts))]
        rows = sum(going) if step else len(prompts)
        parts.append(Part("head", head * itemsize, 2 * head * rows))
        parts.append(Part("logits", 2 * rows * c.vocab_size * itemsize))
        if step == 0:
            continue
        tokens = 0
        for window, count in windows.items():
            sees = step + max(prompts) if window is None else window
            left = [length for length, rows_left in zip(prompts, going, strict=True) if rows_left]
            shared = sum(min(length, max(0, sees - step)) for length in left)
            tokens += count * (shared + rows * min(step, sees))
        parts.append(Part("layers", layers * itemsize, 2 * layers * rows))
        parts.append(Part("keys and values", token * tokens))
    return parts


def passes(
    c: ModelConfig, itemsize: int, tokens: float, completions: float, times: int, *, share: float = 1.0
) -> list[Part]:
    """Lists the work of `times` passes, forward or backward, with 2 flops for each weight and token.

    A pass takes `tokens` packed tokens through `share` of the layers, and the `completions` of them that are
    predicted through the head.
    """
    layers, head = weights(c)
    layers = int(layers * share)
    one = [
        Part("layers", layers * itemsize, 2 * layers * tokens),
        Part("head", head * itemsize, 2 * head * completions),
    ]
    return times * one


def training(c: ModelConfig, itemsize: int, tokens: int, completions: int, *, full: bool) -> list[Part]:
    """Lists the work of one step: forward, gradient of the states and, with `full`,
    gradient of the weights and AdamW.

    AdamW reads weight, gradient and two moments and writes weight and moments, all in float32.
    """
    if not full:
        return passes(c, itemsize, tokens, completions, 2)
    optimizer = Part("optimizer", 7 * 4 * c.parameter_count())
    return [*passes(c, itemsize, tokens, completions, 3), optimizer]
