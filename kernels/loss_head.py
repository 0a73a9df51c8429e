"""hidden x head -> log-probs and gradients: what is kept, what is formed at once and what is computed again, as torch.library ops.

The matrix products are the cost: 2 T D V flop each, T rows. A row's coefficient a_t = d loss / d log p_t is a factor of all it adds
(`kernels.reference`), so it may become known after the logits are gone. Schemes, by what the caller differentiates and the memory budget:

- forward only: 1 product.
- frozen head (C): the forward pass also forms J W [T, D]; the backward pass scales its rows. 2 products. Where that does not fit, a
  preference loss forms it in place of the gradient.
- head with gradient (B): the forward pass keeps J [T, V], or as many rows as fit; the backward pass scales rows of hidden and of J W.
  3 products, and a fourth for rows that were not kept; without any kept row this is recomputation (A).
- preference loss whose J does not fit (D): sequences that share pairs are done together, their coefficients follow from their own
  log-probs, and their gradients are formed before the next ones' logits. 3 products. Two sequences too long for a chunk (E): their
  coefficients differ only in sign, so the difference of both sums is formed over many chunks and scaled at the end. 3 products.
- policy loss (F): a row's coefficient follows from its own log-prob. 3 products, 2 with a frozen head, in any chunks.

Memory beyond inputs, returned gradients and one float32 (float64) accumulator of the head's gradient is at most
`memory_budget_bytes`. Each op counts 64 bytes a row of hidden and what `sizes` of its workspace says. Compiled code on
the CPU keeps tiles of at most 4 MiB and a sixth of the budget (on Intel processors of at most 32 MiB and an eighth, with
4 D bytes for each of a tile's rows), but none for the gradients of a loss that takes several chunks, and
4 (V + 3 D + 12) bytes for each row of which logits are kept: those of a chunk, or all in scheme B; none for a forward
pass and a frozen head. Where a loss that has its gradients already is scaled before its backward pass (on a GPU it
is), hidden's gradient is there once more. Everything is summed in an order that depends on shapes alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native
from kernels.checks import check_policy_values, check_preference_values, check_row_values
from kernels.reference import (
    VECTOR_BYTES_PER_ROW,
    Sizes,
    TorchRows,
    chunks,
    first_order_only,
    group_advantage,
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

    kind: str  # what is asked of the workspace, see `kernels.reference.TorchRows`
    sizes: Sizes
    rows: int  # rows of hidden in a chunk
    kept: int  # rows whose z the forward pass keeps


def plan(
    workspace: type, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, budget: int, needs_hidden: bool,
    needs_head: bool,
) -> Plan:  # fmt: skip
    """The scheme of `sequence_logprob` from shapes and the budget in bytes. Raises: ValueError where one row of logits does not fit."""
    rows = hidden.shape[0]

    def sized(kind: str) -> tuple[Sizes, int, int]:
        """(sizes, bytes whatever the chunk, bytes of a chunk's row)."""
        sizes = workspace.sizes(weight, bias, softcap, rows, budget, kind)
        return sizes, sizes.fixed + VECTOR_BYTES_PER_ROW * rows, sizes.row + sizes.scratch

    if needs_head:
        sizes, fixed, per_row = sized("kept")
        left = budget - fixed - rows * sizes.row
        chunk_of_all = min(rows, left // sizes.scratch) if sizes.scratch else rows
        if left >= 0 and 16 * chunk_of_all >= rows:
            return Plan("kept", sizes, max(1, chunk_of_all), rows)
        # A quarter for the chunks; keeping less than half of the rows would cost more in small chunks than it saves.
        small = (budget - fixed) // 4 // per_row
        kept = (budget - fixed - small * per_row) // sizes.row
        if small > 0 and rows <= 2 * kept:
            return Plan("kept", sizes, min(small, rows), min(kept, rows))
    elif needs_hidden:
        sizes, fixed, per_row = sized("product")
        product = hidden.numel() * hidden.element_size()
        if product <= budget // 2 and fixed + product + per_row <= budget:
            return Plan("product", sizes, rows_that_fit(budget - product, fixed, per_row, rows), 0)
    if needs_head or needs_hidden:
        # The backward pass must fit too.
        rows_that_fit(budget, *sized("kept")[1:], rows)
    sizes, fixed, per_row = sized("values")
    return Plan("values", sizes, rows_that_fit(budget, fixed, per_row, rows), 0)


def _kept_or_spent(
    workspace: type, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, budget: int, beside: int
) -> tuple[str, Sizes]:
    """What a pass that forms all gradients asks for: "spent" where not all rows fit at once, each with `beside` bytes more."""
    rows = len(hidden)
    sizes = workspace.sizes(weight, bias, softcap, rows, budget, "kept")
    if sizes.fixed + rows * (sizes.row + sizes.scratch + beside) <= budget:
        return "kept", sizes
    return "spent", workspace.sizes(weight, bias, softcap, rows, budget, "spent")


def _of_chunk(
    workspace: type, sizes: Sizes, weight: Tensor, bias: Tensor | None, softcap: float | None, rows: int, budget: int, kind: str
) -> Sizes:
    """Tiles of a chunk's own number of rows, wider than those of all rows (`sizes`), where these take no more memory."""
    own = workspace.sizes(weight, bias, softcap, rows, budget, kind)
    return own if own.fixed <= sizes.fixed and own.row + own.scratch <= sizes.row + sizes.scratch else sizes


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
        self.work, self.hidden, self.dtype = work, hidden, dtype
        self.unit = torch.as_tensor(unit) if hidden.dtype == torch.float16 else None
        self.d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.d_weight = work.weight.new_empty(work.weight.shape, dtype=dtype) if needs[1] else None
        self.d_bias = torch.zeros_like(bias, dtype=dtype) if needs[2] else None
        self.started = False  # whether d_weight holds anything
        self.open: tuple[Tensor | None, Tensor | None, list[bool]] | None = None

    def add(self, part: slice | Tensor, z: Tensor, state: Tensor, target: Tensor, row_factor: Tensor) -> None:
        """Add the rows at `part`, of which the workspace has kept z and state."""
        self._add(part, z, state, target, row_factor.to(self.dtype), self.unit, self.d_weight, not self.started, self.d_bias)
        self.started = True

    def add_opposite(self, part: slice, z: Tensor, state: Tensor, target: Tensor, row_factor: Tensor) -> None:
        """Scheme E: add rows of two sequences whose -a is not known yet, but that the second one's is the negative of the first one's."""
        if self.open is None:
            own = torch.empty_like(self.d_weight) if self.started and self.d_weight is not None else self.d_weight
            self.open = own, None if self.d_bias is None else torch.zeros_like(self.d_bias), [True]
        d_weight, d_bias, fresh = self.open
        self._add(part, z, state, target, row_factor, None, d_weight, fresh.pop() if fresh else False, d_bias)

    def end_opposite(self, parts: list[slice], factor: Tensor) -> None:
        """Scheme E: both sequences are added; `factor` is the first one's -a."""
        for part in parts if self.d_hidden is not None else []:
            self.d_hidden[part] = (self.d_hidden[part] * factor).to(self.d_hidden.dtype)
        relative = factor if self.unit is None else factor / self.unit
        for mine, own in ((self.d_weight, self.open[0]), (self.d_bias, self.open[1])):
            if own is not None:
                own.mul_(relative)
            if own is not mine:
                mine.add_(own)
        self.started, self.open = True, None

    def _add(self, part, z, state, target, row_factor, unit, d_weight, first: bool, d_bias) -> None:
        hidden = self.hidden[part]
        into = None
        if self.d_hidden is not None:
            into = self.d_hidden[part] if isinstance(part, slice) else torch.empty_like(hidden, memory_format=torch.contiguous_format)
        self.work.add_gradients(z, state, target, hidden, row_factor, unit, into, d_weight, first, d_bias)
        if into is not None and not isinstance(part, slice):
            self.d_hidden.index_copy_(0, part, into)

    def result(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of the inputs; empty where not needed."""
        none = self.hidden.new_empty(0), self.hidden.new_empty(0), self.hidden.new_empty(0)
        if self.d_weight is not None and not self.started:
            self.d_weight.zero_()
        if self.unit is not None:
            for total in (self.d_weight, self.d_bias):
                if total is not None:
                    total.mul_(self.unit)
        found = (
            self.d_hidden,
            None if self.d_weight is None else self.d_weight.to(weight.dtype),
            None if self.d_bias is None else self.d_bias.to(bias.dtype),
        )
        return tuple(empty if x is None else x for x, empty in zip(found, none, strict=True))


# sequence_logprob: values, then gradients for coefficients that come later.


def _sequence_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor | None, cu_seqlens: Tensor,
    temperature: float, softcap: float | None, budget: int, needs_hidden: bool, needs_head: bool, debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_row_values(hidden, weight, target, cu_seqlens, token_weight, debug)
    workspace = row_workspace(hidden)
    p = plan(workspace, hidden, weight, bias, softcap, budget, needs_hidden, needs_head)
    token, z, product, state = _empty_values(workspace, hidden, weight, p)
    work = workspace(weight, bias, temperature, softcap, p.sizes, p.rows, p.kind)
    # Without scratch the kept rows are one product.
    for part in chunks(0, p.kept, p.rows if p.sizes.scratch else max(1, p.kept)):
        token[part], state[part] = work.keep(hidden[part], target[part], z[part])
    if p.kept < len(hidden):
        buffer = work.new_z(weight, p.rows if p.kind == "kept" else 0)
        for part in chunks(p.kept, len(hidden), p.rows):
            if p.kind == "product":
                token[part] = work.product(hidden[part], target[part], product[part])
            elif p.kind == "values":
                token[part] = work.values(hidden[part], target[part])
            else:
                token[part], _ = work.keep(hidden[part], target[part], buffer[: part.stop - part.start])
    return sequence_sum(token, token_weight, cu_seqlens), token, z, state, product


def _empty_values(workspace: type, hidden: Tensor, weight: Tensor, p: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_logprob [T], kept z [kept, V], J W [T, D], state [kept, STATE]), uninitialised."""
    token = hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden.dtype))
    product = torch.empty_like(hidden, memory_format=torch.contiguous_format) if p.kind == "product" else hidden.new_empty(0)
    return token, workspace.new_z(weight, p.kept), product, token.new_empty(p.kept, workspace.STATE)


def _sequence_logprob_backward(
    d_logprob: Tensor, d_token: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    token_weight: Tensor | None, cu_seqlens: Tensor, kept: Tensor, state: Tensor, product: Tensor, temperature: float,
    softcap: float | None, budget: int, needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = len(hidden)
    factor = _row_coefficients(d_logprob, cu_seqlens, token_weight, rows)
    factor = -(factor if d_token is None else factor + d_token)
    if product.numel():
        scaled = torch.empty_like(product)
        _scale_rows(product, factor, scaled)
        return scaled, hidden.new_empty(0), hidden.new_empty(0)
    workspace, n_kept = row_workspace(hidden), len(kept)
    sizes = workspace.sizes(weight, bias, softcap, rows, budget, "kept")
    # What is kept is part of the budget.
    fixed = sizes.fixed + VECTOR_BYTES_PER_ROW * rows + n_kept * sizes.row
    size = rows_that_fit(budget, fixed, sizes.row + sizes.scratch, rows - n_kept) if n_kept < rows else 0
    work = workspace(weight, bias, temperature, softcap, sizes, size, "kept")
    unit = factor.abs().amax().clamp_min(1e-30) if rows else 1.0
    total = _Gradients(work, hidden, bias, (needs_hidden, needs_weight, needs_bias), unit)
    if n_kept:
        part = slice(0, n_kept)
        total.add(part, kept, state, target[part], factor[part])
    if n_kept < rows:
        buffer = work.new_z(weight, size)
        for part in chunks(n_kept, rows, size):
            z = buffer[: part.stop - part.start]
            _, own = work.keep(hidden[part], target[part], z)
            total.add(part, z, own, target[part], factor[part])
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
    if not (needs_weight or needs_bias):
        return _frozen_preference_pass(
            hidden, weight, bias, target, token_weight, cu_seqlens, pairs, q, ref_logprob, beta, temperature, softcap, budget
        )
    device, dtype, workspace = hidden.device, statistics_dtype(hidden.dtype), row_workspace(hidden)
    starts = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(starts[:-1], starts[1:], strict=True)]
    # Rows that do not follow each other are gathered first.
    gathered = hidden.element_size() * hidden.shape[1]
    kind, sizes = _kept_or_spent(workspace, hidden, weight, bias, softcap, budget, VECTOR_BYTES_PER_ROW + gathered)
    fixed = sizes.fixed + VECTOR_BYTES_PER_ROW * len(hidden)
    per_row = sizes.row + sizes.scratch + gathered
    chunk = rows_that_fit(budget, fixed, per_row, len(hidden))
    parts = _parts(pairs.tolist(), lengths, chunk)
    accumulator = dtype.itemsize * weight.numel()
    several = sum(part.opposite for part in parts) > 1
    if several and needs_weight and fixed + accumulator + (chunk // 2 + 1) * per_row <= budget:
        chunk = rows_that_fit(budget - accumulator, fixed, per_row, len(hidden))
        parts = _parts(pairs.tolist(), lengths, chunk)
        several = False
    longest = max((sum(lengths[n] for n in part.sequences) for part in parts), default=0)
    chunk = max(1, min(chunk, longest))
    sizes = _of_chunk(workspace, sizes, weight, bias, softcap, chunk, budget, kind)
    work = workspace(weight, bias, temperature, softcap, sizes, chunk, kind)
    buffer = work.new_z(weight, chunk)
    total = _Gradients(work, hidden, bias, (needs_hidden, needs_weight, needs_bias), beta / max(1, len(pairs)))
    token = torch.empty(len(hidden), dtype=dtype, device=device)
    logprob = torch.zeros(len(lengths), dtype=dtype, device=device)
    row_weight = torch.ones(len(hidden), dtype=dtype, device=device)
    if token_weight is not None:
        row_weight = token_weight.to(device, dtype, non_blocking=True)
    pairs = pairs.to(device, torch.int64, non_blocking=True)
    ends, ref, q = _by_sequence(pairs, len(lengths)), ref_logprob.to(device, dtype, non_blocking=True), q.to(dtype)

    def forward(rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, y = hidden[rows], target[rows]
        z = buffer[: len(h)]
        token[rows], state = work.keep(h, y, z)
        return z, state, y

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
            kept = forward(rows)
            total.add(rows, *kept, coefficients(part, rows)[1])
        elif part.opposite and not (several and total.started):
            for n, sign in zip(part.sequences, (1, -1), strict=True):
                for piece in chunks(starts[n], starts[n + 1], chunk):
                    total.add_opposite(piece, *forward(piece), sign * row_weight[piece])
            a = coefficients(part, rows)[0]
            total.end_opposite([slice(starts[n], starts[n + 1]) for n in part.sequences], a[0])
        else:
            for piece in pieces:
                forward(_piece(rows, piece))
            factor = coefficients(part, rows)[1]
            if not part.used:
                if needs_hidden:
                    total.d_hidden[rows] = 0
                continue
            for piece in pieces:
                some = _piece(rows, piece)
                total.add(some, *forward(some), factor[piece])
    loss, margin, accuracy, _ = _preference_terms(logprob, pairs, q, ref, beta)
    return loss, logprob, margin, accuracy, *total.result(weight, bias)


def _frozen_preference_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor | None, cu_seqlens: Tensor, pairs: Tensor,
    q: Tensor, ref_logprob: Tensor, beta: float, temperature: float, softcap: float | None, budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_preference_pass` for a frozen head: J W stands where its scaled rows, the gradient, are wanted."""
    workspace, rows = row_workspace(hidden), len(hidden)
    sizes = workspace.sizes(weight, bias, softcap, rows, budget, "product")
    chunk = rows_that_fit(budget, sizes.fixed + VECTOR_BYTES_PER_ROW * rows, sizes.row + sizes.scratch, rows)
    work = workspace(weight, bias, temperature, softcap, sizes, chunk, "product")
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    token = hidden.new_empty(rows, dtype=statistics_dtype(hidden.dtype))
    for part in chunks(0, rows, chunk):
        token[part] = work.product(hidden[part], target[part], d_hidden[part])
    logprob = sequence_sum(token, token_weight, cu_seqlens)
    loss, margin, accuracy, coefficient = _preference_terms(logprob, pairs, q, ref_logprob, beta)
    _scale_rows(d_hidden, -_row_coefficients(coefficient, cu_seqlens, token_weight, rows), d_hidden)
    none = hidden.new_empty(0), hidden.new_empty(0)
    return loss, logprob, margin, accuracy, d_hidden, *none


def _scale_rows(product: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = product times the factor of each row, in the factor's dtype and rounded once; a row of factor 0 becomes 0 whatever it holds."""
    # A block at a time, as converted copies of all rows are not counted.
    for part in chunks(0, len(product), max(1, len(product) // 8)):
        a = factor[part][:, None]
        out[part] = torch.where(a == 0, 0, product[part] * a)


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
    needs, needs_head = (needs_hidden, needs_weight, needs_bias), needs_weight or needs_bias
    # Advantages, shares, coefficients and their parts, all float64.
    vectors = 2 * VECTOR_BYTES_PER_ROW
    if needs_head:
        kind, sizes = _kept_or_spent(workspace, hidden, weight, bias, softcap, budget, vectors + VECTOR_BYTES_PER_ROW)
    else:
        kind = "product" if needs_hidden else "values"
        sizes = workspace.sizes(weight, bias, softcap, rows, budget, kind)
    fixed = sizes.fixed + vectors * rows
    size = rows_that_fit(budget, fixed, sizes.row + sizes.scratch + VECTOR_BYTES_PER_ROW, rows)
    sizes = _of_chunk(workspace, sizes, weight, bias, softcap, size, budget, kind)
    work = workspace(weight, bias, temperature, softcap, sizes, size, kind)
    buffer = work.new_z(weight, size if needs_head else 0)
    share = row_shares(cu_seqlens, token_weight, normalize, rows, device)
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    advantage = torch.repeat_interleave(advantage.to(device, non_blocking=True), lengths, output_size=rows)
    unit = (share.abs().amax() * (advantage.abs().amax() + kl_coef)).clamp_min(1e-30).to(dtype) if rows else 1.0
    total = _Gradients(work, hidden, bias, needs, unit)
    token = torch.empty(rows, dtype=dtype, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for part in chunks(0, rows, size):
        h, y = hidden[part], target[part]
        if needs_head:
            z = buffer[: len(h)]
            token[part], state = work.keep(h, y, z)
        elif kind == "product":
            product = torch.empty_like(h, dtype=dtype, memory_format=torch.contiguous_format)
            token[part] = work.product(h, y, product)
        else:
            token[part] = work.values(h, y)
        old, ref = (None if x is None else x[part] for x in (old_logprob, ref_logprob))
        clip = None if clip_low is None else (clip_low, clip_high)
        terms = policy_terms(token[part], advantage[part], share[part], old, ref, clip, kl_coef, kl)
        sums += torch.stack(terms[:3])
        if needs_head:
            total.add(part, z, state, y, -terms.coefficient)
        elif kind == "product":
            unused = (terms.coefficient == 0)[:, None]
            total.d_hidden[part] = product.mul_(-terms.coefficient.to(dtype)[:, None]).masked_fill_(unused, 0)
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
    op.register_vmap(_refuse_vmap)
    return op


def _refuse_vmap(*arguments):
    raise RuntimeError("vmap is not supported: sequence_logprob and the losses on it take packed sequences instead of a batch dimension")


def _gradient_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    none = hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    like = hidden, weight, bias
    return tuple(x.new_empty(x.shape) if need else empty for x, need, empty in zip(like, needs, none, strict=True))


def _sequence_logprob_shapes(
    hidden, weight, bias, target, token_weight, cu_seqlens, temperature, softcap, budget, needs_hidden, needs_head, debug
):
    workspace = row_workspace(hidden)
    p = plan(workspace, hidden, weight, bias, softcap, budget, needs_hidden, needs_head)
    token, z, product, state = _empty_values(workspace, hidden, weight, p)
    return token.new_empty(cu_seqlens.shape[0] - 1), token, z, state, product


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
    # Mostly it is 1, and the gradients are large; but on a GPU the host does not look, and a traced number has no value.
    if type(d_loss) is not Tensor or d_loss.device.type != "cpu" or float(d_loss) != 1:
        with torch.no_grad():
            gradients = [x * d_loss for x in gradients]
    gradients = [x if need else None for x, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)]
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
