"""Attention of one new token per row while the rows of a prompt share its keys and values; and the store of that token.

A step reads at least each prompt's keys and values once for all its rows, and each row's own once:

    bytes = 2 Hkv d itemsize (sum_p length_p + R used)

What changes from step to step, and what changes when rows are dropped within the same R, is read on the device alone: no argument of a call
but tensors depends on it, and the launches depend on shapes alone, so that a captured CUDA graph of the step stays right when replayed.
"""

import torch
from torch import Tensor

from kernels.checks import check_decode, check_decode_values, check_tensor
from kernels.loss_head import rows as reference


def decode_attention(
    query: Tensor, prompt_keys: Tensor, prompt_values: Tensor, prompt_length: Tensor, owner_offsets: Tensor, own_keys: Tensor,
    own_values: Tensor, used: Tensor, *, scale: float | None = None, softcap: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """[R, H d] in the query's dtype: each row's new token attends to its prompt and to its own `used` tokens, itself the last of them;
    with a window to the last `window` of all these. Scores are softcap * tanh(scale * q.k / softcap); scale None is d ** -0.5, softcap
    None is off. No gradient.

    - query [R, H, d]; H is a multiple of Hkv, and query heads that share keys stand side by side.
    - prompt_keys, prompt_values [P, Hkv, Tp, d], contiguous; prompt_length int64 [P], at most Tp. What stands behind a length may be NaN.
    - owner_offsets int64 [P+1]: rows owner_offsets[p] to owner_offsets[p+1] - 1 are those of prompt p, which may have none; starts at 0,
      never decreases, ends at R.
    - own_keys, own_values [R, Hkv, room, d], contiguous; used int64 [1], at least 1 and at most room, counts the current token, which
      `store` has put there. Every row has as many.

    All of one dtype and device. A replayed graph takes new values of prompt_length, owner_offsets, used and of the caches in place, which
    the host never reads on a GPU. Sums have a fixed order, which depends on shapes: equal calls give equal bits, but a row's last bits may
    change with R and P. In 16 bits products are added in float32 and probabilities are rounded before the second product.

    Raises: ValueError naming the argument, its value and what is accepted; values of tensors are checked on the CPU alone.
    """
    check_decode(query, prompt_keys, prompt_values, prompt_length, owner_offsets, own_keys, own_values, used, scale, softcap, window)
    check_decode_values(query, prompt_keys, prompt_length, owner_offsets, own_keys, used)
    arguments = query, prompt_keys, prompt_values, prompt_length, owner_offsets, own_keys, own_values, used
    with torch.no_grad():
        if query.is_cuda and query.dtype != torch.float64:
            from kernels.attention import decode_triton as triton_decode

            return triton_decode.decode_attention(*arguments, scale, softcap, window)
        return reference.decode_attention(*arguments, scale=scale, softcap=softcap, window=window)


def store(own_keys: Tensor, own_values: Tensor, key: Tensor, value: Tensor, used: Tensor) -> None:
    """Put one token's key and value [R, Hkv, d] of every row at place used - 1 of own_keys, own_values [R, Hkv, room, d] (contiguous);
    used int64 [1] on their device, which the host never reads on a GPU. Raises: ValueError where shapes, dtypes or devices do not agree."""
    rows, heads, _, width = own_keys.shape
    here = own_keys.dtype, own_keys.device
    check_tensor("own_values", own_values, tuple(own_keys.shape), here[:1], here[1:])
    for name, x in (("key", key), ("value", value)):
        check_tensor(name, x, (rows, heads, width), here[:1], here[1:])
    check_tensor("used", used, (1,), (torch.int64,), here[1:])
    if own_keys.is_cuda and own_keys.dtype != torch.float64:
        from kernels.attention import decode_triton as triton_decode

        triton_decode.store(own_keys, own_values, key, value, used)
        return
    for own, x in ((own_keys, key), (own_values, value)):
        own.index_copy_(2, used - 1, x.detach()[:, :, None])
