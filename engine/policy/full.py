"""Full fine-tuning: a policy that trains all weights of the model, embedding and head included."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

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
        self._versions: list[int] = []  # of the trained copies that the shell's weights were rounded from

    def decoder(self) -> Decoder:
        """Returns the decoder with these weights; its gradients reach the trained copies.

        They are rounded to the model's dtype once, until the trained copies change.
        """
        (shell,) = self._shell
        versions = [value._version for value in self.masters.values()]
        if versions != self._versions:
            for name, value in self.masters.items():
                *path, leaf = name.split("|")
                # The setter of nn.Module takes no weight that is computed from another, so this goes past it.
                shell.get_submodule(".".join(path))._parameters[leaf] = rounded(value, self.compute_dtype)
            self._versions = versions
        return shell


def _count_change(optimizer: Optimizer, *unused: object) -> None:
    for group in optimizer.param_groups:
        increment_version(group["params"])


# Fused optimizers change weights without counting it, by which `FullWeights.decoder` knows.
register_optimizer_step_post_hook(_count_change)


def rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in `dtype`, itself where it has that already; a gradient in it is added to the trained
    one's in that one's dtype."""
    if master.dtype == dtype:
        return master
    weight = master.detach().to(dtype).requires_grad_(master.requires_grad)
    if weight.requires_grad:
        weight.register_post_accumulate_grad_hook(partial(_hand_on, master))
    return weight


def _hand_on(master: Tensor, weight: Tensor) -> None:
    """Adds a weight's gradient to that of the copy that is trained, without a copy in between."""
    if master.grad is None:
        master.grad = weight.grad.to(master.dtype)
    else:
        master.grad.add_(weight.grad)
    weight.grad = None
