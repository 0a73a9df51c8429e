"""The base of everything that is trained."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.model.parallel import rows_here
from engine.run.shards import Stored, read_into


class PolicyWeights(nn.Module):
    """The trained weights of a policy, read and set by name."""

    def tensors(self) -> dict[str, Tensor]:
        """Copies all parameters, detached, by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    def set_tensors(self, tensors: Mapping[str, Tensor | Stored]) -> None:
        """Takes over the values that `tensors` of an equal module returned, also where they have been stored,
        or its ranks were more or fewer."""
        read_into(dict(self.named_parameters()), tensors)

    @torch.no_grad()
    def take_back(self, untrained: dict[str, Tensor], share: float) -> None:
        """Leaves each parameter a share of its way from those of the reference, `tensors` before training."""
        for name, value in self.named_parameters():
            rows_here(value).copy_(torch.lerp(rows_here(untrained[name]), rows_here(value), share))
