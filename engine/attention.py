"""Attention by torch: of packed sequences on their padded grid, and of one new token per row over a cache."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None) -> Tensor:
    """softmax(softcap * tanh(scale * query key^T / softcap) + mask) value: [B, H, T, d].

    query [B, H, T, d]; key, value [B, Hkv, S, d], H a multiple of Hkv. mask: bool (True = visible) or additive, of a shape that
    spreads to [B, H, T, S]; None = causal, S = T. scale None is d ** -0.5; softcap None leaves the scores as they are.
    """
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    statistics = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=statistics).to(value.dtype) @ value
