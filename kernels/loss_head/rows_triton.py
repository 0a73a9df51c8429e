"""The arithmetic of rows on a GPU: a matrix product into a chunk of float32 logits, then one Triton program a
row for log p and J. `kernels.loss_head.rows` has the mathematics.

Only code that runs on a GPU imports this module, because Triton is not installed everywhere.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.loss_head import forward_triton
from kernels.loss_head.records import Head
from kernels.loss_head.rows import Sizes, TorchRows
from kernels.triton_math import tanh

# Exponentials are formed relative to the larger of the target's logit and the first block's largest. They are
# formed again where the row's largest logit is this many powers of two away; all sums fit float32 below it.
FARTHEST = tl.constexpr(64.0)


@triton.jit
def _capped(raw, softcap, inverse_softcap, HAS_SOFTCAP: tl.constexpr):
    """Returns softcap * tanh(raw / softcap) and its derivative in raw."""
    if HAS_SOFTCAP:
        value, slope = tanh(raw * inverse_softcap)
        return value * softcap, slope
    else:
        return raw, 1.0


@triton.jit
def _powers(value, middle, to_log2, rest):
    """Returns (value - middle) (to_log2 + rest), whose two parts leave the error of a division."""
    # The difference comes first, so that a large common offset costs no digits. -inf times a part of either
    # sign would be NaN.
    distance = tl.maximum(value - middle, -3e38, propagate_nan=tl.PropagateNan.ALL)
    return distance * to_log2 + distance * rest


@triton.jit
def _exponents(
    p_logits, p_bias, o_v, inside, middle, to_log2, rest, softcap, inverse_softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Returns z = (capped logit - middle) log2(e) / temperature of a block of columns, -inf where it is not
    inside the row, and the cap's slope."""
    raw = tl.load(p_logits + o_v, mask=inside, other=float("-inf"))
    if HAS_BIAS:
        raw += tl.load(p_bias + o_v, mask=inside, other=0.0).to(tl.float32)
    value, slope = _capped(raw, softcap, inverse_softcap, HAS_SOFTCAP)
    z = _powers(value, middle, to_log2, rest)
    if HAS_SOFTCAP:
        z = tl.where(inside, z, float("-inf"))
    return z, slope


@triton.jit
def _exponentials(
    p_logits,
    p_jacobian,
    p_bias,
    target,
    vocabulary,
    middle,
    factor,
    to_log2,
    rest,
    softcap,
    inverse_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Returns the sum of 2^z over all of a row but the target, and the largest z; where STORE writes 2^z
    times factor and the cap's slope."""
    o = tl.arange(0, BLOCK_V)
    b_sum, b_max = tl.zeros([BLOCK_V], tl.float32), tl.full([BLOCK_V], float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        o_v = start + o
        inside = o_v < vocabulary
        z, slope = _exponents(
            p_logits, p_bias, o_v, inside, middle, to_log2, rest, softcap, inverse_softcap, HAS_BIAS,
            HAS_SOFTCAP,
        )  # fmt: skip
        e = tl.exp2(z)
        # 1 - p of the target is the others' share, and no difference of two close numbers.
        b_sum += tl.where(o_v == target, 0.0, e)
        b_max = tl.maximum(b_max, z)
        if STORE:
            tl.store(p_jacobian + o_v, (e * factor * slope).to(p_jacobian.dtype.element_ty), mask=inside)
    # Each lane has one sum of its own: one reduction a row.
    return tl.sum(b_sum, 0), tl.max(b_max, 0)


@triton.jit
def row_kernel(
    p_logits,  # [C, V] float32
    p_jacobian,  # [C, V], J / scale is written here; may be p_logits unless ONE_PASS
    p_bias,  # [V]
    p_target,  # [C]
    p_logprob,  # [C] float32
    p_scale,  # [C] float32; NaN for a row without a log-prob, whose J is 0
    vocabulary,
    logits_stride,
    jacobian_stride,
    to_log2,  # log2(e) / temperature
    rest,  # and what its rounding to float32 left
    temperature,
    softcap,
    inverse_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    JACOBIAN: tl.constexpr,
    ONE_PASS: tl.constexpr,  # J is written as it stands before the row's sum is known, and scale has that sum
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * logits_stride
    p_jacobian += i_row * jacobian_stride
    target = tl.load(p_target + i_row)
    o = tl.arange(0, BLOCK_V)
    inside = o < vocabulary
    raw = tl.load(p_logits + o, mask=inside, other=float("-inf"))
    raw_y = tl.load(p_logits + target)
    if HAS_BIAS:
        raw += tl.load(p_bias + o, mask=inside, other=0.0).to(tl.float32)
        raw_y += tl.load(p_bias + target).to(tl.float32)
    value, _ = _capped(raw, softcap, inverse_softcap, HAS_SOFTCAP)
    value_y, slope_y = _capped(raw_y, softcap, inverse_softcap, HAS_SOFTCAP)
    middle = tl.maximum(tl.max(tl.where(inside, value, float("-inf")), 0), value_y)
    # With -inf alone, -inf - -inf would be NaN.
    middle = tl.where(middle == float("-inf"), 0.0, middle)
    store_first: tl.constexpr = JACOBIAN and ONE_PASS
    others, top = _exponentials(
        p_logits, p_jacobian, p_bias, target, vocabulary, middle, 1.0, to_log2, rest, softcap,
        inverse_softcap, HAS_BIAS, HAS_SOFTCAP, store_first, BLOCK_V,
    )  # fmt: skip
    if (top > FARTHEST) | ((top < -FARTHEST) & (top > float("-inf"))):
        middle += top / to_log2
        others, top = _exponentials(
            p_logits, p_jacobian, p_bias, target, vocabulary, middle, 1.0, to_log2, rest, softcap,
            inverse_softcap, HAS_BIAS, HAS_SOFTCAP, store_first, BLOCK_V,
        )  # fmt: skip
    total = others + tl.exp2(_powers(value_y, middle, to_log2, rest))
    # NaN stands only where no sum exists; a target of mass 0 has log-prob -inf.
    lost = (total != total) | (total == 0)
    logprob = (value_y - middle) / temperature - tl.log(total)
    tl.store(p_logprob + i_row, tl.where(lost, float("nan"), logprob))
    whole = 1 / (temperature * total)
    if ONE_PASS:
        tl.store(p_scale + i_row, tl.where(lost, float("nan"), whole))
        factor = 1.0
    else:
        tl.store(p_scale + i_row, tl.where(lost, float("nan"), 1.0))
        factor = whole
    if JACOBIAN:
        kind = p_jacobian.dtype.element_ty
        # All threads have read the target's logit before any of them overwrites it.
        tl.debug_barrier()
        if lost:
            for start in range(0, vocabulary, BLOCK_V):
                tl.store(p_jacobian + start + o, tl.zeros([BLOCK_V], kind), mask=start + o < vocabulary)
        else:
            if not ONE_PASS:
                _exponentials(
                    p_logits, p_jacobian, p_bias, target, vocabulary, middle, factor, to_log2, rest,
                    softcap, inverse_softcap, HAS_BIAS, HAS_SOFTCAP, True, BLOCK_V,
                )  # fmt: skip
            tl.debug_barrier()
            tl.store(p_jacobian + target, (-others * factor * slope_y).to(kind))


def factors(temperature: float, softcap: float | None) -> tuple[float, float, float, float, float]:
    """Returns the five numbers that `row_kernel` takes behind the strides, so that it divides by none."""
    to_log2, cap = math.log2(math.e) / temperature, 1.0 if softcap is None else float(softcap)
    rest = to_log2 - float(torch.tensor(to_log2, dtype=torch.float32))
    return to_log2, rest, float(temperature), cap, 1 / cap


class TritonRows(TorchRows):
    """A workspace on a GPU, not for float64: one Triton program a row follows a cuBLAS
    product of float32 logits.

    J is kept in the dtype of the inputs, in rows that start at multiples of 16 elements also where V is odd,
    so that loads stay wide. In bfloat16 a row's logits are read once: its J is written before its sum is
    known, which the state holds. Float16 has too small a range for that, and float32 no second place for J:
    they read the row twice and keep J whole (state 1).
    """

    MAX_BLOCK = 4096
    ROUNDS_SUMS = True
    TILE = 256

    @classmethod
    def sizes(cls, head: Head, rows: int, budget: int, kind: str) -> Sizes:
        weight = head.weight
        (vocabulary, width), stride = weight.shape, cls._stride(weight)
        if kind == "values":
            blocks, stored = cls._blocks(weight), 4 * stride
            if blocks is not None:
                stored = 3 * 4 * forward_triton.parts_for(rows, blocks, vocabulary)
            return Sizes(vocabulary, 0, 0, stored, 0)
        logits_apart = weight.dtype != torch.float32
        row = stride * weight.dtype.itemsize + 4 * 4 * width
        return Sizes(vocabulary, 0, 0, row, 4 * stride if logits_apart else 0)

    def __init__(self, head: Head, sizes: Sizes, rows: int, kind: str) -> None:
        weight = head.weight
        self.weight, self.bias, self.temperature, self.softcap, _ = head
        self.dtype, self.blocks = torch.float32, self._blocks(weight) if kind == "values" else None
        self.parts = sizes.row // 12  # of the vocabulary, where no logits are stored
        logits_apart = self.blocks is None if kind == "values" else weight.dtype != torch.float32
        stride = self._stride(weight)
        self.logits = weight.new_empty(rows, stride, dtype=torch.float32) if logits_apart else None
        self.scratch_z = self.new_z(weight, rows) if kind == "product" else self.logits

    @staticmethod
    def _blocks(weight: Tensor) -> forward_triton.Blocks | None:
        """Returns how the kernel that stores no logits goes through a head of this shape.

        None where the product of a library is faster.
        """
        return forward_triton.blocks_for(weight.shape[1], weight.dtype)

    @classmethod
    def most_columns(cls, capped: bool) -> int:
        """Returns the logits that a row's program takes at a time; with a softcap more do not fit the
        registers."""
        return cls.MAX_BLOCK // 2 if capped else cls.MAX_BLOCK

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
        forward_triton.token_logprob(hidden, head, target, self.blocks, self.parts, out)
        return out

    def _logprob(self, hidden: Tensor, target: Tensor, z: Tensor, jacobian: bool) -> tuple[Tensor, Tensor]:
        return self._from_logits(self._product(hidden, z), target, z, jacobian)

    def _product(self, hidden: Tensor, z: Tensor) -> Tensor:
        """Returns the logits [C, V] before bias and softcap, which stand in z where its dtype is theirs."""
        logits = self._logits_of(z)
        if hidden.dtype == torch.float32:
            torch.mm(hidden, self.weight.t(), out=logits)
        elif hidden.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=logits)
        else:
            # Triton's interpreter runs on a CPU, where torch has no 16-bit product with float32 output.
            torch.mm(hidden.float(), self.weight.t().float(), out=logits)
        return logits

    def _logits_of(self, z: Tensor) -> Tensor:
        """Returns where the logits [C, V] of the rows z stand."""
        return (z if self.logits is None else self.logits[: len(z)])[:, : self.weight.shape[0]]

    def _from_logits(
        self, logits: Tensor, target: Tensor, z: Tensor, jacobian: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns log p [C] and scale [C, 1] of logits [C, V]; with `jacobian` z becomes J / scale."""
        rows, vocabulary = logits.shape
        logprob, scale = logits.new_empty(2, rows)
        block = min(self.most_columns(self.softcap is not None), triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(logits):
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
                *factors(self.temperature, self.softcap),
                HAS_BIAS=self.bias is not None,
                HAS_SOFTCAP=self.softcap is not None,
                JACOBIAN=jacobian,
                ONE_PASS=z.dtype == torch.bfloat16,
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
        if total.dtype != torch.float32:
            assert empty, "sums of several products are float32"
            if total.is_cuda:
                torch.mm(jacobian.t(), scaled, out=total)
            else:
                total.copy_(jacobian.t().float() @ scaled.float())
            return
        if not jacobian.is_cuda or jacobian.dtype == torch.float32:
            total.addmm_(jacobian.t().float(), scaled.float(), beta=0 if empty else 1)
        elif empty:
            torch.mm(jacobian.t(), scaled, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, jacobian.t(), scaled, out_dtype=torch.float32, out=total)
