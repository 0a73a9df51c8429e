"""Dualign's fused ops."""

from kernels.dual_moments import dual_moments
from kernels.lagrangian import lagrangian_policy_loss, lagrangian_preference_loss
from kernels.sampling import sample
from kernels.sequence_logprob import sequence_logprob

__all__ = ["dual_moments", "lagrangian_policy_loss", "lagrangian_preference_loss", "sample", "sequence_logprob"]
