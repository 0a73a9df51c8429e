"""The passes of the loss ops over chunks of rows, as `kernels.loss_head.schemes` chooses them."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.loss_head.gradients import Gradients, left_out, scale_rows
from kernels.loss_head.policy import policy_terms, row_shares
from kernels.loss_head.preference import (
    aims_on_device,
    largest_coefficient,
    order_of,
    preference_coefficient,
    preference_links,
    preference_terms,
)
from kernels.loss_head.records import Aims, Head, Needs, Policy, Rows, statistics_dtype
from kernels.loss_head.rows import Kept, TorchRows, chunks
from kernels.loss_head.schemes import (
    VECTOR_BYTES_PER_ROW,
    Part,
    Plan,
    even,
    kept_or_spent,
    parts_of,
    piece_of,
    plan,
    row_workspace,
    rows_of,
    rows_that_fit,
    sizes_of_chunk,
)
from kernels.loss_head.terms import row_coefficients, sequence_sum

# sequence_logprob forms values, and later gradients for the coefficients that come then.


def sequence_logprob_pass(
    rows: Rows, head: Head, budget: int, needs_hidden: bool, needs_head: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns logprob [N], token_logprob [T], and for the backward pass kept z, state and J W [T, D]."""
    hidden, target = rows.hidden, rows.target
    workspace = row_workspace(hidden)
    p = plan(workspace, hidden, head, budget, needs_hidden, needs_head)
    token, z, state, product = empty_values(workspace, hidden, head.weight, p)
    work = workspace(head, p.sizes, p.rows, p.kind)
    # Without scratch the kept rows are one product.
    for part in chunks(0, p.kept, p.rows if p.sizes.scratch else max(1, p.kept)):
        token[part], state[part] = work.keep(hidden[part], target[part], z[part])
    if p.kept < len(hidden):
        buffer = work.new_z(head.weight, p.rows if p.kind == "kept" else 0)
        for part in chunks(p.kept, len(hidden), p.rows):
            if p.kind == "product":
                token[part] = work.product(hidden[part], target[part], product[part])
            elif p.kind == "values":
                token[part] = work.values(hidden[part], target[part])
            else:
                token[part], _ = work.keep(hidden[part], target[part], buffer[: part.stop - part.start])
    return sequence_sum(token, rows.token_weight, rows.cu_seqlens), token, z, state, product


def empty_values(
    workspace: type[TorchRows], hidden: Tensor, weight: Tensor, p: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns uninitialised token_logprob [T], kept z [kept, V], state [kept, STATE] and J W [T, D]."""
    token = hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden.dtype))
    product = hidden.new_empty(0)
    if p.kind == "product":
        product = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return token, workspace.new_z(weight, p.kept), token.new_empty(p.kept, workspace.STATE), product


def sequence_logprob_backward(
    coefficients: tuple[Tensor, Tensor | None],
    rows: Rows,
    head: Head,
    saved: tuple[Tensor, Tensor, Tensor],
    budget: int,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients in hidden, weight and bias.

    coefficients: those of logprob [N] and of token_logprob [T]; saved: z, state and J W of the forward pass.
    """
    hidden, target = rows.hidden, rows.target
    (d_logprob, d_token), (kept_z, state, product), count = coefficients, saved, len(hidden)
    factor = row_coefficients(d_logprob, rows.cu_seqlens, rows.token_weight, count)
    factor = -(factor if d_token is None else factor + d_token)
    if product.numel():
        scaled = torch.empty_like(product)
        scale_rows(product, factor, scaled)
        return scaled, hidden.new_empty(0), hidden.new_empty(0)
    workspace, kept = row_workspace(hidden), len(kept_z)
    sizes = workspace.sizes(head, count, budget, "kept")
    # The kept rows are part of the budget.
    fixed = sizes.fixed + VECTOR_BYTES_PER_ROW * count + kept * sizes.row
    size = rows_that_fit(budget, fixed, sizes.row + sizes.scratch, count - kept) if kept < count else 0
    size = even(count - kept, size, workspace.TILE)
    work = workspace(head, sizes, size, "kept")
    unit = factor.abs().amax().clamp_min(1e-30) if count else 1.0
    total = Gradients(work, hidden, head.bias, needs, unit, once=kept == count)
    if kept:
        part = slice(0, kept)
        total.add(part, Kept(kept_z, state, target[part], hidden[part]), factor[part])
    if kept < count:
        buffer = work.new_z(head.weight, size)
        for part in chunks(kept, count, size):
            h, y, z = hidden[part], target[part], buffer[: part.stop - part.start]
            _, state = work.keep(h, y, z)
            total.add(part, Kept(z, state, y, h), factor[part])
    return total.result(head)


def within_tolerance(form: Callable[[Head], tuple[Tensor, ...]], head: Head) -> tuple[Tensor, ...]:
    """Returns form(head), or that without a tolerance where chunks cancel so far that what they left out is
    too much of their sum, and while a graph is captured, as the host must not look then. The last results of
    `form` are what was left out and the three gradients.
    """
    device = head.weight.device
    if head.tolerance > 0 and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        head = head._replace(tolerance=0.0)
    results = form(head)
    left = results[-4]
    # On a GPU where nothing was left out the host does not look. The factor is for the rounding of the bound.
    looks = head.tolerance > 0 and left.device.type == "cpu"
    if looks and not float(left[0]) <= head.tolerance * (1 + 1e-6):
        results = form(head._replace(tolerance=0.0))
        left = results[-4]
    return *results[:-4], left.to(device, non_blocking=True), *results[-3:]


# The preference loss with the head's gradient goes by chunks of whole pairs or groups.


def preference_pass(
    rows: Rows, head: Head, aims: Aims, budget: int, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, logprob [N], margin [K], accuracy, what `Gradients.left_out` says, and
    d loss / d hidden, weight and bias.

    cu_seqlens, pairs and group are on the CPU, unless the head is frozen.
    """
    if not needs.head:
        return _frozen_preference_pass(rows, head, aims, budget)
    hidden, target = rows.hidden, rows.target
    device, dtype = hidden.device, statistics_dtype(hidden.dtype)
    workspace = row_workspace(hidden, head.tolerance)
    starts = rows.cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(starts[:-1], starts[1:], strict=True)]
    # Rows that do not follow each other are gathered first.
    gathered = hidden.element_size() * hidden.shape[1]
    kind, sizes = kept_or_spent(workspace, len(hidden), head, budget, VECTOR_BYTES_PER_ROW + gathered)
    fixed = sizes.fixed + VECTOR_BYTES_PER_ROW * len(hidden)
    per_row = sizes.row + sizes.scratch + gathered
    chunk = rows_that_fit(budget, fixed, per_row, len(hidden))
    links = preference_links(aims)
    parts = parts_of(links, lengths, chunk)
    accumulator = dtype.itemsize * head.weight.numel()
    several = sum(part.opposite for part in parts) > 1
    if several and needs.weight and fixed + accumulator + (chunk // 2 + 1) * per_row <= budget:
        chunk = rows_that_fit(budget - accumulator, fixed, per_row, len(hidden))
        parts = parts_of(links, lengths, chunk)
        several = False
    longest = max((sum(lengths[n] for n in part.sequences) for part in parts), default=0)
    chunk = max(1, min(chunk, longest))
    sizes = sizes_of_chunk(workspace, sizes, head, chunk, budget, kind)
    work = workspace(head, sizes, chunk, kind)
    work.survey(hidden, target)
    buffer = work.new_z(head.weight, chunk)
    once = len(parts) == 1 and parts[0].used and len(hidden) <= chunk
    total = Gradients(work, hidden, head.bias, needs, largest_coefficient(aims), once)
    token = torch.empty(len(hidden), dtype=dtype, device=device)
    logprob = torch.zeros(len(lengths), dtype=dtype, device=device)
    row_weight = torch.ones(len(hidden), dtype=dtype, device=device)
    if rows.token_weight is not None:
        row_weight = rows.token_weight.to(device, dtype, non_blocking=True)
    here = aims_on_device(aims, device)
    by = order_of(here, len(lengths))

    def forward(at: slice | Tensor) -> Kept:
        h, y = hidden[at], target[at]
        z = buffer[: len(h)]
        token[at], state = work.keep(h, y, z)
        return Kept(z, state, y, h)

    def coefficients(part: Part, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Returns -a of the part's sequences and of its rows, times their weights,
        once their log-probs are known.
        """
        index = torch.tensor(part.sequences).to(device, non_blocking=True)
        offsets = torch.tensor([0, *(lengths[n] for n in part.sequences)]).cumsum(0)
        logprob.index_copy_(0, index, sequence_sum(token[at], row_weight[at], offsets))
        a = -preference_coefficient(logprob, here, by)[index]
        return a, row_coefficients(a, offsets, row_weight[at], int(offsets[-1]))

    for part in parts:
        at = rows_of(part.sequences, starts, lengths, device)
        size = sum(lengths[n] for n in part.sequences)
        pieces = list(chunks(0, size, chunk))
        if size == 0:
            continue  # empty sequences: their log-prob is 0, and they have no rows
        if part.used and size <= chunk:
            kept = forward(at)
            total.add(at, kept, coefficients(part, at)[1])
        elif part.opposite and not (several and total.started):
            for n, sign in zip(part.sequences, (1, -1), strict=False):
                for piece in chunks(starts[n], starts[n + 1], chunk):
                    total.add_opposite(piece, forward(piece), sign * row_weight[piece])
            a = coefficients(part, at)[0]
            total.end_opposite([slice(starts[n], starts[n + 1]) for n in part.sequences], a[0])
        else:
            for piece in pieces:
                forward(piece_of(at, piece))
            factor = coefficients(part, at)[1]
            if not part.used:
                if needs.hidden:
                    total.d_hidden[at] = 0
                continue
            for piece in pieces:
                some = piece_of(at, piece)
                total.add(some, forward(some), factor[piece])
    loss, margin, accuracy, _ = preference_terms(logprob, aims)
    return loss, logprob, margin, accuracy, total.left_out(), *total.result(head)


def _frozen_preference_pass(
    rows: Rows, head: Head, aims: Aims, budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Does the preference pass for a frozen head: J W stands where the gradient, its scaled rows, will be."""
    hidden, target, token_weight, cu_seqlens = rows
    workspace, count = row_workspace(hidden, head.tolerance), len(hidden)
    sizes = workspace.sizes(head, count, budget, "product")
    fixed = sizes.fixed + VECTOR_BYTES_PER_ROW * count
    chunk = rows_that_fit(budget, fixed, sizes.row + sizes.scratch, count)
    chunk = even(count, chunk, workspace.TILE)
    work = workspace(head, sizes, chunk, "product")
    work.survey(hidden, target)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    token = hidden.new_empty(count, dtype=statistics_dtype(hidden.dtype))
    for part in chunks(0, count, chunk):
        token[part] = work.product(hidden[part], target[part], d_hidden[part])
    logprob = sequence_sum(token, token_weight, cu_seqlens)
    loss, margin, accuracy, coefficient = preference_terms(logprob, aims)
    factor = -row_coefficients(coefficient, cu_seqlens, token_weight, count)
    left = left_out(work.mend(hidden, target, d_hidden, factor), hidden)
    scale_rows(d_hidden, factor, d_hidden)
    return loss, logprob, margin, accuracy, left, d_hidden, hidden.new_empty(0), hidden.new_empty(0)


# In the policy loss a row's coefficient follows from its log-prob.


def policy_pass(
    rows: Rows, head: Head, advantage: Tensor, policy: Policy, budget: int, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, logprob [N], token_logprob [T], kl, clip_fraction, what `Gradients.left_out` says, and
    d loss / d hidden, weight, bias.
    """
    hidden, target, token_weight, cu_seqlens = rows
    device, dtype, count = hidden.device, statistics_dtype(hidden.dtype), len(hidden)
    workspace = row_workspace(hidden, head.tolerance)
    # Each row has an advantage, a share, a coefficient and their parts, all float64.
    vectors = 2 * VECTOR_BYTES_PER_ROW
    if needs.head:
        kind, sizes = kept_or_spent(workspace, count, head, budget, vectors + VECTOR_BYTES_PER_ROW)
    else:
        kind = "product" if needs.hidden else "values"
        sizes = workspace.sizes(head, count, budget, kind)
    fixed = sizes.fixed + vectors * count
    size = rows_that_fit(budget, fixed, sizes.row + sizes.scratch + VECTOR_BYTES_PER_ROW, count)
    size = even(count, size, workspace.TILE)
    sizes = sizes_of_chunk(workspace, sizes, head, size, budget, kind)
    work = workspace(head, sizes, size, kind)
    if kind != "values":
        work.survey(hidden, target)
    buffer = work.new_z(head.weight, size if needs.head else 0)
    share = row_shares(cu_seqlens, token_weight, policy.normalize, count, device)
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    advantage = advantage.to(device, non_blocking=True)
    advantage = torch.repeat_interleave(advantage, lengths, output_size=count)
    unit = 1.0
    if count:
        largest = share.abs().amax() * (advantage.abs().amax() + policy.kl_coef)
        unit = largest.clamp_min(1e-30).to(dtype)
    total = Gradients(work, hidden, head.bias, needs, unit, once=size >= count)
    token = torch.empty(count, dtype=dtype, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for part in chunks(0, count, size):
        h, y = hidden[part], target[part]
        if needs.head:
            z = buffer[: len(h)]
            token[part], state = work.keep(h, y, z)
        elif kind == "product":
            product = torch.empty_like(h, dtype=dtype, memory_format=torch.contiguous_format)
            token[part] = work.product(h, y, product)
        else:
            token[part] = work.values(h, y)
        old, ref = (None if x is None else x[part] for x in (policy.old_logprob, policy.ref_logprob))
        of_part = policy._replace(old_logprob=old, ref_logprob=ref)
        terms = policy_terms(token[part], advantage[part], share[part], of_part)
        sums += torch.stack(terms[:3])
        if needs.head:
            total.add(part, Kept(z, state, y, h), -terms.coefficient)
        elif kind == "product":
            total.left += work.mend(h, y, product, -terms.coefficient)
            unused = (terms.coefficient == 0)[:, None]
            scaled = product.mul_(-terms.coefficient.to(dtype)[:, None])
            total.d_hidden[part] = scaled.masked_fill_(unused, 0)
    if count == 0 and policy.ref_logprob is None:
        sums[1] = torch.nan
    loss, divergence, clipped = (x.clone() for x in sums.to(dtype))
    return (
        loss,
        sequence_sum(token, token_weight, cu_seqlens),
        token,
        divergence,
        clipped,
        total.left_out(),
        *total.result(head),
    )
