"""The arithmetic of rows in plain torch: log-probs, J W and gradients of a chunk of rows.

Logits exist for one chunk of rows at a time, in one buffer that all steps overwrite. With z_y the target's
logit and J = d(-log p)/d(logits before the softcap),

    log p = (z_y - m) - log(sum exp(z - m)),  m = max z
    J     = (softmax(z) - onehot(y)) (1 - tanh(u / softcap)^2) / temperature,  u = h W^T + bias
    dH_t  = -a_t J_t W,  dW = -sum_t a_t J_t^T H_t,  dbias = -sum_t a_t J_t,  a_t = d loss / d log p_t

`kernels.loss_head.rows_native` and `kernels.loss_head.rows_triton` do the same with compiled code.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.loss_head.records import Head, LeftOut, statistics_dtype


class Sizes(NamedTuple):
    """How a workspace splits its work, and the bytes that this takes."""

    columns: int  # columns of the logits, and so rows of the head, that are done at a time
    tile_rows: int  # rows that are done at a time within them; 0: all
    fixed: int  # bytes whatever the number of rows
    row: int  # bytes of a row of a chunk, or of a row that is kept, and of the vectors beside it
    scratch: int  # bytes that a row of a chunk takes beyond that


class Kept(NamedTuple):
    """Rows whose logits a workspace has kept."""

    z: Tensor  # [C, V or more], from `keep`
    state: Tensor  # [C, STATE], from `keep`
    target: Tensor  # [C]
    hidden: Tensor  # [C, D]


class Sums(NamedTuple):
    """Where the gradients of a chunk go; None: not wanted."""

    d_hidden: Tensor | None  # [C, D], overwritten
    d_weight: Tensor | None  # [V, D], added to, or overwritten where it is `empty`
    empty: bool
    d_bias: Tensor | None  # [V], added to


class TorchRows:
    """The workspace of one call in plain torch, for chunks of at most `rows` rows.

    kind is what the caller asks for: "values", "product", "kept" (`keep` and `add_gradients`), or "spent",
    the same where z may be lost in `add_gradients`. z [C, V] keeps J without a factor of its row,
    J = state * z, so that the normalisation costs no pass. A row without a log-prob (NaN) spoils what it
    enters unless its coefficient is 0.
    """

    STATE = 1  # numbers a row that stand beside z
    ROUNDS_SUMS = False  # whether a head's gradient may come in the head's dtype, rounded once
    LEAST_ROWS = math.inf  # of a call and a chunk, from which on entries may be left out
    TILE = 1  # rows that a product computes at a time: chunks are whole tiles

    @classmethod
    def sizes(cls, head: Head, rows: int, budget: int, kind: str) -> Sizes:
        """Returns the split for this number of rows within `budget` bytes."""
        weight, bias = head.weight, head.bias
        vocabulary, width = weight.shape
        size = statistics_dtype(weight.dtype).itemsize
        converted = weight.dtype.itemsize != size
        columns = head_columns(weight, budget) if converted else vocabulary
        # The next part of a converted head is made before the last one is dropped, so there are two.
        fixed = size * 2 * columns * width if converted else 0
        fixed += 0 if bias is None or bias.dtype.itemsize == size else size * vocabulary
        # A row has z, hidden, hidden scaled and J W.
        row = size * (vocabulary + 3 * width)
        slope = kind != "values" and head.softcap is not None
        return Sizes(columns, 0, fixed, row, size * vocabulary if slope else 0)

    def __init__(self, head: Head, sizes: Sizes, rows: int, kind: str) -> None:
        weight = head.weight
        self.weight, self.temperature, self.softcap = weight, head.temperature, head.softcap
        self.columns, self.dtype = sizes.columns, statistics_dtype(weight.dtype)
        self.bias = None if head.bias is None else head.bias.to(self.dtype)
        self.slope = weight.new_empty(rows, len(weight), dtype=self.dtype) if sizes.scratch else None
        # Values and products need z within a call alone.
        scratch_rows = rows if kind in ("values", "product") else 0
        self.scratch_z = weight.new_empty(scratch_rows, len(weight), dtype=self.dtype)

    def survey(self, hidden: Tensor, target: Tensor) -> None:
        """Looks at all rows of a call before the first chunk of them; compiled code may choose by it what to
        leave out of their gradients."""

    @staticmethod
    def new_z(weight: Tensor, rows: int) -> Tensor:
        """Returns uninitialised z [rows, V or more]."""
        return weight.new_empty(rows, weight.shape[0], dtype=statistics_dtype(weight.dtype))

    def values(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Returns log p [C] of rows hidden [C, D]."""
        return self._logprob(hidden, target, self.scratch_z[: len(hidden)], False)[0]

    def product(self, hidden: Tensor, target: Tensor, out: Tensor) -> Tensor:
        """Returns log p [C]; out [C, D] becomes J W, rounded to its dtype once."""
        z = self.scratch_z[: len(hidden)]
        logprob, state = self._logprob(hidden, target, z, True)
        self._times_weight(z, state[:, 0], out)
        return logprob

    def keep(self, hidden: Tensor, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p [C] and state [C, STATE]; z [C, V] takes what `add_gradients` needs beside it."""
        return self._logprob(hidden, target, z, True)

    def mend(self, hidden: Tensor, target: Tensor, product: Tensor, row_factor: Tensor) -> list[LeftOut]:
        """Completes the rows of J W [C, D], those of all calls of `product` since the last one of this, that
        lack too much of it for their factors; returns what is left out, where anything is.
        """
        return []

    def add_gradients(self, kept: Kept, row_factor: Tensor, unit: Tensor | None, sums: Sums) -> list[LeftOut]:
        """Adds the gradients of a chunk, of which F = row_factor[:, None] * J.

        d_hidden = F W; d_weight += F^T hidden / unit; d_bias += F^T 1 / unit. A row of factor 0 adds nothing,
        even where it is not finite. Returns what is left out, where anything is.
        """
        z, state, _, hidden = kept
        unused, scale = row_factor == 0, state[:, 0]
        factor = torch.where(unused, 0, row_factor * scale)
        if sums.d_hidden is not None:
            self._times_weight(z, factor, sums.d_hidden)
        if unit is not None:
            factor = torch.where(unused, 0, row_factor / unit * scale)
        if sums.d_weight is not None:
            scaled = (hidden.to(self.dtype) * factor[:, None]).masked_fill_(unused[:, None], 0)
            self._add_weight_gradient(sums.d_weight, z, scaled, sums.empty)
        if sums.d_bias is not None:
            self._add_weight_gradient(sums.d_bias[:, None], z, factor[:, None], False)
        return []

    def _head(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields columns of the logits, and those rows of the head in the dtype of the logits."""
        if self.weight.dtype == self.dtype:
            yield slice(None), self.weight
            return
        for part in chunks(0, len(self.weight), self.columns):
            yield part, self.weight[part].to(self.dtype)

    def _logprob(self, hidden: Tensor, target: Tensor, z: Tensor, jacobian: bool) -> tuple[Tensor, Tensor]:
        """Returns log p [C] and scale [C, 1]; z [C, V] is overwritten, with `jacobian` by J / scale."""
        hidden, target = hidden.to(self.dtype), target.long()[:, None]
        for part, head in self._head():
            torch.mm(hidden, head.t(), out=z[:, part])
        if self.bias is not None:
            z.add_(self.bias)
        slope = None
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            if jacobian:
                slope = torch.mul(z, z, out=self.slope[: len(z)]).neg_().add_(1)
            z.mul_(self.softcap)
        if self.temperature != 1:
            z.div_(self.temperature)
        largest = z.amax(1, keepdim=True)
        shifted = z.gather(1, target) - largest
        total = z.sub_(largest).exp_().sum(1, keepdim=True)
        logprob = (shifted - total.log()).squeeze(1)
        if jacobian:
            # p_y - 1 comes from the unscaled exponentials: one rounding, and no second pass for the one-hot.
            z.scatter_(1, target, z.gather(1, target) - total)
            if slope is not None:
                z.mul_(slope)
            lost = logprob.isnan()
            # On a GPU the host does not look.
            if z.device.type != "cpu" or bool(lost.any()):
                z.masked_fill_(lost[:, None], 0)
        return logprob, 1 / (total * self.temperature)

    def _times_weight(self, z: Tensor, row_factor: Tensor, out: Tensor) -> None:
        """Sets out [C, D] to row_factor[:, None] * (z W), rounded to out's dtype once."""
        product = out if out.dtype == self.dtype else torch.empty_like(out, dtype=self.dtype)
        for i, (part, head) in enumerate(self._head()):
            torch.addmm(product, z[:, part], head, beta=min(i, 1), out=product)
        product.mul_(row_factor[:, None])
        if product is not out:
            out.copy_(product)

    def _add_weight_gradient(self, total: Tensor, z: Tensor, scaled_hidden: Tensor, empty: bool) -> None:
        """Adds z^T scaled_hidden to total [V, D], or overwrite it where it is `empty`."""
        total.addmm_(z.t(), scaled_hidden, beta=0 if empty else 1)


def chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Returns slices of `size` rows from start to stop."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def head_columns(weight: Tensor, budget: int) -> int:
    """Returns how many rows of the head are converted at a time: an eighth of the budget."""
    return max(1, min(weight.shape[0], budget // 16 // (4 * max(1, weight.shape[1]))))
