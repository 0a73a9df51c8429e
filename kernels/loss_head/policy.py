"""The terms of the policy loss: advantages of sequences, shares of tokens, and the loss with its derivative
in the log-probs in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.loss_head.records import Policy, Scores
from kernels.loss_head.terms import Groups, sequence_sum


class PolicyLoss(NamedTuple):
    """Result of `lagrangian_policy_loss`; all but `loss` carry no gradient."""

    loss: Tensor  # scalar
    logprob: Tensor  # [N]
    token_logprob: Tensor  # [T]
    advantage: Tensor  # [N], float64
    # scalar: mean of the KL term, nats per token; with kl="score" of the log-ratios, nats per sequence; NaN
    # without ref_logprob
    kl: Tensor
    clip_fraction: Tensor  # scalar: share of tokens whose ratio the clip cuts off
    gradient_bound: Tensor  # scalar: the largest error of dH and dW by what was left out, relative
    left_out: Tensor  # scalar: the probability left out of a row's gradient, on average


def sequence_log_ratio(
    old_logprob: Tensor,
    ref_logprob: Tensor,
    token_weight: Tensor | None,
    cu_seqlens: Tensor,
    device: torch.device,
) -> Tensor:
    """Returns the log-ratio of each sequence under the policy that sampled, float64 [N]."""
    old, ref = (x.detach().to(device, torch.float64, non_blocking=True) for x in (old_logprob, ref_logprob))
    return sequence_sum(old, token_weight, cu_seqlens) - ref


def group_advantage(
    group: Tensor, scores: Scores, advantage: str, penalty: Tensor | None, device: torch.device
) -> Tensor:
    """Returns the advantage of each sequence within its group, float64 [N].

    "rloo": A_n = s_n - mean of the others' s, s = reward + utility @ lam - penalty. "group_norm": A_n =
    Z(reward) + sum_j lam_j Z(utility_j) - (penalty - group mean) with Z = (x - group mean) / group's
    population standard deviation, 0 where all of a group are equal. A group of one gives 0. penalty: float64
    [N].
    """
    reward, utility, lam = (x.detach().to(device, torch.float64, non_blocking=True) for x in scores)
    groups = Groups(group, device)
    order, first, size = groups.order, groups.first, groups.size
    if advantage == "rloo":
        s = reward + utility @ lam
        s = (s if penalty is None else s - penalty)[order]
        # Differences to one member of the group make equal scores give exactly 0.
        s = s - s[first]
        result = (s - groups.total(s) / size) * size / (size - 1).clamp_min(1)
    else:
        result = torch.zeros_like(reward)
        for x, factor in [(reward, 1.0), *((utility[:, j], lam[j]) for j in range(utility.shape[1]))]:
            x = x[order]
            x = x - x[first]
            x = x - groups.total(x) / size
            deviation = (groups.total(x.square()) / size).sqrt()
            result = result + factor * torch.where(deviation > 0, x / deviation, 0)
        if penalty is not None:
            x = penalty[order]
            result = result - (x - groups.total(x) / size)
    return groups.back(result)


def row_shares(
    cu_seqlens: Tensor, token_weight: Tensor | None, normalize: str, rows: int, device: torch.device
) -> Tensor:
    """Returns the share of each row in the mean of a policy loss, float64 [T], weighted by token_weight.

    "token": the mean over all rows. "sequence": the mean over sequences of the means over their rows, where
    an empty one counts as 0.
    """
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    weight = torch.ones(rows, device=device, dtype=torch.float64)
    if token_weight is not None:
        weight = token_weight.detach().to(device, torch.float64, non_blocking=True)
    if normalize == "token":
        total = weight.sum()
    else:
        per_sequence = torch.segment_reduce(weight, "sum", lengths=lengths, unsafe=True)
        total = torch.repeat_interleave(per_sequence, lengths, output_size=rows) * max(1, len(lengths))
    return torch.where(weight == 0, 0, weight / total)


class PolicyTerms(NamedTuple):
    """Result of `policy_terms`: sums over some rows, and the loss's derivative in each row's log-prob."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    coefficient: Tensor  # [C]


def policy_terms(logprob: Tensor, advantage: Tensor, share: Tensor, policy: Policy) -> PolicyTerms:
    """Returns the terms of `lagrangian_policy_loss` for rows [C], float64, with the log-probs
    that `policy` has of them.

    Differentiable in logprob; `coefficient` is that derivative in closed form (PPO: Schulman et al. 2017, eq.
    7; k2 and k3: Schulman 2020).
    """
    logprob = logprob.double()
    old, ref = (
        None if x is None else x.detach().to(logprob.device, torch.float64, non_blocking=True)
        for x in (policy.old_logprob, policy.ref_logprob)
    )
    ratio = (logprob - (logprob.detach() if old is None else old)).exp()
    gain = ratio * advantage
    slope, clipped = gain.detach(), torch.zeros_like(gain, dtype=torch.bool)
    if policy.clip is not None:
        low, high = policy.clip
        bounded = ratio.clamp(1 - low, 1 + high) * advantage
        clipped = bounded < gain
        gain, slope = torch.minimum(gain, bounded), torch.where(clipped, 0, slope)
    divergence = None
    loss, coefficient = -gain, -slope
    if ref is not None:
        d = ref - logprob
        divergence = d.square() / 2 if policy.kl == "k2" else d.exp() - d - 1
        if policy.kl_coef:
            loss = loss + policy.kl_coef * divergence
            slope = (d if policy.kl == "k2" else d.exp() - 1).detach()
            coefficient = coefficient - policy.kl_coef * slope

    def total(x: Tensor) -> Tensor:
        return torch.where(share == 0, 0, share * x).sum()

    nats = logprob.new_tensor(torch.nan) if divergence is None else total(divergence.detach())
    coefficient = torch.where(share == 0, 0, share * coefficient)
    return PolicyTerms(total(loss), nats, total(clipped.double()), coefficient)
