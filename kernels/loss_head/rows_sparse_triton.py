"""Gradients from the entries of J that matter, on a GPU. `kernels.loss_head.rows_sparse` has the mathematics
and the bounds; here lists are made of whole logits, by one program a row.

The host waits for the device once a call, to choose by a few rows done in full, the pilots, and once a chunk,
to read how many entries there are and what they leave out. Where there are too many, or too much is left out
of dW, the chunk's J is made of the logits that still stand, as `kernels.loss_head.rows_triton` does, and the
chunks after it keep to that. Single rows whose list has no room, or lacks too much, are done in full beside
the others. With a frozen head the host waits once more, when the factors of rows are known.
"""

import torch
from torch import Tensor

from kernels.gather import sums_of_places
from kernels.loss_head import lists_triton
from kernels.loss_head.lists_triton import Lists
from kernels.loss_head.records import Head, LeftOut
from kernels.loss_head.rows import Kept, Sizes, Sums
from kernels.loss_head.rows_sparse import SparseRows
from kernels.loss_head.rows_triton import TritonRows


class SparseTritonRows(TritonRows):
    """A workspace that gathers gradients from lists of entries where `survey` finds that this pays.

    Lists stand beside z, and last until the next call of `keep` or `product`. A chunk that is listed has
    state [C, 3]: log p, and of what is left out the sums of |J| and |J_tv| max|W_v|.
    """

    LEAST_ROWS = 1024  # below that the pilots cost more than lists save
    PILOTS = 16
    # Above this share of entries dense rows are faster: the time that a row's two products take reads so many
    # rows of the head and of the states, by the rates in LOG.md. By bytes of a number.
    DENSE_SHARE = {2: 1 / 256, 4: 1 / 48}
    # A list has room for so many times that.
    ROOM = 4
    # A row that is done in full has its product with the head made twice.
    FULL_SHARE = 1 / 4
    # So many rows, and columns of frequent targets, say how large dH and dW are at least.
    LARGEST, FREQUENT = 16, 64
    # Coefficients of both signs cancel in dW, so that it is about so many times smaller than without them.
    OPPOSITE = 4
    # What 16 bits and TF32 may take off a product of some rows.
    ROUNDED = 0.95
    # Bytes of an entry in lists, packed, and by columns, with the sort between them.
    ENTRY, PACKED = 8, 64

    @classmethod
    def sizes(cls, head: Head, rows: int, budget: int, kind: str) -> Sizes:
        sizes = super().sizes(head, rows, budget, kind)
        if kind == "values":
            return sizes
        vocabulary = len(head.weight)
        # The head's largest elements, the ends of columns, and 8 numbers for each logit of a pilot.
        fixed = 4 * vocabulary * (5 + max(8 * cls.PILOTS, 2 * cls.LARGEST))
        row = cls.ENTRY * cls.room(head.weight) + int(cls.PACKED * cls._most(head.weight)) + 16 * cls.FREQUENT
        return sizes._replace(fixed=sizes.fixed + fixed, scratch=sizes.scratch + row)

    @classmethod
    def _most(cls, weight: Tensor) -> float:
        """Returns the entries a row, on average, from which on dense rows are faster."""
        return cls.DENSE_SHARE[weight.dtype.itemsize] * len(weight)

    @classmethod
    def room(cls, weight: Tensor) -> int:
        """Returns the entries of a list, a multiple of 16."""
        return -(-int(cls.ROOM * cls._most(weight)) // 16) * 16

    def __init__(self, head: Head, sizes: Sizes, rows: int, kind: str) -> None:
        super().__init__(head, sizes, rows, kind)
        self.head, self.chunk, self.frozen = head, rows, kind == "product"
        self.listing, self.threshold = False, 0.0
        self.one = self.weight.new_ones(1, dtype=torch.float32)
        self.lists: Lists | None = None
        self.errors: list[Tensor] = []  # of J W, [C, 2], for each chunk until `mend`

    # What to leave out.

    def survey(self, hidden: Tensor, target: Tensor) -> None:
        rows, pilots, all_targets = len(hidden), self.PILOTS, target
        self.rows = rows
        if rows < self.LEAST_ROWS or self.chunk < pilots or len(self.weight) < 64:
            return
        at = torch.arange(pilots, device=hidden.device) * rows // pilots
        target, z = target[at].long()[:, None], self.new_z(self.weight, pilots)
        value, slope = self._capped(self._product(hidden[at], z), self.bias)
        mass = value.div_(self.temperature).softmax(1)
        # A row without a log-prob says nothing.
        finite = mass.sum(1, keepdim=True).isfinite()
        mass.masked_fill_(~finite, 0)
        jacobian = mass.scatter(1, target, mass.gather(1, target) - finite.float())
        mass.scatter_(1, target, 0)
        if slope is not None:
            jacobian.mul_(slope), mass.mul_(slope)
        product = torch.empty_like(hidden[at], dtype=torch.float32)
        self._times_weight(jacobian.to(z.dtype), self.one.expand(pilots), product)
        allowed = self.head.tolerance * product.abs().amax() / SparseRows.MARGIN
        low, high = self.weight.aminmax(dim=1)
        self.widest = torch.maximum(high, -low).float()
        effect = mass * self.widest
        # The largest bound 2^(-step/4) that leaves out no more than is allowed, by halves.
        first, last = (torch.full_like(allowed, step) for step in (0, SparseRows.STEPS))
        for _ in range(SparseRows.STEPS.bit_length()):
            step = ((first + last) / 2).floor()
            smaller = torch.where(mass <= torch.exp2(-step / 4), effect, 0).sum(1).amax()
            enough = smaller <= allowed
            first, last = torch.where(enough, first, step + 1), torch.where(enough, step, last)
        bound = torch.where(first < SparseRows.STEPS, torch.exp2(-first / 4), 0)
        if not self.frozen:
            bound = torch.minimum(bound, self._bound_of_head(hidden[: self.chunk], all_targets[: self.chunk]))
        share = (mass > bound).float().mean()
        # The host waits here.
        self.threshold, share = torch.stack([bound, share]).tolist()
        self.listing = self.threshold > 0 and share * len(self.weight) <= self._most(self.weight)
        if self.listing:
            self.lists = Lists.empty(self.chunk, self.room(self.weight), self.weight)

    def _bound_of_head(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Returns the largest bound that dW is likely to allow, whatever the coefficients will be."""
        hidden = hidden.float().nan_to_num(0.0, 0.0, 0.0)
        own = target.long()[:, None] == self._frequent(target.long())
        size = (own.float().t() @ hidden).abs().amax()
        effect = hidden.abs().amax(1).sum()
        allowed = self.head.tolerance * len(hidden) / self.rows
        return allowed * size / (self.OPPOSITE * effect.clamp_min(1e-30))

    def _frequent(self, target: Tensor) -> Tensor:
        """Returns the most frequent columns among targets from 0 to V; V stands for none."""
        ordered, vocabulary = target.sort().values, len(self.weight)
        first, last = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
        begins = torch.arange(len(ordered), device=ordered.device) == first
        often = torch.where(begins & (ordered < vocabulary), last - first, 0)
        most = often.topk(min(self.FREQUENT, len(often))).indices
        return ordered[most].clamp_max(vocabulary - 1)

    def _capped(self, raw: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns logits before the temperature, and the cap's slope where there is one."""
        if bias is not None:
            raw = raw + bias
        if self.softcap is None:
            return raw, None
        share = (raw / self.softcap).tanh()
        return share * self.softcap, 1 - share * share

    # The forward pass.

    def keep(self, hidden: Tensor, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if not self.listing:
            return super().keep(hidden, target, z)
        logprob, left = self._listed(hidden, target, z)
        return logprob, torch.cat([logprob[:, None], left], 1)

    def _listed(self, hidden: Tensor, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Fills the lists, and leaves the logits where `_logits_of` finds them."""
        logits, lists = self._product(hidden, z), self._lists(len(hidden))
        return lists_triton.select(logits, self.head, self.widest, target, self.threshold, lists)

    def _lists(self, rows: int) -> Lists:
        return Lists(*(x[:rows] for x in self.lists))

    def product(self, hidden: Tensor, target: Tensor, out: Tensor) -> Tensor:
        if not self.listing:
            self.errors.append(hidden.new_zeros(len(hidden), 2, dtype=torch.float32))
            return super().product(hidden, target, out)
        z, lists = self.scratch_z[: len(hidden)], self._lists(len(hidden))
        logprob, left = self._listed(hidden, target, z)
        full = lists.count < 0
        ends = _ends(lists.count.clamp_min(0))
        # The host waits here.
        n_full, entries = torch.stack([full.sum(), ends[-1]]).tolist()
        if self._is_dense(n_full, entries, len(hidden)):
            logprob, scale = self._from_logits(self._logits_of(z), target, z, True)
            self._times_weight(z, scale[:, 0], out)
            self.errors.append(torch.zeros_like(left))
            return logprob
        packed = lists_triton.pack(lists, ends, self.one.expand(len(hidden)).contiguous(), entries)
        self._gather(self.weight, packed.column, packed.value, ends, self.one, out, False)
        self.errors.append(left.masked_fill_(full[:, None], 0))
        self._replace_by_full(hidden, target, out, _first(full, n_full))
        return logprob

    def _is_dense(self, n_full: int, entries: int, rows: int) -> bool:
        """Tells whether there are too many entries for lists; then the next chunks have none either."""
        self.listing = n_full <= self.FULL_SHARE * rows and entries <= self._most(self.weight) * rows
        return not self.listing

    def _replace_by_full(self, hidden: Tensor, target: Tensor, product: Tensor, at: Tensor) -> None:
        """Makes the rows `at` of J W again, with all entries."""
        for some in at.split(self.chunk) if len(at) else ():
            rows = product.new_empty(len(some), product.shape[1])
            super().product(hidden[some], target[some], rows)
            product.index_copy_(0, some, rows)

    def mend(self, hidden: Tensor, target: Tensor, product: Tensor, row_factor: Tensor) -> list[LeftOut]:
        errors, self.errors = torch.cat(self.errors), []
        if self.lists is None:
            return []
        used, size = row_factor != 0, row_factor.abs().float()
        error = torch.where(used, size * errors[:, 1], 0)
        low, high = product.aminmax(dim=1)
        largest = (torch.maximum(high, -low).float() * size - error).nan_to_num(0.0, 0.0, 0.0).amax()
        bad = ~(error <= self.head.tolerance * largest.clamp_min(0))
        mass = torch.where(used, errors[:, 0], 0).sum() * self.temperature
        numbers = mass, used.sum(), bad.sum(), error.masked_fill(bad, 0).amax(), largest
        # The host waits here.
        mass, n_used, n_bad, error, largest = torch.stack([x.double() for x in numbers]).tolist()
        self._replace_by_full(hidden, target, product, _first(bad, int(n_bad)))
        return [LeftOut(mass, int(n_used), error, max(0.0, largest))]

    # The gradients.

    def add_gradients(self, kept: Kept, row_factor: Tensor, unit: Tensor | None, sums: Sums) -> list[LeftOut]:
        if kept.state.shape[1] == TritonRows.STATE:
            return super().add_gradients(kept, row_factor, unit, sums)
        z, state, target, hidden = kept
        lists, into_head = self._lists(len(z)), sums.d_weight is not None or sums.d_bias is not None
        factor = (row_factor if unit is None else row_factor / unit).float().contiguous()
        used, size, zero = factor != 0, factor.abs(), factor.new_zeros(())
        error = torch.where(used, size * state[:, 2], 0)
        full = used & ((lists.count < 0) | ~factor.isfinite())
        hidden_size = weight_size = bias_size = zero
        if sums.d_hidden is not None:
            hidden_size = self._size_of_d_hidden(kept, lists, factor)
            full |= ~(error <= self.head.tolerance * hidden_size)
        if into_head:
            weight_size, bias_size = self._sizes_of_head(kept, factor)
        listed = used & ~full
        ends = _ends(torch.where(listed, lists.count, 0))
        low, high = hidden.aminmax(dim=1)
        # An entry that is on no list is at most this, but for the rounding of what it was compared with.
        tau = 1.01 * self.threshold / self.temperature
        size = torch.where(listed, size, 0)
        effect = torch.where(listed, size * torch.maximum(high, -low), 0)
        numbers = (
            full.sum(),
            ends[-1],
            used.sum(),
            torch.where(listed, state[:, 1], 0).sum(dtype=torch.float64) * self.temperature,
            torch.where(listed, error, 0).amax(),
            hidden_size,
            tau * effect.sum(dtype=torch.float64),
            weight_size,
            tau * size.sum(dtype=torch.float64),
            bias_size,
        )
        # The host waits here.
        n_full, entries, n_used, mass, *bounds = torch.stack([x.double() for x in numbers]).tolist()
        n_full, entries = int(n_full), int(entries)
        # What chunks leave out adds up, so each has its share.
        allowed = self.head.tolerance * len(hidden) / self.rows
        of_head = ((sums.d_weight, bounds[2:4]), (sums.d_bias, bounds[4:]))
        # NaN is not enough either.
        enough = all(x is None or off <= allowed * size for x, (off, size) in of_head)
        if self._is_dense(n_full, entries, len(hidden)) or not enough:
            self.listing = False
            scale = self._from_logits(self._logits_of(z), target, z, True)[1]
            return super().add_gradients(kept._replace(state=scale), row_factor, unit, sums)
        at = _first(full, n_full)
        rest = self._add_full(kept, at, row_factor, unit, sums) if n_full else None
        # Where rows were done in full dW is rounded twice.
        sums_after = sums._replace(empty=sums.empty and not n_full)
        self._add_lists(lists_triton.pack(lists, ends, factor, entries), hidden, unit, sums_after)
        if rest is not None:
            sums.d_hidden.index_copy_(0, at, rest)
        sizes = [x if wanted else 0.0 for wanted, x in zip(self._wanted(sums), bounds, strict=True)]
        return [LeftOut(mass, int(n_used), *sizes)]

    def _add_lists(
        self, packed: lists_triton.Packed, hidden: Tensor, unit: Tensor | None, sums: Sums
    ) -> None:
        """Adds what the lists have to the gradients."""
        if sums.d_hidden is not None:
            scale = self.one if unit is None else self.one * unit  # which may be on the CPU
            self._gather(self.weight, packed.column, packed.value, packed.ends, scale, sums.d_hidden, False)
        if sums.d_weight is None and sums.d_bias is None:
            return
        columns, order = lists_triton.by_column(packed, len(self.weight))
        if sums.d_weight is not None:
            add = not sums.empty
            self._gather(hidden, columns.row, columns.value, columns.ends, self.one, sums.d_weight, add)
        if sums.d_bias is not None:
            sums.d_bias.add_(sums_of_places(packed.value[:, None], order, columns.ends)[:, 0])

    @staticmethod
    def _wanted(sums: Sums) -> list[bool]:
        """Tells of each number of a `LeftOut` behind its rows whether its gradient is wanted."""
        return [x is not None for x in (sums.d_hidden, sums.d_weight, sums.d_bias) for _ in range(2)]

    def _gather(self, source: Tensor, *rest) -> None:
        lists_triton.gather(source if source.stride(1) == 1 else source.contiguous(), *rest)

    def _add_full(
        self, kept: Kept, at: Tensor, row_factor: Tensor, unit: Tensor | None, sums: Sums
    ) -> Tensor | None:
        """Adds the rows `at` to dW and the bias's gradient in full; returns their dH where it is wanted."""
        hidden, target, z = kept.hidden[at], kept.target[at], kept.z[: len(at)]
        scale = self._logprob(hidden, target, z, True)[1]
        rest = None if sums.d_hidden is None else torch.empty_like(hidden)
        sums = sums._replace(d_hidden=rest)
        super().add_gradients(Kept(z, scale, target, hidden), row_factor[at], unit, sums)
        return rest

    def _size_of_d_hidden(self, kept: Kept, lists: Lists, factor: Tensor) -> Tensor:
        """Returns how large dH is at least, by the rows whose targets' entries are the largest."""
        # The first entry of a list is the target's, also where the list has no room for others.
        score = (factor * lists.value[:, 0]).abs().nan_to_num(0.0, 0.0, 0.0)
        at = score.topk(min(self.LARGEST, len(score))).indices
        logits = (kept.z if self.logits is None else self.logits)[at]
        z = logits if self.logits is None else self.new_z(self.weight, len(at))
        scale = self._from_logits(logits[:, : len(self.weight)], kept.target[at], z, True)[1]
        product = torch.empty(len(at), self.weight.shape[1], dtype=torch.float32, device=z.device)
        self._times_weight(z, scale[:, 0] * factor[at], product)
        return self.ROUNDED * product.abs().nan_to_num(0.0, 0.0, 0.0).amax()

    def _sizes_of_head(self, kept: Kept, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how large dW and the bias's gradient are at least, by the columns of frequent targets."""
        z, state, target, hidden = kept
        logits, used = self._logits_of(z), factor != 0
        wanted = self._frequent(torch.where(used, target.long(), len(self.weight)))
        own = target.long()[:, None]
        bias, bias_y = (None, None) if self.bias is None else (self.bias[wanted], self.bias[own])
        value, slope = self._capped(logits[:, wanted], bias)
        value_y, _ = self._capped(logits.gather(1, own), bias_y)
        jacobian = ((value - value_y) / self.temperature + state[:, :1]).exp() - (own == wanted).float()
        if slope is not None:
            jacobian = jacobian * slope
        unused = ~used[:, None]
        entries = (jacobian / self.temperature * factor[:, None]).masked_fill_(unused, 0).t()
        columns = entries @ hidden.masked_fill(unused, 0).float()
        sizes = columns.abs().amax(), entries.sum(1, dtype=torch.float64).abs().amax()
        return self.ROUNDED * sizes[0], self.ROUNDED * sizes[1]


def _ends(count: Tensor) -> Tensor:
    """Returns where the entries of rows end, int64 [C + 1], from their counts."""
    return torch.cat([count.new_zeros(1, dtype=torch.int64), count.cumsum(0)])


def _first(chosen: Tensor, count: int) -> Tensor:
    """Returns the numbers of the rows that are chosen, `count` in all, without asking the device for it."""
    return (~chosen).to(torch.uint8).argsort(stable=True)[:count]
