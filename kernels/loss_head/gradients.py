"""Adds up the gradients of one call, part by part."""

import math

import torch
from torch import Tensor

from kernels.loss_head.records import Head, LeftOut, Needs, statistics_dtype
from kernels.loss_head.rows import Kept, Sums, TorchRows, chunks


class Gradients:
    """Gradients of one call as they are added up. A part's `row_factor` is -a_t;
    rows where it is 0 add nothing.

    In float16 small factors would be lost, so there the head's gradient is added up
    relative to their size `unit`, which other dtypes do not need.
    """

    def __init__(
        self,
        work: TorchRows,
        hidden: Tensor,
        bias: Tensor | None,
        needs: Needs,
        unit: Tensor | float | None,
        once: bool = False,
    ) -> None:
        """once: all rows are added by one call of `add`, so that there are no sums to keep in float32."""
        dtype = statistics_dtype(hidden.dtype)
        self.work, self.hidden, self.dtype = work, hidden, dtype
        self.unit = torch.as_tensor(unit) if hidden.dtype == torch.float16 else None
        contiguous = torch.contiguous_format
        self.d_hidden = torch.empty_like(hidden, memory_format=contiguous) if needs.hidden else None
        sums = work.weight.dtype if once and work.ROUNDS_SUMS and self.unit is None else dtype
        self.d_weight = work.weight.new_empty(work.weight.shape, dtype=sums) if needs.weight else None
        self.d_bias = torch.zeros_like(bias, dtype=dtype) if needs.bias else None
        self.started = False  # whether d_weight holds anything
        # Scheme E opens sums of two sequences: d_weight, d_bias, and whether d_weight is still empty.
        self.open: tuple[Tensor | None, Tensor | None, bool] | None = None
        self.added = 0  # chunks of rows
        self.left: list[LeftOut] = []  # of each chunk that lacks anything
        self.open_left: list[LeftOut] = []

    def add(self, part: slice | Tensor, kept: Kept, row_factor: Tensor) -> None:
        """Adds the rows at `part`."""
        sums = Sums(None, self.d_weight, not self.started, self.d_bias)
        self.left += self._add(part, kept, row_factor.to(self.dtype), self.unit, sums)
        self.started = True

    def add_opposite(self, part: slice, kept: Kept, row_factor: Tensor) -> None:
        """Adds rows of a sequence or two of scheme E, whose -a is known only up to its sign, as the second
        one's is the negative of the first one's.
        """
        if self.open is None:
            apart = self.started and self.d_weight is not None
            d_weight = torch.empty_like(self.d_weight) if apart else self.d_weight
            self.open = d_weight, None if self.d_bias is None else torch.zeros_like(self.d_bias), True
        d_weight, d_bias, empty = self.open
        self.open_left += self._add(part, kept, row_factor, None, Sums(None, d_weight, empty, d_bias))
        self.open = d_weight, d_bias, False

    def end_opposite(self, parts: list[slice], factor: Tensor) -> None:
        """Ends scheme E for sequences whose rows are all added; factor: the first one's -a."""
        for part in parts if self.d_hidden is not None else []:
            self.d_hidden[part] = (self.d_hidden[part] * factor).to(self.d_hidden.dtype)
        relative = factor if self.unit is None else factor / self.unit
        for total, opposite in ((self.d_weight, self.open[0]), (self.d_bias, self.open[1])):
            if opposite is not None:
                opposite.mul_(relative)
            if opposite is not total:
                total.add_(opposite)
        self.started, self.open = True, None
        if self.open_left:
            # On a GPU the host waits here.
            self.left += [left.times(float(relative)) for left in self.open_left]
            self.open_left = []

    def _add(
        self, part: slice | Tensor, kept: Kept, row_factor: Tensor, unit: Tensor | None, sums: Sums
    ) -> list[LeftOut]:
        """Adds rows, and lists what they lack where they do."""
        self.added += 1
        into = None
        if self.d_hidden is not None:
            if isinstance(part, slice):
                into = self.d_hidden[part]
            else:
                into = torch.empty_like(kept.hidden, memory_format=torch.contiguous_format)
        left = self.work.add_gradients(kept, row_factor, unit, sums._replace(d_hidden=into))
        if into is not None and not isinstance(part, slice):
            self.d_hidden.index_copy_(0, part, into)
        return left

    def left_out(self) -> Tensor:
        """Returns, before `result`, what `left_out` says of what was added."""
        several = self.added > 1
        return left_out(self.left, self.hidden, *((self.d_weight, self.d_bias) if several else ()))

    def result(self, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients in hidden, weight and bias, in their dtypes; empty where not needed."""
        if self.d_weight is not None and not self.started:
            self.d_weight.zero_()
        if self.unit is not None:
            for total in (self.d_weight, self.d_bias):
                if total is not None:
                    total.mul_(self.unit)
        gradients = (
            self.d_hidden,
            None if self.d_weight is None else self.d_weight.to(head.weight.dtype),
            None if self.d_bias is None else self.d_bias.to(head.bias.dtype),
        )
        return tuple(self.hidden.new_empty(0) if x is None else x for x in gradients)


def left_out(
    parts: list[LeftOut], hidden: Tensor, d_weight: Tensor | None = None, d_bias: Tensor | None = None
) -> Tensor:
    """Returns [2]: the bound on the relative error of dH, dW and the bias's gradient by what the parts of a
    call left out, and the mean over rows of the probability left out.

    d_weight [V, D], d_bias [V]: the sums of several parts. A single part knows its size itself. The result is
    on the CPU, where it was made, unless there are no parts.
    """
    dtype = statistics_dtype(hidden.dtype)
    if not parts:
        return torch.zeros(2, dtype=dtype, device=hidden.device)
    bounds = [_ratio(max(x.hidden_error for x in parts), max(x.hidden_size for x in parts))]
    for total, errors, size in (
        (d_weight, [x.weight_error for x in parts], parts[0].weight_size),
        (d_bias, [x.bias_error for x in parts], parts[0].bias_size),
    ):
        if total is not None and sum(errors) > 0:
            low, high = torch.aminmax(total)
            size = max(-float(low), float(high)) - sum(errors)
        bounds.append(_ratio(sum(errors), size))
    mean = sum(x.mass for x in parts) / max(1, sum(x.rows for x in parts))
    return torch.tensor([max(bounds), mean], dtype=dtype)


def _ratio(error: float, size: float) -> float:
    """Divides a bound on an error by how large a gradient is at least."""
    return 0.0 if error == 0 else error / size if size > 0 else math.inf


def scale_rows(product: Tensor, factor: Tensor, out: Tensor) -> None:
    """Sets out to product times the factor of each row, in the factor's dtype and rounded once.

    A row of factor 0 becomes 0 whatever it holds.
    """
    # Blocks go one at a time, as the budget counts no converted copies of all rows.
    for part in chunks(0, len(product), max(1, len(product) // 8)):
        a = factor[part][:, None]
        out[part] = torch.where(a == 0, 0, product[part] * a)
