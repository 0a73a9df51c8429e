"""Turns log-probs into the terms of losses: sums per sequence, labels, pairs, advantages and tokens.

Each loss comes with its derivative in the log-probs in closed form.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.loss_head.records import Labels, Pairs, Policy, Scores


class PreferenceLoss(NamedTuple):
    """Result of `lagrangian_preference_loss`; all but `loss` carry no gradient."""

    loss: Tensor  # scalar
    logprob: Tensor  # [N]
    margin: Tensor  # [K]
    preference: Tensor  # [K], q
    accuracy: Tensor  # scalar


class PolicyLoss(NamedTuple):
    """Result of `lagrangian_policy_loss`; all but `loss` carry no gradient."""

    loss: Tensor  # scalar
    logprob: Tensor  # [N]
    token_logprob: Tensor  # [T]
    advantage: Tensor  # [N], float64
    kl: Tensor  # scalar: mean of the KL term, nats per token; NaN without ref_logprob
    clip_fraction: Tensor  # scalar: share of tokens whose ratio the clip cuts off


def sequence_sum(token_logprob: Tensor, token_weight: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Returns the weighted sum of token log-probs per sequence [N], added in float64 in a fixed order.

    Rows of weight 0 add nothing, even -inf or NaN.
    """
    device = token_logprob.device
    terms = token_logprob.double()
    if token_weight is not None:
        weight = token_weight.detach().to(device, torch.float64, non_blocking=True)
        terms = torch.where(weight == 0, 0, terms) * weight
    # unsafe=True, because the offsets are checked already where the host may read them.
    total = torch.segment_reduce(terms, "sum", offsets=cu_seqlens.to(device, non_blocking=True), unsafe=True)
    return total.to(token_logprob.dtype)


def row_coefficients(
    per_sequence: Tensor, cu_seqlens: Tensor, token_weight: Tensor | None, rows: int
) -> Tensor:
    """Spreads numbers per sequence over their rows [T], times the row's weight; exactly 0 where that is 0."""
    device = per_sequence.device
    lengths = cu_seqlens.to(device, non_blocking=True).diff()
    spread = torch.repeat_interleave(per_sequence, lengths, output_size=rows)
    if token_weight is None:
        return spread
    weight = token_weight.to(device, spread.dtype, non_blocking=True)
    return torch.where(weight == 0, 0, spread * weight)


def draw_uniform(labels: Labels, pairs: Tensor) -> Labels:
    """Draws the uniform numbers [K] of sampled labels where they are not given."""
    if labels.kind != "sampled" or labels.uniform is not None:
        return labels
    generator = labels.generator
    uniform = torch.rand(len(pairs), generator=generator, device=generator.device, dtype=torch.float64)
    return labels._replace(uniform=uniform)


def preference_labels(
    pairs: Tensor, scores: Scores, labels: Labels, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Returns q [K] of `lagrangian_preference_loss`, from scores s = reward + utility @ lam in float64."""

    def here(value: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return value.detach().to(device, dtype, non_blocking=True)

    if labels.kind == "given":
        return here(labels.preference, dtype)
    first, second = here(pairs, torch.int64).unbind(1)
    score = here(scores.reward) + here(scores.utility) @ here(scores.lam)
    q = torch.sigmoid(score[first] - score[second])
    return (q if labels.kind == "soft" else (here(labels.uniform) < q).double()).to(dtype)


def preference_loss(logprob: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the preference loss, margins [K] and accuracy of logprob [N]; the loss is differentiable in it.

    With x = beta ((L_a - ref_a) - (L_b - ref_b)): loss = mean of -q log sigmoid(x) - (1 - q) log sigmoid(-x),
    the DPO objective (Rafailov et al. 2023, eq. 7) with labels from the modified reward r + lam . g.
    """
    index, q, ref_logprob, beta = pairs
    first, second = index.to(logprob.device, torch.int64, non_blocking=True).unbind(1)
    ratio = logprob - ref_logprob.detach().to(logprob.device, logprob.dtype, non_blocking=True)
    margin = beta * (ratio[first] - ratio[second])
    entropy = -q * F.logsigmoid(margin) - (1 - q) * F.logsigmoid(-margin)
    loss = entropy.sum() / max(1, len(index))
    margin = margin.detach()
    tie = (margin == 0) | (q == 0.5)
    accuracy = torch.where(tie, 0.5, ((margin > 0) == (q > 0.5)).to(logprob.dtype)).mean()
    return loss, margin, accuracy


def pairs_on_device(pairs: Pairs, device: torch.device, dtype: torch.dtype) -> Pairs:
    """Returns the pairs where the log-probs are, in their dtype."""
    return Pairs(
        pairs.index.to(device, torch.int64, non_blocking=True),
        pairs.q.to(dtype),
        pairs.ref_logprob.to(device, dtype, non_blocking=True),
        pairs.beta,
    )


def ends_by_sequence(index: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Returns the order of the 2 K ends of pairs by sequence, and where each sequence begins in it.

    Sums over a sequence's ends then have a fixed order.
    """
    ends, order = index.t().reshape(-1).sort(stable=True)
    return order, torch.searchsorted(ends, torch.arange(sequences + 1, device=index.device))


def preference_coefficient(logprob: Tensor, pairs: Pairs, ends: tuple[Tensor, Tensor]) -> Tensor:
    """Returns d loss / d logprob [N] of the preference loss.

    pairs: from `pairs_on_device`; ends: from `ends_by_sequence`.
    """
    index, q, ref_logprob, beta = pairs
    order, offsets = ends
    ratio = logprob - ref_logprob
    margin = beta * (ratio[index[:, 0]] - ratio[index[:, 1]])
    kappa = (torch.sigmoid(margin) - q).double() * (beta / max(1, len(index)))
    signed = torch.cat([kappa, -kappa])[order]
    return torch.segment_reduce(signed, "sum", offsets=offsets, unsafe=True).to(logprob.dtype)


def preference_terms(logprob: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, margin [K], accuracy and d loss / d logprob [N]."""
    pairs = pairs_on_device(pairs, logprob.device, logprob.dtype)
    ends = ends_by_sequence(pairs.index, len(logprob))
    return *preference_loss(logprob, pairs), preference_coefficient(logprob, pairs, ends)


def group_advantage(group: Tensor, scores: Scores, advantage: str, device: torch.device) -> Tensor:
    """Returns the advantage of each sequence within its group, float64 [N].

    "rloo": A_n = s_n - mean of the others' s, s = reward + utility @ lam. "group_norm": A_n = Z(reward) +
    sum_j lam_j Z(utility_j) with Z = (x - group mean) / group's population standard deviation, 0 where all of
    a group are equal. A group of one gives 0.
    """
    reward, utility, lam = (x.detach().to(device, torch.float64, non_blocking=True) for x in scores)
    value, order = group.to(device, non_blocking=True).sort(stable=True)
    # The group of the sorted entry i begins at first[i] and ends before stop[i]. Segment i holds the group
    # where i is its first entry, and nothing elsewhere.
    first, stop = torch.searchsorted(value, value), torch.searchsorted(value, value, right=True)
    place = torch.arange(len(value), device=device)
    offsets = place.new_zeros(1)
    if len(value):
        offsets = torch.cat(
            [torch.where(first == place, place, stop), torch.full_like(place[:1], len(value))]
        )

    def over_group(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", offsets=offsets, unsafe=True, initial=0.0)[first]

    size = (stop - first).double()
    if advantage == "rloo":
        s = (reward + utility @ lam)[order]
        # Differences to one member of the group make equal scores give exactly 0.
        s = s - s[first]
        result = (s - over_group(s) / size) * size / (size - 1).clamp_min(1)
    else:
        result = torch.zeros_like(reward)
        for x, factor in [(reward, 1.0), *((utility[:, j], lam[j]) for j in range(utility.shape[1]))]:
            x = x[order]
            x = x - x[first]
            x = x - over_group(x) / size
            deviation = (over_group(x.square()) / size).sqrt()
            result = result + factor * torch.where(deviation > 0, x / deviation, 0)
    return torch.empty_like(result).index_copy_(0, order, result)


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
