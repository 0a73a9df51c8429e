"""The decoder's view of an adapter.

It asks no more than this, so that `engine.policy.lora` can stand above this package.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.products import by_torch


class Factors(NamedTuple):
    """A matrix W of the decoder acts as W + B A."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank], scaled
    # With dropout: from an input to what each of the linears in this matrix sees of it. Each has as many rows
    # of A.
    seen: Callable[[Tensor], list[Tensor]] | None = None

    def inner(self, x: Tensor) -> Tensor:
        """Computes A x [M, rank] of inputs [M, in]."""
        if self.seen is None:
            return by_torch(F.linear, x, self.down)
        inputs = self.seen(x)
        parts = zip(inputs, self.down.chunk(len(inputs)), strict=True)
        return torch.cat([by_torch(F.linear, own, a) for own, a in parts], dim=1)


# The adapted matrices of a layer, by the name of the decoder's matrix.
LayerMatrices = dict[str, Factors]


class LowRank(Protocol):
    """An adapter: each matrix W of the layers from `first_layer` on acts as W + B A."""

    @property
    def first_layer(self) -> int:
        """The first adapted layer; everything below it is the reference's and frozen."""

    def fused(self, start: int, stop: int) -> dict[int, LayerMatrices]:
        """Computes the adapted matrices of layers start..stop-1, by layer."""

    def deltas(self) -> dict[str, Tensor]:
        """Computes what merging adds to each weight, by Hugging Face name."""


class ReadyAdapter:
    """An adapter whose matrices are computed once, for decoding steps, between which no weight changes."""

    def __init__(self, adapter: LowRank, num_layers: int) -> None:
        self.first_layer = adapter.first_layer
        self._matrices = adapter.fused(0, num_layers)

    def fused(self, start: int, stop: int) -> dict[int, LayerMatrices]:
        """Returns the matrices of all layers."""
        return self._matrices
