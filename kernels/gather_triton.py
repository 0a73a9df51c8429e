"""Sums of rows by their places on a GPU (see `kernels.gather`): a program for each part of a sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def places_kernel(
    p_rows,  # [S, N]
    p_order,  # [S] int64
    p_ends,  # [M + 1] int64
    p_out,  # [M, N]
    width,
    BLOCK: tl.constexpr,
):
    i_row, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(p_ends + i_row), tl.load(p_ends + i_row + 1)):
        place = tl.load(p_order + i)
        b_sum += tl.load(p_rows + place * width + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * width + o, b_sum.to(p_out.dtype.element_ty), mask=inside)


def sums_of_places(rows: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """Returns what `kernels.gather.sums_of_places` does, of up to 32 bits."""
    rows, count = rows.contiguous(), len(ends) - 1
    out, width = rows.new_empty(count, *rows.shape[1:]), rows[:1].numel() if len(rows) else 0
    if out.numel() == 0 or len(rows) == 0:
        return out.zero_()
    block = min(BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(rows):
        places_kernel[(count, triton.cdiv(width, block))](
            rows, order, ends, out, width, BLOCK=block, num_warps=4
        )
    return out
