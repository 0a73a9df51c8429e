"""Decode attention by compiled code (csrc/attention.cpp), float32 or bfloat16 on the CPU,
with keys in blocks of 16 tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import compiled
from kernels.compiled import _native

NO_WINDOW = 2**62


class BlockedCache(NamedTuple):
    """Keys and values of prompts, which their rows share, and of each row's tokens; of one dtype, float32 or
    bfloat16, on the CPU.
    """

    prompt_keys: Tensor  # [P, Hkv, blocks, d, 16]
    prompt_values: Tensor  # [P, Hkv, T, d]
    prompt_length: Tensor  # int64 [P]
    owner: Tensor  # int64 [R]: the row's prompt
    own_keys: Tensor  # [R, Hkv, blocks, d, 16]
    own_values: Tensor  # [R, Hkv, room, d]
    used: int  # tokens of each row so far


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: BlockedCache,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Stores each row's new token as token `used` and attends with it to the row's
    prompt and tokens: [R, H d].

    Scores are softcap * tanh(scale * q.k / softcap); scale None is d ** -0.5, softcap None is off. With a
    window a row sees the last `window` of all these tokens.

    - query [R, H, d]; key, value [R, Hkv, d]; of the cache's dtype. Arithmetic is float32, and the result is
      rounded once.

    Raises ValueError where shapes do not agree, the cache is full or the window is empty.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    score = (
        query.shape[2] ** -0.5 if scale is None else scale,
        softcap or 0.0,
        NO_WINDOW if window is None else window,
    )
    new = query.contiguous(), key.contiguous(), value.contiguous()
    _native.decode_attention(*new, *cache, *score, out, torch.get_num_threads(), compiled.make.instructions)
    return out.flatten(1)
