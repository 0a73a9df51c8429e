"""Rows taken by index, whose gradients are added up in one order on every device.

A row may be taken often: all responses see their prompt. On a GPU torch adds the gradients of such rows
with atomics, in 16 bits and in an order that differs from run to run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Picks:
    """Which rows of a source [M, ...] are taken, S in all, and which of these each source row is."""

    index: Tensor  # int64 [S]: rows of the source
    order: Tensor  # int64 [S]: places among the S, by source row, those of a row in ascending order
    ends: Tensor  # int64 [M+1]: source row m is at the places order[ends[m]] to order[ends[m + 1] - 1]

    @staticmethod
    def of(index: Tensor, rows: int) -> "Picks":
        """Makes picks of a source of so many rows; index int64 [S], on the CPU."""
        ends = torch.cat([index.new_zeros(1), torch.bincount(index, minlength=rows)]).cumsum(0)
        return Picks(index, index.argsort(stable=True), ends)

    def to(self, device: torch.device) -> "Picks":
        """Moves the tensors to `device`."""
        return Picks(*(x.to(device, non_blocking=True) for x in (self.index, self.order, self.ends)))


def take(source: Tensor, picks: Picks) -> Tensor:
    """Returns the rows [S, ...] of source [M, ...]; on a GPU a gradient in it is added up in float32, in the
    order of the picks, and rounded once. On a CPU torch adds in that order itself, in the source's dtype."""
    if source.is_cuda and torch.is_grad_enabled() and source.requires_grad:
        return _Take.apply(source, picks.index, picks.order, picks.ends)
    return source.index_select(0, picks.index)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, index: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(order, ends)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return sums_of_places(gradient, *ctx.saved_tensors), None, None, None


def sums_of_places(rows: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """Returns [M, ...], the sums over the places of each source row of rows [S, ...]; 0 for one without any.

    Sums are float32 (float64 for float64), in the order of the places, and rounded once.
    """
    if rows.is_cuda and rows.dtype != torch.float64:
        from kernels import gather_triton

        return gather_triton.sums_of_places(rows, order, ends)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).index_select(0, order)
    sums = torch.segment_reduce(wide.flatten(1), "sum", lengths=ends.diff(), unsafe=True, initial=0.0)
    return sums.view(len(ends) - 1, *rows.shape[1:]).to(rows.dtype)
