"""Log-probs without stored logits, for forward passes alone: a Triton matrix kernel keeps only the running
maximum and sum of each row.

A program takes BLOCK_M rows and one part of the vocabulary, and leaves (max, sum, target logit) of each row;
a second kernel joins the parts of a row in their order. All shapes of blocks are in `TABLE`;
nothing is tuned at run time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.loss_head.records import Head
from kernels.triton_math import logit


class Blocks(NamedTuple):
    """Shape of one program's tiles."""

    m: int
    v: int
    d: int
    warps: int
    stages: int


# Each entry is (largest D, blocks). Up to D = 1024 reading stored logits back costs more than the products
# that this kernel makes more slowly than cuBLAS: 26 to 46 % of them in 16 bits, 51 to 91 % in float32 by the
# floors of bytes and flops. Above it the row kernel works on cuBLAS's logits. None of this is measured on a
# GPU yet; bench/sm90.py compiles it for sm_90.
TABLE = ((640, Blocks(128, 128, 64, 8, 3)), (1024, Blocks(128, 256, 64, 8, 3)))
INTERPRETED = Blocks(16, 32, 16, 4, 1)
PARTS_PER_ROW_BLOCK = 8
PROGRAMS = 132  # processors of an H100 or H200: few rows go in more parts, so that each has a program


def blocks_for(width: int, dtype: torch.dtype) -> Blocks | None:
    """Returns the tiles for D = width, or None where stored logits are better."""
    if dtype == torch.float32:
        # tl.dot would round to TF32, or leave the tensor cores.
        return None
    return next((blocks for largest, blocks in TABLE if width <= largest), None)


def parts_for(rows: int, blocks: Blocks, vocabulary: int) -> int:
    """Returns into how many parts the vocabulary is cut for so many rows."""
    parts = max(PARTS_PER_ROW_BLOCK, PROGRAMS // max(1, triton.cdiv(rows, blocks.m)))
    return min(parts, triton.cdiv(vocabulary, blocks.v))


@triton.jit
def part_kernel(
    p_hidden,  # [T, D]
    p_weight,  # [V, D]
    p_bias,  # [V]
    p_target,  # [T]
    p_max,  # [parts, T] float32
    p_sum,  # [parts, T] float32
    p_target_logit,  # [parts, T] float32, -inf where the target is in another part
    rows,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    tiles_per_part,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,  # Triton's interpreter multiplies bfloat16 wrongly
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_m, i_part = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = o_m < rows
    o_d = tl.arange(0, BLOCK_D)
    # Rows past the end read the last one; their results are not stored.
    row = tl.minimum(o_m, rows - 1).to(tl.int64)
    target = tl.load(p_target + row)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    z_y = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first = i_part * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tl.cdiv(vocabulary, BLOCK_V))):
        o_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        column = tl.minimum(o_v, vocabulary - 1).to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for start in range(0, width, BLOCK_D):
            inside = start + o_d < width
            at_a = p_hidden + row[:, None] * hidden_stride + (start + o_d)[None, :]
            at_b = p_weight + column[None, :] * weight_stride + (start + o_d)[:, None]
            a = tl.load(at_a, mask=inside[None, :], other=0.0)
            b = tl.load(at_b, mask=inside[:, None], other=0.0)
            if UPCAST:
                acc += tl.dot(a.to(tl.float32), b.to(tl.float32))
            else:
                acc = tl.dot(a, b, acc)
        if HAS_BIAS:
            acc += tl.load(p_bias + column).to(tl.float32)[None, :]
        z, _ = logit(acc, softcap, temperature, HAS_SOFTCAP)
        z = tl.where((o_v < vocabulary)[None, :], z, float("-inf"))
        z_y = tl.maximum(z_y, tl.max(tl.where(o_v[None, :] == target[:, None], z, float("-inf")), 1))
        largest = tl.maximum(m, tl.max(z, 1))
        # In a tile of -inf only, -inf - -inf would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        m = largest
    out = i_part.to(tl.int64) * rows + o_m
    tl.store(p_max + out, m, mask=in_m)
    tl.store(p_sum + out, total, mask=in_m)
    tl.store(p_target_logit + out, z_y, mask=in_m)


@triton.jit
def join_kernel(p_max, p_sum, p_target_logit, p_logprob, rows, parts, BLOCK: tl.constexpr):
    # The program number is converted here instead of rows, because the compiler takes
    # a single row as a constant.
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o < rows
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    z_y = tl.full([BLOCK], float("-inf"), tl.float32)
    for i in range(parts):
        at = i * rows + o
        part_max = tl.load(p_max + at, mask=inside, other=float("-inf"))
        part_sum = tl.load(p_sum + at, mask=inside, other=0.0)
        z_y = tl.maximum(z_y, tl.load(p_target_logit + at, mask=inside, other=float("-inf")))
        largest = tl.maximum(m, part_max)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(m - shift) + part_sum * tl.exp(part_max - shift)
        m = largest
    tl.store(p_logprob + o, (z_y - m) - tl.log(total), mask=inside)


def token_logprob(
    hidden: Tensor, head: Head, target: Tensor, blocks: Blocks, parts: int, out: Tensor
) -> None:
    """Sets out [T], float32, to log p of rows hidden [T, D]; memory 3 x parts x T float32 numbers."""
    weight, bias, temperature, softcap, _ = head
    rows, (vocabulary, width) = len(hidden), weight.shape
    if rows == 0:
        return
    tiles_per_part = triton.cdiv(triton.cdiv(vocabulary, blocks.v), parts)
    partial = hidden.new_empty(3, parts, rows, dtype=torch.float32)
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    with torch.cuda.device_of(hidden):
        part_kernel[(triton.cdiv(rows, blocks.m), parts)](
            hidden,
            weight,
            weight if bias is None else bias,
            target,
            *partial,
            rows,
            vocabulary,
            width,
            hidden.stride(0),
            weight.stride(0),
            tiles_per_part,
            temperature,
            1.0 if softcap is None else float(softcap),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            UPCAST=not hidden.is_cuda,
            BLOCK_M=blocks.m,
            BLOCK_V=blocks.v,
            BLOCK_D=blocks.d,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        join_kernel[(triton.cdiv(rows, 256),)](*partial, out, rows, parts, BLOCK=256)
