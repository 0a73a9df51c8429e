"""Attention among packed tokens on a CPU: by compiled code, and by torch on a padded grid.

The floor is one large product of as many multiplications as scores and sums of values need.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.run.candidates import timed
from bench.run.options import Dtype, Repeats, Save
from bench.run.origin import origin
from bench.run.products import bare_products
from bench.run.tables import Table, candidate_table, floor_shares, ratio_and_memory, times
from engine.model.attention import Layout, attend, attend_packed

WIDE = 576  # of the floor's product


@dataclass(frozen=True)
class Attention:
    """Attention among packed tokens on a CPU, against torch's on a padded grid."""

    prompts: int = 6
    """Number of prompts."""
    responses: int = 8
    """Responses to each prompt; 0 for none."""
    prompt: int = 42
    """Tokens of each prompt."""
    response: int = 36
    """Tokens of each response."""
    heads: int = 9
    """Heads of queries."""
    kv_heads: int = 3
    """Heads of keys and values."""
    width: int = 64
    """Numbers of a head."""
    gradient: bool = False
    """With the gradients in queries, keys and values."""
    dtype: Dtype = "float32"
    repeats: Repeats = 9
    save: Save = True


def run(config: Attention) -> dict:
    """Measures; returns the line of results.jsonl."""
    dtype, device = getattr(torch, config.dtype), torch.device("cpu")
    n, own = config.prompts, config.response
    layout = Layout.shared_prompt([config.prompt] * n, [[own] * config.responses] * n)
    generator = torch.Generator().manual_seed(0)
    heads = config.heads, config.kv_heads, config.kv_heads, config.heads
    *inputs, gradient = (
        torch.randn(len(layout.position), h, config.width, generator=generator).to(dtype) for h in heads
    )
    steps = {
        name: _step(function, layout, inputs, gradient if config.gradient else None)
        for name, function in (("dualign", packed), ("torch on a grid", on_grid))
    }
    found = [[x.float() for x in step()] for step in steps.values()]
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    if not difference <= (bound := 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps):
        raise SystemExit(f"results differ by {difference:.0e}: more than {bound:.0e}; nothing is timed")
    seen = config.prompt * (config.prompt + 1) / 2
    seen += config.responses * own * (config.prompt + (own + 1) / 2)
    products = n * seen * 2 * config.heads * config.width * (1 + 2.5 * config.gradient)
    bare = bare_products([torch.randn(WIDE, WIDE)], max(1, round(products / WIDE**2)))
    measured = timed(steps, {"products": bare}, config.repeats, device)
    return {
        "case": "attention",
        **{name: getattr(config, name) for name in ("prompts", "responses", "prompt", "response", "heads")},
        **{name: getattr(config, name) for name in ("kv_heads", "width", "gradient", "dtype")},
        "keep_pages": False,
        "difference": difference,
        "tokens": len(layout.position),
        **measured,
        **origin(device),
    }


def table(line: dict) -> Table:
    """Returns the table of a line."""
    title = f"attention: {line['tokens']} tokens of {line['prompts']} prompts of {line['prompt']}, with "
    title += f"{line['responses']} responses of {line['response']} each, {line['heads']} heads of "
    title += f"{line['width']}, {line['kv_heads']} of keys, {line['dtype']}"
    title += ", with gradients" if line["gradient"] else ""
    title += f"; floor (a large float32 product of as many multiplications) {1000 * line['floor_s']:.1f} ms"
    return candidate_table(line, title, times() | floor_shares(line) | ratio_and_memory(line))


def packed(layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends as the engine does."""
    return attend_packed(query, key, value, layout, None, None)


def on_grid(layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends in float32 with prompts and their responses side by side in the rows of a padded grid."""
    wide = (layout.grid(x.float()) for x in (query, key, value))
    mixed = attend(*wide, layout.mask, None, None).transpose(1, 2).reshape(-1, *query.shape[1:])
    return mixed.to(query.dtype).index_select(0, layout.slot)


def _step(
    function: Callable[..., Tensor], layout: Layout, inputs: list[Tensor], gradient: Tensor | None
) -> Callable[[], list[Tensor]]:
    """Returns a step: the result alone, or with its gradients."""
    if gradient is None:
        return torch.no_grad()(lambda: [function(layout, *inputs)])
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step() -> list[Tensor]:
        out = function(layout, *leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    return step
