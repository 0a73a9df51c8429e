"""Decode attention on a GPU (see `kernels.attention.decode`): a pass over the prompts on tensor cores, and a
pass over each row's own tokens that joins both.

The queries of all rows of a prompt that share a key head go through the prompt's tokens together and leave
(max, sum, weighted values) per part of the prompt, float32. Each program finds the prompt that it serves, so
that the grid depends on shapes alone: block b belongs to the last prompt p with floor(offset_p group /
queries) + p <= b, which gives every prompt enough blocks and at most one too many.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.records import Caches, Score
from kernels.triton_math import tanh

LOG2_E = 1.4426950408889634
# There are two programs for each of an H100's processors. Where there would be fewer,
# a prompt's tokens are dealt to parts, of this many tokens or more, since a part costs 8 d bytes a query
# beside the 2 d itemsize of a token.
PROGRAMS = 264
LEAST_TOKENS = 128


class Tiles(NamedTuple):
    """Shape of one program's tiles."""

    queries: int
    tokens: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How both passes go through their tokens; None leaves the choice to the rules below."""

    shared: Tiles | None = None  # of the pass over prompts
    own: Tiles | None = None  # of the pass over each row's own tokens
    parts: int | None = None  # that a prompt's tokens are dealt to


INTERPRETED = Tiles(16, 16, 4, 1)


def prompt_tiles(width: int, dtype: torch.dtype, queries: int) -> Tiles:
    """Returns the tiles for this number of queries of a prompt and key head on average.

    Hopper's warp-group products take 64 rows. With fewer the older products do, since 16 queries
    a token are bound by bytes.
    """
    if dtype == torch.float32:
        return Tiles(16, 16, 4, 3 if width <= 128 else 2)
    if queries <= 16:
        return Tiles(16, 64, 4, 3 if width <= 128 else 2)
    return Tiles(64, 64, 4, 3) if width <= 128 else Tiles(64, 64, 8, 2)


def own_tiles(width: int, dtype: torch.dtype, group: int) -> Tiles:
    """Returns the tiles for the `group` query heads of one row that share a key head."""
    return prompt_tiles(width, dtype, 1)._replace(queries=max(16, triton.next_power_of_2(group)))


def parts_of(longest: int, window: int | None, programs: int) -> int:
    """Returns how many parts a prompt's tokens are dealt to; programs: the grid's without parts."""
    seen = longest if window is None else min(longest, window)
    return max(1, min(PROGRAMS // max(1, programs), triton.cdiv(seen, LEAST_TOKENS)))


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    p_keys,  # [stop, WIDTH]
    p_values,
    first,  # first visible token
    stop,  # one past the last
    first_tile,
    stop_tile,
    inner,  # scores in powers of 2 are inner * q.k, or outer * tanh(inner * q.k)
    outer,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,  # Triton's interpreter multiplies bfloat16 wrongly
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns max [BLOCK_M], sum and weighted values [BLOCK_M, BLOCK_D] over the tiles, float32.

    Each of the tiles holds a visible token.
    """
    o_d, o_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d = o_d < WIDTH
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(first_tile, stop_tile):
        o_t = tile * BLOCK_N + o_n
        seen = (o_t >= first) & (o_t < stop)
        in_k = seen[None, :] & in_d[:, None]
        k = tl.load(p_keys + o_t[None, :] * WIDTH + o_d[:, None], mask=in_k, other=0.0)
        s = _dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        if HAS_SOFTCAP:
            bent, _ = tanh(s * inner)
            s = bent * outer
        else:
            s *= inner
        s = tl.where(seen[None, :], s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - largest[:, None])
        before = tl.exp2(m - largest)
        total = total * before + tl.sum(p, 1)
        in_v = seen[:, None] & in_d[None, :]
        v = tl.load(p_values + o_t[:, None] * WIDTH + o_d[None, :], mask=in_v, other=0.0)
        acc = _dot(p.to(v.dtype), v, acc * before[:, None], UPCAST)
        m = largest
    return m, total, acc


@triton.jit
def prompt_kernel(
    p_query,  # [R, Hkv, GROUP, WIDTH]
    p_keys,  # [P, Hkv, longest, WIDTH]
    p_values,
    p_length,  # [P]
    p_offsets,  # [P + 1]
    p_used,  # [1]
    p_max,  # [parts, R, Hkv, GROUP] float32, in powers of 2
    p_sum,  # [parts, R, Hkv, GROUP] float32
    p_acc,  # [parts, R, Hkv, GROUP, WIDTH] float32, written where the sum is not 0
    rows,
    prompts,
    longest,
    window,
    inner,
    outer,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_block, i_head, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, parts = tl.num_programs(1), tl.num_programs(2)
    o_p = tl.arange(0, BLOCK_P)
    begin = tl.load(p_offsets + o_p, mask=o_p < prompts, other=0)
    i_prompt = tl.sum(((o_p < prompts) & (begin * GROUP // BLOCK_M + o_p <= i_block)).to(tl.int32), 0) - 1
    first_row = tl.load(p_offsets + i_prompt)
    queries = (tl.load(p_offsets + i_prompt + 1) - first_row) * GROUP
    first_query = (i_block - (first_row * GROUP // BLOCK_M + i_prompt)) * BLOCK_M
    if first_query >= queries:
        return
    o_m, o_d = first_query + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_m = o_m < queries
    # Places are int64, as a cache may hold more than 2^31 elements.
    at = ((first_row + o_m // GROUP) * heads + i_head) * GROUP + o_m % GROUP
    in_md = in_m[:, None] & (o_d < WIDTH)[None, :]
    q = tl.load(p_query + at[:, None] * WIDTH + o_d[None, :], mask=in_md, other=0.0)

    length = tl.load(p_length + i_prompt).to(tl.int32)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length + tl.load(p_used).to(tl.int32) - window, 0)
    first_tile, stop_tile = first // BLOCK_N, tl.cdiv(length, BLOCK_N)
    if HAS_WINDOW:
        # A window may end behind the prompt.
        stop_tile = tl.where(first < length, stop_tile, first_tile)
    share = tl.cdiv(stop_tile - first_tile, parts)
    first_tile += i_part * share
    stop_tile = tl.minimum(first_tile + share, stop_tile)
    cache = (i_prompt.to(tl.int64) * heads + i_head) * longest * WIDTH
    m, total, acc = _attend(
        q,
        p_keys + cache,
        p_values + cache,
        first,
        length,
        first_tile,
        stop_tile,
        inner,
        outer,
        HAS_SOFTCAP,
        UPCAST,
        WIDTH,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    at += i_part.to(tl.int64) * rows * heads * GROUP
    tl.store(p_max + at, m, mask=in_m)
    tl.store(p_sum + at, total, mask=in_m)
    if first_tile < stop_tile:
        tl.store(p_acc + at[:, None] * WIDTH + o_d[None, :], acc, mask=in_md)


@triton.jit
def own_kernel(
    p_query,  # [R, Hkv, GROUP, WIDTH]
    p_keys,  # [R, Hkv, room, WIDTH]
    p_values,
    p_used,  # [1]
    p_max,  # see prompt_kernel
    p_sum,
    p_acc,
    p_out,  # [R, Hkv, GROUP, WIDTH]
    rows,
    parts,
    room,
    window,
    inner,
    outer,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row, i_head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1).to(tl.int64)
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_m = o_m < GROUP
    in_md = in_m[:, None] & (o_d < WIDTH)[None, :]
    at = (i_row * heads + i_head) * GROUP + o_m
    q = tl.load(p_query + at[:, None] * WIDTH + o_d[None, :], mask=in_md, other=0.0)
    used = tl.load(p_used).to(tl.int32)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(used - window, 0)
    cache = (i_row * heads + i_head) * room * WIDTH
    m, total, acc = _attend(
        q,
        p_keys + cache,
        p_values + cache,
        first,
        used,
        first // BLOCK_N,
        tl.cdiv(used, BLOCK_N),
        inner,
        outer,
        HAS_SOFTCAP,
        UPCAST,
        WIDTH,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    stride = rows * heads * GROUP
    source = at
    for _ in range(parts):
        part_max = tl.load(p_max + source, mask=in_m, other=float("-inf"))
        part_sum = tl.load(p_sum + source, mask=in_m, other=0.0)
        in_part = in_md & (part_sum != 0)[:, None]
        part_acc = tl.load(p_acc + source[:, None] * WIDTH + o_d[None, :], mask=in_part, other=0.0)
        # The row's own maximum is finite, because the current token is always visible.
        largest = tl.maximum(m, part_max)
        before, here = tl.exp2(m - largest), tl.exp2(part_max - largest)
        total = total * before + part_sum * here
        acc = acc * before[:, None] + part_acc * here[:, None]
        m = largest
        source += stride
    out = (acc / total[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + at[:, None] * WIDTH + o_d[None, :], out, mask=in_md)


@triton.jit
def store_kernel(
    p_keys,  # [R, Hkv, room, WIDTH]
    p_values,
    p_key,  # [R, Hkv, WIDTH]
    p_value,
    p_used,  # [1]
    room,
    heads,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < heads * WIDTH
    source = i_row * heads * WIDTH + o
    target = ((i_row * heads + o // WIDTH) * room + tl.load(p_used) - 1) * WIDTH + o % WIDTH
    tl.store(p_keys + target, tl.load(p_key + source, mask=inside), mask=inside)
    tl.store(p_values + target, tl.load(p_value + source, mask=inside), mask=inside)


def decode_attention(query: Tensor, caches: Caches, score: Score, plan: Plan | None = None) -> Tensor:
    """Returns what `kernels.attention.decode.decode_attention` does, of arguments that are checked already.

    Memory beside the output: 4 parts R H (d + 2) bytes.
    """
    (rows, heads, width), (prompts, kv_heads, longest) = query.shape, caches.prompt_keys.shape[:3]
    query, out = query.contiguous(), query.new_empty(rows, heads * width)
    if out.numel() == 0:
        return out
    group = heads // kv_heads
    shared, own, parts = plan or Plan()
    scale, softcap, window = score
    shared = shared or prompt_tiles(width, query.dtype, triton.cdiv(rows * group, prompts))
    own = own or own_tiles(width, query.dtype, group)
    programs = max(prompts, triton.cdiv(rows * group, shared.queries)) * kv_heads
    parts = parts or parts_of(longest, window, programs)
    scalars = (
        0 if window is None else window,
        float(scale * LOG2_E if softcap is None else scale / softcap),
        1.0 if softcap is None else softcap * LOG2_E,
    )
    flags = {
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": window is not None,
        "UPCAST": not query.is_cuda,
        "GROUP": group,
        "WIDTH": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
    }
    statistics = query.new_empty(2, parts, rows, heads, dtype=torch.float32)
    acc = query.new_empty(parts, rows, heads, width, dtype=torch.float32)
    with torch.cuda.device_of(query):
        prompt_kernel[(rows * group // shared.queries + prompts, kv_heads, parts)](
            query,
            *caches[:4],
            caches.used,
            *statistics,
            acc,
            rows,
            prompts,
            longest,
            *scalars,
            **flags,
            BLOCK_P=triton.next_power_of_2(prompts),
            BLOCK_M=shared.queries,
            BLOCK_N=shared.tokens,
            num_warps=shared.warps,
            num_stages=shared.stages,
        )
        own_kernel[(rows, kv_heads)](
            query,
            *caches[4:],
            *statistics,
            acc,
            out,
            rows,
            parts,
            caches.own_keys.shape[2],
            *scalars,
            **flags,
            BLOCK_M=own.queries,
            BLOCK_N=own.tokens,
            num_warps=own.warps,
            num_stages=own.stages,
        )
    return out


def store(own_keys: Tensor, own_values: Tensor, key: Tensor, value: Tensor, used: Tensor) -> None:
    """Puts a token as `kernels.attention.decode.store` does, of arguments that are checked already."""
    rows, heads, room, width = own_keys.shape
    if key.numel() == 0:
        return
    with torch.cuda.device_of(own_keys):
        store_kernel[(rows,)](
            own_keys,
            own_values,
            key.contiguous(),
            value.contiguous(),
            used,
            room,
            heads,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(heads * width),
            num_warps=4,
        )
