"""What a rank holds of a model whose weights are all trained and spread over several ranks, as FSDP2 does.

Each rank has its rows of every weight: in float32 those that are trained, with their gradients and AdamW's
two moments, and in the run's own data type those of the reference. A policy step gathers a layer at a time,
and the embedding and the head for all of a pass. What needs no gradient gathers all weights once.
"""

from dataclasses import replace

import torch

from engine.model.architecture import ModelConfig
from engine.model.decoder import Decoder

# Of a trained weight: float32 with gradient and two moments, the start, and a copy for the iterate. On a CPU
# also the last iterate with its moments, and what a checkpoint writes.
GPU_BYTES, CPU_BYTES = 24, 60


def pieces(shape: ModelConfig, shards: int) -> tuple[int, int]:
    """Counts the weights that a rank holds of a layer, and of all that is no layer, where the rows of each
    weight are spread over `shards` ranks. The last ranks may have fewer rows, or none, and pad them."""
    one = Decoder(replace(shape, num_layers=1), {}, torch.float32, torch.device("meta"))

    def held(part: torch.nn.Module) -> int:
        return sum(-(-len(weight) // shards) * weight[0].numel() for weight in part.parameters())

    return held(one.layers), held(one) - held(one.layers)


def shard_size(shape: ModelConfig, shards: int) -> int:
    """Counts the weights that a rank holds, those that are padding included."""
    layer, outer = pieces(shape, shards)
    return shape.num_layers * layer + outer


def spread_bytes(shape: ModelConfig, dtype: torch.dtype, shards: int, *, on_cpu: bool, averaged: bool) -> int:
    """Counts the bytes that a rank holds all the time, of the policy and of the reference in `dtype`.

    averaged: an iterate is a mean over steps (--weight-average).
    """
    trained = CPU_BYTES if on_cpu else GPU_BYTES
    if averaged:
        trained += mean_bytes(on_cpu=on_cpu)
    return shard_size(shape, shards) * (trained + dtype.itemsize)


def mean_bytes(*, on_cpu: bool) -> int:
    """Counts the bytes of each trained weight that a mean over steps takes: itself, and on a CPU the last
    weights too, in the last iterate and in what a checkpoint writes."""
    return 12 if on_cpu else 4


def step_bytes(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Counts the bytes that a policy step gathers besides: what is no layer in `dtype` with its gradient, in
    `dtype` and as float32; this layer, the next one, and its message; the gradient of one, twice too."""
    layer, outer = pieces(shape, 1)
    return outer * (2 * dtype.itemsize + 4) + layer * (3 * dtype.itemsize + dtype.itemsize + 4)
