"""The trained part of a policy: a LoRA adapter, or all weights."""

import copy

from torch import Tensor

from engine.model.decoder import Decoder
from engine.policy.full import FullWeights
from engine.policy.lora import Adapter

# Either makes a policy of the reference model.
Weights = Adapter | FullWeights


def policy_of(network: Decoder, weights: Weights | None) -> tuple[Decoder, Adapter | None]:
    """Returns a policy's decoder and the adapter to call it with; weights None is the reference."""
    return (weights.decoder(), None) if isinstance(weights, FullWeights) else (network, weights)


def copy_of(weights: Weights, tensors: dict[str, Tensor]) -> Weights:
    """Makes weights of the same kind with other values, as their `tensors` returned them."""
    other = copy.deepcopy(weights) if isinstance(weights, Adapter) else FullWeights(weights.decoder())
    other.set_tensors(tensors)
    return other
