"""Gradients from the entries of J that matter, by compiled code (csrc/sparse.cpp), for rows on the CPU.

A row of softmax - onehot is nearly empty on the states of a trained model: its entries above a bound, a few
thousand of 49,152, hold all but float32's rounding. The forward pass lists them while the logits of a tile
are in cache, and keeps no logits; dH and dW are gathered from the lists. What is left out is summed as it is
left out, so that its effect has a bound that holds whatever the values are:

    |error of dH_t| <= |a_t| E_t,  E_t = sum over entries v left out of |J_tv| max|W_v|
    |error of dW|   <= tau sum_t |a_t| max|H_t|, tau the largest entry that was left out

Rows where this is more than `Head.tolerance` of the largest element of dH are completed from their logits,
and so are all rows where dW asks for it. A few rows are done in full at first, the pilots: they choose tau,
and where most of J matters, as with flat rows, all goes the way of `kernels.loss_head.rows_native`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import compiled
from kernels.compiled import _native
from kernels.loss_head.records import Head, LeftOut
from kernels.loss_head.rows import Kept, Sizes, Sums, chunks
from kernels.loss_head.rows_native import NativeRows, shaped
from kernels.products import add_product, in_float32, linear, takes_pairs, times_transposed


class Lists(NamedTuple):
    """The entries of rows that are kept, by rising columns. Behind `count` a list may hold anything."""

    value: Tensor  # [C, room]
    column: Tensor  # int32 [C, room]
    count: Tensor  # int32 [C]


class SparseRows(NativeRows):
    """A workspace that gathers gradients from lists of entries where `survey` finds that this pays.

    z [C, V] then holds the lists of its rows: values in its first half, columns in its second; what they do
    not fill is never touched. state [C, 5] is (shift, scale, target's J) as in `NativeRows`, and of what is
    left out the sums of |J| and E_t; counts stand beside it.
    """

    # Rows that are done in full to choose by, and the fewest rows of a call that are worth it.
    PILOTS, LEAST_ROWS = 8, 512
    STEPS = 256
    # Above this share of entries dense rows are faster.
    DENSE_SHARE = 0.17
    # The largest row of dH is larger than the pilots', so that more may be left out than they say.
    MARGIN = 0.7
    # So many of the pilots' likeliest columns bound the mass of a row before its tiles come.
    HEAVY = 256
    BLOCK_ROWS = 128

    @classmethod
    def sizes(cls, head: Head, rows: int, budget: int, kind: str) -> Sizes:
        # J does not take the place of lists.
        sizes = super().sizes(head, rows, budget, "kept" if kind == "spent" else kind)
        vocabulary, width = head.weight.shape
        # Rows that are completed need a tile of logits beside that of J. Before there are any, the pilots
        # have up to 8 matrices.
        tile = 4 * sizes.tile_rows * sizes.columns
        fixed = 4 * vocabulary + max(sizes.fixed + tile, 32 * cls.PILOTS * vocabulary)
        # A row has its target's row of the head, the logits of HEAVY columns, and a maximum for each part.
        row = sizes.row + 4 * (width + 2 * cls.HEAVY + 2 * -(-vocabulary // sizes.columns) + 32)
        row += 4 * vocabulary if kind == "product" else 0
        return sizes._replace(fixed=fixed, row=row)

    def __init__(self, head: Head, sizes: Sizes, rows: int, kind: str) -> None:
        super().__init__(head, sizes, rows, "kept" if kind == "spent" else kind)
        self.tolerance, self.room, self.chunk = head.tolerance, len(head.weight) // 2, rows
        self.listing, self.threshold = False, 0.0
        self.widest = self.scratch_lists = None
        self.errors: list[Tensor] = []  # of J W, [C, 2] as in `state`, for each chunk until `mend`

    # What to leave out.

    def survey(self, hidden: Tensor, target: Tensor) -> None:
        rows, vocabulary = len(hidden), len(self.weight)
        self.rows = rows
        if rows < self.LEAST_ROWS or vocabulary < 64:
            return
        at = torch.arange(self.PILOTS) * rows // self.PILOTS
        hidden, target = hidden[at].to(torch.float32), target[at].long()[:, None]
        self.widest = hidden.new_empty(vocabulary)
        z = hidden.new_empty(len(at), vocabulary)
        threads, instructions = torch.get_num_threads(), compiled.make.instructions
        with torch.no_grad():
            for part, head in self._head():
                z[:, part] = linear(hidden, head)
                _native.widest(head.contiguous(), self.widest[part], threads, instructions)
        if self.bias is not None:
            z.add_(self.bias)
        slope = None
        if self.softcap is not None:
            slope = z.div_(self.softcap).tanh_().square().neg_().add_(1)
        mass = z.mul_(self.inverse).softmax(1)
        finite = mass.sum(1).isfinite()
        if not bool(finite.any()):
            return
        mass = mass[finite]
        target = target[finite]
        jacobian = mass.scatter_add(1, target, -torch.ones_like(target, dtype=mass.dtype))
        if slope is not None:
            jacobian.mul_(slope[finite]), mass.mul_(slope[finite])
        # The likeliest columns and the targets make up most of J W.
        self.heavy = mass.sum(0).topk(min(self.HEAVY, vocabulary)).indices
        most = torch.cat([self.heavy, target[:, 0]]).unique()
        product = jacobian[:, most] @ self.weight[most].to(torch.float32)
        allowed = self.tolerance * float(product.abs().amax()) / self.MARGIN
        mass.scatter_(1, target, 0)
        # Entries in steps of 2^(1/4): number i holds those from 2^(-(i + 1) / 4) to 2^(-i / 4).
        steps = mass.log2().mul_(-4).clamp_(0, self.STEPS - 1).long()
        effect = torch.zeros(len(mass), self.STEPS, dtype=torch.float64)
        effect.scatter_add_(1, steps, mass.mul_(self.widest).double())
        smaller = effect.flip(1).cumsum(1).flip(1).amax(0)
        enough = (smaller <= allowed).nonzero()[:, 0]
        if len(enough):
            step = int(enough[0])
            self.threshold = 2 ** (-step / 4)
            self.listing = float((steps < step).float().mean()) <= self.DENSE_SHARE

    # The forward pass.

    def keep(self, hidden: Tensor, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if not self.listing:
            return super().keep(hidden, target, z)
        lists = self._lists(z, len(hidden))
        logprob, state = self._listed(hidden, target, lists)
        count = lists.count
        full = (count < 0).nonzero()[:, 0]
        if len(full):
            self._fill(hidden[full], target[full], state[full], full, z)
        # The pilots may have been unlike the others.
        share = float(count.where(count >= 0, len(self.weight)).float().mean()) / len(self.weight)
        self.listing = share <= 2 * self.DENSE_SHARE
        return logprob, torch.cat([state, count.float()[:, None]], 1)

    def product(self, hidden: Tensor, target: Tensor, out: Tensor) -> Tensor:
        if not self.listing:
            self.errors.append(hidden.new_zeros(len(hidden), 2, dtype=torch.float32))
            return super().product(hidden, target, out)
        if self.scratch_lists is None or len(self.scratch_lists) < len(hidden):
            self.scratch_lists = hidden.new_empty(len(hidden), 2 * self.room, dtype=torch.float32)
        lists = self._lists(self.scratch_lists, len(hidden))
        logprob, state = self._listed(hidden, target, lists)
        self.errors.append(state[:, 3:])
        out.copy_(self._gathered_rows(lists, torch.ones(len(hidden))))
        self._replace_by_full(hidden, target, out, (lists.count < 0).nonzero()[:, 0])
        return logprob

    def _replace_by_full(self, hidden: Tensor, target: Tensor, product: Tensor, at: Tensor) -> None:
        """Makes the rows `at` of J W again, with all entries."""
        for some in at.split(max(1, self.chunk)) if len(at) else ():
            rows = product.new_empty(len(some), product.shape[1])
            super().product(hidden[some], target[some], rows)
            product.index_copy_(0, some, rows)

    def _fill(self, hidden: Tensor, target: Tensor, state: Tensor, at: Tensor, z: Tensor) -> None:
        """Sets the rows `at` of z to J."""
        for tile, columns, _, jacobian in self._jacobian(hidden, target, state, torch.ones(len(at))):
            z[at[tile], columns] = jacobian

    def _jacobian(
        self, hidden: Tensor, target: Tensor, state: Tensor, factor: Tensor
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yields rows, columns, the head's rows at these, and J there, times the factors of rows."""
        hidden, target = hidden.to(torch.float32), target.long().contiguous()
        state = state[:, : NativeRows.STATE].contiguous()
        for part, head in self._head():
            columns = slice(part.start, part.start + len(head))
            for tile in self._row_tiles(len(hidden)):
                logits = times_transposed(hidden[tile], head)
                if self.bias is not None:
                    logits.add_(self.bias[columns])
                slope = None
                if self.softcap is not None:
                    slope = logits.div_(self.softcap).tanh_().square().neg_().add_(1)
                jacobian = torch.empty_like(logits)
                _native.jacobian(
                    logits,
                    target[tile],
                    columns.start,
                    self.inverse,
                    state[tile],
                    factor[tile],
                    jacobian,
                    torch.get_num_threads(),
                    compiled.make.instructions,
                )
                yield tile, columns, head, jacobian if slope is None else jacobian.mul_(slope)

    def mend(self, hidden: Tensor, target: Tensor, product: Tensor, row_factor: Tensor) -> list[LeftOut]:
        errors, self.errors = torch.cat(self.errors), []
        used, size = row_factor != 0, row_factor.abs().float()
        mass = float(errors[:, 0][used].sum()) * self.temperature
        error = torch.where(used, size * errors[:, 1], 0)
        if not bool(error.any()):
            return []
        most = [part.abs().amax(1).float() for part in product.split(max(1, self.chunk))]
        good, largest = self.within(torch.cat(most).mul_(size), error)
        if not bool(good.all()):
            self._replace_by_full(hidden, target, product, (~good).nonzero()[:, 0])
            error = error.where(good, 0)
        return [LeftOut(mass, int(used.sum()), float(error.amax()), largest)]

    def _lists(self, z: Tensor, rows: int) -> Lists:
        z = z[:rows]
        column = z.view(torch.int32)[:, self.room : 2 * self.room]
        return Lists(z[:, : self.room], column, torch.zeros(rows, dtype=torch.int32))

    def _listed(self, hidden: Tensor, target: Tensor, lists: Lists) -> tuple[Tensor, Tensor]:
        """Returns log p [C] and state [C, 5], and fills the lists."""
        rows, given = len(hidden), hidden
        pairs = takes_pairs(given, self.weight)
        hidden, target = hidden.to(torch.float32), target.long().contiguous()
        largest, target_z, logprob, scale = hidden.new_full((4, rows), -torch.inf).unbind()
        others, left = torch.zeros(rows, dtype=torch.float64), hidden.new_zeros(rows, 2)
        early, base = self._early(hidden, target), []
        threads, instructions = torch.get_num_threads(), compiled.make.instructions
        tiles = hidden.new_empty(1 + (self.softcap is not None), min(rows, self.tile_rows) * self.columns)
        for part in chunks(0, len(self.weight), self.columns):
            narrow = self.weight[part]
            head = None if pairs else narrow.to(torch.float32)
            for tile in self._row_tiles(rows):
                h = hidden[tile]
                out = shaped(tiles[0], (len(h), len(narrow)))
                if pairs:
                    logits = in_float32(given[tile], narrow, out=out)
                else:
                    logits = times_transposed(h, head, out=out)
                if self.bias is not None:
                    logits.add_(self.bias[part])
                slope = None
                if self.softcap is not None:
                    logits.div_(self.softcap).tanh_()
                    slope = torch.mul(logits, logits, out=shaped(tiles[1], logits.shape)).neg_().add_(1)
                # A block stays in the second cache between the two.
                for block in chunks(0, len(h), self.BLOCK_ROWS):
                    here = slice(tile.start + block.start, tile.start + block.stop)
                    z, sums = logits[block], (largest[here], others[here])
                    # It takes `left` to the new largest, as it would a product with the head.
                    _native.accumulate(
                        z,
                        target[here],
                        part.start,
                        self.inverse,
                        *sums,
                        target_z[here],
                        left[here],
                        threads,
                        instructions,
                    )
                    if slope is not None:
                        z.mul_(slope[block])
                    _native.collect(
                        z,
                        part.start,
                        self.inverse,
                        self.threshold,
                        *sums,
                        early[here],
                        self.widest[part],
                        *(x[here] for x in lists),
                        left[here],
                        threads,
                        instructions,
                    )
            base.append(largest.clone())
        state = hidden.new_empty(rows, 3)
        _native.finish(self.inverse, 1 / self.temperature, largest, others, target_z, logprob, state, scale)
        full = state
        if self.softcap is not None:
            full = state * torch.stack([torch.ones(rows), torch.ones(rows), 1 - target_z * target_z], 1)
        _native.settle(
            self.inverse,
            self.threshold,
            torch.stack(base),
            self.columns,
            largest,
            others,
            target_z,
            scale,
            target,
            full,
            self.widest,
            *lists,
            left,
            threads,
        )
        return logprob, torch.cat([state, left], 1)

    def _early(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Returns x [C] so that a row's mass is at least exp(x inverse): that of its target, or of the
        columns that were heavy for the pilots."""
        own = self.weight[target].to(torch.float32).mul_(hidden).sum(1)
        heavy = times_transposed(hidden, self.weight[self.heavy].to(torch.float32))
        if self.bias is not None:
            own, heavy = own + self.bias[target], heavy.add_(self.bias[self.heavy])
        if self.softcap is not None:
            own, heavy = (torch.tanh(z / self.softcap) for z in (own, heavy))
        # Rounding must not put it above the mass.
        return torch.maximum(own, heavy.mul_(self.inverse).logsumexp(1) / self.inverse) - 1e-3 / self.inverse

    # The gradients.

    def add_gradients(self, kept: Kept, row_factor: Tensor, unit: Tensor | None, sums: Sums) -> list[LeftOut]:
        z, state, target, hidden = kept
        if state.shape[1] == NativeRows.STATE:
            return super().add_gradients(kept, row_factor, unit, sums)
        lists = self._lists(z, len(z))._replace(count=state[:, 5].to(torch.int32))
        factor = (row_factor if unit is None else row_factor / unit).float().contiguous()
        hidden, used = hidden.to(torch.float32).contiguous(), factor != 0
        kept = kept._replace(hidden=hidden, target=target.long().contiguous())
        full = ((lists.count < 0) & used).nonzero()[:, 0]
        mass = float(state[:, 3][used].sum()) * self.temperature
        left = LeftOut(mass=mass, rows=int(used.sum()))
        if sums.d_hidden is not None:
            d_hidden = self._gathered_rows(lists, factor)
            if len(full):
                rows = torch.zeros(len(full), d_hidden.shape[1])
                for part, head in self._head():
                    add_product(rows, z[full, part], head, part.start == 0)
                d_hidden.index_copy_(0, full, rows)
            d_hidden.mul_(factor[:, None])
            error = torch.where(used, factor.abs() * state[:, 4], 0)
            good, largest = self.within(d_hidden.abs().amax(1), error)
            if not bool(good.all()):
                self._complete((~good).nonzero()[:, 0], kept, lists, factor, sums._replace(d_hidden=d_hidden))
                error = error.where(good, 0)
            left = left._replace(hidden_error=float(error.amax()), hidden_size=largest)
            sums.d_hidden.copy_(d_hidden if unit is None else d_hidden.mul_(unit))
        if sums.d_weight is not None or sums.d_bias is not None:
            left = self._add_to_head(kept, lists, full, factor, sums, left)
        return [left]

    def within(self, most: Tensor, error: Tensor) -> tuple[Tensor, float]:
        """Tells which rows' errors [C] are within the tolerance, and how large dH is at least.

        most [C]: the largest element of each row of dH, as far as it is known.
        """
        largest = max(0.0, float((most - error).nan_to_num(0.0, 0.0, 0.0).amax()))
        return (error <= self.tolerance * largest) | (error == 0), largest

    def _gathered_rows(self, lists: Lists, factor: Tensor) -> Tensor:
        """Returns J W [C, D] of the lists; 0 where a row's factor is."""
        rows = len(lists.count)
        out, cursor = self.weight.new_empty(rows, self.weight.shape[1], dtype=torch.float32), lists.count * 0
        whole = self.weight.dtype == torch.float32 and self.weight.is_contiguous()
        for part, head in [(slice(0, None), self.weight)] if whole else self._head():
            _native.gather_rows(
                head.contiguous(),
                part.start,
                *lists,
                cursor,
                factor,
                part.start > 0,
                out,
                torch.get_num_threads(),
                compiled.make.instructions,
            )
        return out

    def _add_to_head(
        self, kept: Kept, lists: Lists, full: Tensor, factor: Tensor, sums: Sums, left: LeftOut
    ) -> LeftOut:
        """Adds to dW and the bias's gradient."""
        z, state, target, hidden = kept
        unused = (factor == 0)[:, None]
        used_hidden, size = hidden.masked_fill(unused, 0), factor.abs()
        # The columns of frequent targets say how large the gradients are at least.
        score = torch.bincount(target, (size * state[:, 2].abs()).nan_to_num(0.0), minlength=len(self.weight))
        wanted = score.topk(min(16, len(score))).indices
        found = hidden.new_empty(len(hidden), len(wanted))
        _native.listed(*lists, wanted, found)
        if len(full):
            found[full] = z[full[:, None], wanted]
        found = found.mul_(factor[:, None]).masked_fill_(unused, 0).t().contiguous()
        # An entry that no list has is at most tau, but for the rounding of what it was compared with.
        tau = 1.01 * self.threshold / self.temperature
        listed = size.masked_fill(lists.count < 0, 0)
        weight_size = bias_size = 0.0
        relative = []
        if sums.d_weight is not None:
            effect = listed * used_hidden.abs().amax(1)
            weight_size = float(self._sums(used_hidden, found).abs().amax()) - tau * total_of(effect)
            relative.append(effect / max(weight_size, 1e-30))
        if sums.d_bias is not None:
            bias_size = float(found.double().sum(1).abs().amax()) - tau * total_of(listed)
            relative.append(listed / max(bias_size, 1e-30))
        weight = torch.stack(relative).amax(0)
        weights = total_of(weight)
        unlisted = tau * weights
        # What chunks leave out adds up, so each has its share.
        allowed = self.tolerance * len(hidden) / self.rows - unlisted
        # NaN is not enough either.
        enough = allowed > 0 or unlisted == 0
        # At first entries are left out as if few of them met in one column.
        least = 16 * allowed / weights if allowed > 0 and unlisted > 0 else 0.0
        largest = _native.gather_columns(
            hidden,
            *lists,
            z,
            full,
            factor,
            weight.nan_to_num(0.0),
            least,
            max(allowed, 0.0) if enough else 0.0,
            not sums.empty,
            sums.d_weight,
            sums.d_bias,
            torch.get_num_threads(),
            compiled.make.instructions,
        )
        if not enough:
            rest = ((factor != 0) & (lists.count >= 0)).nonzero()[:, 0]
            self._complete(rest, kept, lists, factor, sums._replace(d_hidden=None))
            return left
        bound = unlisted + largest
        return left._replace(
            weight_error=bound * weight_size,
            weight_size=weight_size,
            bias_error=bound * bias_size,
            bias_size=bias_size,
        )

    def _sums(self, hidden: Tensor, factors: Tensor) -> Tensor:
        """Returns factors [K, C] times hidden [C, D], whose bits no number of threads changes."""
        count, rows = factors.shape
        columns = torch.arange(rows, dtype=torch.int32).expand(count, rows).contiguous()
        counts = torch.full((count,), rows, dtype=torch.int32)
        out = hidden.new_empty(count, hidden.shape[1])
        _native.gather_rows(
            hidden,
            0,
            factors,
            columns,
            counts,
            torch.zeros_like(counts),
            torch.ones(count),
            False,
            out,
            torch.get_num_threads(),
            compiled.make.instructions,
        )
        return out

    def _complete(self, at: Tensor, kept: Kept, lists: Lists, factor: Tensor, sums: Sums) -> None:
        """Adds what the lists of rows `at` lack to d_hidden where it is given, else to dW and the bias's."""
        hidden = kept.hidden[at]
        d_hidden = None if sums.d_hidden is None else sums.d_hidden[at]
        for tile, columns, head, jacobian in self._jacobian(
            hidden, kept.target[at], kept.state[at], factor[at]
        ):
            _native.strike(*lists, at[tile], columns.start, jacobian)
            if d_hidden is not None:
                add_product(d_hidden[tile], jacobian, head, False)
                continue
            if sums.d_weight is not None:
                sums.d_weight[columns].addmm_(jacobian.t(), hidden[tile])
            if sums.d_bias is not None:
                sums.d_bias[columns].add_(jacobian.sum(0))
        if d_hidden is not None:
            sums.d_hidden.index_copy_(0, at, d_hidden)


def total_of(x: Tensor) -> float:
    """Returns the sum of a vector, whose bits hardly depend on the number of threads."""
    return float(x.double().sum())
