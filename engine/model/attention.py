"""Attention over packed sequences, and what a layer asks of any attention.

Packed tokens in 16 bits on a GPU go to a kernel for runs of different lengths: flash-attn's where it is
installed, else torch's, which has no softcap. On a CPU compiled code does runs. All others are laid out on a
padded grid for `scaled_dot_product_attention`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.gather import Picks, take
from kernels.layer.records import Places


@dataclass(frozen=True)
class Runs:
    """Runs of packed queries and of the keys that they see.

    The last query of a run sees all of the run's keys, and each query before it sees one less.
    """

    cu_query: Tensor  # int32 [N+1]
    cu_key: Tensor  # int32 [N+1]
    longest: tuple[int, int]  # queries of a run, keys of a run
    key: Picks | None  # the packed tokens whose keys the runs consist of; None: all, in order

    @staticmethod
    def of(queries: list[int], keys: list[int], key: Picks | None) -> "Runs":
        """Makes runs of these lengths."""
        cu_query, cu_key = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
        return Runs(cu_query, cu_key, (max(queries, default=0), max(keys, default=0)), key)

    @cached_property
    def prompts(self) -> tuple[Tensor, Tensor]:
        """Where each run begins, with the end, int64 [N+1], and the run that its first keys are, int64 [N]:
        itself, where it sees no other tokens, else the last such run."""
        own = torch.arange(len(self.cu_query) - 1)
        alone = self.cu_query.diff() == self.cu_key.diff()
        return self.cu_query.long(), torch.where(alone, own, 0).cummax(0).values

    def to(self, device: torch.device) -> "Runs":
        """Moves the tensors to `device`."""
        key = None if self.key is None else self.key.to(device)
        cu_query, cu_key = (x.to(device, non_blocking=True) for x in (self.cu_query, self.cu_key))
        return Runs(cu_query, cu_key, self.longest, key)


@dataclass(frozen=True)
class Layout:
    """Which sequences packed tokens [M] belong to: on a padded [B, T] grid for attention, and as runs."""

    position: Tensor  # int64 [M]
    slot: Tensor  # int64 [M]: index into the flattened [B, T] grid
    shape: tuple[int, int]  # B, T
    runs: Runs
    # int64 [B, T]: 0 in a prompt, i in its response i, -1 behind.
    # None: each row of the grid is one causal sequence.
    segment: Tensor | None
    window: int | None = None  # how many positions a query sees, its own included; None = all

    @staticmethod
    def packed(cu_seqlens: Tensor) -> "Layout":
        """Lays out independent causal sequences: cu_seqlens int [N+1]."""
        cu = cu_seqlens.to("cpu", torch.int64)
        length = cu[1:] - cu[:-1]
        longest = int(length.max()) if len(length) else 0
        row = torch.repeat_interleave(torch.arange(len(length)), length)
        position = torch.arange(int(cu[-1])) - cu[:-1][row]
        runs = Runs.of(length.tolist(), length.tolist(), None)
        return Layout(position, row * longest + position, (len(length), longest), runs, None)

    @staticmethod
    def shared_prompt(prompt_length: list[int], response_length: list[list[int]]) -> "Layout":
        """Lays out groups [prompt, response 1, ..., response n].

        Each response sees the prompt and itself, never another response.
        """
        totals = [p + sum(r) for p, r in zip(prompt_length, response_length, strict=True)]
        longest, base = max(totals), 0
        segment = torch.full((len(totals), longest), -1)
        positions, slots, queries, keys, seen = [], [], [], [], []
        for b, (p, responses) in enumerate(zip(prompt_length, response_length, strict=True)):
            start, prompt = p, torch.arange(p)
            positions.append(prompt)
            segment[b, :p] = 0
            seen.append(base + prompt)
            queries.append(p)
            keys.append(p)
            for i, r in enumerate(responses):
                positions.append(torch.arange(p, p + r))
                segment[b, start : start + r] = i + 1
                seen += [base + prompt, torch.arange(base + start, base + start + r)]
                queries.append(r)
                keys.append(p + r)
                start += r
            slots.append(torch.arange(totals[b]) + b * longest)
            base += totals[b]
        return Layout(
            torch.cat(positions),
            torch.cat(slots),
            (len(totals), longest),
            Runs.of(queries, keys, Picks.of(torch.cat(seen), base)),
            segment,
        )

    def windowed(self, window: int | None) -> "Layout":
        """Returns the layout in which a query sees only the keys less than `window` positions before it."""
        return self if window is None or self.shape[1] <= window else replace(self, window=window)

    def to(self, device: torch.device) -> "Layout":
        """Moves the tensors to `device`."""
        segment = None if self.segment is None else self.segment.to(device, non_blocking=True)
        return Layout(
            self.position.to(device, non_blocking=True),
            self.slot.to(device, non_blocking=True),
            self.shape,
            self.runs.to(device),
            segment,
            self.window,
        )

    @cached_property
    def mask(self) -> Tensor | None:
        """The keys of the grid that its queries see, bool [B or 1, 1, T, T], True = visible.

        None: each query sees all keys up to itself.
        """
        rows, longest = self.shape
        if self.segment is None and self.window is None:
            return None
        mask = torch.ones(1, longest, longest, dtype=torch.bool, device=self.slot.device).tril()
        if self.segment is not None:
            mask = mask & (
                (self.segment[:, :, None] == self.segment[:, None, :]) | (self.segment == 0)[:, None, :]
            )
        if self.window is not None:
            position = (
                self.position.new_zeros(rows * longest)
                .index_copy(0, self.slot, self.position)
                .view(rows, longest)
            )
            mask = mask & (position[:, :, None] - position[:, None, :] < self.window)
        return mask[:, None]

    def grid(self, x: Tensor) -> Tensor:
        """Spreads packed x [M, n, d] over the grid: [B, n, T, d]."""
        rows, longest = self.shape
        if rows * longest != x.shape[0]:
            x = x.new_zeros(rows * longest, *x.shape[1:]).index_copy(0, self.slot, x)
        return x.view(rows, longest, *x.shape[1:]).transpose(1, 2)


class Attention(Protocol):
    """How the tokens of a pass through the decoder see each other, and those before them."""

    @property
    def position(self) -> Tensor:
        """The position of each token in its sequence, int64 [M]."""

    def places(self, layer: int) -> Places | None:
        """Returns where the keys and values of a layer may be put before `attend` is called, if anywhere."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Attends in one layer: query [M, H, d]; key, value [M, Hkv, d] -> [M, H d].

        key, value: None where they have been put at `places`. scale, softcap: see `attend`. window: how many
        tokens a token sees, itself included; None = all before it.
        """


class PackedAttention:
    """Attention among the tokens of a layout, as in training and scoring."""

    def __init__(self, layout: Layout) -> None:
        self.position = layout.position
        # The mask of a layout is computed once for all layers with the same window.
        self._layouts: dict[int | None, Layout] = {None: layout}

    def places(self, layer: int) -> None:
        """Returns None: `attend` wants keys and values itself."""

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
        """Attends as `Attention.attend` says; all layers see the same tokens."""
        if window not in self._layouts:
            self._layouts[window] = self._layouts[None].windowed(window)
        return attend_packed(query, key, value, self._layouts[window], scale, softcap).flatten(1)


class KeepingAttention(PackedAttention):
    """Packed attention that keeps keys and values of every layer, from which responses are decoded."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.kept: list[tuple[Tensor, Tensor]] = []  # per layer: rotated keys and values [M, Hkv, d]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: float | None
    ) -> Tensor:
        """Attends as `PackedAttention` does; a pass calls this once for each layer, in order."""
        self.kept.append((key, value))
        return super().attend(layer, query, key, value, **options)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, softcap: float | None
) -> Tensor:
    """Attends among packed tokens: query [M, H, d]; key, value [M, Hkv, d] -> [M, H, d].

    scale, softcap: see `attend`. On a CPU numbers of 16 bits are computed in float32 and rounded once, on
    the grid too: the backward pass of torch in 16 bits takes twice the time there.
    """
    kernel = runs_kernel(query, softcap) if len(query) else None
    if kernel is not None:
        runs = layout.runs
        if runs.key is not None:
            key, value = take(key, runs.key), take(value, runs.key)
        return kernel(query, key, value, runs, scale, softcap, layout.window)
    if compiled.serves(query.device, query.dtype):
        from kernels.attention.packed_native import packed_attention

        how = {"scale": scale, "softcap": softcap, "window": layout.window}
        return packed_attention(query, key, value, *layout.runs.prompts, **how)
    dtype = query.dtype
    if query.is_cpu and dtype.itemsize == 2:
        query, key, value = query.float(), key.float(), value.float()
    mixed = attend(*(layout.grid(x) for x in (query, key, value)), layout.mask, scale, softcap).transpose(
        1, 2
    )
    mixed = mixed.reshape(-1, *query.shape[1:]).to(dtype)
    return mixed if len(mixed) == len(query) else mixed.index_select(0, layout.slot)


def runs_kernel(query: Tensor, softcap: float | None) -> Callable[..., Tensor] | None:
    """Returns the kernel for runs that takes such queries, or None where the grid must do.

    A kernel maps (query [M, H, d], key, value [S, Hkv, d], runs, scale, softcap, window) to [M, H, d].
    """
    if not goes_by_runs(query.device, query.dtype, query.shape[2], softcap):
        return None
    return _by_torch if _flash_attn() is None else _by_flash_attn


def goes_by_runs(device: torch.device, dtype: torch.dtype, width: int, softcap: float | None) -> bool:
    """Tells whether a kernel for runs takes queries of heads of this width."""
    fits = dtype in (torch.float16, torch.bfloat16) and width <= 256 and width % 8 == 0
    return device.type == "cuda" and fits and (softcap is None or _flash_attn() is not None)


@cache
def _flash_attn() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _by_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    scale: float | None,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    return _flash_attn()(
        query,
        key,
        value,
        runs.cu_query,
        runs.cu_key,
        *runs.longest,
        softmax_scale=scale,
        causal=True,
        window_size=_beside(window),
        softcap=softcap or 0.0,
        deterministic=True,  # in the backward pass
    )


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    scale: float | None,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query,
        key,
        value,
        runs.cu_query,
        runs.cu_key,
        *runs.longest,
        scale=scale,
        window_size=_beside(window),
        **_grouped(varlen_attn),
    )


@cache
def _grouped(varlen_attn: Callable[..., Tensor]) -> dict[str, bool]:
    """Returns the argument that allows fewer heads of keys, which torch asks for from 2.12 on."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _beside(window: int | None) -> tuple[int, int]:
    """Counts the keys that a query sees before and behind its own token's; -1 is all of them."""
    return -1 if window is None else window - 1, 0


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Computes softmax(softcap * tanh(scale * query key^T / softcap) + mask) value: [B, H, T, d].

    query [B, H, T, d]; key, value [B, Hkv, S, d], H a multiple of Hkv. mask: bool (True = visible) or
    additive, of a shape that spreads to [B, H, T, S]; None = causal, S = T. scale None is d ** -0.5; softcap
    None leaves the scores as they are.
    """
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    statistics = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=statistics).to(value.dtype) @ value
