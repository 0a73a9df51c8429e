"""The reference's states of sampled responses, taken while they are sampled."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.packing import Group, LowerStates


@dataclass
class States:
    """The reference's states of sampled responses, taken while they are sampled.

    Adapters sit above these layers, so that the policy's states there are the reference's,
    and heads need no forward of their own.
    """

    layers: list[int]  # to pool for heads
    lower: LowerStates | None  # keeps the states below its layer
    # layer -> mean states of each response, float32 [R, D]
    pooled: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def kept(layer: int, states_MD: Tensor, groups: list[Group]) -> "States":
        """Pools states [M, D] before a layer that were kept in the order of these packed groups.

        The sums run over a response's tokens in their order, as those of `Collector` do, so that the means
        are bitwise those that are taken while sampling.
        """
        lengths = [len(response) for group in groups for response in group.responses]
        starts, base = [], 0
        for group in groups:
            base += len(group.prompt)
            for response in group.responses:
                starts.append(base)
                base += len(response)
        length_R, start_R = torch.tensor(lengths), torch.tensor(starts)
        total_RD = torch.zeros(len(lengths), states_MD.shape[1])
        for step in range(max(lengths)):
            row = (length_R > step).nonzero()[:, 0]
            total_RD[row] += states_MD[start_R[row] + step].float()
        return States([layer], None, {layer: total_RD / length_R[:, None].clamp(min=1)})

    @property
    def top(self) -> int:
        """The highest layer whose input is wanted."""
        return max([*self.layers, *([self.lower.layer] if self.lower else [])])


class Collector:
    """Takes the states of a batch of prompts and responses, step by step, without waiting for the device."""

    def __init__(
        self,
        states: States,
        first_row: int,
        batch: list[list[int]],
        n: int,
        max_new_tokens: int,
        model: Decoder,
    ) -> None:
        self.states, self.first_row, self.n = states, first_row, n
        self.lengths = [len(prompt) for prompt in batch]
        rows, hidden = len(batch) * n, model.config.hidden_size
        self.sums = {layer: torch.zeros(rows, hidden, device=model.device) for layer in states.layers}
        self.kept = None
        if states.lower is not None:
            self.kept = torch.empty(rows, max_new_tokens, hidden, dtype=model.dtype, device=model.device)
        self.prompts: tuple[Tensor, ...] = ()

    def take_prompts(self, layer: int, states: Tensor) -> None:
        """Takes the prompts' states [M, D] before a layer; a tap of the pass over the prompts."""
        if self.kept is not None and layer == self.states.lower.layer:
            self.prompts = states.split(self.lengths)

    def take(self, row: Tensor, step: Tensor, counts: Tensor, layer: int, states: Tensor) -> None:
        """Takes the states [rows side by side, D] of response token `step` (int64 [1]) before a layer.

        row: the rows' places in the batch, int64; counts: false for those that ended before, bool. With these
        a tap of a decoding step.
        """
        if layer in self.sums:
            self.sums[layer].index_add_(0, row, torch.where(counts[:, None], states.float(), 0.0))
        if self.kept is not None and layer == self.states.lower.layer:
            self.kept[row, step] = states

    def finish(self, length: Tensor) -> None:
        """Pools the batch's states and hands them over; length: int64 [rows]."""
        pooled = self.states.pooled
        for layer, total in self.sums.items():
            mean = (total / length.to(total.device)[:, None].clamp(min=1)).cpu()
            pooled[layer] = torch.cat([pooled[layer], mean]) if layer in pooled else mean
        if self.kept is not None:
            for i, size in enumerate(length.tolist()):
                self.states.lower.prompt[self.first_row + i] = self.prompts[i // self.n]
                self.states.lower.response[self.first_row + i] = self.kept[i, :size].clone()
