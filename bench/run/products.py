"""Bare matrix products of a model's shapes, which are the floors of sampling and of training."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.model.decoder import Decoder
from kernels.products import linear

Ways = dict[str, Callable[[], object]]  # who computes a product -> step


def layer_matrices(model: Decoder) -> list[Tensor]:
    """Lists the matrices of all layers."""
    return [w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]


def bare_products(matrices: list[Tensor], tokens: int, backward: bool = False) -> Ways:
    """Returns products of `tokens` rows with frozen matrices [N, K]: x W',
    or of the gradients with W where `backward`."""
    turned = [w if backward else w.t() for w in matrices]
    shapes = {tuple(w.shape) for w in turned}
    x = {k: torch.randn(tokens, k, dtype=turned[0].dtype, device=turned[0].device) for k, _ in shapes}
    out = {(k, n): x[k].new_empty(tokens, n) for k, n in shapes}

    def by_mm() -> None:
        for w in turned:
            torch.mm(x[w.shape[0]], w, out=out[tuple(w.shape)])

    @torch.no_grad()
    def by_linear() -> None:
        for w in turned:
            linear(x[w.shape[0]], w.t())

    return {"torch.mm": by_mm, "kernels.products": by_linear}


def weight_gradients(matrices: list[Tensor], tokens: int) -> Ways:
    """Returns products of `tokens` rows of gradients with as many of states,
    in the shapes [N, K] of `matrices`."""
    shapes = [tuple(w.shape) for w in matrices]
    rows = {size: matrices[0].new_empty(tokens, size).normal_() for shape in shapes for size in shape}
    out = {shape: matrices[0].new_empty(shape) for shape in shapes}

    def by_mm() -> None:
        for n, k in shapes:
            torch.mm(rows[n].t(), rows[k], out=out[n, k])

    return {"torch.mm": by_mm}
