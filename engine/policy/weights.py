"""The trained part of a policy: a LoRA adapter, or all weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from engine.config import RunConfig
from engine.errors import NonFiniteError
from engine.model.decoder import Decoder
from engine.model.names import linears_of
from engine.model.parallel import gathered, is_spread
from engine.policy.full import FullWeights
from engine.policy.lora import Adapter
from engine.policy.sharded import GatheredWeights, ShardedWeights, gathered_weights

# Each makes a policy of the reference model.
Weights = Adapter | FullWeights | ShardedWeights | GatheredWeights


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
    if config.tune == "full":
        return ShardedWeights(network) if is_spread(network) else FullWeights(network)
    return new_adapter(network, config)


def trained_weights(network: Decoder, config: RunConfig, tensors: dict[str, Tensor]) -> Weights:
    """Returns what a run of this config has trained, with the values of an iterate."""
    weights = new_weights(network, config)
    weights.set_tensors(tensors)
    return weights


def policy_of(network: Decoder, weights: Weights | None) -> tuple[Decoder, Adapter | None]:
    """Returns a policy's decoder and the adapter to call it with; weights None is the reference."""
    if weights is None or isinstance(weights, Adapter):
        return network, weights
    return weights.decoder(), None


@contextmanager
def whole(network: Decoder, weights: Weights | None) -> Iterator[tuple[Decoder, Weights | None]]:
    """Gives a policy that needs no other rank for a while: what is spread over ranks of the weights, or of
    the network where they are None, is gathered. All ranks enter together."""
    if isinstance(weights, ShardedWeights):
        with gathered_weights(weights) as policy:
            yield network, policy
    elif weights is None:
        with gathered(network) as reference:
            yield reference, None
    else:
        yield network, weights


@contextmanager
def before_whole(network: Decoder) -> Iterator[None]:
    """Runs a block after which the ranks gather a network. Where the block finds numbers that are not finite,
    this rank gathers it all the same before it says so, as the others wait for it."""
    try:
        yield
    except NonFiniteError:
        with gathered(network):
            raise


def copy_of(weights: Weights, tensors: dict[str, Tensor]) -> Weights:
    """Makes weights of the same kind with other values, as their `tensors` returned them."""
    if isinstance(weights, Adapter):
        other = copy.deepcopy(weights)
    elif isinstance(weights, ShardedWeights):
        other = ShardedWeights(weights.decoder(), weights.compute_dtype)
    else:
        other = FullWeights(weights.decoder())
    other.set_tensors(tensors)
    return other
