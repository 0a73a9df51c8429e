"""Rotary positions: their base, and how their wavelengths are scaled."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: their base, and how wavelengths are scaled."""

    theta: float
    scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", and its parameters}

    def inverse_frequency(self, head_dim: int) -> Tensor:
        """Returns float32 [head_dim / 2]."""
        inverse = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if self.scaling is None:
            return inverse
        factor = self.scaling["factor"]
        if self.scaling["rope_type"] == "linear":
            return inverse / factor
        # Llama 3 stretches long wavelengths by `factor`, keeps short ones, and blends those between.
        wavelength = 2 * math.pi / inverse
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        original = self.scaling["original_max_position_embeddings"]
        blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * inverse / factor + blend * inverse
