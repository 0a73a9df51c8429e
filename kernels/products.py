"""Products with frozen matrices. In float32 on the CPU oneDNN, which is part of torch, does them: on processors on which MKL, torch's own
choice there, leaves half of the arithmetic unused, that is up to twice as fast, and more with a few rows (LOG.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_AVAILABLE = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, K] times weight [N, K] transposed, plus bias [N]: [R, N], with the gradient in x alone where oneDNN does it.

    weight and bias are frozen there (no gradient is asked of them); anything else goes to `torch.nn.functional.linear`.
    """
    if torch.is_grad_enabled():
        if weight.requires_grad or (bias is not None and bias.requires_grad) or not serves(x, weight):
            return F.linear(x, weight, bias)
        if x.requires_grad:
            return _Linear.apply(x, weight, bias)
    return times_transposed(x, weight, bias)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN does the product: two float32 matrices on the CPU, neither empty."""
    both = x.dtype == weight.dtype == torch.float32 and x.dim() == 2 and x.device.type == "cpu"
    # The switch cannot be read while a caller is traced.
    usable = _AVAILABLE and (torch.compiler.is_compiling() or torch.backends.mkldnn.enabled)
    return both and usable and x.numel() > 0 and weight.numel() > 0


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without a gradient."""
    if not serves(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return times_transposed(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradient, weight.t()), None, None
