"""Attention among packed tokens by compiled code (csrc/packed_attention.cpp), float32 or
bfloat16 on the CPU.
"""

import torch
from torch import Tensor

from kernels import compiled
from kernels.attention.decode_native import NO_WINDOW
from kernels.compiled import _native


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: Tensor,
    prompt_of: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attends among packed tokens with gradients: [M, H, d]; a token sees the prompt of its run, and the
    run up to itself.

    Scores are softcap * tanh(scale * q.k / softcap); scale None is d ** -0.5, softcap None is off. With a
    window a token sees the last `window` of all these.

    - query [M, H, d]; key, value [M, Hkv, d]; H is a multiple of Hkv, and query heads that share keys stand
      side by side. All of one dtype. Arithmetic is float32, and results are rounded once: without a gradient
      to the bits of `decode_native.decode_attention`, which had the same prompt and tokens before.
    - begins int64 [N+1]: the tokens of run n are begins[n] to begins[n+1] - 1.
    - prompt_of int64 [N]: the run that is a run's prompt, which stands before it and others of that prompt;
      its own number where it has none before it.

    Sums have one order: equal calls give equal bits, whatever the number of threads.

    Raises ValueError where shapes do not agree or the window is empty.
    """
    score = (
        query.shape[2] ** -0.5 if scale is None else scale,
        softcap or 0.0,
        NO_WINDOW if window is None else window,
    )
    return _PackedAttention.apply(query, key, value, begins, prompt_of, score)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, begins: Tensor, prompt_of: Tensor, score: tuple
    ) -> Tensor:
        inputs = query.contiguous(), key.contiguous(), value.contiguous(), begins, prompt_of
        out = torch.empty_like(inputs[0])
        _native.packed_attention(*inputs, *score, out, torch.get_num_threads(), compiled.make.instructions)
        ctx.save_for_backward(*inputs)
        ctx.score = score
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = [torch.empty_like(x) for x in inputs[:3]]
        how = torch.get_num_threads(), compiled.make.instructions
        _native.packed_attention_gradients(*inputs, *ctx.score, gradient.contiguous(), *found, *how)
        return *found, None, None, None
