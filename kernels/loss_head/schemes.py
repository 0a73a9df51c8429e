"""Chooses how a loss op does its work: what is kept, what is formed at once and what is computed again.

The matrix products are the cost: 2 T D V flop each, T rows. A row's coefficient a_t = d loss / d log p_t is a
factor of all it adds (`kernels.loss_head.rows`), so it may become known after the logits are gone. Schemes,
by what the caller differentiates and the memory budget:

- forward only: 1 product.
- frozen head (C): the forward pass also forms J W [T, D]; the backward pass scales its rows. 2 products.
  Where that does not fit, a preference loss forms it in place of the gradient.
- head with gradient (B): the forward pass keeps J [T, V], or as many rows as fit;
  the backward pass scales rows of hidden and of J W. 3 products, and a fourth for rows that were not kept;
  without any kept row this is recomputation (A).
- preference loss whose J does not fit (D): sequences that share pairs or a group of "listwise" labels are
  done together, their coefficients follow from their log-probs, and their gradients are formed before the
  next ones' logits. 3 products. Two sequences too long for a chunk (E): their coefficients differ only in
  sign, so the difference of both sums is formed over many chunks and scaled at the end, as is the sum of one
  long sequence that shares nothing. 3 products.
- policy loss (F): a row's coefficient follows from its own log-prob. 3 products,
  2 with a frozen head, in any chunks.

Memory beyond inputs, returned gradients and one float32 (float64) accumulator of the head's gradient is at
most `memory_budget_bytes`. Each op counts 64 bytes a row of hidden and what `sizes` of its workspace says.
Compiled code on the CPU keeps tiles of at most 4 MiB and a sixth of the budget (on Intel processors of at
most 32 MiB and an eighth, with 4 D bytes for each of a tile's rows), but none for the gradients of a loss
that takes several chunks, and 4 (V + 3 D + 12) bytes for each row of which logits are kept: those of a chunk,
or all in scheme B; none for a forward pass and a frozen head. Where a loss that has its gradients already is
scaled before its backward pass (on a GPU it is), hidden's gradient is there once more. Everything is summed
in an order that depends on shapes alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import compiled
from kernels.loss_head.records import Head, statistics_dtype
from kernels.loss_head.rows import Sizes, TorchRows
from kernels.loss_head.rows_native import NativeRows
from kernels.loss_head.rows_sparse import SparseRows

DEFAULT_MEMORY_BUDGET_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
# These are the errors that dense rows make by rounding, relative to the largest element: measured on states
# of a trained model in float32, and half a unit in the last place of gradients in 16 bits.
DEFAULT_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
# Each op counts vectors with one number a row: log-probs, their float64 copies, weights, gradients, targets.
VECTOR_BYTES_PER_ROW = 64


def budget_or_default(memory_budget_bytes: int | None, device: torch.device) -> int:
    """Returns the budget in bytes.

    A GPU's default is an eighth of its memory, because in small chunks the head's gradient is read
    and written too often for it, and rows whose J is not kept are computed twice.
    """
    if memory_budget_bytes is not None:
        return int(memory_budget_bytes)
    # A plan may be made for a GPU that is not here.
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory // 8
    return DEFAULT_MEMORY_BUDGET_BYTES.get(device.type, DEFAULT_MEMORY_BUDGET_BYTES["cpu"])


def rows_that_fit(budget: int, fixed: int, per_row: int, rows: int) -> int:
    """Returns the rows of a chunk, at most `rows`. Raises ValueError where not even one row fits."""
    if fixed + per_row > budget:
        least = f"at least {fixed + per_row}, what one row of logits needs here"
        raise ValueError(f"memory_budget_bytes = {budget}: expected {least}")
    return max(1, min((budget - fixed) // per_row, rows))


def even(rows: int, most: int, tile: int) -> int:
    """Returns the rows of a chunk, at most `most`, where `rows` go in several chunks: whole tiles, so that no
    product computes a tile for a few rows, and about as many in each. A tile of 1 leaves `most` as it is."""
    if tile == 1 or most >= rows or most < tile:
        return most
    chunks = -(-rows // (most - most % tile))
    return -(-rows // (chunks * tile)) * tile


def row_workspace(hidden: Tensor, tolerance: float = 0.0) -> type[TorchRows]:
    """Returns the workspace for these rows: Triton on a GPU, compiled code on
    the CPU, plain torch for float64.

    With a tolerance both may leave entries out of the gradients.
    """
    if hidden.device.type == "cuda" and hidden.dtype != torch.float64:
        if tolerance > 0:
            from kernels.loss_head.rows_sparse_triton import SparseTritonRows

            return SparseTritonRows
        from kernels.loss_head.rows_triton import TritonRows

        return TritonRows
    if not compiled.serves(hidden.device, statistics_dtype(hidden.dtype)):
        return TorchRows
    return SparseRows if tolerance > 0 else NativeRows


def tolerance_or_default(
    gradient_tolerance: float | None, hidden: Tensor, weight: Tensor, budget: int
) -> float:
    """Returns the relative error that entries left out of the gradients of these rows may make.

    It is 0 where nothing is left out: in float64, on a CPU without compiled code, in calls of few rows, and
    where a chunk has few.
    """
    least = row_workspace(hidden, 1.0).LEAST_ROWS
    if min(len(hidden), 2 * budget // (4 * max(1, len(weight)))) < least:
        return 0.0
    return DEFAULT_TOLERANCE[hidden.dtype] if gradient_tolerance is None else float(gradient_tolerance)


class Plan(NamedTuple):
    """How one call is done."""

    kind: str  # what is asked of the workspace, see `kernels.loss_head.rows.TorchRows`
    sizes: Sizes
    rows: int  # rows of hidden in a chunk
    kept: int  # rows whose z the forward pass keeps


def plan(
    workspace: type[TorchRows], hidden: Tensor, head: Head, budget: int, needs_hidden: bool, needs_head: bool
) -> Plan:
    """Chooses the scheme of `sequence_logprob` from shapes and the budget in bytes.

    Raises ValueError where one row of logits does not fit.
    """
    rows = hidden.shape[0]

    def sized(kind: str) -> tuple[Sizes, int, int]:
        """Returns sizes, bytes whatever the chunk, and bytes of a chunk's row."""
        sizes = workspace.sizes(head, rows, budget, kind)
        return sizes, sizes.fixed + VECTOR_BYTES_PER_ROW * rows, sizes.row + sizes.scratch

    if needs_head:
        sizes, fixed, per_row = sized("kept")
        left = budget - fixed - rows * sizes.row
        chunk_of_all = min(rows, left // sizes.scratch) if sizes.scratch else rows
        if left >= 0 and 16 * chunk_of_all >= rows:
            return Plan("kept", sizes, even(rows, max(1, chunk_of_all), workspace.TILE), rows)
        # A quarter is for the chunks; keeping less than half of the rows would cost more
        # in small chunks than it saves.
        small = (budget - fixed) // 4 // per_row
        kept = (budget - fixed - small * per_row) // sizes.row
        if small > 0 and rows <= 2 * kept:
            tile = workspace.TILE
            small, kept = (n - n % tile if n >= tile else n for n in (small, kept))
            return Plan("kept", sizes, min(small, rows), min(kept, rows))
    elif needs_hidden:
        sizes, fixed, per_row = sized("product")
        product = hidden.numel() * hidden.element_size()
        if product <= budget // 2 and fixed + product + per_row <= budget:
            most = rows_that_fit(budget - product, fixed, per_row, rows)
            return Plan("product", sizes, even(rows, most, workspace.TILE), 0)
    if needs_head or needs_hidden:
        # The backward pass must fit too.
        rows_that_fit(budget, *sized("kept")[1:], rows)
    sizes, fixed, per_row = sized("values")
    most = rows_that_fit(budget, fixed, per_row, rows)
    return Plan("values", sizes, even(rows, most, workspace.TILE), 0)


def kept_or_spent(
    workspace: type[TorchRows], rows: int, head: Head, budget: int, beside: int
) -> tuple[str, Sizes]:
    """Returns what a pass that forms all gradients asks of its workspace, with `beside` bytes more a row.

    It asks for "spent" where not all rows fit at once.
    """
    sizes = workspace.sizes(head, rows, budget, "kept")
    if sizes.fixed + rows * (sizes.row + sizes.scratch + beside) <= budget:
        return "kept", sizes
    return "spent", workspace.sizes(head, rows, budget, "spent")


def sizes_of_chunk(
    workspace: type[TorchRows], sizes: Sizes, head: Head, rows: int, budget: int, kind: str
) -> Sizes:
    """Returns tiles cut for a chunk's rows, wider than those for all rows (`sizes`),
    where they take no more memory.
    """
    wider = workspace.sizes(head, rows, budget, kind)
    fits = wider.fixed <= sizes.fixed and wider.row + wider.scratch <= sizes.row + sizes.scratch
    return wider if fits else sizes


class Part(NamedTuple):
    """Sequences whose coefficients depend on each other, in one chunk (D) or over several ones (E, A)."""

    sequences: list[int]
    opposite: bool  # one sequence, or two that are linked: their coefficients differ in sign only
    used: bool  # they have coefficients


def parts_of(links: list[tuple[int, int]], lengths: list[int], chunk: int) -> list[Part]:
    """Packs sequences that are linked into parts of at most `chunk` rows; those without a link have no
    coefficients.

    What is larger stands alone, and parts of one or two such sequences come first.
    """
    root = list(range(len(lengths)))

    def find(n: int) -> int:
        while root[n] != n:
            root[n] = n = root[root[n]]
        return n

    used = [False] * len(lengths)
    for a, b in links:
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
            parts.append(Part(group, len(group) <= 2, True))
            continue
        if size + rows > chunk:
            parts.append(Part(open_part, False, True))
            open_part, size = [], 0
        open_part, size = open_part + group, size + rows
    if open_part:
        parts.append(Part(open_part, False, True))
    if alone:
        parts.append(Part(alone, False, False))

    def needs_accumulator(part: Part) -> bool:
        return part.opposite and sum(lengths[n] for n in part.sequences) > chunk

    # The first part that needs an accumulator takes the head's gradient itself, so these parts come first.
    return sorted(parts, key=lambda part: not needs_accumulator(part))


def rows_of(
    sequences: list[int], starts: list[int], lengths: list[int], device: torch.device
) -> slice | Tensor:
    """Returns the rows of these sequences: one slice where they follow each other, else their indices."""
    filled = [n for n in sequences if lengths[n]]
    if not filled:
        return slice(0, 0)
    if all(starts[b] == starts[a] + lengths[a] for a, b in zip(filled, filled[1:], strict=False)):
        return slice(starts[filled[0]], starts[filled[-1]] + lengths[filled[-1]])
    index = torch.cat([torch.arange(starts[n], starts[n] + lengths[n]) for n in filled])
    return index.to(device, non_blocking=True)


def piece_of(rows: slice | Tensor, piece: slice) -> slice | Tensor:
    """Returns a slice of rows that are a slice or indices themselves."""
    if isinstance(rows, slice):
        return slice(rows.start + piece.start, rows.start + piece.stop)
    return rows[piece]
