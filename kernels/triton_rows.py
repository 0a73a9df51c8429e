"""The GPU row pass: a matrix product into a chunk of float32 logits, then one Triton program a row for log p and J. See
`kernels.reference` for the mathematics.

Imported only where it runs, because Triton is not installed everywhere.
"""

import torch
import triton
import triton.language as tl

from kernels.reference import Plan


@triton.jit
def _tanh(x):
    """tanh x and 1 - tanh^2 x, both to a few units in the last place: a series near 0, where 1 - exp(-2|x|) cancels."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    y = x * x
    series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 + y * (-1382 / 155925)))))
    value = tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -far, far))
    return value, 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _logit(raw, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """(softcap * tanh(raw / softcap) / temperature, its derivative in raw)."""
    if HAS_SOFTCAP:
        value, slope = _tanh(raw / softcap)
        return value * softcap / temperature, slope / temperature
    else:
        return raw / temperature, 1 / temperature


@triton.jit
def row_kernel(
    p_logits,  # [C, V] float32
    p_jacobian,  # [C, V], J is written here; may be p_logits, since an element is read before it is written
    p_bias,  # [V]
    p_target,  # [C]
    p_logprob,  # [C] float32
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
        z, _ = _logit(raw, softcap, temperature, HAS_SOFTCAP)
        z = tl.where(inside, z, float("-inf"))
        largest = tl.maximum(m, tl.max(z, 0))
        # A block of -inf only: -inf - -inf would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(z - shift), 0)
        m = largest

    raw_y = tl.load(p_logits + target)
    if HAS_BIAS:
        raw_y += tl.load(p_bias + target).to(tl.float32)
    z_y, _ = _logit(raw_y, softcap, temperature, HAS_SOFTCAP)
    tl.store(p_logprob + i_row, (z_y - m) - tl.log(total))

    if JACOBIAN:
        # The target's logit is read above by all threads, before any of them overwrites it.
        tl.debug_barrier()
        p_jacobian += i_row * jacobian_stride
        for start in range(0, vocabulary, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            inside = o_v < vocabulary
            raw = tl.load(p_logits + o_v, mask=inside, other=0.0)
            if HAS_BIAS:
                raw += tl.load(p_bias + o_v, mask=inside, other=0.0).to(tl.float32)
            z, slope = _logit(raw, softcap, temperature, HAS_SOFTCAP)
            p = tl.exp(z - m) / total
            # p - 1 in float32, rounded to the stored dtype once.
            g = tl.where(o_v == target, p - 1, p) * slope
            tl.store(p_jacobian + o_v, g.to(p_jacobian.dtype.element_ty), mask=inside)


class TritonRows:
    """The row arithmetic of one call on a GPU; same interface as `kernels.reference.TorchRows`. Not for float64."""

    MAX_BLOCK = 4096

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: Plan, jacobian: bool) -> None:
        self.weight, self.bias, self.plan = weight, bias, plan
        shape = (plan.rows, self._stride(weight))
        self.logits = hidden.new_empty(shape, dtype=torch.float32)[:, : weight.shape[0]]
        self.buffer = self.logits
        if jacobian and hidden.dtype != torch.float32:
            self.buffer = hidden.new_empty(shape)[:, : weight.shape[0]]

    @staticmethod
    def _stride(weight: torch.Tensor) -> int:
        # Rows start at multiples of 16 elements, also where V is odd, so that loads stay wide.
        return -(-weight.shape[0] // 16) * 16

    @staticmethod
    def fixed_bytes(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int) -> int:
        return 0

    @staticmethod
    def row_bytes(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None, jacobian: bool) -> int:
        logits = 4 + (hidden.element_size() if jacobian and hidden.dtype != torch.float32 else 0)
        return TritonRows._stride(weight) * logits + 4 * 3 * weight.shape[1]

    def logprob(self, hidden: torch.Tensor, target: torch.Tensor, jacobian: bool) -> torch.Tensor:
        """log p [C] of rows hidden [C, D]; with `jacobian` J [C, V] is left in the dtype of hidden."""
        rows, vocabulary = hidden.shape[0], self.weight.shape[0]
        logits = self.logits[:rows]
        self.jacobian = self.buffer[:rows]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, self.weight.t(), out=logits)
        elif hidden.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=logits)
        else:
            # Triton's interpreter on a CPU, where torch has no 16-bit product with float32 output.
            torch.mm(hidden.float(), self.weight.t().float(), out=logits)
        logprob = hidden.new_empty(rows, dtype=torch.float32)
        block = min(self.MAX_BLOCK, triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(hidden):
            row_kernel[(rows,)](
                logits,
                self.jacobian,
                logits if self.bias is None else self.bias,
                target,
                logprob,
                vocabulary,
                logits.stride(0),
                self.jacobian.stride(0),
                self.plan.temperature,
                1.0 if self.plan.softcap is None else float(self.plan.softcap),
                HAS_BIAS=self.bias is not None,
                HAS_SOFTCAP=self.plan.softcap is not None,
                JACOBIAN=jacobian,
                BLOCK_V=block,
                num_warps=8 if block >= 2048 else 4,
            )
        return logprob

    def times_weight(self, out: torch.Tensor) -> None:
        """out [C, D] = J W."""
        torch.mm(self.jacobian, self.weight, out=out)

    def add_weight_gradient(self, total: torch.Tensor, scaled_hidden: torch.Tensor) -> None:
        """total [V, D] += J^T scaled_hidden, summed over chunks in float32."""
        scaled = scaled_hidden.to(self.jacobian.dtype)
        if self.jacobian.is_cuda and self.jacobian.dtype != torch.float32:
            torch.addmm(total, self.jacobian.t(), scaled, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(self.jacobian.t().float(), scaled.float())

    def add_bias_gradient(self, total: torch.Tensor, coefficient: torch.Tensor) -> None:
        """total [V] += J^T coefficient."""
        column = coefficient.to(self.jacobian.dtype)[:, None]
        self.add_weight_gradient(total[:, None], column)
