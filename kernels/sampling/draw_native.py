"""Sampling by compiled code (csrc/rows.cpp): one pass over a row draws its token and sums both log-probs."""

import torch
from torch import Tensor

from kernels import compiled
from kernels.compiled import _native


def sample_rows(
    logits: Tensor,
    stream: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws a token per row and returns what `kernels.sampling.draw.sample_with_gap` does.

    - logits: float32 [R, V] on the CPU; stream: int64 [R], which names the rows' random numbers.
    - kept: float32 [R, V] or None; where some tokens may be left out it is filled with exp((logits - largest)
      / temperature) of the tokens kept and 0 of the others.

    A token whose mass is below exp(-87.3) of the largest has mass 0, and a token without mass is never drawn.
    A row with NaN or without a finite maximum gives token 0 and NaN for the rest.
    """
    token, floats = torch.empty(len(stream), dtype=torch.int64), [torch.empty(len(stream)) for _ in range(3)]
    threads = torch.get_num_threads()
    _native.sample_rows(
        logits.contiguous(),
        stream,
        1 / temperature,
        top_k,
        top_p,
        token,
        *floats,
        kept,
        threads,
        compiled.make.instructions,
    )
    return token, *floats
