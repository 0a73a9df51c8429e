"""Products with frozen matrices. In float32 on a CPU that is not Intel's oneDNN, which is part of torch, does them: there MKL, torch's own
choice, leaves half of the arithmetic unused. On Intel's MKL is the faster. A few rows go to compiled code (csrc/products.cpp), which reads
the matrix once, as fast as memory gives it. With MKL so do up to a hundred, as it is slow in laying the matrix out for them (LOG.md)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.compiled import _native, instructions

# From this number of rows on oneDNN, which reads the matrix in parts that stay in cache, is as fast.
FEW_ROWS = {"avx512": 16, "avx2": 8}.get(instructions[0], 0) if instructions else 0
_AVAILABLE = torch.backends.mkldnn.is_available()


def _mkl_is_faster() -> bool:
    """Whether torch has MKL and the processor is Intel's."""
    file = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and file.is_file() and "GenuineIntel" in file.read_text()


MKL_IS_FASTER = _mkl_is_faster()
# Up to this number of rows compiled code is faster than MKL.
PANEL_ROWS = 96 if MKL_IS_FASTER and instructions and instructions[0] == "avx512" else 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, K] times weight [N, K] transposed, plus bias [N]: [R, N], with the gradient in x alone where oneDNN does it.

    weight and bias are frozen there (no gradient is asked of them); anything else goes to `torch.nn.functional.linear`.
    """
    if torch.is_grad_enabled():
        if weight.requires_grad or (bias is not None and bias.requires_grad) or not serves(x, weight):
            return F.linear(x, weight, bias)
        if x.requires_grad:
            return _Linear.apply(x, weight, bias)
    elif _on_cpu(x, weight) and x.shape[0] <= max(FEW_ROWS, PANEL_ROWS) and weight.is_contiguous() and not torch.compiler.is_compiling():
        return few_rows(x, weight, bias, instructions[0]) if x.shape[0] <= FEW_ROWS else panels(x, weight, bias)
    return times_transposed(x, weight, bias)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN does the product: two float32 matrices on the CPU, neither empty, where MKL is not the faster."""
    # The switch cannot be read while a caller is traced.
    usable = _AVAILABLE and (torch.compiler.is_compiling() or torch.backends.mkldnn.enabled)
    return usable and not MKL_IS_FASTER and _on_cpu(x, weight)


def _on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Two float32 matrices on the CPU, neither empty."""
    both = x.dtype == weight.dtype == torch.float32 and x.dim() == 2 and x.is_cpu
    return both and x.numel() > 0 and weight.numel() > 0


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`linear` without a gradient. out: where the product is to stand; without a bias."""
    if serves(x, weight):
        product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product if out is None else out.copy_(product)
    if out is None and not (_on_cpu(x, weight) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        return F.linear(x, weight, bias)
    # Into what is there already, as autocast rounds nothing then; nor does oneDNN's operator.
    out = torch.mm(x, weight.t(), out=x.new_empty(len(x), len(weight)) if out is None else out)
    return out if bias is None else out.add_(bias)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, instruction_set: str) -> Tensor:
    """`linear` without a gradient for float32 on the CPU, weight contiguous: bit for bit the same for any number of rows and threads."""
    arrays = _arrays(x, weight, bias)
    _native.few_rows(*arrays, torch.get_num_threads(), instruction_set)
    return arrays[-1]


def panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `few_rows`, for many rows and a processor with AVX-512; the order of its sums is another."""
    arrays = _arrays(x, weight, bias)
    _native.panels(*arrays, torch.get_num_threads())
    return arrays[-1]


def _arrays(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What compiled code takes, and where the product is to stand."""
    return x.contiguous(), weight, None if bias is None else bias.contiguous(), x.new_empty(x.shape[0], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return times_transposed(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradient, weight.t()), None, None
