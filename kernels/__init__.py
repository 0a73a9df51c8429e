"""Dualign's fused ops."""

from kernels.attention.decode import decode_attention
from kernels.loss_head.logprob import sequence_logprob
from kernels.loss_head.losses import lagrangian_policy_loss, lagrangian_preference_loss
from kernels.moments import dual_moments
from kernels.sampling.draw import sample

__all__ = [
    "decode_attention",
    "dual_moments",
    "lagrangian_policy_loss",
    "lagrangian_preference_loss",
    "sample",
    "sequence_logprob",
]
