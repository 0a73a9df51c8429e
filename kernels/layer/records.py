"""What the files of this package hand to each other."""

from typing import NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """Where a decoding step puts the keys and values of each row's new token: at place used - 1.

    On a GPU the host never reads `used`.
    """

    keys: Tensor  # [R, Hkv, room, d], contiguous
    values: Tensor  # [R, Hkv, room, d], contiguous
    used: Tensor  # int64 [1], at least 1 and at most room
