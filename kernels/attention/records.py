"""The records that decode attention passes on: what is cached, and how scores are made."""

from typing import NamedTuple

from torch import Tensor


class Caches(NamedTuple):
    """Keys and values of the prompts, which their rows share, and of each row's tokens; all on one device."""

    prompt_keys: Tensor  # [P, Hkv, Tp, d], contiguous
    prompt_values: Tensor  # [P, Hkv, Tp, d], contiguous
    prompt_length: Tensor  # int64 [P], at most Tp; what stands behind it may be NaN
    owner_offsets: Tensor  # int64 [P + 1]: prompt p has rows owner_offsets[p] to owner_offsets[p + 1] - 1
    own_keys: Tensor  # [R, Hkv, room, d], contiguous
    own_values: Tensor  # [R, Hkv, room, d], contiguous
    used: Tensor  # int64 [1]: tokens of each row so far, the current one included


class Score(NamedTuple):
    """A score is softcap * tanh(scale * q.k / softcap); a row sees the last `window` tokens."""

    scale: float
    softcap: float | None  # None: no softcap
    window: int | None  # None: a row sees all tokens
