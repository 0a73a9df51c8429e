"""Sums of log-probs per sequence, sums per group, and numbers of sequences spread over their rows."""

import torch
from torch import Tensor


def sequence_sum(token_logprob: Tensor, token_weight: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Returns the weighted sum of token log-probs per sequence [N], added in float64 in a fixed order.

    Rows of weight 0 add nothing, even -inf or NaN.
    """
    device = token_logprob.device
    terms = token_logprob.double()
    if token_weight is not None:
        weight = token_weight.detach().to(device, torch.float64, non_blocking=True)
        terms = torch.where(weight == 0, 0, terms) * weight
    # unsafe=True, because the offsets are checked already where the host may read them.
    total = torch.segment_reduce(terms, "sum", offsets=cu_seqlens.to(device, non_blocking=True), unsafe=True)
    return total.to(token_logprob.dtype)


def row_coefficients(
    per_sequence: Tensor, cu_seqlens: Tensor, token_weight: Tensor | None, rows: int
) -> Tensor:
    """Spreads numbers per sequence over their rows [T], times the row's weight; exactly 0 where that is 0."""
    device = per_sequence.device
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    spread = torch.repeat_interleave(per_sequence, lengths, output_size=rows)
    if token_weight is None:
        return spread
    weight = token_weight.to(device, spread.dtype, non_blocking=True)
    return torch.where(weight == 0, 0, spread * weight)


class Groups:
    """Sequences sorted by their group, where sums have a fixed order and the host reads nothing."""

    def __init__(self, group: Tensor, device: torch.device) -> None:
        value, self.order = group.to(device, non_blocking=True).sort(stable=True)
        # The group of the sorted entry i begins at first[i] and ends before stop[i]. Segment i holds the
        # group where i is its first entry, and nothing elsewhere.
        self.first = torch.searchsorted(value, value)
        stop = torch.searchsorted(value, value, right=True)
        place = torch.arange(len(value), device=device)
        begins = self.first == place
        self.offsets = place.new_zeros(1)
        if len(value):
            self.offsets = torch.cat(
                [torch.where(begins, place, stop), torch.full_like(place[:1], len(value))]
            )
        self.size = (stop - self.first).double()  # [N], sorted
        self.count = begins.sum()

    def total(self, x: Tensor) -> Tensor:
        """Returns the sum of its group for each of x [N]; both sorted."""
        return torch.segment_reduce(x, "sum", offsets=self.offsets, unsafe=True, initial=0.0)[self.first]

    def back(self, x: Tensor) -> Tensor:
        """Returns sorted numbers [N] in the order of the sequences."""
        return torch.empty_like(x).index_copy_(0, self.order, x)

    def log_softmax(self, x: Tensor) -> Tensor:
        """Returns log softmax within each group, of x [N] in the order of the sequences."""
        x = x[self.order]
        largest = torch.segment_reduce(x, "max", offsets=self.offsets, unsafe=True, initial=-torch.inf)
        x = x - largest[self.first]
        return self.back(x - self.total(x.exp()).log())
