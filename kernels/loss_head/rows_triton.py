"""The arithmetic of rows on a GPU: a matrix product into a chunk of float32 logits, then one Triton program a
row for log p and J. `kernels.loss_head.rows` has the mathematics.

Only code that runs on a GPU imports this module, because Triton is not installed everywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.loss_head import forward_triton
from kernels.loss_head.records import Head
from kernels.loss_head.rows import Sizes, TorchRows
from kernels.triton_math import logit


@triton.jit
def row_kernel(
    p_logits,  # [C, V] float32
    p_jacobian,  # [C, V], J is written here; may be p_logits, since an element is read before it is written
    p_bias,  # [V]
    p_target,  # [C]
    p_logprob,  # [C] float32
    p_scale,  # [C] float32: 1, or NaN for a row without a log-prob, whose J is 0
    vocabulary,
    logits_stride,
    jacobian_stride,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    JACOBIAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * logits_stride
    target = tl.load(p_target + i_row)

    m = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        inside = o_v < vocabulary
        raw = tl.load(p_logits + o_v, mask=inside, other=0.0)
        if HAS_BIAS:
            raw += tl.load(p_bias + o_v, mask=inside, other=0.0).to(tl.float32)
        z, _ = logit(raw, softcap, temperature, HAS_SOFTCAP)
        z = tl.where(inside, z, float("-inf"))
        largest = tl.maximum(m, tl.max(z, 0))
        # In a block of -inf only, -inf - -inf would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(z - shift), 0)
        m = largest

    raw_y = tl.load(p_logits + target)
    if HAS_BIAS:
        raw_y += tl.load(p_bias + target).to(tl.float32)
    z_y, _ = logit(raw_y, softcap, temperature, HAS_SOFTCAP)
    logprob = (z_y - m) - tl.log(total)
    # NaN stands only where no sum exists; a target of mass 0 has log-prob -inf.
    lost = total != total
    tl.store(p_logprob + i_row, tl.where(lost, float("nan"), logprob))
    tl.store(p_scale + i_row, tl.where(lost, float("nan"), 1.0))

    if JACOBIAN:
        # All threads read the target's logit above before any of them overwrites it.
        tl.debug_barrier()
        p_jacobian += i_row * jacobian_stride
        for start in range(0, vocabulary, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            inside = o_v < vocabulary
            raw = tl.load(p_logits + o_v, mask=inside, other=0.0)
            if HAS_BIAS:
                raw += tl.load(p_bias + o_v, mask=inside, other=0.0).to(tl.float32)
            z, slope = logit(raw, softcap, temperature, HAS_SOFTCAP)
            p = tl.exp(z - m) / total
            # p - 1 is formed in float32 and rounded to the stored dtype once.
            g = tl.where(lost, 0.0, tl.where(o_v == target, p - 1, p) * slope)
            tl.store(p_jacobian + o_v, g.to(p_jacobian.dtype.element_ty), mask=inside)


class TritonRows(TorchRows):
    """A workspace on a GPU, not for float64: one Triton program a row follows a cuBLAS
    product of float32 logits.

    J is kept whole (state 1) in the dtype of the inputs, in rows that start at multiples of 16 elements also
    where V is odd, so that loads stay wide.
    """

    MAX_BLOCK = 4096

    @classmethod
    def sizes(cls, head: Head, rows: int, budget: int, kind: str) -> Sizes:
        weight = head.weight
        (vocabulary, width), stride = weight.shape, cls._stride(weight)
        if kind == "values":
            stored = 4 * stride if cls._blocks(weight) is None else 3 * 4 * forward_triton.PARTS_PER_ROW_BLOCK
            return Sizes(vocabulary, 0, 0, stored, 0)
        logits_apart = weight.dtype != torch.float32
        row = stride * weight.dtype.itemsize + 4 * 4 * width
        return Sizes(vocabulary, 0, 0, row, 4 * stride if logits_apart else 0)

    def __init__(self, head: Head, sizes: Sizes, rows: int, kind: str) -> None:
        weight = head.weight
        self.weight, self.bias, self.temperature, self.softcap = head
        self.dtype, self.blocks = torch.float32, self._blocks(weight) if kind == "values" else None
        logits_apart = sizes.scratch > 0 or (kind == "values" and self.blocks is None)
        stride = self._stride(weight)
        self.logits = weight.new_empty(rows, stride, dtype=torch.float32) if logits_apart else None
        self.scratch_z = self.new_z(weight, rows) if kind == "product" else self.logits

    @staticmethod
    def _blocks(weight: Tensor) -> forward_triton.Blocks | None:
        """Returns how the kernel that stores no logits goes through a head of this shape.

        None where the product of a library is faster.
        """
        return forward_triton.blocks_for(weight.shape[1], weight.dtype)

    @staticmethod
    def _stride(weight: Tensor) -> int:
        return -(-weight.shape[0] // 16) * 16

    @staticmethod
    def new_z(weight: Tensor, rows: int) -> Tensor:
        return weight.new_empty(rows, TritonRows._stride(weight))

    def values(self, hidden: Tensor, target: Tensor) -> Tensor:
        if self.blocks is None:
            return super().values(hidden, target)
        out = hidden.new_empty(len(hidden), dtype=torch.float32)
        head = Head(self.weight, self.bias, self.temperature, self.softcap)
        forward_triton.token_logprob(hidden, head, target, self.blocks, out)
        return out

    def _logprob(self, hidden: Tensor, target: Tensor, z: Tensor, jacobian: bool) -> tuple[Tensor, Tensor]:
        rows, vocabulary = hidden.shape[0], self.weight.shape[0]
        logits = (z if self.logits is None else self.logits[:rows])[:, :vocabulary]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, self.weight.t(), out=logits)
        elif hidden.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=logits)
        else:
            # Triton's interpreter runs on a CPU, where torch has no 16-bit product with float32 output.
            torch.mm(hidden.float(), self.weight.t().float(), out=logits)
        logprob, scale = hidden.new_empty(2, rows, dtype=torch.float32)
        block = min(self.MAX_BLOCK, triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(hidden):
            row_kernel[(rows,)](
                logits,
                z,
                logits if self.bias is None else self.bias,
                target,
                logprob,
                scale,
                vocabulary,
                logits.stride(0),
                z.stride(0),
                self.temperature,
                1.0 if self.softcap is None else float(self.softcap),
                HAS_BIAS=self.bias is not None,
                HAS_SOFTCAP=self.softcap is not None,
                JACOBIAN=jacobian,
                BLOCK_V=block,
                num_warps=8 if block >= 2048 else 4,
            )
        return logprob, scale[:, None]

    def _times_weight(self, z: Tensor, row_factor: Tensor, out: Tensor) -> None:
        jacobian = z[:, : self.weight.shape[0]]
        if out.dtype == torch.float32 == z.dtype:
            torch.mm(jacobian, self.weight, out=out)
            out.mul_(row_factor[:, None])
        elif out.is_cuda:
            out.copy_(torch.mm(jacobian, self.weight, out_dtype=torch.float32).mul_(row_factor[:, None]))
        else:
            out.copy_((jacobian.float() @ self.weight.float()).mul_(row_factor[:, None]))

    def _add_weight_gradient(self, total: Tensor, z: Tensor, scaled_hidden: Tensor, empty: bool) -> None:
        jacobian, scaled = z[:, : self.weight.shape[0]], scaled_hidden.to(z.dtype)
        if not jacobian.is_cuda or jacobian.dtype == torch.float32:
            total.addmm_(jacobian.t().float(), scaled.float(), beta=0 if empty else 1)
        elif empty:
            torch.mm(jacobian.t(), scaled, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, jacobian.t(), scaled, out_dtype=torch.float32, out=total)
