"""Full fine-tuning: a policy whose weights are all its own, embedding and head included."""

import torch
from torch import nn

from engine.model.decoder import Decoder
from engine.policy.parameters import PolicyWeights


class FullWeights(PolicyWeights):
    """Trainable copies of all weights of a decoder, float32 unless the model is float64: 16-bit weights would lose most of a step.

    Stands where an `engine.policy.lora.Adapter` may stand; `policy_of` gives the decoder that computes with these weights in the
    model's dtype.
    """

    def __init__(self, network: Decoder) -> None:
        super().__init__()
        master = torch.float64 if network.dtype == torch.float64 else torch.float32
        self.compute_dtype = network.dtype
        self.masters = nn.ParameterDict({
            name.replace(".", "|"): nn.Parameter(value.detach().to(master, copy=True)) for name, value in network.named_parameters()
        })  # fmt: skip
        shell = Decoder(network.config, network.raw_config, network.dtype, torch.device("meta"))
        shell.inverse_frequency = network.inverse_frequency
        # In a list, so that its weights are no second set of parameters.
        self._shell = [shell]

    def decoder(self) -> Decoder:
        """The decoder; its gradients go to the float32 weights."""
        (shell,) = self._shell
        for name, value in self.masters.items():
            *path, leaf = name.split("|")
            # Past nn.Module's own setter, which takes no weight that is computed from another.
            shell.get_submodule(".".join(path))._parameters[leaf] = value.to(self.compute_dtype)
        return shell
