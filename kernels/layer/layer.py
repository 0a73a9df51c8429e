"""Does what a decoder layer needs between its matrix products: RMS norm, rotary positions, gated SiLU.

Rows that need no gradient go to compiled code, in one pass where torch takes two to eight: float32 and
bfloat16 on the CPU to csrc/layer.cpp, up to 32 bits on a GPU to Triton (layer_triton.py), where gradients
have kernels too (layer_gradients.py). The torch code is their specification, and serves gradients on a CPU
and all else. On a CPU both work in float32 and round a result of 16 bits once; where a gradient is asked for
in bfloat16, compiled code makes the values there too.
"""

from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.layer import layer_native
from kernels.layer.records import Places


def _backend(x: Tensor, *others: Tensor) -> ModuleType | None:
    """Returns the module with compiled code for these rows, native or Triton, or None for plain torch."""
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
    if torch.compiler.is_compiling() or x.dim() != 2:
        return None
    if x.is_cuda:
        from kernels.layer import layer_gradients, layer_triton

        rows = layer_gradients if differentiated else layer_triton
        return rows if layer_triton.serves(x, *others) else None
    return layer_native if not differentiated and compiled.serves(x.device, x.dtype) else None


def _trains_compiled(x: Tensor, *others: Tensor) -> bool:
    """Returns whether compiled code makes the values of these rows while torch code makes their gradient:
    bfloat16 on the CPU."""
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
    if torch.compiler.is_compiling() or not differentiated or x.dim() != 2 or x.dtype != torch.bfloat16:
        return False
    return compiled.serves(x.device, x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; x [..., N], weight [N]."""
    if (rows := _backend(x, weight)) is not None:
        return rows.rms_norm(x, None, weight, epsilon)[1]
    if _trains_compiled(x, weight):
        return compiled.with_gradient(
            lambda x, weight: layer_native.rms_norm(x, None, weight, epsilon)[1],
            lambda x, weight: F.rms_norm(_wide(x), (x.shape[-1],), _wide(weight), epsilon).to(x.dtype),
            x,
            weight,
        )
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns x + delta and its `rms_norm`."""
    if (rows := _backend(x, delta, weight)) is not None:
        return rows.rms_norm(x, delta, weight, epsilon)
    # Compiled code makes the same sum.
    total = x + delta
    return total, rms_norm(total, weight, epsilon)


def rms_norm_one_more(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Does `rms_norm` with 1 + weight, formed in float32 before anything is rounded."""
    if x.is_cuda and (rows := _backend(x, weight)) is not None:
        return rows.rms_norm(x, None, weight, epsilon, True)[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), (x.shape[-1],), 1 + weight.to(wide), epsilon).to(x.dtype)


def add_rms_norm_one_more(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns x + delta and its `rms_norm_one_more`."""
    if x.is_cuda and (rows := _backend(x, delta, weight)) is not None:
        return rows.rms_norm(x, delta, weight, epsilon, True)
    total = x + delta
    return total, rms_norm_one_more(total, weight, epsilon)


def split_rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, places: Places | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Splits qkv [R, (H + 2 Hkv) d] into queries [R, H, d], keys [R, Hkv, d] and values [R, Hkv, d].

    Queries and keys are turned by their positions with cos, sin [R, d]: a head x becomes
    x cos + (-second half, first half) sin. With places keys and values may be put there instead, by a kernel
    on a GPU; then None is returned for them.
    """
    if (rows := _backend(qkv, cos, sin)) is not None:
        more = {"places": places} if places is not None and rows.NORMS_AND_STORES else {}
        return rows.split_rotated(qkv, cos, sin, heads, kv_heads, **more)
    split = partial(_split_rotated, heads=heads, kv_heads=kv_heads)
    if _trains_compiled(qkv, cos, sin):
        fast = partial(layer_native.split_rotated, heads=heads, kv_heads=kv_heads)
        return compiled.with_gradient(fast, split, qkv, cos, sin)
    return split(qkv, cos, sin)


def _split_rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    turned = rotated(qkv[:, : heads + kv_heads], cos, sin)
    return turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns heads x [R, n, d] by cos, sin [R, d]."""
    dtype, half = x.dtype, x.shape[-1] // 2
    x, cos, sin = _wide(x), _wide(cos), _wide(sin)
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(dtype)


def split_normed_rotated(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor, float, bool],
    places: Places | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Does `split_rotated` where each head of queries and keys has its norm taken first.

    norms: weights [d] for queries and for keys, epsilon, and whether they are times 1 + weight.
    """
    query_norm, key_norm, epsilon, one_more = norms
    rows = _backend(qkv, cos, sin, query_norm, key_norm) if qkv.is_cuda else None
    if rows is not None and rows.NORMS_AND_STORES:
        return rows.split_rotated(qkv, cos, sin, heads, kv_heads, rows.HeadNorms(*norms), places)
    norm = rms_norm_one_more if one_more else rms_norm
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads), dim=1)
    q, k = norm(q, query_norm, epsilon), norm(k, key_norm, epsilon)
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def gated_gelu(gate_up: Tensor) -> Tensor:
    """Returns gelu(gate) * up, [R, N], of gate_up [R, 2 N]; gelu by its formula with tanh."""
    if gate_up.is_cuda and (rows := _backend(gate_up)) is not None:
        return rows.gated(gate_up, True)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def gated_silu(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up, [R, N], of gate_up [R, 2 N]."""
    if (rows := _backend(gate_up)) is not None:
        return rows.gated_silu(gate_up)
    if _trains_compiled(gate_up):
        return compiled.with_gradient(layer_native.gated_silu, _gated_silu, gate_up)
    return _gated_silu(gate_up)


def _gated_silu(gate_up: Tensor) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _wide(x: Tensor) -> Tensor:
    """Returns numbers of 16 bits on a CPU in float32, and others as they are."""
    return x.float() if x.is_cpu and x.dtype.itemsize == 2 else x
