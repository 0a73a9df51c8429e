"""Keyed random numbers: each depends on its key, its step and its place alone, not on device or batch."""

import torch
from torch import Tensor

_WORD = (1 << 32) - 1


def combine(*parts: Tensor | int) -> Tensor:
    """Returns one int64 key made of several integers or int64 tensors, which are broadcast."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _mix(key * 31 + torch.as_tensor(part, dtype=torch.int64) - 7046029254386353131)
    return key


def stream(key: Tensor, step: int | Tensor) -> Tensor:
    """Returns int64 [R] that names the random numbers of (key, step).

    key: int64 [R]; step: an int, or an int64 tensor [] or [1].
    """
    step = step if isinstance(step, Tensor) else torch.full_like(key, step)
    return _mix(_mix(key) + step * -7046029254386353131)


def uniform(key: Tensor, step: int | Tensor) -> Tensor:
    """Returns uniform numbers in (0, 1), float64 [R], of (key, step); see `stream`."""
    return (stream(key, step) >> 11 & (1 << 53) - 1).double() * 2.0**-53 + 2.0**-54


def exponential(streams: Tensor, count: int) -> Tensor:
    """Returns exponential numbers of mean 1, float64 [R, count], of int64 streams [R].

    Number i of a stream is -log(1 - v), and 64 bits of its own make v.
    """
    low, high = streams[:, None] & _WORD, streams[:, None] >> 32 & _WORD
    bits = _bits(torch.arange(count, device=streams.device), low, high)
    more = _bits(bits, high, low) | 1
    return -torch.log1p(-(bits.double() * 2.0**-32 + more.double() * 2.0**-64))


def _mix(x: Tensor) -> Tensor:
    """Finishes splitmix64 on int64 with wrap-around; masks make the shifts logical."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)


def _bits(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns 32 random bits for each number x."""
    return _scrambled(_scrambled((x * 0x9E3779B9 + low) & _WORD) ^ high)


def _scrambled(x: Tensor) -> Tensor:
    """Applies lowbias32 to 32 bits in an int64."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16
