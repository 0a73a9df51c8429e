"""hidden x head -> log-probs and gradients: what is kept, what is formed at once and what is computed again, as torch.library ops.

The matrix products are the cost: 2 T D V flop each, T rows. A row's coefficient a_t = d loss / d log p_t is a factor of all it adds
(`kernels.reference`), so it may become known after the logits are gone. Schemes, by what the caller differentiates and the memory budget:

- forward only: 1 product.
- frozen head (C): the forward pass also forms J W [T, D]; the backward pass scales its rows. 2 products.
- head with gradient (B): the forward pass keeps J [T, V], or as many rows as fit; the backward pass scales rows of hidden and of J W.
  3 products, and a fourth for rows that were not kept; without any kept row this is recomputation (A).
- preference loss whose J does not fit (D): sequences that share pairs are done together, their coefficients follow from their own
  log-probs, and their gradients are formed before the next ones' logits. 3 products. Two sequences too long for a chunk (E): their
  coefficients differ only in sign, so the difference of both sums is formed over many chunks and scaled at the end. 3 products.
- policy loss (F): a row's coefficient follows from its own log-prob. 3 products, 2 with a frozen head, in any chunks.

Memory beyond inputs, returned gradients and one float32 (float64) accumulator of the head's gradient is at most `memory_budget_bytes`. Each
op counts: 64 bytes a row of hidden, parts of the head that are converted (16-bit heads on the CPU), and per row of a chunk or kept row what
`row_bytes` and `scratch_row_bytes` of its workspace say, in float32 4 (V + 3 D) bytes, 4 V more with a softcap. Everything is summed in
an order that depends on shapes alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native
from kernels.checks import check_policy_values, check_preference_values, check_row_values
from kernels.reference import (
    VECTOR_BYTES_PER_ROW,
    TorchRows,
    chunks,
    first_order_only,
    group_advantage,
    head_columns,
    policy_terms,
    preference_labels,
    preference_loss,
    row_shares,
    rows_that_fit,
    sequence_sum,
    statistics_dtype,
)


def row_workspace(hidden: Tensor) -> type:
    """Who does the row arithmetic for these inputs: Triton on a GPU and compiled code on the CPU (not in float64), else plain torch."""
    if hidden.device.type == "cuda" and hidden.dtype != torch.float64:
        from kernels.triton_rows import TritonRows

        return TritonRows
    return native.NativeRows if native.serves(hidden.device, statistics_dtype(hidden.dtype)) else TorchRows


class Plan(NamedTuple):
    """How one call is done."""

    rows: int  # rows of hidden in a chunk
    columns: int  # rows of the head converted at a time, where its dtype is not that of the logits
    kept: int  # rows whose J the forward pass keeps
    product: bool  # the forward pass forms J W


def plan(
    workspace: type, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, budget: int, needs_hidden: bool,
    needs_head: bool,
) -> Plan:  # fmt: skip
    """The scheme of `sequence_logprob` from shapes and the budget in bytes. Raises: ValueError where one row of logits does not fit."""
    rows, columns = hidden.shape[0], head_columns(weight, budget)
    fixed = workspace.fixed_bytes(weight, bias, columns) + VECTOR_BYTES_PER_ROW * rows
    jacobian = needs_hidden or needs_head
    per_row, scratch = workspace.row_bytes(weight, jacobian), workspace.scratch_row_bytes(weight, softcap, jacobian)
    chunk = rows_that_fit(budget, fixed, per_row + scratch, rows)
    if needs_head:
        left = budget - fixed - rows * per_row
        chunk_of_all = min(rows, left // scratch) if scratch else rows
        if left >= 0 and 16 * chunk_of_all >= rows:
            return Plan(max(1, chunk_of_all), columns, rows, False)
        # A quarter for the chunks; keeping less than half of the rows would cost more in small chunks than it saves.
        small = (budget - fixed) // 4 // (per_row + scratch)
        kept = (budget - fixed - small * (per_row + scratch)) // per_row
        if small > 0 and rows <= 2 * kept:
            return Plan(min(small, rows), columns, min(kept, rows), False)
    elif needs_hidden:
        product = hidden.numel() * hidden.element_size()
        if product <= budget // 2 and fixed + product + per_row + scratch <= budget:
            return Plan(rows_that_fit(budget - product, fixed, per_row + scratch, rows), columns, 0, True)
    return Plan(chunk, columns, 0, False)


def _row_coefficients(per_sequence: Tensor, cu_seqlens: Tensor, token_weight: Tensor | None, rows: int) -> Tensor:
    """Per sequence -> per row [T], times the row's weight; exactly 0 where that is 0."""
    device = per_sequence.device
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    spread = torch.repeat_interleave(per_sequence, lengths, output_size=rows)
    if token_weight is None:
        return spread
    weight = token_weight.to(device, spread.dtype, non_blocking=True)
    return torch.where(weight == 0, 0, spread * weight)


class _Gradients:
    """Gradients of one call as they are added up, part by part. `row_factor` is -a_t; rows where it is 0 add nothing.

    `unit`: in float16 small factors would be lost, so that the head's gradient is added up relative to this size of them.
    """

    def __init__(self, work: TorchRows, hidden: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool], unit: Tensor | float) -> None:
        dtype = statistics_dtype(hidden.dtype)
        self.work, self.hidden, self.dtype, self.needs = work, hidden, dtype, needs
        self.unit = unit if hidden.dtype == torch.float16 else None
        self.d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0)
        self.d_weight = work.weight.new_empty(work.weight.shape, dtype=dtype) if needs[1] else hidden.new_empty(0)
        self.d_bias = torch.zeros_like(bias, dtype=dtype) if needs[2] else hidden.new_empty(0)
        self.started = False  # whether d_weight holds anything
        self.open: tuple[Tensor, Tensor, list[bool]] | None = None

    def add(self, part: slice | Tensor, z: Tensor, scale: Tensor, row_factor: Tensor) -> None:
        """Add the rows at `part`, whose z and scale these are."""
        row_factor = row_factor.to(self.dtype)
        self.add_hidden(part, z, scale, row_factor)
        relative = row_factor if self.unit is None else row_factor / self.unit
        if self.needs[1]:
            self.add_weight(self.d_weight, part, z, scale, relative, not self.started)
            self.started = True
        if self.needs[2]:
            self.work.add_bias_gradient(self.d_bias, z, _masked(relative, scale))

    def add_opposite(self, part: slice, z: Tensor, scale: Tensor, row_weight: Tensor, sign: int) -> None:
        """Scheme E: add rows of two sequences whose -a is not known yet, the second with sign -1."""
        row_factor = sign * row_weight
        if self.open is None:
            own = torch.empty_like(self.d_weight) if self.started else self.d_weight
            self.open = own, torch.zeros_like(self.d_bias), [True]
        d_weight, d_bias, fresh = self.open
        self.add_hidden(part, z, scale, row_weight)
        if self.needs[1]:
            self.add_weight(d_weight, part, z, scale, row_factor, fresh.pop() if fresh else False)
        if self.needs[2]:
            self.work.add_bias_gradient(d_bias, z, _masked(row_factor, scale))

    def end_opposite(self, parts: list[slice], row_factor: Tensor) -> None:
        """Scheme E: both sequences are added; `row_factor` [2] is -a of each."""
        for part, factor in zip(parts if self.needs[0] else [], row_factor, strict=False):
            self.d_hidden[part] = (self.d_hidden[part] * factor).to(self.d_hidden.dtype)
        factor = row_factor[0] if self.unit is None else row_factor[0] / self.unit
        for mine, own in ((self.d_weight, self.open[0]), (self.d_bias, self.open[1])):
            own.mul_(factor)
            if own is not mine:
                mine.add_(own)
        self.started, self.open = True, None

    def add_hidden(self, part: slice | Tensor, z: Tensor, scale: Tensor, row_factor: Tensor) -> None:
        """d_hidden at `part`."""
        if not self.needs[0]:
            return
        a = _masked(row_factor, scale)
        if isinstance(part, slice):
            self.work.times_weight(z, a, self.d_hidden[part])
        else:
            product = self.hidden.new_empty(len(part), self.hidden.shape[1])
            self.work.times_weight(z, a, product)
            self.d_hidden.index_copy_(0, part, product)

    def add_weight(self, total: Tensor, part: slice | Tensor, z: Tensor, scale: Tensor, row_factor: Tensor, first: bool) -> None:
        """total [V, D] += the rows at `part`, or = where they are the `first`."""
        scaled = self.hidden[part].to(self.dtype) * _masked(row_factor, scale)[:, None]
        # NaN x 0: a row that adds nothing may hold anything.
        scaled.masked_fill_((row_factor == 0)[:, None], 0)
        self.work.add_weight_gradient(total, z, scaled, first)

    def result(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of the inputs; empty where not needed."""
        if self.needs[1] and not self.started:
            self.d_weight.zero_()
        if self.unit is not None:
            self.d_weight.mul_(self.unit)
            self.d_bias.mul_(self.unit)
        return self.d_hidden, self.d_weight.to(weight.dtype), self.d_bias if bias is None else self.d_bias.to(bias.dtype)


def _masked(row_factor: Tensor, scale: Tensor) -> Tensor:
    """row_factor * scale, 0 where row_factor is."""
    return torch.where(row_factor == 0, 0, row_factor * scale)


# sequence_logprob: values, then gradients for coefficients that come later.


def _sequence_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor | None, cu_seqlens: Tensor,
    temperature: float, softcap: float | None, budget: int, needs_hidden: bool, needs_head: bool, debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_row_values(hidden, weight, target, cu_seqlens, token_weight, debug)
    workspace = row_workspace(hidden)
    p = plan(workspace, hidden, weight, bias, softcap, budget, needs_hidden, needs_head)
    rows, jacobian = len(hidden), bool(p.kept or p.product)
    token, z, product, scale = _empty_values(workspace, hidden, weight, p)
    if not (needs_hidden or needs_head) and workspace.forward_only(hidden, weight, bias, target, temperature, softcap, token):
        return sequence_sum(token, token_weight, cu_seqlens), token, z, scale, product
    work = workspace(weight, bias, temperature, softcap, p.columns, p.rows, jacobian)
    # Without scratch the kept rows are one product.
    size = p.rows if workspace.scratch_row_bytes(weight, softcap, jacobian) else max(1, p.kept)
    for part in chunks(0, p.kept, size):
        token[part], scale[part] = work.logprob(hidden[part], target[part], z[part], True)
    if p.kept < rows:
        buffer = work.new_z(weight, p.rows, jacobian)
        for part in chunks(p.kept, rows, p.rows):
            own = buffer[: part.stop - part.start]
            token[part], factor = work.logprob(hidden[part], target[part], own, p.product)
            if p.product:
                work.times_weight(own, factor, product[part])
    return sequence_sum(token, token_weight, cu_seqlens), token, z, scale, product


def _empty_values(workspace: type, hidden: Tensor, weight: Tensor, p: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_logprob [T], kept J [kept, V], J W [T, D], scale [kept]), uninitialised."""
    token = hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden.dtype))
    product = torch.empty_like(hidden, memory_format=torch.contiguous_format) if p.product else hidden.new_empty(0)
    return token, workspace.new_z(weight, p.kept, True), product, token.new_empty(p.kept)


def _sequence_logprob_backward(
    d_logprob: Tensor, d_token: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    token_weight: Tensor | None, cu_seqlens: Tensor, kept: Tensor, scale: Tensor, product: Tensor, temperature: float,
    softcap: float | None, budget: int, needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = len(hidden)
    factor = _row_coefficients(d_logprob, cu_seqlens, token_weight, rows)
    factor = -(factor if d_token is None else factor + d_token)
    if product.numel():
        scaled = torch.empty_like(product)
        # The product in the dtype of the coefficients, rounded once; a block at a time, as converted copies of all rows are not counted.
        for part in chunks(0, rows, max(1, rows // 8)):
            a = factor[part][:, None]
            scaled[part] = torch.where(a == 0, 0, product[part] * a)
        return scaled, hidden.new_empty(0), hidden.new_empty(0)
    workspace = row_workspace(hidden)
    p = plan(workspace, hidden, weight, bias, softcap, budget, needs_hidden, needs_weight or needs_bias)._replace(kept=len(kept))
    work = workspace(weight, bias, temperature, softcap, p.columns, p.rows, len(kept) < rows)
    unit = factor.abs().amax().clamp_min(1e-30) if rows else 1.0
    total = _Gradients(work, hidden, bias, (needs_hidden, needs_weight, needs_bias), unit)
    if p.kept:
        total.add(slice(0, p.kept), kept, scale, factor[: p.kept])
    if p.kept < rows:
        buffer = work.new_z(weight, p.rows, True)
        for part in chunks(p.kept, rows, p.rows):
            z = buffer[: part.stop - part.start]
            _, own = work.logprob(hidden[part], target[part], z, True)
            total.add(part, z, own, factor[part])
    return total.result(weight, bias)


# Preference loss with the head's gradient, in chunks of whole pairs.


class _Part(NamedTuple):
    """Sequences whose coefficients hang together, in one chunk (D), or over several ones (E, A)."""

    sequences: list[int]
    opposite: bool  # two sequences in pairs with each other: their coefficients differ in sign only
    used: bool  # they stand in pairs


def _parts(pairs: list[list[int]], lengths: list[int], chunk: int) -> list[_Part]:
    """Connected sequences packed into parts of at most `chunk` rows; what is larger stands alone, pairs of two first."""
    root = list(range(len(lengths)))

    def find(n: int) -> int:
        while root[n] != n:
            root[n] = n = root[root[n]]
        return n

    used = [False] * len(lengths)
    for a, b in pairs:
        used[a] = used[b] = True
        low, high = sorted((find(a), find(b)))
        root[high] = low
    groups: dict[int, list[int]] = {}
    for n in range(len(lengths)):
        groups.setdefault(find(n) if used[n] else -1, []).append(n)
    alone = groups.pop(-1, [])
    parts, open_part, size = [], [], 0
    for group in groups.values():
        rows = sum(lengths[n] for n in group)
        if rows > chunk:
            parts.append(_Part(group, len(group) == 2, True))
            continue
        if size + rows > chunk:
            parts.append(_Part(open_part, False, True))
            open_part, size = [], 0
        open_part, size = open_part + group, size + rows
    if open_part:
        parts.append(_Part(open_part, False, True))
    if alone:
        parts.append(_Part(alone, False, False))
    # Those that need an accumulator of their own come first: the first of them takes the head's gradient itself.
    return sorted(parts, key=lambda part: not (part.opposite and sum(lengths[n] for n in part.sequences) > chunk))


def _rows_of(sequences: list[int], starts: list[int], lengths: list[int], device: torch.device) -> slice | Tensor:
    """The rows of these sequences: one slice where they follow each other, else their indices."""
    filled = [n for n in sequences if lengths[n]]
    if not filled:
        return slice(0, 0)
    if all(starts[b] == starts[a] + lengths[a] for a, b in zip(filled, filled[1:], strict=False)):
        return slice(starts[filled[0]], starts[filled[-1]] + lengths[filled[-1]])
    index = torch.cat([torch.arange(starts[n], starts[n] + lengths[n]) for n in filled])
    return index.to(device, non_blocking=True)


def _preference_coefficient(logprob: Tensor, ends: tuple[Tensor, Tensor], pairs: Tensor, q: Tensor, ref: Tensor, beta: float) -> Tensor:
    """d loss / d logprob [N] of the preference loss; `ends` is `_by_sequence(pairs)`."""
    order, offsets = ends
    ratio = logprob - ref
    margin = beta * (ratio[pairs[:, 0]] - ratio[pairs[:, 1]])
    kappa = (torch.sigmoid(margin) - q).double() * (beta / max(1, len(pairs)))
    signed = torch.cat([kappa, -kappa])[order]
    return torch.segment_reduce(signed, "sum", offsets=offsets, unsafe=True).to(logprob.dtype)


def _by_sequence(pairs: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """(order of the 2 K ends of pairs by sequence, where each sequence begins in it): sums over them then have a fixed order."""
    ends, order = pairs.t().reshape(-1).sort(stable=True)
    return order, torch.searchsorted(ends, torch.arange(sequences + 1, device=pairs.device))


def _preference_terms(logprob: Tensor, pairs: Tensor, q: Tensor, ref_logprob: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, margin [K], accuracy, d loss / d logprob [N])."""
    loss, _, margin, _, accuracy = preference_loss(logprob, pairs, q, ref_logprob, beta)
    pairs = pairs.to(logprob.device, torch.int64, non_blocking=True)
    ref = ref_logprob.to(logprob.device, logprob.dtype, non_blocking=True)
    ends = _by_sequence(pairs, len(logprob))
    return loss, margin, accuracy, _preference_coefficient(logprob, ends, pairs, q, ref, beta)


def _preference_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor | None, cu_seqlens: Tensor, pairs: Tensor,
    q: Tensor, ref_logprob: Tensor, beta: float, temperature: float, softcap: float | None, budget: int, needs_hidden: bool,
    needs_weight: bool, needs_bias: bool, debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, logprob [N], margin [K], accuracy, d loss / d hidden, weight, bias) with cu_seqlens and pairs on the CPU."""
    check_row_values(hidden, weight, target, cu_seqlens, token_weight, debug)
    device, dtype, workspace = hidden.device, statistics_dtype(hidden.dtype), row_workspace(hidden)
    starts = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(starts[:-1], starts[1:], strict=True)]
    columns = head_columns(weight, budget)
    fixed = workspace.fixed_bytes(weight, bias, columns) + VECTOR_BYTES_PER_ROW * len(hidden)
    per_row = workspace.row_bytes(weight, True) + workspace.scratch_row_bytes(weight, softcap, True)
    # Rows that do not follow each other are gathered first.
    per_row += hidden.element_size() * hidden.shape[1]
    chunk = rows_that_fit(budget, fixed, per_row, len(hidden))
    parts = _parts(pairs.tolist(), lengths, chunk)
    accumulator = dtype.itemsize * weight.numel()
    several = sum(part.opposite for part in parts) > 1
    if several and needs_weight and fixed + accumulator + (chunk // 2 + 1) * per_row <= budget:
        chunk = rows_that_fit(budget - accumulator, fixed, per_row, len(hidden))
        parts = _parts(pairs.tolist(), lengths, chunk)
        several = False
    work = workspace(weight, bias, temperature, softcap, columns, chunk, True)
    buffer = work.new_z(weight, chunk, True)
    total = _Gradients(work, hidden, bias, (needs_hidden, needs_weight, needs_bias), beta / max(1, len(pairs)))
    token = torch.empty(len(hidden), dtype=dtype, device=device)
    logprob = torch.zeros(len(lengths), dtype=dtype, device=device)
    row_weight = torch.ones(len(hidden), dtype=dtype, device=device)
    if token_weight is not None:
        row_weight = token_weight.to(device, dtype, non_blocking=True)
    pairs = pairs.to(device, torch.int64, non_blocking=True)
    ends, ref, q = _by_sequence(pairs, len(lengths)), ref_logprob.to(device, dtype, non_blocking=True), q.to(dtype)

    def forward(rows: slice | Tensor, jacobian: bool) -> tuple[Tensor, Tensor]:
        h = hidden[rows]
        z = buffer[: len(h)]
        values, scale = work.logprob(h, target[rows], z, jacobian)
        token[rows] = values
        return z, scale

    def coefficients(part: _Part, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """(-a of the part's sequences, the same of its rows times their weights), once their log-probs are known."""
        index = torch.tensor(part.sequences).to(device, non_blocking=True)
        offsets = torch.tensor([0, *(lengths[n] for n in part.sequences)]).cumsum(0)
        logprob.index_copy_(0, index, sequence_sum(token[rows], row_weight[rows], offsets))
        a = -_preference_coefficient(logprob, ends, pairs, q, ref, beta)[index]
        return a, _row_coefficients(a, offsets, row_weight[rows], int(offsets[-1]))

    for part in parts:
        rows = _rows_of(part.sequences, starts, lengths, device)
        size = sum(lengths[n] for n in part.sequences)
        pieces = list(chunks(0, size, chunk))
        if part.used and size <= chunk:
            z, scale = forward(rows, True)
            total.add(rows, z, scale, coefficients(part, rows)[1])
        elif part.opposite and not (several and total.started):
            for n, sign in zip(part.sequences, (1, -1), strict=True):
                for piece in chunks(starts[n], starts[n + 1], chunk):
                    z, scale = forward(piece, True)
                    total.add_opposite(piece, z, scale, row_weight[piece], sign)
            a = coefficients(part, rows)[0]
            total.end_opposite([slice(starts[n], starts[n + 1]) for n in part.sequences], a)
        else:
            for piece in pieces:
                forward(_piece(rows, piece), False)
            factor = coefficients(part, rows)[1]
            if not part.used:
                if needs_hidden:
                    total.d_hidden[rows] = 0
                continue
            for piece in pieces:
                some = _piece(rows, piece)
                total.add(some, *forward(some, True), factor[piece])
    loss, margin, accuracy, _ = _preference_terms(logprob, pairs, q, ref, beta)
    return loss, logprob, margin, accuracy, *total.result(weight, bias)


def _piece(rows: slice | Tensor, piece: slice) -> slice | Tensor:
    return slice(rows.start + piece.start, rows.start + piece.stop) if isinstance(rows, slice) else rows[piece]


# Policy loss: a row's coefficient follows from its own log-prob.


def _policy_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor | None, cu_seqlens: Tensor,
    advantage: Tensor, old_logprob: Tensor | None, ref_logprob: Tensor | None, clip_low: float | None, clip_high: float | None,
    kl_coef: float, kl: str, normalize: str, temperature: float, softcap: float | None, budget: int, needs_hidden: bool,
    needs_weight: bool, needs_bias: bool, debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, logprob [N], token_logprob [T], kl, clip_fraction, d loss / d hidden, weight, bias)."""
    check_row_values(hidden, weight, target, cu_seqlens, token_weight, debug)
    device, dtype, workspace, rows = hidden.device, statistics_dtype(hidden.dtype), row_workspace(hidden), len(hidden)
    needs = needs_hidden, needs_weight, needs_bias
    columns = head_columns(weight, budget)
    # Advantages, shares, coefficients and their parts, all float64.
    fixed = workspace.fixed_bytes(weight, bias, columns) + 2 * VECTOR_BYTES_PER_ROW * rows
    per_row = workspace.row_bytes(weight, any(needs)) + workspace.scratch_row_bytes(weight, softcap, any(needs)) + VECTOR_BYTES_PER_ROW
    size = rows_that_fit(budget, fixed, per_row, rows)
    work = workspace(weight, bias, temperature, softcap, columns, size, any(needs))
    buffer = work.new_z(weight, size, any(needs))
    share = row_shares(cu_seqlens, token_weight, normalize, rows, device)
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    advantage = torch.repeat_interleave(advantage.to(device, non_blocking=True), lengths, output_size=rows)
    unit = (share.abs().amax() * (advantage.abs().amax() + kl_coef)).clamp_min(1e-30).to(dtype) if rows else 1.0
    total = _Gradients(work, hidden, bias, needs, unit)
    token = torch.empty(rows, dtype=dtype, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for part in chunks(0, rows, size):
        z = buffer[: part.stop - part.start]
        token[part], scale = work.logprob(hidden[part], target[part], z, any(needs))
        old, ref = (None if x is None else x[part] for x in (old_logprob, ref_logprob))
        clip = None if clip_low is None else (clip_low, clip_high)
        terms = policy_terms(token[part], advantage[part], share[part], old, ref, clip, kl_coef, kl)
        sums += torch.stack(terms[:3])
        if any(needs):
            total.add(part, z, scale, -terms.coefficient)
    if rows == 0 and ref_logprob is None:
        sums[1] = torch.nan
    loss, divergence, clipped = (x.clone() for x in sums.to(dtype))
    return loss, sequence_sum(token, token_weight, cu_seqlens), token, divergence, clipped, *total.result(weight, bias)


def _preference_labels(
    hidden: Tensor, pairs: Tensor, reward: Tensor | None, utility: Tensor | None, lam: Tensor | None, ref_logprob: Tensor, labels: str,
    preference: Tensor | None, uniform: Tensor | None, debug: bool,
) -> Tensor:  # fmt: skip
    check_preference_values(len(ref_logprob), pairs, reward, utility, lam, ref_logprob, preference, uniform, debug)
    q = preference_labels(pairs, reward, utility, lam, labels, preference, uniform, hidden.device, statistics_dtype(hidden.dtype))
    # An op must not hand back one of its arguments.
    return q.clone() if labels == "given" else q


def _group_advantage(
    hidden: Tensor, group: Tensor, reward: Tensor, utility: Tensor, lam: Tensor, old_logprob: Tensor | None, ref_logprob: Tensor | None,
    advantage: str, debug: bool,
) -> Tensor:  # fmt: skip
    check_policy_values(group, reward, utility, lam, old_logprob, ref_logprob, debug)
    return group_advantage(group, reward, utility, lam, advantage, hidden.device)


# Registration: every op once, for CPU and CUDA alike (`row_workspace` chooses who does the rows), with the shapes of its results.


def _register(name: str, function: Callable, shapes: Callable) -> Callable:
    op = torch.library.custom_op(f"dualign::{name}", function, mutates_args=(), device_types=("cpu", "cuda"))
    op.register_fake(shapes)
    return op


def _gradient_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    none = hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    like = hidden, weight, bias
    return tuple(x.new_empty(x.shape) if need else empty for x, need, empty in zip(like, needs, none, strict=True))


def _sequence_logprob_shapes(
    hidden, weight, bias, target, token_weight, cu_seqlens, temperature, softcap, budget, needs_hidden, needs_head, debug
):
    workspace = row_workspace(hidden)
    p = plan(workspace, hidden, weight, bias, softcap, budget, needs_hidden, needs_head)
    token, z, product, scale = _empty_values(workspace, hidden, weight, p)
    return token.new_empty(cu_seqlens.shape[0] - 1), token, z, scale, product


def _sequence_logprob_backward_shapes(d_logprob, d_token, hidden, weight, bias, *rest):
    return _gradient_shapes(hidden, weight, bias, rest[-3:])


def _preference_terms_shapes(logprob, pairs, q, ref_logprob, beta):
    return logprob.new_empty(()), logprob.new_empty(pairs.shape[0]), logprob.new_empty(()), torch.empty_like(logprob)


def _preference_pass_shapes(hidden, weight, bias, target, token_weight, cu_seqlens, pairs, *rest):
    dtype = statistics_dtype(hidden.dtype)
    loss, accuracy = hidden.new_empty((), dtype=dtype), hidden.new_empty((), dtype=dtype)
    logprob, margin = hidden.new_empty(cu_seqlens.shape[0] - 1, dtype=dtype), hidden.new_empty(pairs.shape[0], dtype=dtype)
    return loss, logprob, margin, accuracy, *_gradient_shapes(hidden, weight, bias, rest[-4:-1])


def _policy_pass_shapes(hidden, weight, bias, target, token_weight, cu_seqlens, *rest):
    dtype = statistics_dtype(hidden.dtype)
    loss, kl, clipped = (hidden.new_empty((), dtype=dtype) for _ in range(3))
    logprob, token = hidden.new_empty(cu_seqlens.shape[0] - 1, dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)
    return loss, logprob, token, kl, clipped, *_gradient_shapes(hidden, weight, bias, rest[-4:-1])


sequence_logprob_op = _register("sequence_logprob", _sequence_logprob, _sequence_logprob_shapes)
_backward_op = _register("sequence_logprob_backward", _sequence_logprob_backward, _sequence_logprob_backward_shapes)
preference_labels_op = _register(
    "preference_labels",
    _preference_labels,
    lambda hidden, pairs, *rest: hidden.new_empty(pairs.shape[0], dtype=statistics_dtype(hidden.dtype)),
)
preference_terms_op = _register("preference_terms", _preference_terms, _preference_terms_shapes)
preference_pass_op = _register("preference_pass", _preference_pass, _preference_pass_shapes)
group_advantage_op = _register(
    "group_advantage", _group_advantage, lambda hidden, group, *rest: hidden.new_empty(group.shape[0], dtype=torch.float64)
)
policy_pass_op = _register("policy_pass", _policy_pass, _policy_pass_shapes)


def _save_sequence_logprob(ctx, inputs, output) -> None:
    hidden, weight, bias, target, token_weight, cu_seqlens, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, target, token_weight, cu_seqlens, *output[2:])


def _differentiate_sequence_logprob(ctx, d_logprob, d_token, *rest):
    hidden, weight, bias, target, token_weight, cu_seqlens, *kept = ctx.saved_tensors
    temperature, softcap, budget = ctx.options[:3]
    if d_logprob is None and d_token is None:
        return (None,) * 12
    if d_logprob is None:
        d_logprob = d_token.new_zeros(cu_seqlens.shape[0] - 1)
    needs = ctx.needs_input_grad[:3]
    with torch.no_grad():
        gradients = _backward_op(
            d_logprob, d_token, hidden, weight, bias, target, token_weight, cu_seqlens, *kept, temperature, softcap, budget, *needs
        )
    gradients = [x if need else None for x, need in zip(gradients, needs, strict=True)]
    return *first_order_only(gradients, d_logprob, d_token, hidden, weight, bias), *(None,) * 9


def _save_gradients(ctx, inputs, output) -> None:
    """For ops whose forward pass forms the gradients: the last three results."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.n_inputs = len(inputs)
    ctx.save_for_backward(*inputs[:3], *output[-3:])


def _scale_gradients(ctx, d_loss, *rest):
    hidden, weight, bias, *gradients = ctx.saved_tensors
    if d_loss is None:
        return (None,) * ctx.n_inputs
    with torch.no_grad():
        gradients = [x * d_loss if need else None for x, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)]
    return *first_order_only(gradients, d_loss, hidden, weight, bias), *(None,) * (ctx.n_inputs - 3)


def _save_coefficient(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], output[3])


def _scale_coefficient(ctx, d_loss, *rest):
    logprob, coefficient = ctx.saved_tensors
    if d_loss is None:
        return (None,) * 5
    with torch.no_grad():
        gradient = coefficient * d_loss
    return *first_order_only([gradient], d_loss, logprob), *(None,) * 4


sequence_logprob_op.register_autograd(_differentiate_sequence_logprob, setup_context=_save_sequence_logprob)
preference_terms_op.register_autograd(_scale_coefficient, setup_context=_save_coefficient)
preference_pass_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
policy_pass_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
