"""Full fine-tuning: a policy whose weights are all its own, embedding and head included."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.model import decoder as model
from engine.model.decoder import Decoder
from engine.policy.lora import Adapter, PolicyWeights, load_peft, save_peft


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


# What makes a policy of the reference model.
Weights = Adapter | FullWeights


def policy_of(network: Decoder, weights: Weights | None) -> tuple[Decoder, Adapter | None]:
    """The decoder and the adapter to call it with; weights None is the reference."""
    return (weights.decoder(), None) if isinstance(weights, FullWeights) else (network, weights)


def copy_of(weights: Weights, tensors: dict[str, Tensor]) -> Weights:
    """Weights of the same kind with other values, as their `tensors` returned them."""
    other = copy.deepcopy(weights) if isinstance(weights, Adapter) else FullWeights(weights.decoder())
    other.set_tensors(tensors)
    return other


def save_weights(weights: Weights, folder: Path, base_model: str, tokenizer_from: Path) -> None:
    """Write an iterate: a PEFT folder, or a Hugging Face folder of all weights. Raises: UserError on a full or closed disk."""
    if isinstance(weights, Adapter):
        save_peft(weights, folder, base_model)
    else:
        model.save(weights.decoder(), folder, tokenizer_from=tokenizer_from)


def load_weights(folder: Path, network: Decoder) -> Weights:
    """What `save_weights` wrote, for the model `network`. Raises: UserError where they do not belong together."""
    if (folder / "adapter_config.json").is_file():
        return load_peft(folder, network)
    own = model.load(folder, dtype=network.dtype, device=network.device)
    if own.config != network.config:
        raise UserError(f"{folder}: these weights are of another model; give the model they were trained from.")
    return FullWeights(own)


def is_saved(folder: Path) -> bool:
    """Whether `folder` holds what `save_weights` writes."""
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
