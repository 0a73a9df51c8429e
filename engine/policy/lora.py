"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linears of a range of layers.

An adapter is never merged in place: it is passed to each call of the model, and a call
without it gives the reference.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from engine.model.architecture import ModelConfig
from engine.model.decoder import Decoder
from engine.model.low_rank import Factors, LayerMatrices
from engine.model.names import CUT_BY_COLUMNS, FUSED, LINEARS, linear_shapes
from engine.policy.parameters import PolicyWeights
from kernels.random import combine


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where in a model an adapter sits: the same linears in each layer of a range."""

    config: ModelConfig
    first_layer: int
    last_layer: int  # exclusive
    linears: tuple[str, ...] = LINEARS  # Hugging Face names
    # Of a decoder that ranks hold in slices: how many, and which of them the adapter computes matrices for.
    slices: int = 1
    slice: int = 0

    @staticmethod
    def on(model: Decoder, first_layer: int, last_layer: int, linears: tuple[str, ...]) -> "Placement":
        """Returns a place in the layers first_layer..last_layer-1 of a decoder, or of this rank's slice."""
        return Placement(
            config=model.config,
            first_layer=first_layer,
            last_layer=last_layer,
            linears=linears,
            slices=model.slices.size,
            slice=model.slices.rank,
        )

    def cut(self, matrix: Tensor, dim: int) -> Tensor:
        """Returns this slice's rows (dim 0) or columns (dim 1) of a matrix."""
        return matrix if self.slices == 1 else matrix.chunk(self.slices, dim)[self.slice]


class Adapter(PolicyWeights):
    """A and B of every adapted linear, float32 unless the model is float64; output += (alpha / rank) B A x.

    They are whole also where ranks hold the decoder in slices. Each computes with its part of them, so that
    the sum of the gradients over these ranks is that of the whole. It is an `engine.model.low_rank.LowRank`.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        rank: int,
        alpha: float,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        self.placement, self.rank, self.alpha = placement, rank, alpha
        self.compute_dtype = dtype
        self.shapes = linear_shapes(placement.config)  # (out, in) features by linear
        master = torch.float64 if dtype == torch.float64 else torch.float32
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for layer in range(placement.first_layer, placement.last_layer):
            for number, name in enumerate(LINEARS):
                if name not in placement.linears:
                    continue
                out, inside = self.shapes[name]
                generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 101 + number)
                start = (
                    torch.rand(rank, inside, generator=generator, dtype=torch.float64) * 2 - 1
                ) / math.sqrt(inside)
                self.down[key_of(layer, name)] = nn.Parameter(start.to(device, master))
                self.up[key_of(layer, name)] = nn.Parameter(
                    torch.zeros(out, rank, dtype=master, device=device)
                )

    @staticmethod
    def on(
        model: Decoder,
        *,
        rank: int,
        alpha: float,
        share: float,
        seed: int,
        linears: tuple[str, ...] = LINEARS,
    ) -> "Adapter":
        """Makes a new adapter, with B = 0, on the layers of `model` from `share` of its depth on."""
        first, last = first_layer(model.config.num_layers, share), model.config.num_layers
        placement = Placement.on(model, first, last, tuple(linears))
        return Adapter(placement, rank=rank, alpha=alpha, dtype=model.dtype, device=model.device, seed=seed)

    @property
    def first_layer(self) -> int:
        """The first adapted layer; everything below it equals the reference."""
        return self.placement.first_layer

    def fused(self, start: int, stop: int) -> dict[int, LayerMatrices]:
        """Computes A and B of the decoder's fused matrices in layers start..stop-1.

        The linears in a matrix keep their ranks side by side: A is [parts * rank, in], and B, times alpha /
        rank, is block-diagonal, [out, parts * rank].
        """
        first, last = max(start, self.placement.first_layer), min(stop, self.placement.last_layer)
        matrices = [matrix for matrix in FUSED if self.adapted(matrix)]
        return {
            layer: {matrix: self._fused(layer, matrix) for matrix in matrices} for layer in range(first, last)
        }

    def with_dropout(self, share: float, key: int) -> "WithDropout":
        """Returns the adapter as a policy step trains it; `key` names its random numbers."""
        return WithDropout(adapter=self, share=share, key=key)

    def adapted(self, matrix: str) -> list[str]:
        """Returns the adapted linears in a fused matrix, in the order of its rows."""
        return [name for name in FUSED[matrix] if name in self.placement.linears]

    def _fused(self, layer: int, matrix: str) -> Factors:
        names, adapted = FUSED[matrix], self.adapted(matrix)
        down, cut = torch.cat([self.down[key_of(layer, name)] for name in adapted]), self.placement.cut
        # A linear that is not adapted is a block without columns.
        blocks = [
            self.up[key_of(layer, name)] if name in adapted else down.new_zeros(self.shapes[name][0], 0)
            for name in names
        ]
        if matrix in CUT_BY_COLUMNS:
            down = cut(down, 1)
        else:
            blocks = [cut(block, 0) for block in blocks]
        up = torch.block_diag(*blocks) * (self.alpha / self.rank)
        return Factors(down.to(self.compute_dtype), up.to(self.compute_dtype))

    @torch.no_grad()
    def take_back(self, untrained: dict[str, Tensor], share: float) -> None:
        """Leaves the product B A a share of itself, by B alone: A has no say in how far the policy is."""
        for up in self.up.values():
            up.mul_(share)

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Computes (alpha / rank) B A of each adapted weight, by Hugging Face name, for merging."""
        scale, result = self.alpha / self.rank, {}
        for key in self.down:
            layer, name = layer_and_name(key)
            result[f"model.layers.{layer}.{name}.weight"] = scale * self.up[key] @ self.down[key]
        return result


@dataclass(frozen=True, kw_only=True)
class WithDropout:
    """An adapter in a policy step with dropout: output += (alpha / rank) B A d(x), where d sets a random
    `share` of the numbers of x to 0, other ones for each linear, and divides the rest by 1 - share.

    It is an `engine.model.low_rank.LowRank`. The random numbers depend on (key, layer, linear) alone, so that
    a layer which is computed again for the backward pass sees the same.
    """

    adapter: Adapter
    share: float
    key: int

    @property
    def first_layer(self) -> int:
        """The first adapted layer."""
        return self.adapter.first_layer

    def fused(self, start: int, stop: int) -> dict[int, LayerMatrices]:
        """Computes the adapted matrices of layers start..stop-1, as `Adapter.fused` does."""
        # Dividing B, which is small, divides all that passes through it.
        return {
            layer: {
                matrix: f._replace(up=f.up / (1 - self.share), seen=partial(self._seen, layer, matrix))
                for matrix, f in matrices.items()
            }
            for layer, matrices in self.adapter.fused(start, stop).items()
        }

    def deltas(self) -> dict[str, Tensor]:
        """Computes what merging adds: dropout is no part of it."""
        return self.adapter.deltas()

    def _seen(self, layer: int, matrix: str, x: Tensor) -> list[Tensor]:
        inputs = []
        for name in self.adapter.adapted(matrix):
            key = int(combine(self.key, layer, LINEARS.index(name)))
            if matrix in CUT_BY_COLUMNS and self.adapter.placement.slice:
                # Other inputs than those of the first slice.
                key = int(combine(key, self.adapter.placement.slice))
            generator = torch.Generator(x.device).manual_seed(key)
            inputs.append(x * torch.empty_like(x).bernoulli_(1 - self.share, generator=generator))
        return inputs


def first_layer(num_layers: int, share: float) -> int:
    """Returns the first layer of an adapter on the layers from `share` of the depth on."""
    return int(num_layers * share)


def key_of(layer: int, name: str) -> str:
    """Returns the key of a linear in `Adapter.down` and `Adapter.up`; parameters take no dots."""
    return f"{layer}|{name.replace('.', '|')}"


def layer_and_name(key: str) -> tuple[int, str]:
    """Undoes `key_of`."""
    layer, *name = key.split("|")
    return int(layer), ".".join(name)
