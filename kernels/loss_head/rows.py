"""Every op in plain torch: the specification, and the float64 oracle of the kernels.

Logits exist for one chunk of rows at a time, in one buffer that all steps overwrite. With z_y the target's logit and J = d(-log
p)/d(logits before the softcap),

    log p = (z_y - m) - log(sum exp(z - m)),  m = max z
    J     = (softmax(z) - onehot(y)) (1 - tanh(u / softcap)^2) / temperature,  u = h W^T + bias
    dH_t  = -a_t J_t W,  dW = -sum_t a_t J_t^T H_t,  dbias = -sum_t a_t J_t,  a_t = d loss / d log p_t

The backward pass computes the logits again; `kernels.loss_head.passes` has the schemes that do not.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.checks import (
    check_dual,
    check_dual_values,
    check_policy,
    check_policy_values,
    check_preference,
    check_preference_values,
    check_row_values,
    check_rows,
)

DEFAULT_MEMORY_BUDGET_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
# Vectors of one number a row: log-probs, their float64 copies, weights, gradients, targets.
VECTOR_BYTES_PER_ROW = 64


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs and coefficients: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sizes(NamedTuple):
    """How a workspace splits its work, and the bytes that this takes."""

    columns: int  # columns of the logits, and so rows of the head, that are done at a time
    tile_rows: int  # rows that are done at a time within them; 0: all
    fixed: int  # bytes whatever the number of rows
    row: int  # bytes of a row of a chunk, or of a row that is kept, and of the vectors beside it
    scratch: int  # bytes that a row of a chunk takes beyond that


class TorchRows:
    """The arithmetic of one call in plain torch, a chunk of rows at a time: log-probs, J W and gradients.

    weight [V, D], bias [V] or None; `rows` is the largest chunk; kind is what the caller asks for: "values", "product", "kept" (`keep`,
    `add_gradients`) or "spent", the same where z may be lost in `add_gradients`. z [C, V] keeps J without a factor of its row, J = state *
    z, so that the normalisation costs no pass. A row without a log-prob (NaN) spoils what it enters unless its coefficient is 0.
    """

    STATE = 1  # numbers a row that stand beside z

    @classmethod
    def sizes(cls, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, rows: int, budget: int, kind: str) -> Sizes:
        """The split for `rows` rows within `budget` bytes."""
        vocabulary, width = weight.shape
        size = statistics_dtype(weight.dtype).itemsize
        converted = weight.dtype.itemsize != size
        columns = head_columns(weight, budget) if converted else vocabulary
        # Two parts of the head: the next one is made before the last one is dropped.
        fixed = (size * 2 * columns * width if converted else 0) + (0 if bias is None or bias.dtype.itemsize == size else size * vocabulary)
        # z, hidden, hidden scaled, J W.
        row = size * (vocabulary + 3 * width)
        return Sizes(columns, 0, fixed, row, size * vocabulary if kind != "values" and softcap is not None else 0)

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float | None, sizes: Sizes, rows: int, kind: str
    ) -> None:
        self.weight, self.temperature, self.softcap, self.columns = weight, temperature, softcap, sizes.columns
        self.dtype = statistics_dtype(weight.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.slope = weight.new_empty(rows, len(weight), dtype=self.dtype) if sizes.scratch else None
        self.own_z = weight.new_empty(rows if kind in ("values", "product") else 0, len(weight), dtype=self.dtype)

    @staticmethod
    def new_z(weight: torch.Tensor, rows: int) -> torch.Tensor:
        """Uninitialised z [rows, V or more]."""
        return weight.new_empty(rows, weight.shape[0], dtype=statistics_dtype(weight.dtype))

    def values(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """log p [C] of rows hidden [C, D]."""
        return self._logprob(hidden, target, self.own_z[: len(hidden)], False)[0]

    def product(self, hidden: torch.Tensor, target: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """log p [C]; out [C, D] becomes J W, rounded to its dtype once."""
        z = self.own_z[: len(hidden)]
        logprob, state = self._logprob(hidden, target, z, True)
        self._times_weight(z, state[:, 0], out)
        return logprob

    def keep(self, hidden: torch.Tensor, target: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p [C], state [C, STATE]); z [C, V] is overwritten with what `add_gradients` needs beside the state."""
        return self._logprob(hidden, target, z, True)

    def add_gradients(
        self,
        z: torch.Tensor,
        state: torch.Tensor,
        target: torch.Tensor,
        hidden: torch.Tensor,
        row_factor: torch.Tensor,
        unit: torch.Tensor | None,
        d_hidden: torch.Tensor | None,
        d_weight: torch.Tensor | None,
        first: bool,
        d_bias: torch.Tensor | None,
    ) -> None:
        """With F = row_factor[:, None] * J of a chunk: d_hidden [C, D] = F W; d_weight [V, D] += F^T hidden / unit, or = where it is the
        `first`; d_bias [V] += F^T 1 / unit. None: not wanted. A row of factor 0 adds nothing, even where it is not finite."""
        unused, scale = row_factor == 0, state[:, 0]
        factor = torch.where(unused, 0, row_factor * scale)
        if d_hidden is not None:
            self._times_weight(z, factor, d_hidden)
        if unit is not None:
            factor = torch.where(unused, 0, row_factor / unit * scale)
        if d_weight is not None:
            scaled = (hidden.to(self.dtype) * factor[:, None]).masked_fill_(unused[:, None], 0)
            self._add_weight_gradient(d_weight, z, scaled, first)
        if d_bias is not None:
            self._add_weight_gradient(d_bias[:, None], z, factor[:, None], False)

    def _head(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns of the logits, those rows of the head in the dtype of the logits)."""
        if self.weight.dtype == self.dtype:
            yield slice(None), self.weight
            return
        for part in chunks(0, len(self.weight), self.columns):
            yield part, self.weight[part].to(self.dtype)

    def _logprob(self, hidden: torch.Tensor, target: torch.Tensor, z: torch.Tensor, jacobian: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p [C], scale [C, 1]); z [C, V] is overwritten, with `jacobian` by J / scale."""
        hidden, target = hidden.to(self.dtype), target.long()[:, None]
        for part, head in self._head():
            torch.mm(hidden, head.t(), out=z[:, part])
        if self.bias is not None:
            z.add_(self.bias)
        slope = None
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            if jacobian:
                slope = torch.mul(z, z, out=self.slope[: len(z)]).neg_().add_(1)
            z.mul_(self.softcap)
        if self.temperature != 1:
            z.div_(self.temperature)
        largest = z.amax(1, keepdim=True)
        shifted = z.gather(1, target) - largest
        total = z.sub_(largest).exp_().sum(1, keepdim=True)
        logprob = (shifted - total.log()).squeeze(1)
        if jacobian:
            # p_y - 1 from the unscaled exponentials: one rounding, and no second pass for the one-hot.
            z.scatter_(1, target, z.gather(1, target) - total)
            if slope is not None:
                z.mul_(slope)
            lost = logprob.isnan()
            # On a GPU the host does not look.
            if z.device.type != "cpu" or bool(lost.any()):
                z.masked_fill_(lost[:, None], 0)
        return logprob, 1 / (total * self.temperature)

    def _times_weight(self, z: torch.Tensor, row_factor: torch.Tensor, out: torch.Tensor) -> None:
        """out [C, D] = row_factor[:, None] * (z W), rounded to out's dtype once."""
        product = out if out.dtype == self.dtype else torch.empty_like(out, dtype=self.dtype)
        for i, (part, head) in enumerate(self._head()):
            torch.addmm(product, z[:, part], head, beta=min(i, 1), out=product)
        product.mul_(row_factor[:, None])
        if product is not out:
            out.copy_(product)

    def _add_weight_gradient(self, total: torch.Tensor, z: torch.Tensor, scaled_hidden: torch.Tensor, first: bool) -> None:
        """total [V, D] += z^T scaled_hidden, or = where it is the `first`."""
        total.addmm_(z.t(), scaled_hidden, beta=0 if first else 1)


def chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows from start to stop."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


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


def first_order_only(gradients: list[torch.Tensor | None], *sources: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The gradients, made an error to differentiate again where a graph of them is being recorded."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if g is None else _FirstOrderOnly.apply(g, *sources) for g in gradients]


class _TokenLogprob(torch.autograd.Function):
    """log p of every row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, temperature: float, softcap: float | None, sizes: Sizes, rows: int) -> torch.Tensor:
        logprob = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
        work = TorchRows(weight, bias, temperature, softcap, sizes, rows, "values")
        for part in chunks(0, len(hidden), rows):
            logprob[part] = work.values(hidden[part], target[part])
        ctx.plan = temperature, softcap, sizes, rows
        ctx.save_for_backward(hidden, weight, bias, target)
        return logprob

    @staticmethod
    def backward(ctx, gradient):
        temperature, softcap, sizes, rows = ctx.plan
        hidden, weight, bias, target = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = statistics_dtype(hidden.dtype)
        with torch.no_grad():
            d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
            d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
            d_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
            work = TorchRows(weight, bias, temperature, softcap, sizes, rows, "kept")
            buffer = work.new_z(weight, rows)
            for part in chunks(0, len(hidden), rows):
                z, h, y = buffer[: part.stop - part.start], hidden[part], target[part]
                _, state = work.keep(h, y, z)
                into = None if d_hidden is None else d_hidden[part]
                work.add_gradients(z, state, y, h, -gradient[part], None, into, d_weight, False, d_bias)
            gradients = [
                d_hidden,
                None if d_weight is None else d_weight.to(weight.dtype),
                None if d_bias is None else d_bias.to(bias.dtype),
            ]
        return *first_order_only(gradients, gradient, hidden, weight, bias), None, None, None, None, None


def budget_or_default(memory_budget_bytes: int | None, device: torch.device) -> int:
    """Bytes. A GPU's default is larger: in small chunks the head's gradient is read and written too often for it."""
    if memory_budget_bytes is not None:
        return int(memory_budget_bytes)
    return DEFAULT_MEMORY_BUDGET_BYTES.get(device.type, DEFAULT_MEMORY_BUDGET_BYTES["cpu"])


def head_columns(weight: torch.Tensor, budget: int) -> int:
    """Rows of the head that are converted at a time: an eighth of the budget."""
    return max(1, min(weight.shape[0], budget // 16 // (4 * max(1, weight.shape[1]))))


def rows_that_fit(budget: int, fixed: int, per_row: int, rows: int) -> int:
    """Rows of a chunk, at most `rows`. Raises: ValueError where not even one row fits."""
    if fixed + per_row > budget:
        raise ValueError(f"memory_budget_bytes = {budget}: expected at least {fixed + per_row}, what one row of logits needs here")
    return max(1, min((budget - fixed) // per_row, rows))


def token_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget_bytes: int | None,
) -> torch.Tensor:
    """log p [T] of every row, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias. Arguments are checked
    already. Raises ValueError where one row does not fit the budget."""
    budget = budget_or_default(memory_budget_bytes, hidden.device)
    needs = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
    sizes = TorchRows.sizes(weight, bias, softcap, len(hidden), budget, "kept" if needs else "values")
    rows = rows_that_fit(budget, sizes.fixed + VECTOR_BYTES_PER_ROW * len(hidden), sizes.row + sizes.scratch, len(hidden))
    return _TokenLogprob.apply(hidden, weight, bias, target, float(temperature), softcap, sizes, rows)


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
    check_rows(hidden, weight, target, cu_seqlens, token_weight, bias, temperature, softcap, memory_budget_bytes)
    check_row_values(hidden, weight, target, cu_seqlens, token_weight, debug)
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


def preference_labels(
    pairs: torch.Tensor,
    reward: torch.Tensor | None,
    utility: torch.Tensor | None,
    lam: torch.Tensor | None,
    labels: str,
    preference: torch.Tensor | None,
    uniform: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """q [K] of `lagrangian_preference_loss` on `device`, in `dtype`, from scores s = reward + utility @ lam in float64."""

    def here(value: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return value.detach().to(device, dtype, non_blocking=True)

    if labels == "given":
        return here(preference, dtype)
    first, second = here(pairs, torch.int64).unbind(1)
    score = here(reward) + here(utility) @ here(lam)
    q = torch.sigmoid(score[first] - score[second])
    return (q if labels == "soft" else (here(uniform) < q).double()).to(dtype)


def preference_loss(logprob: torch.Tensor, pairs: torch.Tensor, q: torch.Tensor, ref_logprob: torch.Tensor, beta: float) -> PreferenceLoss:
    """The pair arithmetic of `lagrangian_preference_loss` on logprob [N], differentiable in it; arguments are checked already.

    With x = beta ((L_a - ref_a) - (L_b - ref_b)): loss = mean of -q log sigmoid(x) - (1 - q) log sigmoid(-x), the DPO objective (Rafailov
    et al. 2023, eq. 7) with labels from the modified reward r + lam . g.
    """
    first, second = pairs.to(logprob.device, torch.int64, non_blocking=True).unbind(1)
    ratio = logprob - ref_logprob.detach().to(logprob.device, logprob.dtype, non_blocking=True)
    margin = beta * (ratio[first] - ratio[second])
    entropy = -q * F.logsigmoid(margin) - (1 - q) * F.logsigmoid(-margin)
    loss = entropy.sum() / max(1, len(pairs))
    margin = margin.detach()
    tie = (margin == 0) | (q == 0.5)
    accuracy = torch.where(tie, 0.5, ((margin > 0) == (q > 0.5)).to(logprob.dtype)).mean()
    return PreferenceLoss(loss, logprob.detach(), margin, q, accuracy)


def draw_uniform(labels: str, uniform: torch.Tensor | None, generator: torch.Generator | None, pairs: torch.Tensor) -> torch.Tensor | None:
    """The uniform numbers [K] of sampled labels."""
    if labels != "sampled" or uniform is not None:
        return uniform
    return torch.rand(len(pairs), generator=generator, device=generator.device, dtype=torch.float64)


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
    check_rows(hidden, weight, target, cu_seqlens, token_weight, bias, temperature, softcap, memory_budget_bytes)
    check_row_values(hidden, weight, target, cu_seqlens, token_weight, debug)
    check_preference(
        len(cu_seqlens) - 1, hidden.device, pairs, reward, utility, lam, ref_logprob, beta, labels, preference, uniform, generator
    )
    uniform = draw_uniform(labels, uniform, generator, pairs)
    check_preference_values(len(cu_seqlens) - 1, pairs, reward, utility, lam, ref_logprob, preference, uniform, debug)
    dtype = statistics_dtype(hidden.dtype)
    q = preference_labels(pairs, reward, utility, lam, labels, preference, uniform, hidden.device, dtype)
    token = token_logprob(hidden, weight, target, bias, temperature, softcap, memory_budget_bytes)
    return preference_loss(sequence_sum(token, token_weight, cu_seqlens), pairs, q, ref_logprob, beta)


class PolicyLoss(NamedTuple):
    """Result of `lagrangian_policy_loss`; all but `loss` carry no gradient."""

    loss: torch.Tensor  # scalar
    logprob: torch.Tensor  # [N]
    token_logprob: torch.Tensor  # [T]
    advantage: torch.Tensor  # [N], float64
    kl: torch.Tensor  # scalar: mean of the KL term, nats per token; NaN without ref_logprob
    clip_fraction: torch.Tensor  # scalar: share of tokens whose ratio the clip cuts off


def group_advantage(
    group: torch.Tensor, reward: torch.Tensor, utility: torch.Tensor, lam: torch.Tensor, advantage: str, device: torch.device
) -> torch.Tensor:
    """Advantage of each sequence within its group, float64 [N]; arguments are checked already.

    "rloo": A_n = s_n - mean of the others' s, s = reward + utility @ lam. "group_norm": A_n = Z(reward) + sum_j lam_j Z(utility_j) with Z
    = (x - group mean) / group's population standard deviation, 0 where all of a group are equal. A group of one gives 0.
    """
    reward, utility, lam = (x.detach().to(device, torch.float64, non_blocking=True) for x in (reward, utility, lam))
    value, order = group.to(device, non_blocking=True).sort(stable=True)
    # first[i], stop[i]: where the group of the sorted entry i begins and ends. Segment i holds the group where i is its first entry.
    first, stop = torch.searchsorted(value, value), torch.searchsorted(value, value, right=True)
    place = torch.arange(len(value), device=device)
    offsets = (
        torch.cat([torch.where(first == place, place, stop), torch.full_like(place[:1], len(value))]) if len(value) else place.new_zeros(1)
    )

    def over_group(x: torch.Tensor, kind: str) -> torch.Tensor:
        return torch.segment_reduce(x, kind, offsets=offsets, unsafe=True, initial=0.0 if kind == "sum" else None)[first]

    size = (stop - first).double()
    if advantage == "rloo":
        s = (reward + utility @ lam)[order]
        # From differences to one member, so that equal scores give exactly 0.
        s = s - s[first]
        result = (s - over_group(s, "sum") / size) * size / (size - 1).clamp_min(1)
    else:
        result = torch.zeros_like(reward)
        for x, factor in [(reward, 1.0), *((utility[:, j], lam[j]) for j in range(utility.shape[1]))]:
            x = x[order]
            x = x - x[first]
            x = x - over_group(x, "sum") / size
            deviation = (over_group(x.square(), "sum") / size).sqrt()
            result = result + factor * torch.where(deviation > 0, x / deviation, 0)
    return torch.empty_like(result).index_copy_(0, order, result)


def row_shares(
    cu_seqlens: torch.Tensor, token_weight: torch.Tensor | None, normalize: str, rows: int, device: torch.device
) -> torch.Tensor:
    """Share of each row in the mean of a policy loss, float64 [T]: over all rows ("token"), or over sequences of the means over their
    rows ("sequence", an empty one counts as 0), weighted by token_weight."""
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    weight = torch.ones(rows, device=device, dtype=torch.float64)
    if token_weight is not None:
        weight = token_weight.detach().to(device, torch.float64, non_blocking=True)
    if normalize == "token":
        total = weight.sum()
    else:
        per_sequence = torch.segment_reduce(weight, "sum", lengths=lengths, unsafe=True)
        total = torch.repeat_interleave(per_sequence, lengths, output_size=rows) * max(1, len(lengths))
    return torch.where(weight == 0, 0, weight / total)


class PolicyTerms(NamedTuple):
    """What `policy_terms` gives for some rows: sums over these rows, and the loss's derivative in each row's log-prob."""

    loss: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    coefficient: torch.Tensor


def policy_terms(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    share: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    clip: tuple[float, float] | None,
    kl_coef: float,
    kl: str,
) -> PolicyTerms:
    """The token arithmetic of `lagrangian_policy_loss`, float64 [C], all arguments per row. Differentiable in logprob; `coefficient` is
    that derivative in closed form (PPO: Schulman et al. 2017, eq. 7; k2 and k3: Schulman 2020)."""
    logprob = logprob.double()
    old = logprob.detach() if old_logprob is None else old_logprob.detach().to(logprob.device, torch.float64, non_blocking=True)
    ratio = (logprob - old).exp()
    gain = ratio * advantage
    slope, clipped = gain.detach(), torch.zeros_like(gain, dtype=torch.bool)
    if clip is not None:
        bounded = ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage
        clipped = bounded < gain
        gain, slope = torch.minimum(gain, bounded), torch.where(clipped, 0, slope)
    divergence = None
    loss, coefficient = -gain, -slope
    if ref_logprob is not None:
        d = ref_logprob.detach().to(logprob.device, torch.float64, non_blocking=True) - logprob
        divergence = d.square() / 2 if kl == "k2" else d.exp() - d - 1
        if kl_coef:
            loss = loss + kl_coef * divergence
            coefficient = coefficient - kl_coef * (d if kl == "k2" else d.exp() - 1).detach()

    def total(x: torch.Tensor) -> torch.Tensor:
        return torch.where(share == 0, 0, share * x).sum()

    nats = logprob.new_tensor(torch.nan) if divergence is None else total(divergence.detach())
    return PolicyTerms(total(loss), nats, total(clipped.double()), torch.where(share == 0, 0, share * coefficient))


def lagrangian_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    group: torch.Tensor,
    reward: torch.Tensor,
    utility: torch.Tensor,
    lam: torch.Tensor,
    *,
    old_logprob: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    clip: tuple[float, float] | None = None,
    kl_coef: float = 0.0,
    kl: str = "k2",
    advantage: str = "rloo",
    normalize: str = "token",
    token_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget_bytes: int | None = None,
    debug: bool = False,
) -> PolicyLoss:
    """`kernels.lagrangian_policy_loss` in plain torch on any device, with the same arguments."""
    check_rows(hidden, weight, target, cu_seqlens, token_weight, bias, temperature, softcap, memory_budget_bytes)
    scores = (group, reward, utility, lam)
    check_policy(len(cu_seqlens) - 1, hidden, *scores, old_logprob, ref_logprob, clip, kl_coef, kl, advantage, normalize)
    check_row_values(hidden, weight, target, cu_seqlens, token_weight, debug)
    check_policy_values(*scores, old_logprob, ref_logprob, debug)
    token = token_logprob(hidden, weight, target, bias, temperature, softcap, memory_budget_bytes)
    device, rows = hidden.device, len(target)
    advantage_N = group_advantage(*scores, advantage, device)
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    terms = policy_terms(
        token,
        torch.repeat_interleave(advantage_N, lengths, output_size=rows),
        row_shares(cu_seqlens, token_weight, normalize, rows, device),
        old_logprob,
        ref_logprob,
        clip,
        kl_coef,
        kl,
    )
    loss, divergence, clipped = (x.to(token.dtype) for x in terms[:3])
    return PolicyLoss(
        loss, sequence_sum(token.detach(), token_weight, cu_seqlens), token.detach(), advantage_N, divergence.detach(), clipped.detach()
    )


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
    """`kernels.dual_moments` in plain torch on any device, with the same arguments."""
    levels = check_dual(reward_PG, utility_PGJ, lam_J, beta, utility_mean, threshold)
    check_dual_values(reward_PG, utility_PGJ, lam_J, *levels)
    return tilted_moments(reward_PG, utility_PGJ, lam_J, beta, *levels)


def tilted_moments(
    reward_PG: torch.Tensor,
    utility_PGJ: torch.Tensor,
    lam_J: torch.Tensor,
    beta: float,
    utility_mean: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> DualMoments:
    """The arithmetic of `dual_moments`; arguments are checked already.

    With g' = g - utility_mean - threshold and the tilted weights w = softmax_i((r + lam . g') / beta):
    value = (beta / P) sum_p [logsumexp_i((r + lam . g') / beta) - ln G], gradient = mean_p E_w[g'], hessian = mean_p Cov_w[g'] / beta,
    ess = 1 / sum_i w_i^2.
    """
    prompts, responses = reward_PG.shape

    def here(value: torch.Tensor) -> torch.Tensor:
        return value.to(reward_PG.device, torch.float64, non_blocking=True)

    reward, utility, lam = reward_PG.double(), utility_PGJ.double(), here(lam_J)
    utility = utility - (utility.mean((0, 1)) if utility_mean is None else here(utility_mean))
    if threshold is not None:
        utility = utility - here(threshold)
    tilted = (reward + utility @ lam) / beta
    value = beta * (tilted.logsumexp(1).mean() - torch.tensor(responses, dtype=torch.float64).log())
    w = tilted.softmax(1)
    mean_PJ = torch.einsum("pg,pgj->pj", w, utility)
    spread = utility - mean_PJ[:, None]
    hessian = torch.einsum("pgj,pgk->jk", spread * w[..., None], spread) / (prompts * beta)
    return DualMoments(value, mean_PJ.mean(0), hessian, 1 / w.square().sum(1))


def decode_attention(
    query: torch.Tensor, prompt_keys: torch.Tensor, prompt_values: torch.Tensor, prompt_length: torch.Tensor, owner_offsets: torch.Tensor,
    own_keys: torch.Tensor, own_values: torch.Tensor, used: torch.Tensor, *, scale: float | None = None, softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """`kernels.decode_attention.decode_attention` in plain torch on any device, with the same arguments, which are checked already; float32
    arithmetic (float64 for float64 inputs)."""
    (rows, heads, width), (kv_heads, room) = query.shape, own_keys.shape[1:3]
    dtype, longest = statistics_dtype(query.dtype), prompt_keys.shape[2]
    owner = torch.searchsorted(owner_offsets[1:], torch.arange(rows, device=query.device), right=True)
    length = prompt_length[owner][:, None]
    slot = torch.arange(longest + room, device=query.device)[None]
    own = slot >= longest
    position = torch.where(own, slot - longest + length, slot)
    seen = torch.where(own, slot - longest < used, slot < length)
    if window is not None:
        seen &= position >= length + used - window
    keys, values = (
        torch.cat([prompt[owner], mine], 2).to(dtype).masked_fill(~seen[:, None, :, None], 0)
        for prompt, mine in ((prompt_keys, own_keys), (prompt_values, own_values))
    )
    grouped = query.to(dtype).view(rows, kv_heads, heads // kv_heads, width)
    scores = grouped @ keys.transpose(2, 3) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weight = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(3)
    return (weight @ values).reshape(rows, heads * width).to(query.dtype)
