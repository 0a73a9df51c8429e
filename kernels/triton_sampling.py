"""Sampling on a GPU: a program for each part of a row of logits, which are read once, and one program a row that joins its parts. See
`kernels.sampling`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 4096


@triton.jit
def _scrambled(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log_exponential(o, stream):
    """Logarithm of the exponential numbers `o` (int32) of a stream, as `kernels.sampling.exponential` makes them, in float32."""
    low, high = (stream & 0xFFFFFFFF).to(tl.uint32), ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits = _scrambled(_scrambled(o.to(tl.uint32) * 0x9E3779B9 + low) ^ high)
    more = (_scrambled(_scrambled(bits * 0x9E3779B9 + high) ^ low) | 1).to(tl.float32) * 2.3283064e-10
    # v, and 1 - v from the bits' complement: both keep all digits near 0.
    v = (bits.to(tl.float32) + more) * 2.3283064e-10
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + (1 - more)) * 2.3283064e-10
    s = v / (2 - v)
    y = s * s
    near = 2 * s * (1.0 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9)))))
    return tl.log(tl.where(v < 0.25, near, -tl.log(rest)))


@triton.jit
def part_kernel(
    p_raw,  # [R, V]
    p_stream,  # [R] int64, not read where GREEDY
    p_max,  # [R, parts] float32: the largest z = logit / temperature
    p_sum,  # [R, parts] float32: sum of exp(z - largest)
    p_lead,  # [R, parts] float32: the best z - largest - log E
    p_second,  # [R, parts] float32: and the second best
    p_place,  # [R, parts] int64: and its token
    vocabulary,
    parts,
    row_stride,
    temperature,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = tl.arange(0, BLOCK)
    o_v = i_part * BLOCK + o
    raw = tl.load(p_raw + i_row * row_stride + o_v, mask=o_v < vocabulary, other=float("-inf")).to(tl.float32)
    z = tl.div_rn(raw, temperature)
    m = tl.max(z, 0)
    # A part of -inf only: -inf - -inf would be NaN.
    z -= tl.where(m == float("-inf"), 0.0, m)
    mass = tl.exp(z)
    if GREEDY:
        lead = z
    else:
        # What has no mass is never drawn.
        lead = tl.where(mass > 0, z - _log_exponential(o_v, tl.load(p_stream + i_row)), float("-inf"))
    best = tl.max(lead, 0)
    i_out = i_row * parts + i_part
    tl.store(p_max + i_out, m)
    tl.store(p_sum + i_out, tl.sum(mass, 0))
    place = tl.min(tl.where(lead == best, o, BLOCK - 1), 0)
    tl.store(p_lead + i_out, best)
    tl.store(p_second + i_out, tl.max(tl.where(o == place, float("-inf"), lead), 0))
    tl.store(p_place + i_out, (i_part * BLOCK + place).to(tl.int64))


@triton.jit
def join_kernel(
    p_raw,  # [R, V]
    p_max,
    p_sum,
    p_lead,
    p_second,
    p_place,
    p_token,  # [R] int64
    p_logprob,  # [R] float32
    p_gap,  # [R] float32
    parts,
    row_stride,
    temperature,
    BLOCK_PARTS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_PARTS)
    i_in, inside = i_row * parts + o_p, o_p < parts
    part_max = tl.load(p_max + i_in, mask=inside, other=float("-inf"))
    part_sum = tl.load(p_sum + i_in, mask=inside, other=0.0)
    lead = tl.load(p_lead + i_in, mask=inside, other=float("-inf"))
    m = tl.max(part_max, 0)
    shift = tl.where(m == float("-inf"), 0.0, m)
    # A sum keeps NaN, which a maximum would lose.
    total = tl.sum(part_sum.to(tl.float64) * tl.exp(part_max - shift).to(tl.float64), 0)
    second = tl.load(p_second + i_in, mask=inside, other=float("-inf")) + (part_max - shift)
    lead += part_max - shift
    best = tl.max(lead, 0)
    part = tl.min(tl.where(lead == best, o_p, parts - 1), 0)
    gap = best - tl.max(tl.where(o_p == part, second, lead), 0)
    # NaN, no finite logit, or infinity (whose mass is NaN).
    lost = (total > 0) == 0
    token = tl.where(lost, 0, tl.load(p_place + i_row * parts + part))
    chosen = tl.div_rn(tl.load(p_raw + i_row * row_stride + token).to(tl.float32), temperature)
    logprob = (chosen - shift).to(tl.float64) - tl.log(tl.where(lost, 1.0, total))
    tl.store(p_token + i_row, token)
    tl.store(p_logprob + i_row, tl.where(lost, float("nan"), logprob).to(tl.float32))
    tl.store(p_gap + i_row, tl.where(lost, float("nan"), gap))


def sample_rows(logits: Tensor, stream: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Token int64 [R], its log-prob float32 [R] under softmax(logits / temperature) and the gap float32 [R] (see
    `kernels.sampling.sample_with_gap`); the likeliest token (the first of equals) where stream is None.

    logits [R, V] of any float dtype, read as float32; stream int64 [R], the rows' random numbers. Sums over parts are float64. A token
    without mass is never drawn. A row with NaN or without a finite maximum gives token 0 and else NaN.
    """
    rows, vocabulary = logits.shape
    logits = logits.detach()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    token, (logprob, gap) = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(2, rows, dtype=torch.float32)
    if rows == 0:
        return token, logprob, gap
    block = min(PART, triton.next_power_of_2(vocabulary))
    parts = triton.cdiv(vocabulary, block)
    statistics = *logits.new_empty(4, rows, parts, dtype=torch.float32), logits.new_empty(rows, parts, dtype=torch.int64)
    with torch.cuda.device_of(logits):
        part_kernel[(rows, parts)](
            logits, token if stream is None else stream, *statistics, vocabulary, parts, logits.stride(0), float(temperature),
            GREEDY=stream is None, BLOCK=block, num_warps=4 if block < PART else 8,
        )  # fmt: skip
        join_kernel[(rows,)](
            logits, *statistics, token, logprob, gap, parts, logits.stride(0), float(temperature),
            BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=1,
        )  # fmt: skip
    return token, logprob, gap
