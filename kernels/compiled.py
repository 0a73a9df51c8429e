"""The compiled module of csrc/, where it was built, and how this make of processor
multiplies matrices.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from kernels import _native
except ImportError:
    _native = None

# The instruction sets that this processor runs, fastest first.
instructions: tuple[str, ...] = () if _native is None else _native.instructions
# Whether compiled code multiplies bfloat16, by AVX512-BF16.
multiplies_pairs: bool = _native is not None and _native.multiplies_pairs

_warned = False


class Make(NamedTuple):
    """How float32 work on the CPU is done on one make of processor.

    LOG.md has the measurements behind the numbers.
    """

    instructions: str | None  # instruction set of the compiled code; None: plain torch does all the work
    few_rows: int  # a layer's product of at most this many rows sums along the rows of the matrix as they lie
    panel_rows: int | None  # one of at most this many takes the matrix in panels; None: so does every product

    @property
    def compiles_products(self) -> bool:
        """Returns whether compiled code makes every product with a frozen matrix, also in the loss head."""
        return self.instructions is not None and self.panel_rows is None


# Every make that is told apart. The tests run each of them wherever the processor has the instructions.
MAKES = {
    "intel": Make("avx512", few_rows=16, panel_rows=96),
    "intel, avx2": Make("avx2", few_rows=8, panel_rows=0),
    "amd": Make("avx512", few_rows=16, panel_rows=None),
    "avx2": Make("avx2", few_rows=8, panel_rows=None),
    "generic": Make("generic", few_rows=0, panel_rows=0),
    "none": Make(None, few_rows=0, panel_rows=0),
}


def _make() -> Make:
    """Finds the make of this processor.

    On Intel processors MKL, torch's choice there, multiplies many rows fastest.
    """
    file = Path("/proc/cpuinfo")
    intel = torch.backends.mkl.is_available() and file.is_file() and "GenuineIntel" in file.read_text()
    names = {"avx512": ("amd", "intel"), "avx2": ("avx2", "intel, avx2"), "generic": ("generic", "generic")}
    return MAKES[names[instructions[0]][intel] if instructions else "none"]


make = _make()


def has_16_bit_products() -> bool:
    """Returns whether this processor multiplies bfloat16 faster than float32: by AVX512-BF16 or AMX.

    Others take several times as long.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether compiled code works on such tensors; logs once where only the module is missing."""
    global _warned
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if make.instructions is None and not _warned:
        _warned = True
        cure = "with a C++ compiler, install the project again"
        logging.getLogger(__name__).warning(
            f"the compiled CPU kernels are not there: slower torch code runs instead; {cure}"
        )
    return make.instructions is not None


def with_gradient(
    fast: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    *tensors: Tensor,
) -> Tensor | tuple[Tensor, ...]:
    """Returns fast(*tensors), whose gradient is that of plain(*tensors): the same function in torch code.

    In 16 bits two ways to the same number part at the first rounding that falls otherwise, and after some
    layers all bits differ. What is trained this way has the bits of what is scored without a gradient. The
    backward pass keeps the tensors alone and computes `plain` again.
    """
    return _WithGradient.apply(fast, plain, *tensors)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fast: Callable, plain: Callable, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.plain = plain
        ctx.save_for_backward(*tensors)
        return fast(*tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        leaves = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            out = ctx.plain(*leaves)
        asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
        found = iter(torch.autograd.grad(out, asked, gradients))
        return None, None, *(next(found) if need else None for need in wanted)
