"""Every op in plain torch: the specification, the CPU path and the float64 oracle of the GPU kernels.

Logits exist for one chunk of rows at a time, in one buffer that all steps overwrite. With z_y the target's logit and J = d(-log
p)/d(logits before the softcap),

    log p = (z_y - m) - log(sum exp(z - m)),  m = max z
    J     = (softmax(z) - onehot(y)) (1 - tanh(u / softcap)^2) / temperature,  u = h W^T + bias
    dH_t  = -a_t J_t W,  dW = -sum_t a_t J_t^T H_t,  dbias = -sum_t a_t J_t,  a_t = d loss / d log p_t

a_t is a factor of the whole row, so a frozen head needs two matrix products in all: the forward pass also forms J W and the backward pass
only scales its rows. Otherwise the backward pass computes the logits again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.checks import FLOATS, check_finite, check_positive, check_preference, check_rows, check_tensor

DEFAULT_MEMORY_BUDGET_BYTES = 256 * 2**20
# Vectors of one number a row: log-probs, their float64 copies, weights, gradients, targets.
_VECTOR_BYTES_PER_ROW = 64


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs and coefficients: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Plan(NamedTuple):
    """The non-tensor arguments of one call."""

    workspace: type
    temperature: float
    softcap: float | None
    rows: int  # rows of hidden a chunk
    columns: int  # rows of the head converted at a time, where its dtype is not that of the logits
    keep_product: bool  # the forward pass forms J W (frozen head)


class TorchRows:
    """The row arithmetic of one call in plain torch; owns the one logits buffer [rows, V] (two with a softcap and gradients)."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: Plan, jacobian: bool) -> None:
        self.weight, self.plan, self.dtype = weight, plan, statistics_dtype(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        shape = (plan.rows, weight.shape[0])
        self.buffer = hidden.new_empty(shape, dtype=self.dtype)
        self.slope = hidden.new_empty(shape, dtype=self.dtype) if jacobian and plan.softcap is not None else None

    @staticmethod
    def fixed_bytes(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int) -> int:
        size = statistics_dtype(hidden.dtype).itemsize
        converted = hidden.dtype.itemsize != size
        # Two parts: the next one is made before the last one is dropped.
        return size * (2 * columns * weight.shape[1] * converted + (0 if bias is None or bias.dtype.itemsize == size else weight.shape[0]))

    @staticmethod
    def row_bytes(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None, jacobian: bool) -> int:
        buffers = 2 if jacobian and softcap is not None else 1
        return statistics_dtype(hidden.dtype).itemsize * (buffers * weight.shape[0] + 3 * weight.shape[1])

    def _head(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns of the logits, those rows of the head in the dtype of the logits)."""
        if self.weight.dtype == self.dtype:
            yield slice(None), self.weight
            return
        for start in range(0, self.weight.shape[0], self.plan.columns):
            part = slice(start, start + self.plan.columns)
            yield part, self.weight[part].to(self.dtype)

    def logprob(self, hidden: torch.Tensor, target: torch.Tensor, jacobian: bool) -> torch.Tensor:
        """log p [C] of rows hidden [C, D]; with `jacobian` the buffer then holds J [C, V]."""
        softcap = self.plan.softcap
        z = self.z = self.buffer[: hidden.shape[0]]
        hidden = hidden.to(self.dtype)
        for part, head in self._head():
            torch.mm(hidden, head.t(), out=z[:, part])
        if self.bias is not None:
            z.add_(self.bias)
        if softcap is not None:
            z.div_(softcap).tanh_()
            if jacobian:
                slope = torch.mul(z, z, out=self.slope[: z.shape[0]]).neg_().add_(1)
            z.mul_(softcap)
        logprob = self.normalise(z, target.long(), jacobian)
        if jacobian and softcap is not None:
            z.mul_(slope)
        return logprob

    def normalise(self, z: torch.Tensor, target: torch.Tensor, jacobian: bool) -> torch.Tensor:
        """log softmax(z / temperature)[target] [C]; z [C, V] is overwritten, with `jacobian` by (softmax - onehot) / temperature."""
        temperature = self.plan.temperature
        if temperature != 1:
            z.div_(temperature)
        target = target[:, None]
        largest = z.amax(1, keepdim=True)
        shifted = z.gather(1, target) - largest
        total = z.sub_(largest).exp_().sum(1, keepdim=True)
        if jacobian:
            # p_y - 1 from the unscaled exponentials: one rounding, and no second pass for the one-hot.
            z.scatter_(1, target, z.gather(1, target) - total)
            z.div_(total * temperature)
        return (shifted - total.log()).squeeze(1)

    def times_weight(self, out: torch.Tensor) -> None:
        """out [C, D] = J W."""
        if out.dtype == self.dtype:
            torch.mm(self.z, self.weight, out=out)
            return
        product = torch.zeros_like(out, dtype=self.dtype)
        for part, head in self._head():
            product.addmm_(self.z[:, part], head)
        out.copy_(product)

    def add_weight_gradient(self, total: torch.Tensor, scaled_hidden: torch.Tensor) -> None:
        """total [V, D] += J^T scaled_hidden."""
        total.addmm_(self.z.t(), scaled_hidden)

    def add_bias_gradient(self, total: torch.Tensor, coefficient: torch.Tensor) -> None:
        """total [V] += J^T coefficient."""
        total.addmv_(self.z.t(), coefficient)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on a gradient; differentiating it again is an error instead of a silently missing term."""

    @staticmethod
    def forward(ctx, gradient: torch.Tensor, *sources: torch.Tensor | None) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "double backward is not supported: sequence_logprob and the losses on it have first derivatives only, "
            "so their gradients cannot be differentiated again"
        )


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, plan: Plan) -> torch.Tensor:
        logprob = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
        product = torch.empty_like(hidden) if plan.keep_product else None
        work = plan.workspace(hidden, weight, bias, plan, plan.keep_product)
        for rows in _chunks(hidden.shape[0], plan.rows):
            logprob[rows] = work.logprob(hidden[rows], target[rows], plan.keep_product)
            if product is not None:
                work.times_weight(product[rows])
        ctx.plan = plan
        ctx.save_for_backward(hidden, weight, bias, target, product)
        return logprob

    @staticmethod
    def backward(ctx, gradient):
        plan: Plan = ctx.plan
        hidden, weight, bias, target, product = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = statistics_dtype(hidden.dtype)
        with torch.no_grad():
            coefficient = gradient.neg()[:, None]
            d_hidden = torch.empty_like(hidden) if needs_hidden else None
            d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
            d_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
            # float16 would lose small coefficients: they enter the head's gradient relative to the largest one.
            unit = coefficient.abs().amax().clamp_min(1e-30) if hidden.dtype == torch.float16 and len(hidden) else None
            work = None if product is not None else plan.workspace(hidden, weight, bias, plan, True)
            for rows in _chunks(hidden.shape[0], plan.rows):
                a = coefficient[rows]
                if product is not None:
                    # A row of coefficient 0 adds nothing, even where it is not finite.
                    d_hidden[rows] = torch.where(a == 0, 0, product[rows] * a)
                    continue
                h = torch.where(a == 0, 0, hidden[rows])
                work.logprob(h, target[rows], True)
                if needs_hidden:
                    work.times_weight(d_hidden[rows])
                    d_hidden[rows].mul_(a)
                relative = a if unit is None else a / unit
                if needs_weight:
                    work.add_weight_gradient(d_weight, h * relative)
                if needs_bias:
                    work.add_bias_gradient(d_bias, relative[:, 0])
            if unit is not None:
                for total in (d_weight, d_bias):
                    if total is not None:
                        total.mul_(unit)
            gradients = [
                d_hidden,
                None if d_weight is None else d_weight.to(weight.dtype),
                None if d_bias is None else d_bias.to(bias.dtype),
            ]
        if torch.is_grad_enabled():
            gradients = [None if g is None else _FirstOrderOnly.apply(g, gradient, hidden, weight, bias) for g in gradients]
        return *gradients, None, None


def token_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget_bytes: int | None,
    workspace: type = TorchRows,
) -> torch.Tensor:
    """log p [T] of every row, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias. Arguments are checked
    already.

    `workspace` does the row arithmetic: `TorchRows`, or the Triton one. Raises ValueError where one row does not fit the budget.
    """
    budget = DEFAULT_MEMORY_BUDGET_BYTES if memory_budget_bytes is None else int(memory_budget_bytes)
    differentiable = torch.is_grad_enabled()
    needs_head = differentiable and (weight.requires_grad or (bias is not None and bias.requires_grad))
    needs_any = needs_head or (differentiable and hidden.requires_grad)
    # An eighth of the budget is for converted parts of the head.
    columns = max(1, min(weight.shape[0], budget // 16 // (4 * max(1, weight.shape[1]))))
    fixed = workspace.fixed_bytes(hidden, weight, bias, columns) + _VECTOR_BYTES_PER_ROW * hidden.shape[0]
    per_row = workspace.row_bytes(hidden, weight, softcap, needs_any)
    if fixed + per_row > budget:
        raise ValueError(f"memory_budget_bytes = {budget}: expected at least {fixed + per_row}, what one row of logits needs here")
    product = hidden.numel() * hidden.element_size()
    keep_product = needs_any and not needs_head and product <= budget // 2 and fixed + product + per_row <= budget
    rows = (budget - fixed - product * keep_product) // per_row
    plan = Plan(workspace, float(temperature), softcap, max(1, min(rows, hidden.shape[0])), columns, keep_product)
    return _TokenLogprob.apply(hidden, weight, bias, target, plan)


def sequence_sum(token_logprob: torch.Tensor, token_weight: torch.Tensor | None, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Weighted sum of token log-probs per sequence [N], added in float64 in a fixed order; rows of weight 0 add nothing, even -inf or
    NaN."""
    device = token_logprob.device
    terms = token_logprob.double()
    if token_weight is not None:
        weight = token_weight.detach().to(device, torch.float64, non_blocking=True)
        terms = torch.where(weight == 0, 0, terms) * weight
    # unsafe=True: the offsets are checked already where the host may read them.
    total = torch.segment_reduce(terms, "sum", offsets=cu_seqlens.to(device, non_blocking=True), unsafe=True)
    return total.to(token_logprob.dtype)


def sequence_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_token_logprob: bool = False,
    memory_budget_bytes: int | None = None,
    debug: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`kernels.sequence_logprob` in plain torch on any device, with the same arguments."""
    check_rows(hidden, weight, target, cu_seqlens, token_weight, bias, temperature, softcap, memory_budget_bytes, debug)
    token = token_logprob(hidden, weight, target, bias, temperature, softcap, memory_budget_bytes)
    logprob = sequence_sum(token, token_weight, cu_seqlens)
    return (logprob, token) if return_token_logprob else logprob


class PreferenceLoss(NamedTuple):
    """Result of `lagrangian_preference_loss`; all but `loss` carry no gradient."""

    loss: torch.Tensor  # scalar
    logprob: torch.Tensor  # [N]
    margin: torch.Tensor  # [K]
    preference: torch.Tensor  # [K], q
    accuracy: torch.Tensor  # scalar


def preference_loss(
    logprob: torch.Tensor,
    pairs: torch.Tensor,
    reward: torch.Tensor | None,
    utility: torch.Tensor | None,
    lam: torch.Tensor | None,
    ref_logprob: torch.Tensor,
    beta: float,
    labels: str,
    preference: torch.Tensor | None,
    uniform: torch.Tensor | None,
    generator: torch.Generator | None,
) -> PreferenceLoss:
    """The pair arithmetic of `lagrangian_preference_loss` on logprob [N]; arguments are checked already.

    With x = beta ((L_a - ref_a) - (L_b - ref_b)): loss = mean of -q log sigmoid(x) - (1 - q) log sigmoid(-x), the DPO objective (Rafailov
    et al. 2023, eq. 7) with labels from the modified reward r + lam . g.
    """

    def here(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return value.detach().to(logprob.device, dtype, non_blocking=True)

    first, second = here(pairs, torch.int64).unbind(1)
    if labels == "given":
        q = here(preference, logprob.dtype)
    else:
        score = here(reward, torch.float64) + here(utility, torch.float64) @ here(lam, torch.float64)
        q = torch.sigmoid(score[first] - score[second])
        if labels == "sampled":
            if uniform is None:
                uniform = torch.rand(len(pairs), generator=generator, device=generator.device, dtype=torch.float64)
            q = (here(uniform, torch.float64) < q).double()
        q = q.to(logprob.dtype)
    ratio = logprob - here(ref_logprob, logprob.dtype)
    margin = beta * (ratio[first] - ratio[second])
    entropy = -q * F.logsigmoid(margin) - (1 - q) * F.logsigmoid(-margin)
    loss = entropy.sum() / max(1, len(pairs))
    margin = margin.detach()
    tie = (margin == 0) | (q == 0.5)
    accuracy = torch.where(tie, 0.5, ((margin > 0) == (q > 0.5)).to(logprob.dtype)).mean()
    return PreferenceLoss(loss, logprob.detach(), margin, q, accuracy)


def lagrangian_preference_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    pairs: torch.Tensor,
    reward: torch.Tensor | None,
    utility: torch.Tensor | None,
    lam: torch.Tensor | None,
    ref_logprob: torch.Tensor,
    *,
    beta: float,
    labels: str = "soft",
    preference: torch.Tensor | None = None,
    uniform: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    token_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget_bytes: int | None = None,
    debug: bool = False,
) -> PreferenceLoss:
    """`kernels.lagrangian_preference_loss` in plain torch on any device, with the same arguments."""
    check_rows(hidden, weight, target, cu_seqlens, token_weight, bias, temperature, softcap, memory_budget_bytes, debug)
    sequences = len(cu_seqlens) - 1
    labelling = (reward, utility, lam, ref_logprob, beta, labels, preference, uniform, generator)
    check_preference(sequences, hidden.device, pairs, *labelling, debug)
    token = token_logprob(hidden, weight, target, bias, temperature, softcap, memory_budget_bytes)
    return preference_loss(sequence_sum(token, token_weight, cu_seqlens), pairs, *labelling)


class DualMoments(NamedTuple):
    """Result of `dual_moments`, float64, without gradients."""

    value: torch.Tensor  # scalar
    gradient: torch.Tensor  # [J], above 0 means slack
    hessian: torch.Tensor  # [J, J]
    ess: torch.Tensor  # [P], effective number of responses


@torch.no_grad()
def dual_moments(
    reward_PG: torch.Tensor,
    utility_PGJ: torch.Tensor,
    lam_J: torch.Tensor,
    beta: float,
    *,
    utility_mean: torch.Tensor | float | None = None,
    threshold: torch.Tensor | float | None = None,
) -> DualMoments:
    """`kernels.dual_moments` in plain torch on any device, with the same arguments.

    With g' = g - utility_mean - threshold and the tilted weights w = softmax_i((r + lam . g') / beta):
    value = (beta / P) sum_p [logsumexp_i((r + lam . g') / beta) - ln G], gradient = mean_p E_w[g'], hessian = mean_p Cov_w[g'] / beta,
    ess = 1 / sum_i w_i^2.
    """
    check_tensor("reward_PG", reward_PG, (None, None), FLOATS, None)
    prompts, responses = reward_PG.shape
    if prompts == 0 or responses == 0:
        raise ValueError(f"reward_PG has shape {list(reward_PG.shape)}: expected at least one prompt and one response")
    places = (reward_PG.device, torch.device("cpu"))
    check_tensor("utility_PGJ", utility_PGJ, (prompts, responses, None), FLOATS, (reward_PG.device,))
    constraints = utility_PGJ.shape[2]
    check_tensor("lam_J", lam_J, (constraints,), FLOATS, places)
    check_positive("beta", beta)
    for name, value in (("reward_PG", reward_PG), ("utility_PGJ", utility_PGJ), ("lam_J", lam_J)):
        check_finite(name, value, False)

    def level(name: str, value: torch.Tensor | float) -> torch.Tensor:
        value = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64)
        check_tensor(name, value, (constraints,) if value.dim() else (), FLOATS, places)
        check_finite(name, value, False)
        return value.to(reward_PG.device, torch.float64, non_blocking=True)

    reward, utility = reward_PG.double(), utility_PGJ.double()
    lam = lam_J.to(reward_PG.device, torch.float64, non_blocking=True)
    centre = utility.mean((0, 1)) if utility_mean is None else level("utility_mean", utility_mean)
    utility = utility - centre
    if threshold is not None:
        utility = utility - level("threshold", threshold)
    tilted = (reward + utility @ lam) / beta
    value = beta * (tilted.logsumexp(1).mean() - torch.tensor(responses, dtype=torch.float64).log())
    w = tilted.softmax(1)
    mean_PJ = torch.einsum("pg,pgj->pj", w, utility)
    spread = utility - mean_PJ[:, None]
    hessian = torch.einsum("pgj,pgk->jk", spread * w[..., None], spread) / (prompts * beta)
    return DualMoments(value, mean_PJ.mean(0), hessian, 1 / w.square().sum(1))
