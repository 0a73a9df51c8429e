"""RMS norm, rotary positions and gated SiLU on a GPU: a kernel each, where torch takes two to eight.

`kernels.layer.layer` says what they do. Arithmetic is float32, and each result is rounded to the dtype once.
Each layer launches 10 kernels per decoding step instead of 21.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layer.records import Places
from kernels.triton_math import tanh

GATE_BLOCK = 1024
NORMS_AND_STORES = True  # whether `split_rotated` takes norms and places


class HeadNorms(NamedTuple):
    """Norms of each head of queries and of keys."""

    query: Tensor  # [d]
    key: Tensor  # [d]
    epsilon: float
    one_more: bool  # each is times 1 + its weight


@triton.jit
def norm_kernel(
    p_x,  # [R, N], rows x_stride apart
    p_delta,  # [R, N], rows delta_stride apart
    p_weight,  # [N]
    p_total,  # [R, N]: x + delta, rounded, of which the norm is taken
    p_out,  # [R, N]
    x_stride,
    delta_stride,
    width,
    epsilon,
    ADD: tl.constexpr,
    ONE_MORE: tl.constexpr,  # the norm is times 1 + weight
    BLOCK: tl.constexpr,
):
    i_row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = o < width
    x = tl.load(p_x + i_row * x_stride + o, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(p_delta + i_row * delta_stride + o, mask=inside, other=0.0)
        total = (x + delta.to(tl.float32)).to(p_total.dtype.element_ty)
        tl.store(p_total + i_row * width + o, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(p_weight + o, mask=inside, other=0.0).to(tl.float32)
    if ONE_MORE:
        weight += 1
    out = x * (1 / tl.sqrt(tl.sum(x * x, 0) / width + epsilon)) * weight
    tl.store(p_out + i_row * width + o, out.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    p_qkv,  # [R, (HEADS + 2 KV_HEADS) 2 HALF], rows qkv_stride apart
    p_cos,  # [R, 2 HALF]
    p_sin,  # [R, 2 HALF]
    p_query,  # [R, HEADS, 2 HALF]
    p_key,  # [R, KV_HEADS, room, 2 HALF], or [R, KV_HEADS, 2 HALF] unless STORES
    p_value,
    p_used,  # [1]; not read unless STORES
    p_query_norm,  # [2 HALF]; the norms are not read unless NORMED
    p_key_norm,  # [2 HALF]
    qkv_stride,
    room,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,  # each head of queries and keys is divided by its root mean square first
    ONE_MORE: tl.constexpr,
    STORES: tl.constexpr,  # keys and values go to place used - 1
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row, o_h, o_d = (
        tl.program_id(0).to(tl.int64),
        tl.arange(0, BLOCK_H)[:, None],
        tl.arange(0, BLOCK_D)[None, :],
    )
    in_d = o_d < HALF
    inside = (o_h < HEADS + KV_HEADS) & in_d
    source = p_qkv + i_row * qkv_stride + o_h * 2 * HALF + o_d
    lower = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    upper = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = p_query.dtype.element_ty
    if NORMED:
        size = tl.sum(lower * lower + upper * upper, 1)[:, None] / (2 * HALF)
        scale = 1 / tl.sqrt(size + epsilon)
        is_query, is_key = in_d & (o_h < HEADS), in_d & (o_h >= HEADS)
        low_weight = tl.load(p_query_norm + o_d + 0 * o_h, mask=is_query, other=0.0).to(tl.float32)
        low_weight += tl.load(p_key_norm + o_d + 0 * o_h, mask=is_key, other=0.0).to(tl.float32)
        up_weight = tl.load(p_query_norm + HALF + o_d + 0 * o_h, mask=is_query, other=0.0).to(tl.float32)
        up_weight += tl.load(p_key_norm + HALF + o_d + 0 * o_h, mask=is_key, other=0.0).to(tl.float32)
        if ONE_MORE:
            low_weight += 1
            up_weight += 1
        # A norm is rounded before its result is turned, as it is where a gradient is asked for.
        lower = (lower * scale * low_weight).to(kind).to(tl.float32)
        upper = (upper * scale * up_weight).to(kind).to(tl.float32)
    angle = i_row * 2 * HALF + o_d
    cos_low = tl.load(p_cos + angle, mask=in_d, other=0.0)
    cos_up = tl.load(p_cos + angle + HALF, mask=in_d, other=0.0)
    sin_low = tl.load(p_sin + angle, mask=in_d, other=0.0)
    sin_up = tl.load(p_sin + angle + HALF, mask=in_d, other=0.0)
    low = lower * cos_low.to(tl.float32) - upper * sin_low.to(tl.float32)
    up = upper * cos_up.to(tl.float32) + lower * sin_up.to(tl.float32)
    query = p_query + (i_row * HEADS + o_h) * 2 * HALF + o_d
    tl.store(query, low.to(kind), mask=inside & (o_h < HEADS))
    tl.store(query + HALF, up.to(kind), mask=inside & (o_h < HEADS))
    o_v = tl.arange(0, BLOCK_V)
    if STORES:
        place = tl.load(p_used) - 1
        key = p_key + ((i_row * KV_HEADS + o_h - HEADS) * room + place) * 2 * HALF + o_d
        i_head, in_head = o_v // (2 * HALF), o_v % (2 * HALF)
        target = ((i_row * KV_HEADS + i_head) * room + place) * 2 * HALF + in_head
    else:
        key = p_key + (i_row * KV_HEADS + o_h - HEADS) * 2 * HALF + o_d
        target = i_row * KV_HEADS * 2 * HALF + o_v
    tl.store(key, low.to(kind), mask=inside & (o_h >= HEADS))
    tl.store(key + HALF, up.to(kind), mask=inside & (o_h >= HEADS))
    in_v = o_v < KV_HEADS * 2 * HALF
    value = tl.load(p_qkv + i_row * qkv_stride + (HEADS + KV_HEADS) * 2 * HALF + o_v, mask=in_v)
    tl.store(p_value + target, value, mask=in_v)


@triton.jit
def gelu(x):
    """Returns gelu x by its formula with tanh, and its derivative."""
    inner = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
    value, slope = tanh(inner)
    inner_slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + value), 0.5 * (1 + value) + 0.5 * x * slope * inner_slope


@triton.jit
def gate_kernel(
    p_gate_up,  # [R, 2 N], rows stride apart
    p_out,  # [R, N]
    gate_stride,
    width,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    gate = tl.load(p_gate_up + i_row * gate_stride + o, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(p_gate_up + i_row * gate_stride + width + o, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value, _ = gelu(gate)
    else:
        value = gate / (1 + tl.exp(-gate))
    out = value * up
    tl.store(p_out + i_row * width + o, out.to(p_out.dtype.element_ty), mask=inside)


def serves(x: Tensor, *others: Tensor) -> bool:
    """Returns whether these kernels take x [R, N] and the tensors with it.

    They take tensors on a GPU, in one dtype of up to 32 bits, and not empty.
    """
    alike = x.is_cuda and x.dtype != torch.float64 and all(t.dtype == x.dtype for t in others)
    return alike and x.numel() > 0 and x.stride(1) == 1


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, one_more: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns x + delta, or x itself without a delta, and its norm, times weight or with `one_more` times
    1 + weight; [R, N] each."""
    rows, width = x.shape
    out = x.new_empty(rows, width)
    total = x if delta is None else torch.empty_like(out)
    delta = x if delta is None else delta
    delta = delta if delta.stride(1) == 1 else delta.contiguous()
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        norm_kernel[(rows,)](
            x,
            delta,
            weight,
            total,
            out,
            x.stride(0),
            delta.stride(0),
            width,
            epsilon,
            ADD=total is not x,
            ONE_MORE=one_more,
            BLOCK=block,
            num_warps=norm_warps(block),
        )
    return total, out


def norm_warps(block: int) -> int:
    """Returns 1 to 16 warps, for about 8 numbers a thread."""
    return max(1, min(16, block // 256))


def split_rotated(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: HeadNorms | None = None,
    places: Places | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns what `kernels.layer.layer.split_rotated`, or with norms `split_normed_rotated`, does, as three
    contiguous tensors; with places the queries alone, and puts keys and values there."""
    rows, d, room = len(qkv), cos.shape[1], 0
    query, key, value = qkv.new_empty(rows, heads, d), None, None
    if places is None:
        key, value = written = [qkv.new_empty(rows, kv_heads, d) for _ in range(2)]
    else:
        written, room = [places.keys, places.values], places.keys.shape[2]
        assert places.keys.shape == places.values.shape == (rows, kv_heads, room, d)
        assert places.keys.dtype == places.values.dtype == qkv.dtype
    with torch.cuda.device_of(qkv):
        rotate_kernel[(rows,)](
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            query,
            *written,
            qkv if places is None else places.used,
            cos if norms is None else norms.query,
            cos if norms is None else norms.key,
            qkv.stride(0),
            room,
            0.0 if norms is None else norms.epsilon,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=d // 2,
            NORMED=norms is not None,
            ONE_MORE=norms is not None and norms.one_more,
            STORES=places is not None,
            BLOCK_H=triton.next_power_of_2(heads + kv_heads),
            BLOCK_D=triton.next_power_of_2(d // 2),
            BLOCK_V=triton.next_power_of_2(kv_heads * d),
            num_warps=4,
        )
    return query, key, value


def gated_silu(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up, [R, N]."""
    return gated(gate_up, False)


def gated(gate_up: Tensor, by_gelu: bool) -> Tensor:
    """Returns silu(gate) * up, or gelu(gate) * up by its formula with tanh, [R, N]."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    with torch.cuda.device_of(gate_up):
        gate_kernel[(rows, triton.cdiv(width, GATE_BLOCK))](
            gate_up, out, gate_up.stride(0), width, GELU=by_gelu, BLOCK=GATE_BLOCK, num_warps=4
        )
    return out
