"""Products with frozen matrices.

For float32 on a CPU compiled code (csrc/products.cpp) makes them, except on Intel processors, where MKL is
faster at many rows. A few rows read the matrix once, as fast as memory gives it; more rows take it in panels
of columns. `kernels.compiled.Make` says which way goes when.

The terms of a panel's sums are added up 128 at a time, so that rounding errors are as small as MKL's.
oneDNN adds more of them in one chain: its errors are 1.5 to 2.5 times as large, and were up to 10
times in a gradient (LOG.md).

Products of bfloat16 with float32 sums are torch's, that is oneDNN's, which rounds them to bfloat16, where the
processor has such products. Where it has none torch takes three to nine times as long as for float32: there
both factors are widened at each call, and the float32 product is rounded. Logits must not be rounded so:
`in_float32` keeps their sums.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.compiled import _native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies x [R, K] with weight [N, K] transposed and adds bias [N]: [R, N].

    Compiled code does it where weight and bias are frozen, that is no gradient is asked of them, and forms
    the gradient in x alone. Anything else goes to `torch.nn.functional.linear`.
    """
    if torch.is_grad_enabled():
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        if not frozen or not (serves(x, weight) or _widens(x, weight)):
            return by_torch(F.linear, x, weight) if bias is None else by_torch(F.linear, x, weight, bias)
        if x.requires_grad:
            return _Linear.apply(x, weight, bias)
    elif _on_cpu(x, weight) and weight.is_contiguous():
        make = compiled.make
        if len(x) <= make.few_rows:
            return few_rows(x, weight, bias, make.instructions)
        if make.panel_rows is not None and len(x) <= make.panel_rows:
            return panels(x, weight, bias, make.instructions)
    return times_transposed(x, weight, bias)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Returns whether compiled code makes every product of these.

    They must be two float32 matrices on the CPU, neither empty, weight dense by rows or by columns, on a make
    of processor where compiled code is the fastest.
    """
    return (
        _on_cpu(x, weight)
        and compiled.make.compiles_products
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


def by_torch(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Returns function(*matrices), a product in torch code, of two matrices or more that may be trained.

    Where they are bfloat16 on a CPU that does not multiply such numbers, it is computed in float32 and
    rounded once, and so are its gradients; the graph keeps the matrices as they are.
    """
    if not _widens(*matrices[:2]):
        return function(*matrices)

    def wide(*narrow: Tensor) -> Tensor:
        return function(*(x.float() for x in narrow)).to(torch.bfloat16)

    return compiled.with_gradient(wide, wide, *matrices)


def _on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Returns whether these are float32 matrices on the CPU, not empty, and torch.compile traces nothing."""
    both = x.dtype == weight.dtype == torch.float32 and x.dim() == 2 and x.is_cpu
    return both and x.numel() > 0 and weight.numel() > 0 and not torch.compiler.is_compiling()


def times_transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Does `linear` without a gradient. out: a contiguous matrix for the product, without a bias."""
    if _widens(x, weight):
        wide = linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype) if out is None else out.copy_(wide)
    if serves(x, weight):
        return panels(x, weight, bias, compiled.make.instructions, out=out)
    if out is None and not (_on_cpu(x, weight) and not torch.is_grad_enabled()):
        return F.linear(x, weight, bias)
    # Autocast rounds nothing where torch.mm has an `out`; nor does it in compiled code.
    out = torch.mm(x, weight.t(), out=x.new_empty(len(x), len(weight)) if out is None else out)
    return out if bias is None else out.add_(bias)


def _widens(x: Tensor, weight: Tensor) -> bool:
    """Returns whether these are bfloat16 matrices on a CPU that does not multiply such numbers."""
    return _narrow(x, weight) and not compiled.has_16_bit_products()


def _narrow(x: Tensor, weight: Tensor) -> bool:
    """Returns whether these are bfloat16 matrices on the CPU, not empty, and torch.compile traces nothing."""
    both = x.dtype == weight.dtype == torch.bfloat16 and x.dim() == 2 and x.is_cpu
    return both and x.numel() > 0 and weight.numel() > 0 and not torch.compiler.is_compiling()


def takes_pairs(x: Tensor, weight: Tensor) -> bool:
    """Returns whether compiled code multiplies these: two bfloat16 matrices on a CPU with AVX512-BF16,
    neither empty, weight dense and with rows of an even length."""
    both = compiled.multiplies_pairs and _narrow(x, weight)
    return both and weight.shape[1] % 2 == 0 and weight.is_contiguous()


def in_float32(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiplies bfloat16 x [R, K] with weight [N, K] transposed: float32 [R, N], without a gradient.

    Products are exact, and sums are rounded to float32 alone. Compiled code makes them where `takes_pairs`
    says so, with the same bits for any number of rows and threads, and counts numbers below 1.2e-38 as 0.
    Elsewhere both matrices are widened, so many rows of weight at a time that freed memory serves the next.
    out: a contiguous matrix for the product.
    """
    if not takes_pairs(x, weight):
        wide = x.float()
        return torch.cat([times_transposed(wide, part.float()) for part in weight.split(4096)], -1, out=out)
    out = x.new_empty(len(x), len(weight), dtype=torch.float32) if out is None else out
    _native.pairs(x.contiguous(), weight, out, torch.get_num_threads())
    return out


def add_product(total: Tensor, x: Tensor, matrix: Tensor, first: bool) -> None:
    """Adds x [R, K] times matrix [K, N] to total [R, N], or overwrites it where the product is the `first`.

    All of it is float32 on the CPU, and total is contiguous.
    """
    if serves(x, matrix.t()):
        panels(
            x, matrix.t(), None, compiled.make.instructions, out=total.zero_() if first else total, add=True
        )
        return
    share = torch.mm(x, matrix, out=x.new_empty(total.shape))
    total.copy_(share) if first else total.add_(share)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, instruction_set: str) -> Tensor:
    """Does `linear` without a gradient for float32 on the CPU and a contiguous weight.

    The bits are the same for any number of rows and threads.
    """
    out = x.new_empty(len(x), len(weight))
    _native.few_rows(x.contiguous(), weight, _dense(bias), out, torch.get_num_threads(), instruction_set)
    return out


def panels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    instruction_set: str,
    *,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Does what `few_rows` does for many rows, with AVX2 or AVX-512 and sums in another order.

    - weight or its transpose is contiguous.
    - out: a contiguous matrix for the product. With `add` the product is added to it,
      1024 terms of each sum at a time.
    """
    out = x.new_empty(len(x), len(weight)) if out is None else out
    turned = not weight.is_contiguous()
    matrix = weight.t() if turned else weight
    _native.panels(
        x.contiguous(), matrix, turned, _dense(bias), out, add, torch.get_num_threads(), instruction_set
    )
    return out


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return times_transposed(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradient, weight.t()), None, None
