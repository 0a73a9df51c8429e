"""Losses of the label forms that no kernel fuses."""

import torch
from torch import Tensor


def regression(moved_N: Tensor, score_N: Tensor, pairs_K2: Tensor) -> Tensor:
    """Computes half the mean square, over pairs, of the difference of beta x log-ratio minus that of the
    score; least at the tilt by the score."""
    a, b = pairs_K2.unbind(1)
    return (moved_N[a] - moved_N[b] - (score_N[a] - score_N[b])).square().mean() / 2


def single(moved_N: Tensor, advantage_N: Tensor) -> Tensor:
    """Computes half the mean square of beta x log-ratio minus (score - V) (DRO, arXiv 2405.19107)."""
    return (moved_N - advantage_N).square().mean() / 2


def listwise(log_ratio_N: Tensor, score_N: Tensor, prompt_N: Tensor) -> Tensor:
    """Computes the cross-entropy of softmax(score / beta) and softmax(log-ratio) over the responses of
    a prompt, mean over prompts. score: over beta."""
    losses = []
    for p in prompt_N.unique().tolist():
        own = prompt_N == p
        losses.append(-(score_N[own].softmax(0) * log_ratio_N[own].log_softmax(0)).sum())
    return torch.stack(losses).mean()
