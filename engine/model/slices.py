"""A decoder that several ranks hold together, each with a slice of every layer (arXiv 1909.08053).

q, k, v, gate and up are cut by rows, in whole heads, and o and down by columns. So a rank computes attention
and the inside of the MLP of its slice alone, and what o and down give is added up over the ranks. Embedding,
norms and head stand whole on each, and so do the states between layers, the logits, and the tokens that are
drawn with equal random numbers: a sum has the same bits on all ranks. These take all passes together.
"""

from dataclasses import replace

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.ranks import Ranks


def sliced(config: ModelConfig, slices: int) -> ModelConfig:
    """Returns the sizes of a slice's layers, those of a decoder with fewer heads and a smaller MLP.

    Raises: UserError where heads or MLP cannot be cut into so many.
    """
    heads, inner = config.num_kv_heads, config.intermediate_size
    if heads % slices or inner % slices:
        fits = map(str, slices_of(config))
        raise UserError(
            f"--model-ranks {slices} does not divide the model's {heads} key heads and its intermediate size "
            f"of {inner}; use {' or '.join(fits)}."
        )
    return replace(
        config,
        num_heads=config.num_heads // slices,
        num_kv_heads=heads // slices,
        intermediate_size=inner // slices,
    )


def slices_of(config: ModelConfig) -> list[int]:
    """Lists the numbers of slices that a decoder can be cut into."""
    heads, inner = config.num_kv_heads, config.intermediate_size
    return [n for n in range(1, heads + 1) if heads % n == inner % n == 0]


def part_of(whole: tuple[int, ...], own: tuple[int, ...], place: int) -> tuple[slice, ...] | None:
    """Returns where a slice's weight stands in the whole one: it is cut where it is shorter. None: all of it.

    whole, own: shapes. place: the slice's number.
    """
    if whole == own:
        return None
    return tuple(
        slice(None) if n == all_of_it else slice(place * n, (place + 1) * n)
        for n, all_of_it in zip(own, whole, strict=True)
    )


def enter(x: Tensor, ranks: Ranks) -> Tensor:
    """Returns x, which is the same on all slices; its gradient is the sum of theirs."""
    return x if ranks.size == 1 else _Entered.apply(x, ranks)


def leave(x: Tensor, ranks: Ranks) -> Tensor:
    """Returns the sum of x over the slices, each of which gets the sum's gradient."""
    return x if ranks.size == 1 else _Left.apply(x, ranks)


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.summed(gradient), None


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.summed(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
