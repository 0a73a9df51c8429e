"""The compiled row arithmetic (csrc/rows.cpp) for float32 rows on the CPU; where it is missing, plain torch does the same work."""

import logging

import torch
from torch import Tensor

from kernels.reference import TorchRows

try:
    from kernels import _native
except ImportError:
    _native = None

# Instruction sets that this processor runs, fastest first.
instructions: tuple[str, ...] = () if _native is None else _native.instructions
available = bool(instructions)
_told = False


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled path takes rows of logits there. Where only the module is missing, a log line says so once."""
    global _told
    if device.type != "cpu" or dtype != torch.float32:
        return False
    if not available and not _told:
        _told = True
        logging.getLogger(__name__).warning("the compiled CPU kernels are not there: slower torch code runs instead (see README.md)")
    return available


class NativeRows(TorchRows):
    """`TorchRows` with compiled code between the matrix products."""

    def normalise(self, z: Tensor, target: Tensor, jacobian: bool) -> tuple[Tensor, Tensor]:
        return rows_logprob(z, target, self.temperature, jacobian)


def sample_rows(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token int64 [R] and its log-prob float32 [R] under softmax(logits / temperature), by inversion of the cumulative mass at u.

    logits: float32 [R, V] on the CPU; u: float64 [R] in (0, 1). Mass below exp(-87.3) of the largest is 0, and a token without mass is
    never drawn. A row with NaN or without a finite maximum gives token 0 and log-prob NaN.
    """
    token, logprob = torch.empty(len(u), dtype=torch.int64), torch.empty(len(u), dtype=torch.float32)
    _native.sample_rows(logits.detach().contiguous(), u, 1 / temperature, token, logprob, torch.get_num_threads(), instructions[0])
    return token, logprob


def rows_logprob(logits: Tensor, target: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """(log softmax(logits / temperature)[target], scale), float32 [R]; with `gradient` the logits then hold (softmax - onehot) /
    temperature / scale.

    logits: float32 [R, V] on the CPU, contiguous; target: int64 [R]. The target's own gradient is the negative
    sum of the others' mass, so it keeps its digits where the target is almost certain. A row without a log-prob becomes 0 with scale
    NaN. Raises IndexError for a target outside [0, V).
    """
    logprob, scale = torch.empty(len(target), dtype=torch.float32), torch.empty(len(target), dtype=torch.float32)
    _native.rows_logprob(logits, target, 1 / temperature, gradient, logprob, scale, torch.get_num_threads(), instructions[0])
    return logprob, scale


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, prompt_keys: Tensor, prompt_values: Tensor, prompt_length: Tensor, owner: Tensor,
    own_keys: Tensor, own_values: Tensor, used: int,
) -> Tensor:  # fmt: skip
    """Attention of one new token per row, [R, H d]: to the keys of the row's prompt, to its own `used` tokens so far, and to itself.

    query [R, H, d]; key, value [R, Hkv, d], stored as the row's token `used`. Prompts stand once: prompt_keys [P, Hkv, blocks, d, 16],
    prompt_values [P, Hkv, T, d], prompt_length int64 [P]; owner int64 [R]: the row's prompt. own_keys [R, Hkv, blocks, d, 16], own_values
    [R, Hkv, room, d]. All float32 on the CPU. Raises ValueError where shapes do not agree or the cache is full.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _native.decode_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), prompt_keys, prompt_values, prompt_length, owner, own_keys, own_values,
        used, query.shape[2] ** -0.5, out, torch.get_num_threads(), instructions[0],
    )  # fmt: skip
    return out.flatten(1)
