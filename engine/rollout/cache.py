"""Keys and values of the rows that are decoded side by side."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.attention import attend
from kernels import native
from kernels.decode_attention import decode_attention, store


def new_cache(
    kept: list[tuple[Tensor, Tensor]], cu_seqlens: Tensor, n: int, room: int, windows: list[int | None] | None = None
) -> "AnyCache":
    """A cache for n rows per prompt, prompt-major, with room for `room` new tokens each.

    kept: per layer the prompts' rotated keys and values, packed [M, Hkv, d] by cu_seqlens [P+1]; windows: per layer how many tokens a token
    sees, itself included, as `attend` is told later. Only what new tokens see is kept, except by the slab of torch's attention.
    """
    key = kept[0][0]
    if native.serves(key.device, key.dtype):
        return SharedCache(kept, cu_seqlens, n, room, windows)
    if key.is_cuda and key.dtype != torch.float64:
        return GpuCache(kept, cu_seqlens, n, room, windows)
    return Cache(kept, cu_seqlens, n, room)


def _prompts(
    kept: list[tuple[Tensor, Tensor]], cu_seqlens: Tensor, windows: list[int | None] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per layer keys and values [P, T, Hkv, d], with zeros behind a prompt's end, and lengths int64 [P] on the keys' device; of a layer
    with a window only the tokens that the first new one sees, and at least one."""
    full = cu_seqlens.diff().to("cpu", torch.int64)
    prompts, device = len(full), kept[0][0].device
    places = {}
    for window in {None} if windows is None else set(windows):
        length = full if window is None else full.clamp(max=max(1, window - 1))
        longest = int(length.max())
        row = torch.repeat_interleave(torch.arange(prompts), length)
        at = torch.arange(len(row)) - (length.cumsum(0) - length)[row]
        # Where the tokens lie in the packed ones, and in the grid.
        source = at + (cu_seqlens[1:].to("cpu", torch.int64) - length)[row]
        places[window] = source.to(device), (at + row * longest).to(device), longest, length.to(device)
    for pair, window in zip(kept, windows or [None] * len(kept), strict=True):
        source, slot, longest, length = places[window]
        grids = (x.new_zeros(prompts * longest, *x.shape[1:]).index_copy_(0, slot, x if window is None else x[source]) for x in pair)
        key, value = (x.view(prompts, longest, *x.shape[1:]) for x in grids)
        yield key, value, length


class Cache:
    """A fixed slab per row whose prompts are right-aligned, so that every row appends at the same slot; attention by torch."""

    def __init__(self, kept: list[tuple[Tensor, Tensor]], cu_seqlens: Tensor, n: int, room: int) -> None:
        key = kept[0][0]
        length = cu_seqlens.diff().to(key.device, torch.int64)
        prompts, longest = len(length), int(cu_seqlens.diff().max())
        self.used = longest
        self.first = (longest - length).repeat_interleave(n)  # int64 [R]: first visible slot
        # Where the packed tokens stand in the right-aligned grid.
        begins = cu_seqlens[:-1].to(key.device, torch.int64)
        row = torch.repeat_interleave(torch.arange(prompts, device=key.device), length)
        slot = torch.arange(len(key), device=key.device) - begins[row] + (longest - length)[row] + row * longest
        self.slabs = []
        for pair in kept:
            slab = [x.new_empty(prompts * n, x.shape[1], longest + room, x.shape[2]) for x in pair]
            for target, x in zip(slab, pair, strict=True):
                grid = x.new_zeros(prompts * longest, *x.shape[1:]).index_copy_(0, slot, x)
                grid = grid.view(prompts, longest, *x.shape[1:]).transpose(1, 2)
                target[:, :, :longest] = grid.repeat_interleave(n, dim=0)
            self.slabs.append(slab)
        self._mask = self._new_mask()

    def _new_mask(self) -> Tensor:
        """Additive [R, 1, 1, used + 1]: 0 where a key is visible, -inf in front of the prompt."""
        slot = torch.arange(self.used + 1, device=self.first.device)
        hidden = slot < self.first[:, None]
        dtype = self.slabs[0][0].dtype
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)[:, None, None]

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, *,
        scale: float | None = None, softcap: float | None = None, window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Store one token's key and value [R, Hkv, d] in layer `index` and attend to all so far, or to the last `window` with itself:
        query [R, H, d] -> [R, H d]. scale, softcap: see `engine.model.attention.attend`."""
        stop = self.used + 1
        start = 0 if window is None else max(0, stop - window)
        for slab, x in zip(self.slabs[index], (key, value), strict=True):
            slab[:, :, self.used] = x
        keys, values = (slab[:, :, start:stop] for slab in self.slabs[index])
        # Heads that share keys stand side by side as queries.
        grouped = query.reshape(len(query), key.shape[1], -1, key.shape[2])
        return attend(grouped, keys, values, self._mask[..., start:], scale, softcap).reshape(len(query), -1)

    def advance(self) -> None:
        """All layers hold the token: go to the next."""
        self.used += 1
        self._mask = self._new_mask()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (int64)."""
        self.first = self.first[rows]
        self.slabs = [[x.index_select(0, rows) for x in slab] for slab in self.slabs]
        self._mask = self._new_mask()


class SharedCache:
    """Float32 on the CPU: a prompt's keys and values stand once for all its rows, keys in blocks of 16 tokens; compiled attention."""

    BLOCK = 16

    def __init__(
        self, kept: list[tuple[Tensor, Tensor]], cu_seqlens: Tensor, n: int, room: int, windows: list[int | None] | None = None
    ) -> None:
        self.owner = torch.arange(len(cu_seqlens) - 1).repeat_interleave(n)
        self.used = 0
        self.prompts, self.rows = [], []
        blocks = -(-room // self.BLOCK)
        for key, value, length in _prompts(kept, cu_seqlens, windows):
            rows, (heads, d) = len(self.owner), key.shape[2:]
            self.prompts.append((self._blocks(key), value.transpose(1, 2).contiguous(), length))
            self.rows.append([key.new_empty(rows, heads, blocks, d, self.BLOCK), key.new_empty(rows, heads, room, d)])

    def _blocks(self, keys: Tensor) -> Tensor:
        """[P, T, Hkv, d] -> [P, Hkv, blocks, d, 16]."""
        prompts, longest, heads, d = keys.shape
        padded = F.pad(keys, (0, 0, 0, 0, 0, -longest % self.BLOCK))
        return padded.view(prompts, -1, self.BLOCK, heads, d).permute(0, 3, 1, 4, 2).contiguous()

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, *,
        scale: float | None = None, softcap: float | None = None, window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Cache.attend`."""
        return native.decode_attention(
            query, key, value, *self.prompts[index], self.owner, *self.rows[index], self.used,
            scale=scale, softcap=softcap, window=window,
        )  # fmt: skip

    def advance(self) -> None:
        """See `Cache.advance`."""
        self.used += 1

    def keep(self, rows: Tensor) -> None:
        """See `Cache.keep`."""
        self.owner = self.owner[rows]
        self.rows = [[x.index_select(0, rows) for x in slab] for slab in self.rows]


class GpuCache:
    """On a GPU: a prompt's keys and values stand once for all its rows; attention by Triton. The host reads nothing of a step, so that a
    CUDA graph of it can be replayed until rows are dropped."""

    def __init__(
        self, kept: list[tuple[Tensor, Tensor]], cu_seqlens: Tensor, n: int, room: int, windows: list[int | None] | None = None
    ) -> None:
        device, prompts = kept[0][0].device, len(cu_seqlens) - 1
        self.owner = torch.arange(prompts, device=device).repeat_interleave(n)
        self.offsets = torch.arange(prompts + 1, device=device) * n
        self.used = torch.ones(1, dtype=torch.int64, device=device)  # with the token of this step
        self.prompts, self.rows = [], []
        for key, value, length in _prompts(kept, cu_seqlens, windows):
            self.prompts.append((*(x.transpose(1, 2).contiguous() for x in (key, value)), length))
            self.rows.append([x.new_empty(len(self.owner), x.shape[2], room, x.shape[3]) for x in (key, value)])

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, *,
        scale: float | None = None, softcap: float | None = None, window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Cache.attend`."""
        store(*self.rows[index], key, value, self.used)
        return decode_attention(
            query, *self.prompts[index], self.offsets, *self.rows[index], self.used,
            scale=scale, softcap=softcap, window=window,
        )  # fmt: skip

    def advance(self) -> None:
        """See `Cache.advance`."""
        self.used += 1

    def keep(self, rows: Tensor) -> None:
        """See `Cache.keep`; rows in ascending order."""
        self.owner = self.owner[rows]
        self.offsets = torch.searchsorted(self.owner, torch.arange(len(self.offsets), device=rows.device))
        self.rows = [[x.index_select(0, rows) for x in slab] for slab in self.rows]


AnyCache = Cache | SharedCache | GpuCache
