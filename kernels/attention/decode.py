"""Attention of one new token per row while the rows of a prompt share its keys and values,
and the store of that token.

A step reads at least each prompt's keys and values once for all its rows, and each row's own once:

    bytes = 2 Hkv d itemsize (sum_p length_p + R used)

What changes from step to step, and what changes when rows are dropped within the same R, is read on the
device alone: only tensors among the arguments depend on it, and launches depend on shapes alone. A captured
CUDA graph of the step therefore stays right when it is replayed.
"""

from numbers import Integral

import torch
from torch import Tensor

from kernels.attention.records import Caches, Score
from kernels.checks import FLOATS, check_positive, check_tensor, check_values, readable


def decode_attention(
    query: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_length: Tensor,
    owner_offsets: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    used: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attends with each row's new token to the row's prompt and to its own `used`
    tokens, itself the last of them.

    Scores are softcap * tanh(scale * q.k / softcap); scale None is d ** -0.5, softcap None is off. With a
    window a row sees the last `window` of all these tokens.

    - query [R, H, d]; H is a multiple of Hkv, and query heads that share keys stand side by side.
    - prompt_keys, prompt_values [P, Hkv, Tp, d], contiguous; prompt_length int64 [P], at most Tp. What stands
      behind a length may be NaN.
    - owner_offsets int64 [P+1]: rows owner_offsets[p] to owner_offsets[p+1] - 1 belong to prompt p, which may
      have none. It starts at 0, never decreases and ends at R.
    - own_keys, own_values [R, Hkv, room, d], contiguous; used int64 [1], at least 1 and at most room, counts
      the current token, which `store` has put there. Every row has as many.

    All of one dtype and device. Returns [R, H d] in the query's dtype, without a gradient. A replayed graph
    takes new values of prompt_length, owner_offsets, used and of the caches in place; on a GPU the host never
    reads them. Sums have a fixed order, which depends on shapes: equal calls give equal bits, but a row's
    last bits may change with R and P. In 16 bits products are added in float32 and probabilities are rounded
    before the second product.

    Raises ValueError naming the argument, its value and what is accepted;
    values of tensors are checked on the CPU alone.
    """
    caches = Caches(prompt_keys, prompt_values, prompt_length, owner_offsets, own_keys, own_values, used)
    _check(query, caches, scale, softcap, window)
    score = Score(query.shape[2] ** -0.5 if scale is None else scale, softcap, window)
    with torch.no_grad():
        if query.is_cuda and query.dtype != torch.float64:
            from kernels.attention import decode_triton

            return decode_triton.decode_attention(query, caches, score)
        return _attend_by_torch(query, caches, score)


def store(own_keys: Tensor, own_values: Tensor, key: Tensor, value: Tensor, used: Tensor) -> None:
    """Puts key and value [R, Hkv, d] of every row's new token at place used - 1 of the contiguous own_keys
    and own_values [R, Hkv, room, d].

    used is int64 [1] on their device; on a GPU the host never reads it. Raises ValueError where shapes,
    dtypes or devices do not agree.
    """
    rows, heads, _, width = own_keys.shape
    dtypes, devices = (own_keys.dtype,), (own_keys.device,)
    check_tensor("own_values", own_values, tuple(own_keys.shape), dtypes, devices)
    for name, x in (("key", key), ("value", value)):
        check_tensor(name, x, (rows, heads, width), dtypes, devices)
    check_tensor("used", used, (1,), (torch.int64,), devices)
    if own_keys.is_cuda and own_keys.dtype != torch.float64:
        from kernels.attention import decode_triton

        decode_triton.store(own_keys, own_values, key, value, used)
        return
    for slab, x in ((own_keys, key), (own_values, value)):
        slab.index_copy_(2, used - 1, x.detach()[:, :, None])


def _attend_by_torch(query: Tensor, caches: Caches, score: Score) -> Tensor:
    """Attends on any device, in float32 arithmetic (float64 for float64 inputs)."""
    (rows, heads, width), (kv_heads, room) = query.shape, caches.own_keys.shape[1:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    longest = caches.prompt_keys.shape[2]
    owner = torch.searchsorted(caches.owner_offsets[1:], torch.arange(rows, device=query.device), right=True)
    length = caches.prompt_length[owner][:, None]
    slot = torch.arange(longest + room, device=query.device)[None]
    of_row = slot >= longest
    position = torch.where(of_row, slot - longest + length, slot)
    seen = torch.where(of_row, slot - longest < caches.used, slot < length)
    if score.window is not None:
        seen &= position >= length + caches.used - score.window
    keys, values = (
        torch.cat([prompt[owner], own_tokens], 2).to(dtype).masked_fill(~seen[:, None, :, None], 0)
        for prompt, own_tokens in (
            (caches.prompt_keys, caches.own_keys),
            (caches.prompt_values, caches.own_values),
        )
    )
    grouped = query.to(dtype).view(rows, kv_heads, heads // kv_heads, width)
    scores = grouped @ keys.transpose(2, 3) * score.scale
    if score.softcap is not None:
        scores = score.softcap * torch.tanh(scores / score.softcap)
    weight = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(3)
    return (weight @ values).reshape(rows, heads * width).to(query.dtype)


def _check(
    query: Tensor, caches: Caches, scale: float | None, softcap: float | None, window: int | None
) -> None:
    """Checks the arguments of `decode_attention`; values of tensors on the CPU alone."""
    check_tensor("query", query, (None, None, None), FLOATS, None)
    (rows, heads, width), here, dtypes = query.shape, (query.device,), (query.dtype,)
    check_tensor("prompt_keys", caches.prompt_keys, (None, None, None, width), dtypes, here)
    prompts, kv_heads = caches.prompt_keys.shape[:2]
    check_tensor("prompt_values", caches.prompt_values, tuple(caches.prompt_keys.shape), dtypes, here)
    check_tensor("own_keys", caches.own_keys, (rows, kv_heads, None, width), dtypes, here)
    check_tensor("own_values", caches.own_values, tuple(caches.own_keys.shape), dtypes, here)
    for name in ("prompt_keys", "prompt_values", "own_keys", "own_values"):
        value = getattr(caches, name)
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {list(value.stride())}: expected a contiguous tensor")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads and prompt_keys {kv_heads}: expected a multiple")
    check_tensor("prompt_length", caches.prompt_length, (prompts,), (torch.int64,), here)
    check_tensor("owner_offsets", caches.owner_offsets, (prompts + 1,), (torch.int64,), here)
    check_tensor("used", caches.used, (1,), (torch.int64,), here)
    if scale is not None:
        check_positive("scale", scale)
    if softcap is not None:
        check_positive("softcap", softcap)
    if window is not None and (isinstance(window, bool) or not isinstance(window, Integral) or window < 1):
        raise ValueError(f"window = {window!r}: expected a whole number of tokens above 0")
    if readable(query, False):
        _check_values(rows, caches)


def _check_values(rows: int, caches: Caches) -> None:
    """Checks the values of tensors that place the tokens."""
    longest, room = caches.prompt_keys.shape[2], caches.own_keys.shape[2]
    length, used, offsets = caches.prompt_length, caches.used, caches.owner_offsets
    check_values("prompt_length", length, (length >= 0) & (length <= longest), f"a number in [0, {longest}]")
    check_values("used", used, (used >= 1) & (used <= room), f"a number in [1, {room}]")
    if (int(offsets[0]), int(offsets[-1])) != (0, rows) or not bool((offsets.diff() >= 0).all()):
        wanted = f"numbers that start at 0, never decrease and end at {rows}"
        raise ValueError(f"owner_offsets = {offsets.tolist()}: expected {wanted}")
