"""Sampling on a GPU (see `kernels.sampling.draw`).

A program for each part of a row reads its logits once, and one program a row joins the parts. With top-k or
top-p a program a row runs before these and finds which tokens are kept, by a search that reads the row 19
times for one of the two and 35 times for both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 4096
ROW_BLOCK, ROW_WARPS = 4096, 16


@triton.jit
def _scrambled(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log_exponential(o, stream):
    """Returns the logarithm of the exponential numbers `o` (int32) of a stream, float32.

    `kernels.random.exponential` makes the same numbers.
    """
    low, high = (stream & 0xFFFFFFFF).to(tl.uint32), ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits = _scrambled(_scrambled(o.to(tl.uint32) * 0x9E3779B9 + low) ^ high)
    more = (_scrambled(_scrambled(bits * 0x9E3779B9 + high) ^ low) | 1).to(tl.float32) * 2.3283064e-10
    # 1 - v comes from the bits' complement, so that v and 1 - v both keep all digits near 0.
    v = (bits.to(tl.float32) + more) * 2.3283064e-10
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + (1 - more)) * 2.3283064e-10
    s = v / (2 - v)
    y = s * s
    near = 2 * s * (1.0 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9)))))
    return tl.log(tl.where(v < 0.25, near, -tl.log(rest)))


@triton.jit
def _mixed(x):
    """Finishes splitmix64 on uint64, as `kernels.random` does."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def stream_kernel(
    p_seed,  # [R] int64: the keys
    p_step,  # [1] int64
    p_stream,  # [R] int64
    rows,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(p_seed + o, mask=o < rows, other=0).to(tl.uint64, bitcast=True)
    step = tl.load(p_step).to(tl.uint64, bitcast=True)
    stream = _mixed(_mixed(key) + step * 0x9E3779B97F4A7C15)
    tl.store(p_stream + o, stream.to(tl.int64, bitcast=True), mask=o < rows)


@triton.jit
def _distances(raw, temperature, top):
    """Returns the distance from the row's largest z = logit / temperature, `top`, down to other ones.

    It is 0 or more, so that the order of its bits is its own order.
    """
    return tl.abs(top - tl.div_rn(raw.to(tl.float32), temperature))


@triton.jit
def _nearer(p_row, vocabulary, temperature, top, one, two, three, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over a row's tokens whose distance has bits below `one`, `two` and `three`, float64.

    A token counts 1 where COUNTED, else its mass exp(-distance). The order of additions is fixed, and the sum
    never falls where the bound grows.
    """
    o = tl.arange(0, BLOCK)
    b_one, b_two, b_three = (
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
    )
    for first in range(0, vocabulary, BLOCK):
        distance = _distances(
            tl.load(p_row + first + o, mask=first + o < vocabulary, other=float("-inf")), temperature, top
        )
        bits = distance.to(tl.uint32, bitcast=True)
        if COUNTED:
            weight = tl.full([BLOCK], 1.0, tl.float32)
        else:
            weight = tl.exp(-distance)
        b_one += tl.where(bits < one, weight, 0.0)
        b_two += tl.where(bits < two, weight, 0.0)
        b_three += tl.where(bits < three, weight, 0.0)
    return tl.sum(b_one.to(tl.float64), 0), tl.sum(b_two.to(tl.float64), 0), tl.sum(b_three.to(tl.float64), 0)


@triton.jit
def _prefix(p_row, vocabulary, temperature, top, limit, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """Finds the prefix of a row's tokens, in order of distance, whose elements each have less than `limit`
    before them (see `_nearer`).

    Returns the bits of its largest distance, how many tokens at this distance belong to it, and the sum over
    the nearer ones. A pass finds two bits, the highest first.
    """
    bits, step = tl.full((), 0, tl.uint32), tl.full((), 1 << 30, tl.uint32)
    before = tl.full((), 0.0, tl.float64)
    for _ in range(16):
        one, two, three = _nearer(
            p_row, vocabulary, temperature, top, bits + step, bits + 2 * step, bits + 3 * step, COUNTED, BLOCK
        )
        digit = (one < limit).to(tl.uint32) + (two < limit).to(tl.uint32) + (three < limit).to(tl.uint32)
        before = tl.where(digit == 0, before, tl.where(digit == 1, one, tl.where(digit == 2, two, three)))
        bits += digit * step
        step = step >> 2
    if COUNTED:
        equals = limit - before
    else:
        # At a mass of 0 rounding has hidden the boundary, and all tokens are kept.
        mass = tl.exp(-bits.to(tl.float32, bitcast=True)).to(tl.float64)
        equals = tl.where(mass > 0, tl.ceil((limit - before) / tl.where(mass > 0, mass, 1.0)), vocabulary)
    return bits, tl.minimum(tl.maximum(equals, 1.0), vocabulary), before


@triton.jit
def keep_kernel(
    p_raw,  # [R, V]
    p_top,  # [R] float32: the largest z = logit / temperature
    p_far,  # [R] float32: the largest distance from it that is kept
    p_last,  # [R] int64: the last token kept at this distance
    p_kept,  # [R] float64: sum of exp(z - top) over the tokens kept
    vocabulary,
    row_stride,
    temperature,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_raw + i_row * row_stride
    o = tl.arange(0, BLOCK)
    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        raw = tl.load(p_row + first + o, mask=first + o < vocabulary, other=float("-inf")).to(tl.float32)
        b_top = tl.maximum(b_top, raw)
    top = tl.div_rn(tl.max(b_top, 0), temperature)
    if TOP_K > 0:
        bits, equals, _ = _prefix(
            p_row, vocabulary, temperature, top, tl.full((), TOP_K, tl.float64), True, BLOCK
        )
        kept, _, _ = _nearer(p_row, vocabulary, temperature, top, bits, bits, bits, False, BLOCK)
        kept += equals * tl.exp(-bits.to(tl.float32, bitcast=True))
    else:
        bits, equals = tl.full((), 0x7F800000, tl.uint32), tl.full((), 0.0, tl.float64)
        kept, _, _ = _nearer(p_row, vocabulary, temperature, top, bits, bits, bits, False, BLOCK)
    if TOP_P < 1:
        limit = tl.full((), TOP_P, tl.float64) * kept
        own_bits, own_equals, before = _prefix(p_row, vocabulary, temperature, top, limit, False, BLOCK)
        shorter = (own_bits < bits) | ((own_bits == bits) & (own_equals < equals))
        kept = tl.where(shorter, before + own_equals * tl.exp(-own_bits.to(tl.float32, bitcast=True)), kept)
        bits, equals = tl.where(shorter, own_bits, bits), tl.where(shorter, own_equals, equals)
    far = bits.to(tl.float32, bitcast=True)
    seen, b_last = tl.full((), 0, tl.int32), tl.full([BLOCK], -1, tl.int32)
    for first in range(0, vocabulary, BLOCK):
        distance = _distances(
            tl.load(p_row + first + o, mask=first + o < vocabulary, other=float("-inf")), temperature, top
        )
        at = (distance == far).to(tl.int32)
        b_last = tl.where((at == 1) & (seen + tl.cumsum(at, 0) <= equals.to(tl.int32)), first + o, b_last)
        seen += tl.sum(at, 0)
    tl.store(p_top + i_row, top)
    tl.store(p_far + i_row, far)
    tl.store(p_last + i_row, tl.max(b_last, 0).to(tl.int64))
    tl.store(p_kept + i_row, kept)


@triton.jit
def part_kernel(
    p_raw,  # [R, V]
    p_stream,  # [R] int64, not read where GREEDY
    p_top,  # [R]: see keep_kernel; these are not read unless TRUNCATED
    p_far,
    p_last,
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
    TRUNCATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = tl.arange(0, BLOCK)
    o_v = i_part * BLOCK + o
    raw = tl.load(p_raw + i_row * row_stride + o_v, mask=o_v < vocabulary, other=float("-inf")).to(tl.float32)
    z = tl.div_rn(raw, temperature)
    m = tl.max(z, 0)
    # In a part of -inf only, -inf - -inf would be NaN.
    z -= tl.where(m == float("-inf"), 0.0, m)
    mass = tl.exp(z)
    if GREEDY:
        lead = z
    else:
        # A token without mass is never drawn.
        lead = tl.where(mass > 0, z - _log_exponential(o_v, tl.load(p_stream + i_row)), float("-inf"))
    if TRUNCATED:
        distance, far = _distances(raw, temperature, tl.load(p_top + i_row)), tl.load(p_far + i_row)
        lead = tl.where(
            (distance < far) | ((distance == far) & (o_v <= tl.load(p_last + i_row))), lead, float("-inf")
        )
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
    p_kept,  # [R]: see keep_kernel; not read unless TRUNCATED
    p_token,  # [R] int64
    p_logprob,  # [R] float32: among the tokens kept, or 0 where GREEDY
    p_model_logprob,  # [R] float32: among all
    p_gap,  # [R] float32
    parts,
    row_stride,
    temperature,
    GREEDY: tl.constexpr,
    TRUNCATED: tl.constexpr,
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
    # A row is lost with a NaN, an infinity (whose mass is NaN) or no finite logit.
    lost = (total > 0) == 0
    token = tl.where(lost, 0, tl.load(p_place + i_row * parts + part))
    chosen = tl.div_rn(tl.load(p_raw + i_row * row_stride + token).to(tl.float32), temperature)
    logprob = (chosen - shift).to(tl.float64) - tl.log(tl.where(lost, 1.0, total))
    tl.store(p_token + i_row, token)
    logprob = tl.where(lost, float("nan"), logprob).to(tl.float32)
    tl.store(p_model_logprob + i_row, logprob)
    if TRUNCATED:
        among_kept = (chosen - shift).to(tl.float64) - tl.log(tl.where(lost, 1.0, tl.load(p_kept + i_row)))
        tl.store(p_logprob + i_row, tl.where(lost, float("nan"), among_kept).to(tl.float32))
    elif GREEDY:
        tl.store(p_logprob + i_row, 0.0)
    else:
        tl.store(p_logprob + i_row, logprob)
    tl.store(p_gap + i_row, tl.where(lost, float("nan"), gap))


def streams(key: Tensor, step: int | Tensor) -> Tensor:
    """Returns what `kernels.random.stream` does, by one kernel where torch takes 14."""
    key, rows, block = key.contiguous(), len(key), 256
    step = step if isinstance(step, Tensor) else key.new_full((1,), step)
    out = torch.empty_like(key)
    if rows:
        with torch.cuda.device_of(key):
            stream_kernel[(triton.cdiv(rows, block),)](key, step, out, rows, BLOCK=block, num_warps=4)
    return out


def sample_rows(
    logits: Tensor, stream: Tensor | None, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws a token per row and returns what `kernels.sampling.draw.sample_with_gap` does.

    - logits [R, V]: any float dtype, read as float32.
    - stream int64 [R] names the rows' random numbers. None takes the likeliest token (the first of equals)
      with logprob 0, whatever top_k and top_p.

    Sums over parts are float64. A token without mass is never drawn. A row with NaN or without a finite
    maximum gives token 0 and NaN for the rest (a greedy logprob stays 0).
    """
    rows, vocabulary = logits.shape
    logits = logits.detach()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    token = logits.new_empty(rows, dtype=torch.int64)
    logprob, model_logprob, gap = logits.new_empty(3, rows, dtype=torch.float32)
    if rows == 0:
        return token, logprob, model_logprob, gap
    greedy, temperature = stream is None, float(temperature)
    top_k = top_k if top_k < vocabulary else 0
    truncated = not greedy and (top_k > 0 or top_p < 1)
    block = min(PART, triton.next_power_of_2(vocabulary))
    parts = triton.cdiv(vocabulary, block)
    statistics = (
        *logits.new_empty(4, rows, parts, dtype=torch.float32),
        logits.new_empty(rows, parts, dtype=torch.int64),
    )
    bounds, kept = (gap, gap, token), gap
    with torch.cuda.device_of(logits):
        if truncated:
            bounds = *logits.new_empty(2, rows, dtype=torch.float32), torch.empty_like(token)
            kept = logits.new_empty(rows, dtype=torch.float64)
            row_block = min(ROW_BLOCK, triton.next_power_of_2(vocabulary))
            keep_kernel[(rows,)](
                logits,
                *bounds,
                kept,
                vocabulary,
                logits.stride(0),
                temperature,
                TOP_K=top_k,
                TOP_P=float(top_p),
                BLOCK=row_block,
                num_warps=ROW_WARPS,
            )
        part_kernel[(rows, parts)](
            logits,
            token if greedy else stream,
            *bounds,
            *statistics,
            vocabulary,
            parts,
            logits.stride(0),
            temperature,
            GREEDY=greedy,
            TRUNCATED=truncated,
            BLOCK=block,
            num_warps=4 if block < PART else 8,
        )
        join_kernel[(rows,)](
            logits,
            *statistics,
            kept,
            token,
            logprob,
            model_logprob,
            gap,
            parts,
            logits.stride(0),
            temperature,
            GREEDY=greedy,
            TRUNCATED=truncated,
            BLOCK_PARTS=triton.next_power_of_2(parts),
            num_warps=1,
        )
    return token, logprob, model_logprob, gap
