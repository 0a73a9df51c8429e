"""The GPU row pass: a matrix product into a chunk of float32 logits, then one Triton program a row for log p and J. See
`kernels.loss_head.rows` for the mathematics.

Imported only where it runs, because Triton is not installed everywhere.
"""

import torch
import triton
import triton.language as tl

from kernels.loss_head.rows import Sizes, TorchRows


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
    logprob = (z_y - m) - tl.log(total)
    # NaN only where no sum exists: a target of mass 0 has log-prob -inf.
    lost = total != total
    tl.store(p_logprob + i_row, tl.where(lost, float("nan"), logprob))
    tl.store(p_scale + i_row, tl.where(lost, float("nan"), 1.0))

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
            g = tl.where(lost, 0.0, tl.where(o_v == target, p - 1, p) * slope)
            tl.store(p_jacobian + o_v, g.to(p_jacobian.dtype.element_ty), mask=inside)


class TritonRows(TorchRows):
    """`kernels.loss_head.rows.TorchRows` on a GPU, not for float64. Beside a cuBLAS product of float32 logits stands one Triton program a row.

    J is kept in the dtype of the inputs, whole (state 1), in rows that start at multiples of 16 elements also where V is odd, so that loads
    stay wide.
    """

    MAX_BLOCK = 4096

    @classmethod
    def sizes(cls, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, rows: int, budget: int, kind: str) -> Sizes:
        (vocabulary, width), stride = weight.shape, cls._stride(weight)
        if kind == "values":
            from kernels.loss_head.forward_triton import PARTS_PER_ROW_BLOCK

            return Sizes(vocabulary, 0, 0, 3 * 4 * PARTS_PER_ROW_BLOCK if cls._blocks(weight) else 4 * stride, 0)
        own_logits = weight.dtype != torch.float32
        return Sizes(vocabulary, 0, 0, stride * weight.dtype.itemsize + 4 * 4 * width, 4 * stride if own_logits else 0)

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float | None, sizes: Sizes, rows: int, kind: str
    ) -> None:
        self.weight, self.bias, self.temperature, self.softcap = weight, bias, temperature, softcap
        self.dtype, self.blocks = torch.float32, self._blocks(weight) if kind == "values" else None
        own_logits = sizes.scratch > 0 or (kind == "values" and self.blocks is None)
        self.logits = weight.new_empty(rows, self._stride(weight), dtype=torch.float32) if own_logits else None
        self.own_z = self.new_z(weight, rows) if kind == "product" else self.logits

    @staticmethod
    def _blocks(weight: torch.Tensor):
        """How the kernel that stores no logits goes through a head of this shape; None where the product of a library is faster."""
        from kernels.loss_head import forward_triton as triton_forward

        return triton_forward.blocks_for(weight.shape[1], weight.dtype)

    @staticmethod
    def _stride(weight: torch.Tensor) -> int:
        return -(-weight.shape[0] // 16) * 16

    @staticmethod
    def new_z(weight: torch.Tensor, rows: int) -> torch.Tensor:
        return weight.new_empty(rows, TritonRows._stride(weight))

    def values(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.blocks is None:
            return super().values(hidden, target)
        from kernels.loss_head import forward_triton as triton_forward

        out = hidden.new_empty(len(hidden), dtype=torch.float32)
        triton_forward.token_logprob(hidden, self.weight, self.bias, target, self.temperature, self.softcap, self.blocks, out)
        return out

    def _logprob(self, hidden: torch.Tensor, target: torch.Tensor, z: torch.Tensor, jacobian: bool) -> tuple[torch.Tensor, torch.Tensor]:
        rows, vocabulary = hidden.shape[0], self.weight.shape[0]
        logits = (z if self.logits is None else self.logits[:rows])[:, :vocabulary]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, self.weight.t(), out=logits)
        elif hidden.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=logits)
        else:
            # Triton's interpreter on a CPU, where torch has no 16-bit product with float32 output.
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

    def _times_weight(self, z: torch.Tensor, row_factor: torch.Tensor, out: torch.Tensor) -> None:
        jacobian = z[:, : self.weight.shape[0]]
        if out.dtype == torch.float32 == z.dtype:
            torch.mm(jacobian, self.weight, out=out)
            out.mul_(row_factor[:, None])
        elif out.is_cuda:
            out.copy_(torch.mm(jacobian, self.weight, out_dtype=torch.float32).mul_(row_factor[:, None]))
        else:
            out.copy_((jacobian.float() @ self.weight.float()).mul_(row_factor[:, None]))

    def _add_weight_gradient(self, total: torch.Tensor, z: torch.Tensor, scaled_hidden: torch.Tensor, first: bool) -> None:
        jacobian, scaled = z[:, : self.weight.shape[0]], scaled_hidden.to(z.dtype)
        if not jacobian.is_cuda or jacobian.dtype == torch.float32:
            total.addmm_(jacobian.t().float(), scaled.float(), beta=0 if first else 1)
        elif first:
            torch.mm(jacobian.t(), scaled, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, jacobian.t(), scaled, out_dtype=torch.float32, out=total)
