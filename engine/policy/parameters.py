"""The base of everything that is trained."""

import torch
from torch import Tensor, nn

from engine.model.parallel import rows_here


class PolicyWeights(nn.Module):
    """The trained weights of a policy, read and set by name."""

    def tensors(self) -> dict[str, Tensor]:
        """Copies all parameters, detached, by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    @torch.no_grad()
    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the values that `tensors` of an equal module returned."""
        for name, value in self.named_parameters():
            value.copy_(tensors[name])

    @torch.no_grad()
    def take_back(self, untrained: dict[str, Tensor], share: float) -> None:
        """Leaves each parameter a share of its way from those of the reference, `tensors` before training."""
        for name, value in self.named_parameters():
            rows_here(value).copy_(torch.lerp(rows_here(untrained[name]), rows_here(value), share))
