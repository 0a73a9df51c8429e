"""RMS norm, rotary positions and gated SiLU by compiled code (csrc/layer.cpp); see `kernels.layer.layer`."""

import torch
from torch import Tensor

from kernels import compiled
from kernels.compiled import _native

NORMS_AND_STORES = False  # whether `split_rotated` takes norms and places


def rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns x + delta, or x itself without a delta, and its RMS norm times weight; [R, N].

    All of it is float32, or all bfloat16. Arithmetic is float32. In bfloat16 x + delta is rounded before its
    norm is taken, as the next layer sees it.
    """
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    out = torch.empty_like(x)
    added = (None, None) if delta is None else (delta.contiguous(), total)
    how = torch.get_num_threads(), compiled.make.instructions
    _native.rms_norm(x, added[0], weight, epsilon, added[1], out, *how)
    return total, out


def split_rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `kernels.layer.layer.split_rotated` does, of float32 or bfloat16 on the CPU."""
    q = qkv.new_empty(len(qkv), heads, cos.shape[1])
    k, v = (qkv.new_empty(len(qkv), kv_heads, cos.shape[1]) for _ in range(2))
    how = torch.get_num_threads(), compiled.make.instructions
    _native.split_rotated(qkv.contiguous(), cos.contiguous(), sin.contiguous(), q, k, v, *how)
    return q, k, v


def gated_silu(gate_up: Tensor) -> Tensor:
    """Returns what `kernels.layer.layer.gated_silu` does, of float32 or bfloat16 on the CPU."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _native.gated_silu(gate_up.contiguous(), out, torch.get_num_threads(), compiled.make.instructions)
    return out
