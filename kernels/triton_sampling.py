"""Sampling on a GPU: a part of a row of logits a program, then one program a row that finds the token's part and reads only that again. See
`kernels.sampling`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 4096


@triton.jit
def part_kernel(p_raw, p_max, p_sum, vocabulary, parts, row_stride, temperature, BLOCK: tl.constexpr):
    """Of p_raw [R, V]: the maximum and the sum of exp(z - maximum) of each part [R, parts], float32; z = logit / temperature."""
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_part * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(p_raw + i_row * row_stride + o_v, mask=o_v < vocabulary, other=float("-inf")).to(tl.float32)
    z = tl.div_rn(raw, temperature)
    m = tl.max(z, 0)
    # A part of -inf only: -inf - -inf would be NaN.
    shift = tl.where(m == float("-inf"), 0.0, m)
    tl.store(p_max + i_row * parts + i_part, m)
    tl.store(p_sum + i_row * parts + i_part, tl.sum(tl.exp(z - shift), 0))


@triton.jit
def pick_kernel(
    p_raw,  # [R, V]
    p_max,  # [R, parts] float32
    p_sum,  # [R, parts] float32
    p_u,  # [R] float64, not read where GREEDY
    p_token,  # [R] int64
    p_logprob,  # [R] float32
    vocabulary,
    parts,
    row_stride,
    temperature,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_PARTS)
    part_max = tl.load(p_max + i_row * parts + o_p, mask=o_p < parts, other=float("-inf"))
    part_sum = tl.load(p_sum + i_row * parts + o_p, mask=o_p < parts, other=0.0)
    m = tl.max(part_max, 0)
    shift = tl.where(m == float("-inf"), 0.0, m)
    mass = part_sum.to(tl.float64) * tl.exp(part_max - shift).to(tl.float64)
    # A sum keeps NaN, which a maximum would lose.
    total = tl.sum(mass, 0)
    if GREEDY:
        part = tl.min(tl.where(part_max == m, o_p, parts - 1), 0)
    else:
        upto = tl.cumsum(mass, 0)
        goal = tl.load(p_u + i_row) * total
        # What has no mass is never picked, though rounding may put the goal past the last sum or let sums of equal value differ.
        last = tl.max(tl.where(mass > 0, o_p, 0), 0)
        part = tl.min(tl.where((upto > goal) & (mass > 0), o_p, last), 0)
        goal -= tl.max(tl.where(o_p < part, upto, 0.0), 0)

    o = tl.arange(0, BLOCK)
    o_v = part * BLOCK + o
    raw = tl.load(p_raw + i_row * row_stride + o_v, mask=o_v < vocabulary, other=float("-inf")).to(tl.float32)
    z = tl.div_rn(raw, temperature)
    if GREEDY:
        within = tl.min(tl.where(z == m, o, BLOCK - 1), 0)
    else:
        mass_v = tl.exp(z - shift)
        last_v = tl.max(tl.where(mass_v > 0, o, 0), 0)
        within = tl.min(tl.where((tl.cumsum(mass_v.to(tl.float64), 0) > goal) & (mass_v > 0), o, last_v), 0)
    chosen = tl.sum(tl.where(o == within, z, 0.0), 0)
    # NaN, no finite logit, or infinity (whose mass is NaN).
    lost = (total > 0) == 0
    logprob = (chosen - shift).to(tl.float64) - tl.log(tl.where(lost, 1.0, total))
    tl.store(p_token + i_row, tl.where(lost, 0, part * BLOCK + within).to(tl.int64))
    tl.store(p_logprob + i_row, tl.where(lost, float("nan"), logprob).to(tl.float32))


def sample_rows(logits: Tensor, u: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Token int64 [R] and its log-prob float32 [R] under softmax(logits / temperature): by inversion of the cumulative mass at u, or the
    likeliest (the first of equals) where u is None.

    logits [R, V] of any float dtype, read as float32; u float64 [R] in (0, 1). The mass of parts and tokens is float32, its sums float64. A
    token without mass is never drawn. A row with NaN or without a finite maximum gives token 0 and log-prob NaN.
    """
    rows, vocabulary = logits.shape
    logits = logits.detach()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    token, logprob = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return token, logprob
    block = min(PART, triton.next_power_of_2(vocabulary))
    parts = triton.cdiv(vocabulary, block)
    statistics = logits.new_empty(2, rows, parts, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        part_kernel[(rows, parts)](
            logits, *statistics, vocabulary, parts, logits.stride(0), float(temperature), BLOCK=block, num_warps=4 if block < PART else 8
        )
        pick_kernel[(rows,)](
            logits, *statistics, statistics if u is None else u, token, logprob, vocabulary, parts, logits.stride(0), float(temperature),
            GREEDY=u is None, BLOCK=block, BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=4 if block < PART else 8,
        )  # fmt: skip
    return token, logprob
