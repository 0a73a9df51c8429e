"""The trained part of a policy: a LoRA adapter, or all weights."""

import copy

from torch import Tensor

from engine.config import RunConfig
from engine.model.decoder import Decoder
from engine.model.names import linears_of
from engine.policy.full import FullWeights
from engine.policy.lora import Adapter

# Either makes a policy of the reference model.
Weights = Adapter | FullWeights


def new_adapter(network: Decoder, config: RunConfig) -> Adapter:
    """Returns a fresh adapter of the size that a config asks for; its policy equals the reference."""
    return Adapter.on(
        network,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        share=config.lora_from,
        seed=config.seed,
        linears=linears_of(config.lora_targets),
    )


def new_weights(network: Decoder, config: RunConfig) -> Weights:
    """Returns what a run of this config trains, still equal to the reference."""
    return FullWeights(network) if config.tune == "full" else new_adapter(network, config)


def trained_weights(network: Decoder, config: RunConfig, tensors: dict[str, Tensor]) -> Weights:
    """Returns what a run of this config has trained, with the values of an iterate."""
    weights = new_weights(network, config)
    weights.set_tensors(tensors)
    return weights


def policy_of(network: Decoder, weights: Weights | None) -> tuple[Decoder, Adapter | None]:
    """Returns a policy's decoder and the adapter to call it with; weights None is the reference."""
    return (weights.decoder(), None) if isinstance(weights, FullWeights) else (network, weights)


def copy_of(weights: Weights, tensors: dict[str, Tensor]) -> Weights:
    """Makes weights of the same kind with other values, as their `tensors` returned them."""
    other = copy.deepcopy(weights) if isinstance(weights, Adapter) else FullWeights(weights.decoder())
    other.set_tensors(tensors)
    return other
