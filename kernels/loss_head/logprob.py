"""hidden x head -> log-prob per packed sequence; the logits of all rows never exist at once."""

import torch
from torch import Tensor

from kernels.loss_head.checks import check_rows
from kernels.loss_head.ops import sequence_logprob_op
from kernels.loss_head.records import Head, Rows
from kernels.loss_head.schemes import budget_or_default


def needs_gradient(*values: Tensor | None) -> bool:
    """Returns whether a gradient in any of these will be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in values)


def sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    *,
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_token_logprob: bool = False,
    memory_budget_bytes: int | None = None,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the log-probability of each packed sequence: the sum over its rows of token_weight * log
    softmax(logits)[target], never length-normalised.

    logits = softcap * tanh((hidden weight^T + bias) / softcap) / temperature.

    - hidden [T, D] and weight [V, D]: float32, bfloat16, float16 or float64, both the same; hidden[t]
      predicts target[t], int32 or int64 in [0, V).
    - cu_seqlens [N+1], int32 or int64, on the CPU or hidden's device: sequence n has rows cu_seqlens[n] to
      cu_seqlens[n+1]. An empty one has log-prob 0.
    - token_weight [T], default 1: a row of weight 0 adds nothing. bias [V].
    - memory_budget_bytes bounds memory beyond inputs, returned gradients and one float32 accumulator of the
      head's gradient (kernels/loss_head/schemes.py has the formula); default 256 MiB, on a GPU an
      eighth of its memory.
    - debug=True also reads the values of tensors on a GPU, which makes the host wait.

    Returns logprob [N], or (logprob [N], token_logprob [T], unweighted) with return_token_logprob; float32
    (float64 for float64 inputs), differentiable once in hidden, weight and bias. Raises ValueError for
    arguments that cannot be used, RuntimeError when a gradient is differentiated again.
    """
    rows = Rows(hidden, target, token_weight, cu_seqlens)
    check_rows(rows, Head(weight, bias, temperature, softcap), memory_budget_bytes)
    budget = budget_or_default(memory_budget_bytes, hidden.device)
    needs = needs_gradient(hidden), needs_gradient(weight, bias)
    logprob, token, *_ = sequence_logprob_op(
        hidden,
        weight,
        bias,
        target,
        token_weight,
        cu_seqlens,
        float(temperature),
        softcap,
        budget,
        *needs,
        debug,
    )
    return (logprob, token) if return_token_logprob else logprob
