"""RMS norm, rotary positions and gated SiLU on a GPU where a gradient is asked for: the kernels of
layer_triton.py forward, and one kernel each backward, where torch takes three to eight.

Arithmetic is float32, and each gradient is rounded to the dtype once. Sums over rows have an order that
depends on shapes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layer import layer_triton

# Programs that add up the gradient of a norm's weights, each over some rows.
PROGRAMS = 264
NORMS_AND_STORES = False


@triton.jit
def norm_backward_kernel(
    p_x,  # [R, N], of which the norm was taken, rows x_stride apart
    p_weight,  # [N]
    p_d_total,  # [R, N]: gradient of x itself, not read unless ADD
    p_d_out,  # [R, N]: gradient of the norm
    p_d_x,  # [R, N]
    p_d_weight,  # [programs, N] float32, not written unless WEIGHT
    rows,
    x_stride,
    width,
    epsilon,
    ADD: tl.constexpr,
    ONE_MORE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    inside = o < width
    weight = tl.load(p_weight + o, mask=inside, other=0.0).to(tl.float32)
    if ONE_MORE:
        weight += 1
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        x = tl.load(p_x + i_row * x_stride + o, mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(p_d_out + i_row * width + o, mask=inside, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(x * x, 0) / width + epsilon)
        normed, d_normed = x * scale, d_out * weight
        d_x = (d_normed - normed * (tl.sum(d_normed * normed, 0) / width)) * scale
        if ADD:
            d_x += tl.load(p_d_total + i_row * width + o, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_d_x + i_row * width + o, d_x.to(p_d_x.dtype.element_ty), mask=inside)
        if WEIGHT:
            b_sum += d_out * normed
    if WEIGHT:
        tl.store(p_d_weight + tl.program_id(0) * width + o, b_sum, mask=inside)


@triton.jit
def rotate_backward_kernel(
    p_query,  # [R, HEADS, 2 HALF]: gradients
    p_key,  # [R, KV_HEADS, 2 HALF]
    p_value,  # [R, KV_HEADS, 2 HALF]
    p_cos,  # [R, 2 HALF]
    p_sin,  # [R, 2 HALF]
    p_qkv,  # [R, (HEADS + 2 KV_HEADS) 2 HALF]
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
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
    is_query, is_key = (o_h < HEADS) & in_d, (o_h >= HEADS) & (o_h < HEADS + KV_HEADS) & in_d
    query = p_query + (i_row * HEADS + o_h) * 2 * HALF + o_d
    key = p_key + (i_row * KV_HEADS + o_h - HEADS) * 2 * HALF + o_d
    low = tl.load(query, mask=is_query, other=0.0).to(tl.float32)
    low += tl.load(key, mask=is_key, other=0.0).to(tl.float32)
    up = tl.load(query + HALF, mask=is_query, other=0.0).to(tl.float32)
    up += tl.load(key + HALF, mask=is_key, other=0.0).to(tl.float32)
    angle = i_row * 2 * HALF + o_d
    cos_low = tl.load(p_cos + angle, mask=in_d, other=0.0).to(tl.float32)
    cos_up = tl.load(p_cos + angle + HALF, mask=in_d, other=0.0).to(tl.float32)
    sin_low = tl.load(p_sin + angle, mask=in_d, other=0.0).to(tl.float32)
    sin_up = tl.load(p_sin + angle + HALF, mask=in_d, other=0.0).to(tl.float32)
    kind = p_qkv.dtype.element_ty
    row = p_qkv + i_row * (HEADS + 2 * KV_HEADS) * 2 * HALF
    out = row + o_h * 2 * HALF + o_d
    tl.store(out, (low * cos_low + up * sin_up).to(kind), mask=is_query | is_key)
    tl.store(out + HALF, (up * cos_up - low * sin_low).to(kind), mask=is_query | is_key)
    o_v = tl.arange(0, BLOCK_V)
    in_v = o_v < KV_HEADS * 2 * HALF
    value = tl.load(p_value + i_row * KV_HEADS * 2 * HALF + o_v, mask=in_v)
    tl.store(row + (HEADS + KV_HEADS) * 2 * HALF + o_v, value, mask=in_v)


@triton.jit
def gate_backward_kernel(
    p_gate_up,  # [R, 2 N], rows gate_stride apart
    p_d_out,  # [R, N]
    p_d_gate_up,  # [R, 2 N]
    gate_stride,
    width,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    gate = tl.load(p_gate_up + i_row * gate_stride + o, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(p_gate_up + i_row * gate_stride + width + o, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(p_d_out + i_row * width + o, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value, slope = layer_triton.gelu(gate)
    else:
        share = 1 / (1 + tl.exp(-gate))
        value, slope = gate * share, share * (1 + gate * (1 - share))
    d_gate = d_out * up * slope
    kind = p_d_gate_up.dtype.element_ty
    tl.store(p_d_gate_up + i_row * 2 * width + o, d_gate.to(kind), mask=inside)
    tl.store(p_d_gate_up + i_row * 2 * width + width + o, (d_out * value).to(kind), mask=inside)


class _Norm(torch.autograd.Function):
    """The norm of x + delta, and that sum; without a delta only the norm."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, one_more: bool):
        total, out = layer_triton.rms_norm(x, delta, weight, epsilon, one_more)
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)  # behind the last layer nobody uses the sum
        ctx.epsilon, ctx.one_more, ctx.added = epsilon, one_more, delta is not None
        return (total, out) if ctx.added else out

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (rows, width), wanted = x.shape, ctx.needs_input_grad[2]
        programs, block = min(rows, PROGRAMS) if wanted else rows, triton.next_power_of_2(width)
        d_total, d_out = gradients if ctx.added else (None, gradients[0])
        if d_out is None:
            return d_total, d_total, None, None, None
        d_out, add = d_out.contiguous(), d_total is not None
        d_x = x.new_empty(rows, width)
        d_weight = x.new_empty(programs, width, dtype=torch.float32) if wanted else d_x
        with torch.cuda.device_of(x):
            norm_backward_kernel[(programs,)](
                x,
                weight,
                d_total.contiguous() if add else d_out,
                d_out,
                d_x,
                d_weight,
                rows,
                x.stride(0),
                width,
                ctx.epsilon,
                ADD=add,
                ONE_MORE=ctx.one_more,
                WEIGHT=wanted,
                BLOCK=block,
                num_warps=layer_triton.norm_warps(block),
            )
        d_weight = d_weight.sum(0).to(weight.dtype) if wanted else None
        return d_x, d_x if ctx.added else None, d_weight, None, None


class _SplitRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return layer_triton.split_rotated(qkv, cos, sin, heads, kv_heads)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (cos, sin), (query, key, value) = ctx.saved_tensors, (x.contiguous() for x in gradients)
        rows, heads, d = query.shape
        kv_heads = key.shape[1]
        qkv = query.new_empty(rows, (heads + 2 * kv_heads) * d)
        with torch.cuda.device_of(query):
            rotate_backward_kernel[(rows,)](
                query,
                key,
                value,
                cos,
                sin,
                qkv,
                HEADS=heads,
                KV_HEADS=kv_heads,
                HALF=d // 2,
                BLOCK_H=triton.next_power_of_2(heads + kv_heads),
                BLOCK_D=triton.next_power_of_2(d // 2),
                BLOCK_V=triton.next_power_of_2(kv_heads * d),
                num_warps=4,
            )
        return qkv, None, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, by_gelu: bool) -> Tensor:
        ctx.by_gelu = by_gelu
        ctx.save_for_backward(gate_up)
        return layer_triton.gated(gate_up, by_gelu)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        rows, width = gradient.shape
        d_gate_up = gate_up.new_empty(rows, 2 * width)
        block = layer_triton.GATE_BLOCK
        with torch.cuda.device_of(gate_up):
            gate_backward_kernel[(rows, triton.cdiv(width, block))](
                gate_up,
                gradient.contiguous(),
                d_gate_up,
                gate_up.stride(0),
                width,
                GELU=ctx.by_gelu,
                BLOCK=block,
                num_warps=4,
            )
        return d_gate_up, None


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, one_more: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns what `kernels.layer.layer_triton.rms_norm` does, with gradients in x, delta and weight."""
    if delta is None:
        return x, _Norm.apply(x, None, weight, epsilon, one_more)
    return _Norm.apply(x, delta, weight, epsilon, one_more)


def split_rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `kernels.layer.layer_triton.split_rotated` does, with a gradient in qkv."""
    return _SplitRotated.apply(qkv, cos, sin, heads, kv_heads)


def gated_silu(gate_up: Tensor) -> Tensor:
    """Returns what `kernels.layer.layer_triton.gated_silu` does, with its gradient."""
    return _Gated.apply(gate_up, False)


def gated(gate_up: Tensor, by_gelu: bool) -> Tensor:
    """Returns what `kernels.layer.layer_triton.gated` does, with its gradient."""
    return _Gated.apply(gate_up, by_gelu)
