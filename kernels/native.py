"""The compiled row arithmetic (csrc/rows.cpp) for float32 rows on the CPU; where it is missing, plain torch does the same work."""

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import compiled
from kernels.compiled import _native
from kernels.products import add_product, times_transposed
from kernels.reference import Sizes, TorchRows, chunks, head_columns

NO_WINDOW = 2**62
_told = False


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled path takes rows of logits there. Where only the module is missing, a log line says so once."""
    global _told
    if device.type != "cpu" or dtype != torch.float32:
        return False
    available = compiled.make.instructions is not None
    if not available and not _told:
        _told = True
        logging.getLogger(__name__).warning(
            "the compiled CPU kernels are not there: slower torch code runs instead; with a C++ compiler, install the project again"
        )
    return available


class NativeRows(TorchRows):
    """`kernels.reference.TorchRows` in which logits are worked on a tile at a time, between its product and the next, while it is in cache.

    - Values and J W take the logits in as they are made, with a running maximum, and keep none of them.
    - For gradients z keeps the logits (before the temperature, their tanh where there is a softcap), column part by column part. J is
      formed from them a tile at a time, times the factor of its row, and enters dH and dW at once. Where z may be lost
      then, J takes its place and needs no tile, whose memory holds more rows of a chunk.
    """

    STATE = 3
    TILE_ROWS = 1024
    # Tiles of compiled products stay in cache; MKL multiplies small tiles more slowly.
    TILE_BYTES, MKL_TILE_BYTES = 2**22, 2**25

    @classmethod
    def sizes(cls, weight: Tensor, bias: Tensor | None, softcap: float | None, rows: int, budget: int, kind: str) -> Sizes:
        vocabulary, width = weight.shape
        compiled_products = compiled.make.compiles_products
        # With MKL a tile's share of J W needs memory too.
        largest, part = (cls.TILE_BYTES, 6) if compiled_products else (cls.MKL_TILE_BYTES, 8)
        in_place = kind == "spent"
        tiles = (not in_place) + (softcap is not None and kind != "values")
        elements = max(1, min(largest, budget // part) // 4 // tiles) if tiles else largest // 4
        tile_rows = max(1, min(_even(rows, cls.TILE_ROWS), elements // 64))
        columns = max(1, min(vocabulary, elements // tile_rows))
        converted = weight.dtype != torch.float32
        if converted:
            columns = min(columns, head_columns(weight, budget))
        # An odd number of cache lines: rows a power of two apart would share few places of the cache.
        columns = max(columns // 32 * 32 - 16, columns % 32 if columns < 32 else 16)
        # By MKL a tile's share of J W, too, before it is added.
        shared = 1 if in_place or compiled_products else tile_rows
        fixed = 4 * (tile_rows * tiles * columns + shared * width + (2 * columns * width if converted else 0))
        fixed += 0 if bias is None or bias.dtype == torch.float32 else 4 * vocabulary
        return Sizes(columns, tile_rows, fixed, 4 * (3 * width + 12) + (4 * vocabulary if kind in ("kept", "spent") else 0), 0)

    def __init__(
        self, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None, sizes: Sizes, rows: int, kind: str
    ) -> None:
        super().__init__(weight, bias, temperature, softcap, sizes, 0, kind)
        self.tile_rows, self.in_place = sizes.tile_rows, kind == "spent"
        self.inverse = (1 if softcap is None else softcap) / temperature

    def values(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self._forward(hidden, target, None, None)[0]

    def product(self, hidden: Tensor, target: Tensor, out: Tensor) -> Tensor:
        sums = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        logprob, state, scale = self._forward(hidden, target, None, sums)
        own = state[:, 2]
        if self.softcap is not None:
            own = own * self.own_slope
        # The target's share of J W apart from the others', so that it keeps its digits where the target is almost certain.
        for tile in self._row_tiles(len(hidden)):
            mine = self.weight[target[tile].long()].to(torch.float32).mul_(own[tile][:, None])
            torch.addcmul(mine, sums[tile], scale[tile][:, None], out=sums[tile])
        if sums is not out:
            out.copy_(sums)
        return logprob

    def keep(self, hidden: Tensor, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        logprob, state, _ = self._forward(hidden, target, z, None)
        return logprob, state

    def add_gradients(
        self, z: Tensor, state: Tensor, target: Tensor, hidden: Tensor, row_factor: Tensor, unit: Tensor | None, d_hidden: Tensor | None,
        d_weight: Tensor | None, first: bool, d_bias: Tensor | None,
    ) -> None:  # fmt: skip
        factor = (row_factor if unit is None else row_factor / unit).float().contiguous()
        target, hidden = target.long().contiguous(), hidden.to(torch.float32)
        # NaN x 0: a row that adds nothing may hold anything.
        unused = factor == 0
        some_unused = bool(unused.any())
        if d_weight is not None and some_unused:
            hidden = hidden.masked_fill(unused[:, None], 0)
        sums = d_hidden
        if d_hidden is not None and (d_hidden.dtype != torch.float32 or not d_hidden.is_contiguous()):
            sums = torch.empty_like(d_hidden, dtype=torch.float32, memory_format=torch.contiguous_format)
        buffers = hidden.new_empty((not self.in_place) + (self.softcap is not None), min(len(z), self.tile_rows) * self.columns)
        for part, head in self._head():
            for i, tile in enumerate(self._row_tiles(len(z))):
                logits = _part(z, part)[tile]
                jacobian = logits if self.in_place else _shaped(buffers[0], logits.shape)
                if self.softcap is not None:
                    slope = torch.mul(logits, logits, out=_shaped(buffers[-1], logits.shape)).neg_().add_(1)
                _native.jacobian(
                    logits, target[tile], part.start, self.inverse, state[tile], factor[tile], jacobian, torch.get_num_threads(),
                    compiled.make.instructions,
                )  # fmt: skip
                if self.softcap is not None:
                    jacobian.mul_(slope)
                    if some_unused:
                        jacobian.masked_fill_(unused[tile][:, None], 0)
                if sums is not None and self.in_place and not compiled.make.compiles_products:
                    _add_by_mkl(sums[tile], jacobian, head, part.start == 0)
                elif sums is not None:
                    add_product(sums[tile], jacobian, head, part.start == 0)
                if d_weight is not None:
                    d_weight[part].addmm_(jacobian.t(), hidden[tile], beta=0 if first and i == 0 else 1)
                if d_bias is not None:
                    d_bias[part].add_(jacobian.sum(0))
        if sums is None:
            return
        if unit is not None:
            sums.mul_(unit)
        if sums is not d_hidden:
            d_hidden.copy_(sums)

    def _head(self) -> Iterator[tuple[slice, Tensor]]:
        for part in chunks(0, len(self.weight), self.columns):
            yield part, self.weight[part].to(torch.float32)

    def _row_tiles(self, rows: int) -> Iterator[slice]:
        return chunks(0, rows, _even(rows, self.tile_rows))

    def _forward(self, hidden: Tensor, target: Tensor, z: Tensor | None, sums: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(log p [C], state [C, 3], what to multiply `sums` with [C]); `z` takes all logits, `sums` [C, D] the others' part of J W."""
        rows = len(hidden)
        hidden, target = hidden.to(torch.float32), target.long().contiguous()
        largest, own, logprob, scale = hidden.new_full((4, rows), -math.inf).unbind()
        others = torch.zeros(rows, dtype=torch.float64)
        for part, head in self._head():
            for tile in self._row_tiles(rows):
                logits = times_transposed(hidden[tile], head, out=None if z is None else _part(z, part)[tile])
                if self.bias is not None:
                    logits.add_(self.bias[part])
                slope = None
                if self.softcap is not None:
                    logits.div_(self.softcap).tanh_()
                    if sums is not None:
                        slope = torch.mul(logits, logits).neg_().add_(1)
                into = None if sums is None else sums[tile]
                _native.accumulate(
                    logits, target[tile], part.start, self.inverse, largest[tile], others[tile], own[tile], into, torch.get_num_threads(),
                    compiled.make.instructions,
                )  # fmt: skip
                if into is not None:
                    add_product(into, logits if slope is None else logits.mul_(slope), head, part.start == 0)
                # Before the next tile is made.
                del logits, slope
        state = hidden.new_empty(rows, 3)
        _native.finish(self.inverse, 1 / self.temperature, largest, others, own, logprob, state, scale)
        if self.softcap is not None:
            self.own_slope = 1 - own * own
        return logprob, state, scale


def _add_by_mkl(total: Tensor, x: Tensor, head: Tensor, first: bool) -> None:
    """`kernels.products.add_product` by MKL, without memory for more than a row."""
    if len(x) > 1:
        total.addmm_(x, head, beta=0 if first else 1)
        return
    # A single row is added up one product after the other: long sums round more.
    for i, part in enumerate(chunks(0, len(head), 4096)):
        add_product(total, x[:, part], head[part], first and i == 0)


def _shaped(buffer: Tensor, shape: tuple[int, int]) -> Tensor:
    """The first elements of a flat buffer, as a matrix."""
    return buffer[: shape[0] * shape[1]].view(shape)


def _part(z: Tensor, part: slice) -> Tensor:
    """The columns `part` of z [C, V], which stand together."""
    rows, columns = len(z), min(part.stop, z.shape[1]) - part.start
    return z.view(-1)[rows * part.start : rows * (part.start + columns)].view(rows, columns)


def _even(rows: int, most: int) -> int:
    """Rows of a part where `rows` are dealt to as few parts of at most `most` as there can be, all about equal."""
    return -(-rows // max(1, -(-rows // max(1, most))))


def sample_rows(
    logits: Tensor, stream: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token int64 [R], its log-prob among the tokens kept, its log-prob under softmax(logits / temperature) and the gap, float32 [R]; see
    `kernels.sampling.sample_with_gap`.

    logits: float32 [R, V] on the CPU; stream: int64 [R], the rows' random numbers. `kept`, float32 [R, V], takes exp((logits - largest) /
    temperature) of the tokens kept and 0 of the others; only where some may be left out. Mass below exp(-87.3) of the largest is 0, and a
    token without mass is never drawn. A row with NaN or without a finite maximum gives token 0 and else NaN.
    """
    token, floats = torch.empty(len(stream), dtype=torch.int64), [torch.empty(len(stream)) for _ in range(3)]
    _native.sample_rows(
        logits.contiguous(),
        stream,
        1 / temperature,
        top_k,
        top_p,
        token,
        *floats,
        kept,
        torch.get_num_threads(),
        compiled.make.instructions,
    )
    return token, *floats


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, prompt_keys: Tensor, prompt_values: Tensor, prompt_length: Tensor, owner: Tensor,
    own_keys: Tensor, own_values: Tensor, used: int, *, scale: float | None = None, softcap: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one new token per row, [R, H d]: to the keys of the row's prompt, to its own `used` tokens so far, and to itself; with
    a window to the last `window` of these. Scores are softcap * tanh(scale * q.k / softcap); scale None is d ** -0.5, softcap None is off.

    query [R, H, d]; key, value [R, Hkv, d], stored as the row's token `used`. Prompts stand once: prompt_keys [P, Hkv, blocks, d, 16],
    prompt_values [P, Hkv, T, d], prompt_length int64 [P]; owner int64 [R]: the row's prompt. own_keys [R, Hkv, blocks, d, 16], own_values
    [R, Hkv, room, d]. All float32 on the CPU. Raises ValueError where shapes do not agree, the cache is full or the window is empty.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _native.decode_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), prompt_keys, prompt_values, prompt_length, owner, own_keys, own_values,
        used, query.shape[2] ** -0.5 if scale is None else scale, softcap or 0.0, NO_WINDOW if window is None else window, out,
        torch.get_num_threads(), compiled.make.instructions,
    )  # fmt: skip
    return out.flatten(1)


def rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x + delta, or x itself, and its RMS norm times weight); x, delta float32 [R, N] on the CPU. See `kernels.layer`."""
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    out = torch.empty_like(x)
    _native.rms_norm(
        x, None if delta is None else delta.contiguous(), weight, epsilon, None if delta is None else total, out,
        torch.get_num_threads(), compiled.make.instructions,
    )  # fmt: skip
    return total, out


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.layer.split_rotated`; float32 on the CPU."""
    q = qkv.new_empty(len(qkv), heads, cos.shape[1])
    k, v = (qkv.new_empty(len(qkv), kv_heads, cos.shape[1]) for _ in range(2))
    _native.split_rotated(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), q, k, v, torch.get_num_threads(), compiled.make.instructions
    )
    return q, k, v


def gated_silu(gate_up: Tensor) -> Tensor:
    """See `kernels.layer.gated_silu`; float32 on the CPU."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _native.gated_silu(gate_up.contiguous(), out, torch.get_num_threads(), compiled.make.instructions)
    return out
