"""Keys and values of rows that are decoded side by side. A cache is an `engine.model.attention.Attention`."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.attention import attend
from engine.run.needs import shares_prompts
from kernels import decode_attention
from kernels.attention import decode_native
from kernels.attention.decode import store
from kernels.layer.records import Places

KeysAndValues = tuple[Tensor, Tensor]  # [M, Hkv, d] each


def new_cache(
    kept: list[KeysAndValues], cu_seqlens: Tensor, n: int, room: int, windows: list[int | None] | None = None
) -> "AnyCache":
    """Makes a cache for n rows per prompt, prompt-major, with room for `room` new tokens each.

    kept: per layer the prompts' rotated keys and values, packed by cu_seqlens [P+1]. windows: per layer how
    many tokens a token sees, itself included, as `attend` will be given them. Only the keys that new tokens
    see are kept; the cache with torch's attention keeps all.
    """
    key = kept[0][0]
    if not shares_prompts(key.device, key.dtype):
        return Cache(kept, cu_seqlens, n, room)
    return (GpuCache if key.is_cuda else SharedCache)(kept, cu_seqlens, n, room, windows)


def _prompt_grids(
    kept: list[KeysAndValues], cu_seqlens: Tensor, windows: list[int | None] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Lays out the prompts of each layer: keys and values [P, T, Hkv, d], lengths int64 [P] on their device.

    Zeros stand behind a prompt's end. A layer with a window keeps only the tokens that the first new one
    sees, and at least one.
    """
    full = cu_seqlens.diff().to("cpu", torch.int64)
    prompts, device = len(full), kept[0][0].device
    places = {}
    for window in {None} if windows is None else set(windows):
        length = full if window is None else full.clamp(max=max(1, window - 1))
        longest = int(length.max())
        row = torch.repeat_interleave(torch.arange(prompts), length)
        at = torch.arange(len(row)) - (length.cumsum(0) - length)[row]
        # Each token has a place among the packed ones, and one in the grid.
        source = at + (cu_seqlens[1:].to("cpu", torch.int64) - length)[row]
        places[window] = source.to(device), (at + row * longest).to(device), longest, length.to(device)
    for pair, window in zip(kept, windows or [None] * len(kept), strict=True):
        source, slot, longest, length = places[window]
        grids = []
        for x in pair:
            seen = x if window is None else x[source]
            grid = x.new_zeros(prompts * longest, *x.shape[1:]).index_copy_(0, slot, seen)
            grids.append(grid.view(prompts, longest, *x.shape[1:]))
        yield *grids, length


def _keep(slabs: list[list[Tensor]], rows: Tensor) -> None:
    """Drops all rows but `rows` of keys and values, one after the other: memory may not hold all twice."""
    for slab in slabs:
        for i, x in enumerate(slab):
            slab[i] = x.index_select(0, rows)


class _Positions:
    """The positions of the rows' next tokens, which every cache counts."""

    def __init__(self, kept: list[KeysAndValues], cu_seqlens: Tensor, n: int) -> None:
        length = cu_seqlens.diff().to(kept[0][0].device, torch.int64)
        self.position = length.repeat_interleave(n)  # int64 [R]

    def places(self, layer: int) -> Places | None:
        """Returns None: `attend` wants keys and values itself."""

    def advance(self) -> None:
        """Goes on to the next token, after all layers have stored this one."""
        self.position += 1

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows` (int64, in ascending order)."""
        self.position = self.position[rows]


class Cache(_Positions):
    """A fixed slab per row, with attention by torch.

    Prompts are right-aligned, so that every row appends at the same slot.
    """

    def __init__(self, kept: list[KeysAndValues], cu_seqlens: Tensor, n: int, room: int) -> None:
        super().__init__(kept, cu_seqlens, n)
        key = kept[0][0]
        length = cu_seqlens.diff().to(key.device, torch.int64)
        prompts, longest = len(length), int(cu_seqlens.diff().max())
        self.used = longest
        self.first = (longest - length).repeat_interleave(n)  # int64 [R]: first visible slot
        # The packed tokens go to these slots of the right-aligned grid.
        begins = cu_seqlens[:-1].to(key.device, torch.int64)
        row = torch.repeat_interleave(torch.arange(prompts, device=key.device), length)
        slot = (
            torch.arange(len(key), device=key.device) - begins[row] + (longest - length)[row] + row * longest
        )
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
        """Makes the additive mask [R, 1, 1, used + 1]: 0 for visible keys, -inf in front of the prompt."""
        slot = torch.arange(self.used + 1, device=self.first.device)
        hidden = slot < self.first[:, None]
        dtype = self.slabs[0][0].dtype
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, -math.inf)[:, None, None]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Stores one token of each row in a layer, and attends to all of its row so far: [R, H d].

        query [R, H, d]; key, value [R, Hkv, d]. window: attends to the last `window`
        tokens only, this one included.
        scale, softcap: see `engine.model.attention.attend`.
        """
        stop = self.used + 1
        start = 0 if window is None else max(0, stop - window)
        for slab, x in zip(self.slabs[layer], (key, value), strict=True):
            slab[:, :, self.used] = x
        keys, values = (slab[:, :, start:stop] for slab in self.slabs[layer])
        # Heads that share keys stand side by side as queries.
        grouped = query.reshape(len(query), key.shape[1], -1, key.shape[2])
        return attend(grouped, keys, values, self._mask[..., start:], scale, softcap).reshape(len(query), -1)

    def advance(self) -> None:
        """Goes on to the next token, after all layers have stored this one."""
        super().advance()
        self.used += 1
        self._mask = self._new_mask()

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows` (int64, in ascending order)."""
        super().keep(rows)
        self.first = self.first[rows]
        _keep(self.slabs, rows)
        self._mask = self._new_mask()


class SharedCache(_Positions):
    """On the CPU, in float32 or bfloat16: all rows of a prompt share its keys and values, and attention is
    compiled code.

    The keys lie in blocks of 16 tokens.
    """

    BLOCK = 16

    def __init__(
        self,
        kept: list[KeysAndValues],
        cu_seqlens: Tensor,
        n: int,
        room: int,
        windows: list[int | None] | None = None,
    ) -> None:
        super().__init__(kept, cu_seqlens, n)
        self.owner = torch.arange(len(cu_seqlens) - 1).repeat_interleave(n)
        self.used = 0
        self.prompts, self.rows = [], []
        blocks = -(-room // self.BLOCK)
        for key, value, length in _prompt_grids(kept, cu_seqlens, windows):
            rows, (heads, d) = len(self.owner), key.shape[2:]
            self.prompts.append((self._blocks(key), value.transpose(1, 2).contiguous(), length))
            self.rows.append(
                [key.new_empty(rows, heads, blocks, d, self.BLOCK), key.new_empty(rows, heads, room, d)]
            )

    def _blocks(self, keys: Tensor) -> Tensor:
        """Turns keys [P, T, Hkv, d] into [P, Hkv, blocks, d, 16]."""
        prompts, longest, heads, d = keys.shape
        padded = F.pad(keys, (0, 0, 0, 0, 0, -longest % self.BLOCK))
        return padded.view(prompts, -1, self.BLOCK, heads, d).permute(0, 3, 1, 4, 2).contiguous()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: float | None
    ) -> Tensor:
        """Stores and attends as `Cache.attend` does, with the same options."""
        prompt, rows = self.prompts[layer], self.rows[layer]
        cache = decode_native.BlockedCache(*prompt, self.owner, *rows, self.used)
        return decode_native.decode_attention(query, key, value, cache, **options)

    def advance(self) -> None:
        """Goes on to the next token, after all layers have stored this one."""
        super().advance()
        self.used += 1

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows` (int64, in ascending order)."""
        super().keep(rows)
        self.owner = self.owner[rows]
        _keep(self.rows, rows)


class GpuCache(_Positions):
    """On a GPU: all rows of a prompt share its keys and values, and attention is done by Triton.

    The host reads nothing during a step, so a CUDA graph of it can be replayed until rows are dropped.
    """

    def __init__(
        self,
        kept: list[KeysAndValues],
        cu_seqlens: Tensor,
        n: int,
        room: int,
        windows: list[int | None] | None = None,
    ) -> None:
        super().__init__(kept, cu_seqlens, n)
        device, prompts = kept[0][0].device, len(cu_seqlens) - 1
        self.owner = torch.arange(prompts, device=device).repeat_interleave(n)
        self.offsets = torch.arange(prompts + 1, device=device) * n
        self.used = torch.ones(1, dtype=torch.int64, device=device)  # with the token of this step
        self.prompts, self.rows = [], []
        for key, value, length in _prompt_grids(kept, cu_seqlens, windows):
            self.prompts.append((*(x.transpose(1, 2).contiguous() for x in (key, value)), length))
            self.rows.append(
                [x.new_empty(len(self.owner), x.shape[2], room, x.shape[3]) for x in (key, value)]
            )

    def places(self, layer: int) -> Places:
        """Returns where the kernel that turns keys may put them and their values."""
        return Places(*self.rows[layer], self.used)

    def attend(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None, **options: float | None
    ) -> Tensor:
        """Stores and attends as `Cache.attend` does, with the same options. key, value: None where they stand
        at `places` already."""
        rows = self.rows[layer]
        if key is not None:
            store(*rows, key, value, self.used)
        return decode_attention(query, *self.prompts[layer], self.offsets, *rows, self.used, **options)

    def advance(self) -> None:
        """Goes on to the next token, after all layers have stored this one."""
        super().advance()
        self.used += 1

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows` (int64, in ascending order)."""
        super().keep(rows)
        self.owner = self.owner[rows]
        self.offsets = torch.searchsorted(self.owner, torch.arange(len(self.offsets), device=rows.device))
        _keep(self.rows, rows)


AnyCache = Cache | SharedCache | GpuCache
