"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linears of a range of layers.

An adapter is never merged in place: it is passed to each call of the model, and a call
without it gives the reference.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.model.architecture import ModelConfig
from engine.model.decoder import Decoder
from engine.model.low_rank import LayerMatrices
from engine.model.names import FUSED, LINEARS, linear_shapes
from engine.policy.parameters import PolicyWeights


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where in a model an adapter sits: the same linears in each layer of a range."""

    config: ModelConfig
    first_layer: int
    last_layer: int  # exclusive
    linears: tuple[str, ...] = LINEARS  # Hugging Face names


class Adapter(PolicyWeights):
    """A and B of every adapted linear, float32 unless the model is float64; output += (alpha / rank) B A x.

    It is an `engine.model.low_rank.LowRank`.
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
    def on(model: Decoder, *, rank: int, alpha: float, share: float, seed: int) -> "Adapter":
        """Makes a new adapter, with B = 0, on the layers of `model` from `share` of its depth on."""
        first, last = first_layer(model.config.num_layers, share), model.config.num_layers
        placement = Placement(config=model.config, first_layer=first, last_layer=last)
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
        matrices = {
            matrix: names for matrix, names in FUSED.items() if set(names) & set(self.placement.linears)
        }
        return {
            layer: {matrix: self._fused(layer, names) for matrix, names in matrices.items()}
            for layer in range(first, last)
        }

    def _fused(self, layer: int, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        adapted = [name for name in names if name in self.placement.linears]
        down = torch.cat([self.down[key_of(layer, name)] for name in adapted])
        # A linear that is not adapted is a block without columns.
        blocks = [
            self.up[key_of(layer, name)] if name in adapted else down.new_zeros(self.shapes[name][0], 0)
            for name in names
        ]
        up = torch.block_diag(*blocks) * (self.alpha / self.rank)
        return down.to(self.compute_dtype), up.to(self.compute_dtype)

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Computes (alpha / rank) B A of each adapted weight, by Hugging Face name, for merging."""
        scale, result = self.alpha / self.rank, {}
        for key in self.down:
            layer, name = layer_and_name(key)
            result[f"model.layers.{layer}.{name}.weight"] = scale * self.up[key] @ self.down[key]
        return result


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
