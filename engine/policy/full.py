"""Full fine-tuning: a policy that trains all weights of the model, embedding and head included."""

import torch
from torch import nn

from engine.model.decoder import Decoder
from engine.policy.parameters import PolicyWeights


class FullWeights(PolicyWeights):
    """Trainable copies of all weights of a decoder.

    They are float32 unless the model is float64: 16-bit weights would lose most of a step.

    It stands wherever an `engine.policy.lora.Adapter` may stand; `engine.policy.weights.policy_of` gives the
    decoder that computes with these weights in the model's dtype.
    """

    def __init__(self, network: Decoder) -> None:
        super().__init__()
        master = torch.float64 if network.dtype == torch.float64 else torch.float32
        self.compute_dtype = network.dtype
        # Parameters take no dots in their names. A ParameterDict sorts the names of a dict, which is
        # the order in which the norms of gradients are added up.
        trained = {
            name.replace(".", "|"): nn.Parameter(value.detach().to(master, copy=True))
            for name, value in network.named_parameters()
        }
        self.masters = nn.ParameterDict(trained)
        shell = Decoder(network.config, network.raw_config, network.dtype, torch.device("meta"))
        shell.inverse_frequency = network.inverse_frequency
        # A list hides the shell from nn.Module, which would count its weights as parameters too.
        self._shell = [shell]

    def decoder(self) -> Decoder:
        """Returns the decoder with these weights; its gradients reach the trained copies."""
        (shell,) = self._shell
        for name, value in self.masters.items():
            *path, leaf = name.split("|")
            # The setter of nn.Module takes no weight that is computed from another, so this goes past it.
            shell.get_submodule(".".join(path))._parameters[leaf] = value.to(self.compute_dtype)
        return shell
