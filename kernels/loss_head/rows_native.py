"""The arithmetic of rows by compiled code (csrc/rows.cpp) for float32 rows on the CPU."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import compiled
from kernels.compiled import _native
from kernels.loss_head.records import Head, LeftOut
from kernels.loss_head.rows import Kept, Sizes, Sums, TorchRows, chunks, head_columns
from kernels.products import add_product, in_float32, takes_pairs, times_transposed


class NativeRows(TorchRows):
    """A workspace that works on logits a tile at a time, between its product
    and the next, while it is in cache.

    - Values and J W take in the logits of a tile with a running maximum, and keep none of them.
    - For gradients z keeps the logits (before the temperature; their tanh where there is a softcap),
      column part by column part. J is formed from them a tile at a time, times the factor of its row,
      and enters dH and dW at once. Where z may be lost then, J takes its place and needs no tile,
      whose memory holds more rows of a chunk.
    """

    STATE = 3
    TILE_ROWS = 1024
    # Tiles of compiled products stay in cache; MKL multiplies small tiles more slowly.
    TILE_BYTES, MKL_TILE_BYTES = 2**22, 2**25

    @classmethod
    def sizes(cls, head: Head, rows: int, budget: int, kind: str) -> Sizes:
        weight, bias = head.weight, head.bias
        vocabulary, width = weight.shape
        compiled_products = compiled.make.compiles_products
        # With MKL a tile's share of J W needs memory too.
        largest, part = (cls.TILE_BYTES, 6) if compiled_products else (cls.MKL_TILE_BYTES, 8)
        in_place = kind == "spent"
        tiles = (not in_place) + (head.softcap is not None and kind != "values")
        elements = max(1, min(largest, budget // part) // 4 // tiles) if tiles else largest // 4
        tile_rows = max(1, min(_even(rows, cls.TILE_ROWS), elements // 64))
        columns = max(1, min(vocabulary, elements // tile_rows))
        converted = weight.dtype != torch.float32
        if converted:
            columns = min(columns, head_columns(weight, budget))
        # The number of cache lines is odd: rows a power of two apart would share few places of the cache.
        columns = max(columns // 32 * 32 - 16, columns % 32 if columns < 32 else 16)
        # With MKL a tile's share of J W stands apart before it is added.
        shared = 1 if in_place or compiled_products else tile_rows
        fixed = 4 * (tile_rows * tiles * columns + shared * width + (2 * columns * width if converted else 0))
        fixed += 0 if bias is None or bias.dtype == torch.float32 else 4 * vocabulary
        row = 4 * (3 * width + 12) + (4 * vocabulary if kind in ("kept", "spent") else 0)
        return Sizes(columns, tile_rows, fixed, row, 0)

    def __init__(self, head: Head, sizes: Sizes, rows: int, kind: str) -> None:
        super().__init__(head, sizes, 0, kind)
        self.tile_rows, self.in_place = sizes.tile_rows, kind == "spent"
        self.inverse = (1 if head.softcap is None else head.softcap) / head.temperature

    def values(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self._forward(hidden, target, None, None)[0]

    def product(self, hidden: Tensor, target: Tensor, out: Tensor) -> Tensor:
        sums = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        logprob, state, scale = self._forward(hidden, target, None, sums)
        target_j = state[:, 2]
        if self.softcap is not None:
            target_j = target_j * self.target_slope
        # The target's share of J W is added apart from the others', so that it keeps its digits where the
        # target is almost certain.
        for tile in self._row_tiles(len(hidden)):
            share = self.weight[target[tile].long()].to(torch.float32).mul_(target_j[tile][:, None])
            torch.addcmul(share, sums[tile], scale[tile][:, None], out=sums[tile])
        if sums is not out:
            out.copy_(sums)
        return logprob

    def keep(self, hidden: Tensor, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        logprob, state, _ = self._forward(hidden, target, z, None)
        return logprob, state

    def add_gradients(self, kept: Kept, row_factor: Tensor, unit: Tensor | None, sums: Sums) -> list[LeftOut]:
        z, state, target, hidden = kept
        factor = (row_factor if unit is None else row_factor / unit).float().contiguous()
        target, hidden = target.long().contiguous(), hidden.to(torch.float32)
        # A row that adds nothing may hold anything, and NaN x 0 is NaN.
        unused = factor == 0
        some_unused = bool(unused.any())
        if sums.d_weight is not None and some_unused:
            hidden = hidden.masked_fill(unused[:, None], 0)
        d_hidden = sums.d_hidden
        if d_hidden is not None and (d_hidden.dtype != torch.float32 or not d_hidden.is_contiguous()):
            d_hidden = torch.empty_like(d_hidden, dtype=torch.float32, memory_format=torch.contiguous_format)
        buffers = hidden.new_empty(
            (not self.in_place) + (self.softcap is not None), min(len(z), self.tile_rows) * self.columns
        )
        threads = torch.get_num_threads()
        for part, head in self._head():
            for i, tile in enumerate(self._row_tiles(len(z))):
                logits = part_of(z, part)[tile]
                jacobian = logits if self.in_place else shaped(buffers[0], logits.shape)
                if self.softcap is not None:
                    slope = torch.mul(logits, logits, out=shaped(buffers[-1], logits.shape)).neg_().add_(1)
                _native.jacobian(
                    logits,
                    target[tile],
                    part.start,
                    self.inverse,
                    state[tile],
                    factor[tile],
                    jacobian,
                    threads,
                    compiled.make.instructions,
                )
                if self.softcap is not None:
                    jacobian.mul_(slope)
                    if some_unused:
                        jacobian.masked_fill_(unused[tile][:, None], 0)
                if d_hidden is not None and self.in_place and not compiled.make.compiles_products:
                    _add_by_mkl(d_hidden[tile], jacobian, head, part.start == 0)
                elif d_hidden is not None:
                    add_product(d_hidden[tile], jacobian, head, part.start == 0)
                if sums.d_weight is not None:
                    beta = 0 if sums.empty and i == 0 else 1
                    sums.d_weight[part].addmm_(jacobian.t(), hidden[tile], beta=beta)
                if sums.d_bias is not None:
                    sums.d_bias[part].add_(jacobian.sum(0))
        if d_hidden is None:
            return []
        if unit is not None:
            d_hidden.mul_(unit)
        if d_hidden is not sums.d_hidden:
            sums.d_hidden.copy_(d_hidden)
        return []

    def _head(self) -> Iterator[tuple[slice, Tensor]]:
        for part in chunks(0, len(self.weight), self.columns):
            yield part, self.weight[part].to(torch.float32)

    def _row_tiles(self, rows: int) -> Iterator[slice]:
        return chunks(0, rows, _even(rows, self.tile_rows))

    def _forward(
        self, hidden: Tensor, target: Tensor, z: Tensor | None, sums: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log p [C], state [C, 3] and the factors [C] that `sums` still wants.

        z takes all logits; sums [C, D] takes the part of J W of all tokens but the target.
        """
        rows, given = len(hidden), hidden
        pairs = takes_pairs(given, self.weight)
        hidden, target = hidden.to(torch.float32), target.long().contiguous()
        largest, target_z, logprob, scale = hidden.new_full((4, rows), -math.inf).unbind()
        others = torch.zeros(rows, dtype=torch.float64)
        threads = torch.get_num_threads()
        for part in chunks(0, len(self.weight), self.columns):
            narrow = self.weight[part]
            head = None if pairs and sums is None else narrow.to(torch.float32)
            for tile in self._row_tiles(rows):
                out = None if z is None else part_of(z, part)[tile]
                if pairs:
                    logits = in_float32(given[tile], narrow, out=out)
                else:
                    logits = times_transposed(hidden[tile], head, out=out)
                if self.bias is not None:
                    logits.add_(self.bias[part])
                slope = None
                if self.softcap is not None:
                    logits.div_(self.softcap).tanh_()
                    if sums is not None:
                        slope = torch.mul(logits, logits).neg_().add_(1)
                into = None if sums is None else sums[tile]
                _native.accumulate(
                    logits,
                    target[tile],
                    part.start,
                    self.inverse,
                    largest[tile],
                    others[tile],
                    target_z[tile],
                    into,
                    threads,
                    compiled.make.instructions,
                )
                if into is not None:
                    mass = logits if slope is None else logits.mul_(slope)
                    add_product(into, mass, head, part.start == 0)
                    del mass
                # The memory is free before the next tile is made.
                del logits, slope
        state = hidden.new_empty(rows, 3)
        _native.finish(self.inverse, 1 / self.temperature, largest, others, target_z, logprob, state, scale)
        if self.softcap is not None:
            self.target_slope = 1 - target_z * target_z
        return logprob, state, scale


def _add_by_mkl(total: Tensor, x: Tensor, head: Tensor, first: bool) -> None:
    """Does what `kernels.products.add_product` does by MKL, without memory for more than a row."""
    if len(x) > 1:
        total.addmm_(x, head, beta=0 if first else 1)
        return
    # MKL adds a single row up one product after the other, and long sums round more.
    for i, part in enumerate(chunks(0, len(head), 4096)):
        add_product(total, x[:, part], head[part], first and i == 0)


def shaped(buffer: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns the first elements of a flat buffer as a matrix."""
    return buffer[: shape[0] * shape[1]].view(shape)


def part_of(z: Tensor, part: slice) -> Tensor:
    """Returns the columns `part` of z [C, V], which stand together."""
    rows, columns = len(z), min(part.stop, z.shape[1]) - part.start
    return z.view(-1)[rows * part.start : rows * (part.start + columns)].view(rows, columns)


def _even(rows: int, most: int) -> int:
    """Returns the rows of a part where as few parts as there can be, of at most `most`,
    share them about equally.
    """
    return -(-rows // max(1, -(-rows // max(1, most))))
