"""Triton kernels for the entries of J that matter: their lists from logits, and sums of the rows that lists
name. `kernels.loss_head.rows_sparse_triton` says what for.

All sums have a fixed order: no result depends on which program ends first. Nothing of this is measured on a
GPU yet; bench/sm90.py compiles it for sm_90, and LOG.md has times by arithmetic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.loss_head.records import Head
from kernels.loss_head.rows_triton import FARTHEST, _capped, _exponents, _powers, factors

BLOCK = 256  # entries of a list that are cut or copied at a time
BLOCK_N, MOST_D = 8, 1024  # rows that a program adds up side by side, and elements of each


@triton.jit
def _collected(
    p_logits, p_bias, p_widest, p_entry, p_column, target, vocabulary, middle, start_total, space, threshold,
    to_log2, rest, softcap, inverse_softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Lists what is above threshold times the row's mass as far as it is known, from place 1 on.

    Returns the sum of 2^z over all but the target, the largest z, the length that the list would have, and of
    what is not listed the sums of 2^z times the cap's slope, bare and times the head's largest elements.
    """
    # A thread has EACH columns side by side, so that threads' counts alone are added up across them.
    o = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    b_max = tl.full([LANES, EACH], float("-inf"), tl.float32)
    b_left, b_error = tl.zeros([LANES, EACH], tl.float32), tl.zeros([LANES, EACH], tl.float32)
    others, count = 0.0, 1
    for start in range(0, vocabulary, LANES * EACH):
        o_v = start + o
        inside = o_v < vocabulary
        z, slope = _exponents(
            p_logits, p_bias, o_v, inside, middle, to_log2, rest, softcap, inverse_softcap, HAS_BIAS,
            HAS_SOFTCAP,
        )  # fmt: skip
        b_max = tl.maximum(b_max, z)
        e = tl.where(o_v == target, 0.0, tl.exp2(z))
        others += tl.sum(tl.sum(e, 1), 0)
        x = e * slope
        # The mass only grows, so that what is not above this is not above the bound of the whole row.
        live = x > threshold * (others + start_total)
        ones = live.to(tl.int32)
        mine = tl.sum(ones, 1)
        before = tl.cumsum(mine, 0) - mine
        place = count + before[:, None] + tl.cumsum(ones, 1) - ones
        fits = live & (place < space)
        tl.store(p_entry + place, x, mask=fits)
        tl.store(p_column + place, o_v, mask=fits)
        count += tl.sum(mine, 0)
        left = tl.where(live, 0.0, x)
        b_left += left
        b_error += left * tl.load(p_widest + o_v, mask=inside, other=0.0)
    top = tl.max(tl.max(b_max, 1), 0)
    return others, top, count, tl.sum(tl.sum(b_left, 1), 0), tl.sum(tl.sum(b_error, 1), 0)


@triton.jit
def select_kernel(
    p_logits,  # [C, V] float32
    p_bias,  # [V]
    p_widest,  # [V] float32, the largest absolute element of each row of the head
    p_target,  # [C]
    p_entry,  # [C, room] float32: entries of J; the first one is the target's, the others' columns rise
    p_column,  # [C, room] int32
    p_count,  # [C] int32; -1 for a list that has no room, and for a row without a log-prob
    p_logprob,  # [C] float32
    p_left,  # [C, 2] float32: of what is not listed the sum of J, and that of J times `widest`
    vocabulary,
    logits_stride,
    space,  # room
    threshold,  # share of a row's mass; only what is above it is listed
    to_log2,
    rest,
    temperature,
    softcap,
    inverse_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * logits_stride
    p_entry += i_row * space
    p_column += i_row * space
    target = tl.load(p_target + i_row).to(tl.int32)
    o = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    inside = o < vocabulary
    raw = tl.load(p_logits + o, mask=inside, other=float("-inf"))
    raw_y = tl.load(p_logits + target)
    if HAS_BIAS:
        raw += tl.load(p_bias + o, mask=inside, other=0.0).to(tl.float32)
        raw_y += tl.load(p_bias + target).to(tl.float32)
    value, _ = _capped(raw, softcap, inverse_softcap, HAS_SOFTCAP)
    value_y, slope_y = _capped(raw_y, softcap, inverse_softcap, HAS_SOFTCAP)
    middle = tl.maximum(tl.max(tl.max(tl.where(inside, value, float("-inf")), 1), 0), value_y)
    # With -inf alone, -inf - -inf would be NaN.
    middle = tl.where(middle == float("-inf"), 0.0, middle)
    own = tl.exp2(_powers(value_y, middle, to_log2, rest))
    others, top, count, left, error = _collected(
        p_logits, p_bias, p_widest, p_entry, p_column, target, vocabulary, middle, own, space, threshold,
        to_log2, rest, softcap, inverse_softcap, HAS_BIAS, HAS_SOFTCAP, LANES, EACH,
    )  # fmt: skip
    if (top > FARTHEST) | ((top < -FARTHEST) & (top > float("-inf"))):
        middle += top / to_log2
        own = tl.exp2(_powers(value_y, middle, to_log2, rest))
        # No thread writes the new list before the old one is written.
        tl.debug_barrier()
        others, top, count, left, error = _collected(
            p_logits, p_bias, p_widest, p_entry, p_column, target, vocabulary, middle, own, space, threshold,
            to_log2, rest, softcap, inverse_softcap, HAS_BIAS, HAS_SOFTCAP, LANES, EACH,
        )  # fmt: skip
    total = others + own
    lost = (total != total) | (total == 0)
    logprob = (value_y - middle) / temperature - tl.log(total)
    whole = 1 / (temperature * total)
    # The list was written by other threads.
    tl.debug_barrier()
    bound, kept, last = threshold * total, 1, tl.minimum(count, space)
    o = tl.arange(0, BLOCK)
    for start in range(1, last, BLOCK):
        here = start + o < last
        x = tl.load(p_entry + start + o, mask=here, other=0.0)
        column = tl.load(p_column + start + o, mask=here, other=0)
        above = here & (x > bound)
        below = tl.where(above, 0.0, x)
        left += tl.sum(below, 0)
        error += tl.sum(below * tl.load(p_widest + column, mask=here, other=0.0), 0)
        ones = above.to(tl.int32)
        place = kept + tl.cumsum(ones, 0) - ones
        # What is kept moves to places that all threads have read.
        tl.debug_barrier()
        tl.store(p_entry + place, x * whole, mask=above)
        tl.store(p_column + place, column, mask=above)
        kept += tl.sum(ones, 0)
    tl.store(p_entry, -others * whole * slope_y)
    tl.store(p_column, target)
    tl.store(p_count + i_row, tl.where(lost | (count > space), -1, kept))
    tl.store(p_logprob + i_row, tl.where(lost, float("nan"), logprob))
    tl.store(p_left + 2 * i_row, left * whole)
    tl.store(p_left + 2 * i_row + 1, error * whole)


@triton.jit
def pack_kernel(
    p_entry,  # [C, room] float32
    p_column,  # [C, room] int32
    p_offsets,  # [C + 1] int64: where the entries of each row go
    p_factor,  # [C] float32
    p_packed,  # [n] float32, values times their rows' factors
    p_packed_column,  # [n] int32
    p_packed_row,  # [n] int32
    space,
    BLOCK: tl.constexpr,
):
    i_row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    begin = tl.load(p_offsets + i_row)
    count = (tl.load(p_offsets + i_row + 1) - begin).to(tl.int32)
    factor = tl.load(p_factor + i_row)
    for start in range(0, count, BLOCK):
        here = start + o < count
        value = tl.load(p_entry + i_row * space + start + o, mask=here, other=0.0)
        column = tl.load(p_column + i_row * space + start + o, mask=here, other=0)
        at = begin + start + o
        tl.store(p_packed + at, value * factor, mask=here)
        tl.store(p_packed_column + at, column, mask=here)
        tl.store(p_packed_row + at, tl.zeros([BLOCK], tl.int32) + i_row.to(tl.int32), mask=here)


@triton.jit
def gather_kernel(
    p_source,  # [S, N]
    p_index,  # [n] int32: rows of the source
    p_entry,  # [n] float32
    p_ends,  # [M + 1] int64: row m of the result takes the entries from ends[m] to ends[m + 1]
    p_scale,  # [1] float32, a factor of all
    p_sums,  # [M, N]
    width,
    source_stride,
    sums_stride,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = o_d < width
    begin, end = tl.load(p_ends + i_row), tl.load(p_ends + i_row + 1)
    at_sums = p_sums + i_row * sums_stride + o_d
    # Each of BLOCK_N lanes has a sum of its own: long sums round more.
    b_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        here = start + o < end
        index = tl.load(p_index + start + o, mask=here, other=0).to(tl.int64)
        value = tl.load(p_entry + start + o, mask=here, other=0.0)
        at = p_source + index[:, None] * source_stride + o_d[None, :]
        x = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        b_sums += x * value[:, None]
    sums = tl.sum(b_sums, 0) * tl.load(p_scale)
    if ADD:
        # Most columns of a chunk have no entry.
        inside = o_d < tl.where(begin < end, width, 0)
        sums += tl.load(at_sums, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_sums, sums.to(p_sums.dtype.element_ty), mask=inside)


class Shape(NamedTuple):
    """How many logits a program of `select_kernel` takes at a time: lanes x each, by so many warps."""

    lanes: int
    each: int
    warps: int


def shape_of(vocabulary: int) -> Shape:
    """Returns the shape for a head of so many tokens. With 4096 logits at a time one program fills the
    registers of a processor."""
    lanes = max(8, min(512, triton.next_power_of_2(vocabulary) // 4))
    return Shape(lanes, 4, 8 if lanes == 512 else 4)


class Lists(NamedTuple):
    """The entries of rows that are kept. Behind `count` a list may hold anything."""

    value: Tensor  # [C, room] float32
    column: Tensor  # [C, room] int32
    count: Tensor  # [C] int32

    @staticmethod
    def empty(rows: int, room: int, like: Tensor) -> "Lists":
        """Returns uninitialised lists on the device of `like`."""
        value = like.new_empty(rows, room, dtype=torch.float32)
        column, count = (like.new_empty(*shape, dtype=torch.int32) for shape in ((rows, room), (rows,)))
        return Lists(value, column, count)


class Packed(NamedTuple):
    """The entries of all rows one behind the other, times the factors of their rows."""

    value: Tensor  # [n] float32
    column: Tensor  # [n] int32
    row: Tensor  # [n] int32
    ends: Tensor  # [C + 1] int64: row r has the entries from ends[r] to ends[r + 1]


def select(
    logits: Tensor, head: Head, widest: Tensor, target: Tensor, threshold: float, lists: Lists
) -> tuple[Tensor, Tensor]:
    """Fills the lists from logits [C, V]; returns log p [C] and the sums of what is left out [C, 2]."""
    rows, vocabulary = logits.shape
    logprob, left = (logits.new_empty(*shape) for shape in ((rows,), (rows, 2)))
    shape = shape_of(vocabulary)
    with torch.cuda.device_of(logits):
        select_kernel[(rows,)](
            logits,
            logits if head.bias is None else head.bias,
            widest,
            target,
            *lists,
            logprob,
            left,
            vocabulary,
            logits.stride(0),
            lists.value.shape[1],
            threshold,
            *factors(head.temperature, head.softcap),
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            LANES=shape.lanes,
            EACH=shape.each,
            BLOCK=BLOCK,
            num_warps=shape.warps,
        )
    return logprob, left


def pack(lists: Lists, ends: Tensor, factor: Tensor, total: int) -> Packed:
    """Copies the first ends[r + 1] - ends[r] entries of each row r, `total` in all, times factor [C]."""
    value, column, row = (x.new_empty(total) for x in (lists.value, lists.column, lists.column))
    rows, room = lists.value.shape
    with torch.cuda.device_of(value):
        pack_kernel[(rows,)](
            lists.value, lists.column, ends, factor, value, column, row, room, BLOCK=BLOCK, num_warps=4
        )
    return Packed(value, column, row, ends)


def by_column(packed: Packed, vocabulary: int) -> tuple[Packed, Tensor]:
    """Returns the entries in the order of their columns, those of a column in that of their rows, with the
    ends of columns [V + 1]; and where they were, int64 [n]."""
    column, order = packed.column.sort(stable=True)
    numbers = torch.arange(vocabulary + 1, dtype=torch.int32, device=column.device)
    ends = torch.searchsorted(column, numbers)
    return Packed(packed.value[order], column, packed.row[order], ends), order


def gather(
    source: Tensor, index: Tensor, value: Tensor, ends: Tensor, scale: Tensor, sums: Tensor, add: bool
) -> None:
    """Sets row m of sums [M, N] to scale times the sum of value * source[index] over the entries from
    ends[m] to ends[m + 1], or adds it; each is rounded once."""
    rows, width = sums.shape
    block = max(16, min(MOST_D, triton.next_power_of_2(width)))
    if rows == 0:
        return
    with torch.cuda.device_of(sums):
        gather_kernel[(rows, triton.cdiv(width, block))](
            source,
            index,
            value,
            ends,
            scale,
            sums,
            width,
            source.stride(0),
            sums.stride(0),
            ADD=add,
            BLOCK_N=BLOCK_N,
            BLOCK_D=block,
            num_warps=4,
        )
