"""Low-rank adapters (LoRA, arXiv 2106.09685) on every linear of a range of layers; import and export in PEFT's file format.

An adapter is never merged in place: it is passed to each call of the model, and leaving it out gives the reference.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.policy.parameters import PolicyWeights

# Fused matrix -> the Hugging Face linears stacked in it, in order.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an adapter needs to know of its model: sizes, and the layers it sits on."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    first_layer: int
    last_layer: int  # exclusive
    linears: tuple[str, ...] = tuple(n for names in PARTS.values() for n in names)  # those of each layer that are adapted

    @staticmethod
    def of(model, first_layer: int, **changes) -> "Shape":
        """That of an adapter on the layers of `model` from `first_layer` on."""
        c = model.config
        sizes = dict(hidden=c.hidden_size, intermediate=c.intermediate_size, heads=c.num_heads, kv_heads=c.num_kv_heads)
        return Shape(**{**sizes, "head_dim": c.head_dim, "first_layer": first_layer, "last_layer": c.num_layers, **changes})

    def linear(self, name: str) -> tuple[int, int]:
        """(out, in) features of a Hugging Face linear."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }[name]


class Adapter(PolicyWeights):
    """A and B of every adapted linear, float32 unless the model is float64; output += (alpha / rank) B A x."""

    def __init__(self, shape: Shape, *, rank: int, alpha: float, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        super().__init__()
        self.shape, self.rank, self.alpha = shape, rank, alpha
        self.compute_dtype = dtype
        master = torch.float64 if dtype == torch.float64 else torch.float32
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for layer in range(shape.first_layer, shape.last_layer):
            for number, name in enumerate(n for names in PARTS.values() for n in names):
                if name not in shape.linears:
                    continue
                out, inside = shape.linear(name)
                generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 101 + number)
                start = (torch.rand(rank, inside, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(inside)
                self.down[key_of(layer, name)] = nn.Parameter(start.to(device, master))
                self.up[key_of(layer, name)] = nn.Parameter(torch.zeros(out, rank, dtype=master, device=device))

    @staticmethod
    def on(model, *, rank: int, alpha: float, share: float, seed: int) -> "Adapter":
        """A fresh adapter (B = 0) on the layers of `model` from `share` of its depth on."""
        shape = Shape.of(model, first_layer(model.config.num_layers, share))
        return Adapter(shape, rank=rank, alpha=alpha, dtype=model.dtype, device=model.device, seed=seed)

    @property
    def first_layer(self) -> int:
        """The first adapted layer; everything below it equals the reference."""
        return self.shape.first_layer

    def fused(self, start: int, stop: int) -> dict[int, dict[str, tuple[Tensor, Tensor]]]:
        """Layer -> fused matrix -> (A [parts * rank, in], scaled block-diagonal B [out, parts * rank]) for layers start..stop-1."""
        scale, result = self.alpha / self.rank, {}
        for layer in range(max(start, self.shape.first_layer), min(stop, self.shape.last_layer)):
            result[layer] = {}
            for matrix, names in PARTS.items():
                adapted = [n for n in names if n in self.shape.linears]
                if not adapted:
                    continue
                down = torch.cat([self.down[key_of(layer, n)] for n in adapted])
                # A linear that is not adapted is a block without columns.
                up = torch.block_diag(*(
                    self.up[key_of(layer, n)] if n in adapted else down.new_zeros(self.shape.linear(n)[0], 0) for n in names
                )) * scale  # fmt: skip
                result[layer][matrix] = (down.to(self.compute_dtype), up.to(self.compute_dtype))
        return result

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Hugging Face weight name -> (alpha / rank) B A, for merging."""
        scale, result = self.alpha / self.rank, {}
        for key in self.down:
            layer, name = layer_and_name(key)
            result[f"model.layers.{layer}.{name}.weight"] = scale * self.up[key] @ self.down[key]
        return result


def first_layer(num_layers: int, share: float) -> int:
    """The first adapted layer of an adapter on the layers from `share` of the depth on."""
    return int(num_layers * share)


def key_of(layer: int, name: str) -> str:
    return f"{layer}|{name.replace('.', '|')}"


def layer_and_name(key: str) -> tuple[int, str]:
    layer, *name = key.split("|")
    return int(layer), ".".join(name)
