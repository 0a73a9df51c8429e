"""The decoder's view of an adapter.

It asks no more than this, so that `engine.policy.lora` can stand above this package.
"""

from typing import Protocol

from torch import Tensor

# The adapted matrices of a layer: name of the decoder's matrix -> (A [rank, in], scaled B [out, rank]).
LayerMatrices = dict[str, tuple[Tensor, Tensor]]


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
