"""The base of everything that is trained."""

import torch
from torch import Tensor, nn


class PolicyWeights(nn.Module):
    """What is trained of a policy."""

    def tensors(self) -> dict[str, Tensor]:
        """Detached copies of all parameters, by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    @torch.no_grad()
    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` of an equal module returned."""
        for name, value in self.named_parameters():
            value.copy_(tensors[name])
