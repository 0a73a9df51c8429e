"""Batched sampling with keyed random numbers."""

from engine.rollout.sampler import generate

__all__ = [
    "generate",
]
