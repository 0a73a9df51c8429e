"""Every public op by its definition: whole logits in plain torch, and gradients by autograd.

This is the specification of the ops, and in float64 the oracle of their tests. It imports nothing of
`kernels`, so that it shares no code with what it judges. Arguments are those of the ops, without memory
budgets; nothing is checked. Inputs of 16 bits are computed in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_sequence(rows: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Cuts [T] into the rows of each sequence."""
    bounds = cu_seqlens.tolist()
    return [rows[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def sequence_logprob(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N + 1]
    *,
    token_weight: Tensor | None = None,  # [T]
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    return_token_logprob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns logprob_n = sum of weight_t log p_t over the rows of sequence n, and log p_t where asked for.

    log p_t = log softmax(softcap * tanh((h_t W^T + bias) / softcap) / temperature)[target_t].
    """
    if hidden.dtype.itemsize == 2:
        hidden, weight = hidden.float(), weight.float()
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token = (logits / temperature).log_softmax(1).gather(1, target.long()[:, None])[:, 0]
    weighted = token if token_weight is None else token * token_weight.to(token.dtype)
    sums = [rows.sum() for rows in _per_sequence(weighted, cu_seqlens)]
    logprob = torch.stack(sums) if sums else token.new_zeros(0)
    return (logprob, token) if return_token_logprob else logprob


class PreferenceLoss(NamedTuple):
    """Result of `lagrangian_preference_loss`; all but `loss` carry no gradient."""

    loss: Tensor
    logprob: Tensor  # [N]
    margin: Tensor  # [K]
    preference: Tensor  # [K], q
    accuracy: Tensor


def lagrangian_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,  # [K, 2]
    reward: Tensor | None,  # [N]
    utility: Tensor | None,  # [N, J]
    lam: Tensor | None,  # [J]
    ref_logprob: Tensor,  # [N]
    *,
    beta: float,
    labels: str = "soft",
    preference: Tensor | None = None,  # [K]
    uniform: Tensor | None = None,  # [K]
    generator: torch.Generator | None = None,
    value: Tensor | None = None,  # [N]
    group: Tensor | None = None,  # [N]
    **options,
) -> PreferenceLoss:
    """Returns the loss of log-ratios L - ref against the score s = reward + utility @ lam.

    q = sigmoid(s_a - s_b), 1 where u < that and else 0 ("sampled"), or the preference ("given");
    x = beta ((L_a - ref_a) - (L_b - ref_b)). "soft", "sampled" and "given" are DPO's loss (Rafailov et al.
    2023, eq. 7), the mean of -q log sigmoid(x) - (1 - q) log sigmoid(-x); "regression" is the mean of
    (x - (s_a - s_b))^2 / 2; "single" the mean over sequences of (beta (L - ref) - (s - value))^2 / 2 (DRO,
    Richemond et al. 2024); "listwise" the mean over groups of the cross-entropy of softmax(s / beta) and
    softmax(L - ref). options: those of `sequence_logprob`, which gives L.
    """
    logprob = sequence_logprob(hidden, weight, target, cu_seqlens, **options)
    first, second = pairs.long().T
    if labels == "given":
        q = preference
    else:
        score = reward.double() + (utility.double() * lam.double()).sum(1)
        q = 1 / (1 + torch.exp(score[second] - score[first]))
        if labels == "sampled":
            if uniform is None:
                uniform = torch.rand(
                    len(q), generator=generator, device=generator.device, dtype=torch.float64
                )
            q = (uniform < q).double()
    q, ref = q.to(logprob.dtype), ref_logprob.to(logprob.dtype)
    margin = beta * ((logprob[first] - logprob[second]) - (ref[first] - ref[second]))
    if not (len(logprob) if labels in ("single", "listwise") else len(pairs)):
        loss = 0 * logprob.sum()
    elif labels == "regression":
        loss = F.mse_loss(margin, (score[first] - score[second]).to(logprob.dtype)) / 2
    elif labels == "single":
        loss = F.mse_loss(beta * (logprob - ref), (score - value.double()).to(logprob.dtype)) / 2
    elif labels == "listwise":
        members = [group == g for g in group.unique()]
        goals = [(score[own] / beta).softmax(0).to(logprob.dtype) for own in members]
        each = [F.cross_entropy((logprob - ref)[own], goal) for own, goal in zip(members, goals, strict=True)]
        loss = sum(each) / len(each)
    else:
        loss = F.binary_cross_entropy_with_logits(margin, q)
    margin = margin.detach()
    right = (((margin > 0) == (q > 0.5)).double()).where((margin != 0) & (q != 0.5), 0.5)
    return PreferenceLoss(loss, logprob.detach(), margin, q, right.mean().to(logprob.dtype))


class PolicyLoss(NamedTuple):
    """Result of `lagrangian_policy_loss`; all but `loss` carry no gradient."""

    loss: Tensor
    logprob: Tensor  # [N]
    token_logprob: Tensor  # [T]
    advantage: Tensor  # [N], float64
    kl: Tensor
    clip_fraction: Tensor


def lagrangian_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,  # [N]
    reward: Tensor,  # [N]
    utility: Tensor,  # [N, J]
    lam: Tensor,  # [J]
    *,
    old_logprob: Tensor | None = None,  # [T]
    ref_logprob: Tensor | None = None,  # [T], with kl "score" [N]
    clip: tuple[float, float] | None = None,
    kl_coef: float = 0.0,
    kl: str = "k2",
    advantage: str = "rloo",
    normalize: str = "token",
    **options,
) -> PolicyLoss:
    """Returns the mean of -min(rho A, clip(rho) A) + kl_coef KL over tokens
    (PPO: Schulman et al. 2017, eq. 7).

    rho = exp(log p - old); with d = ref - log p the KL term is d^2 / 2 (k2) or exp(d) - d - 1 (k3; Schulman
    2020). With kl "score" kl_coef x (log-ratio of the sequence under the policy that sampled) is in its score
    instead. options: those of `sequence_logprob`.
    """
    rows = hidden, weight, target, cu_seqlens
    logprob, token_logprob = sequence_logprob(*rows, **options, return_token_logprob=True)
    token = token_logprob.double()
    penalty = log_ratio = None
    if kl == "score":
        if ref_logprob is not None:
            old = old_logprob.double() * options.get("token_weight", torch.ones(())).double()
            log_ratio = torch.stack([rows.sum() for rows in _per_sequence(old, cu_seqlens)]) - ref_logprob
            penalty = kl_coef * log_ratio
        ref_logprob, kl_coef = None, 0.0
    a_N = group_advantage(group, reward, utility, lam, advantage, penalty).to(token.device)
    a = a_N.repeat_interleave(cu_seqlens.diff().to(token.device))
    ratio = torch.exp(token - (token.detach() if old_logprob is None else old_logprob.double()))
    gain, clipped = ratio * a, torch.zeros_like(token)
    if clip is not None:
        bounded = ratio.clamp(1 - clip[0], 1 + clip[1]) * a
        gain, clipped = torch.minimum(gain, bounded), (bounded < gain).double()
    divergence = torch.full_like(token, torch.nan)
    if ref_logprob is not None:
        d = ref_logprob.double() - token
        divergence = d**2 / 2 if kl == "k2" else d.exp() - d - 1
    term = -gain + kl_coef * divergence if kl_coef else -gain

    def mean(x: Tensor) -> Tensor:
        w = options.get("token_weight")
        w = torch.ones_like(x) if w is None else w.to(x.device).double()
        if normalize == "token":
            return (w * x).sum() / w.sum()
        both = zip(_per_sequence(w * x, cu_seqlens), _per_sequence(w, cu_seqlens), strict=True)
        return sum(part.sum() / weights.sum() for part, weights in both if weights.sum() > 0) / len(a_N)

    nats = mean(divergence) if log_ratio is None else log_ratio.mean()
    loss, nats, share = (x.to(token_logprob.dtype) for x in (mean(term), nats, mean(clipped)))
    return PolicyLoss(loss, logprob.detach(), token_logprob.detach(), a_N, nats.detach(), share.detach())


def group_advantage(
    group: Tensor,
    reward: Tensor,
    utility: Tensor,
    lam: Tensor,
    advantage: str,
    penalty: Tensor | None = None,
) -> Tensor:
    """Returns the advantage of each sequence within its group, float64 [N].

    "rloo": s_n - mean of the others' s (Ahmadian et al. 2024), s less the penalty. "group_norm": the sum of
    reward and of each lam_j utility_j, each standardised in its group (Shao et al. 2024), 0 where all are
    equal, less the penalty's distance from its mean. A group of one gives 0.
    """
    reward, utility, lam = reward.double(), utility.double(), lam.double()
    penalty = torch.zeros_like(reward) if penalty is None else penalty
    result = torch.zeros_like(reward)
    for n in range(len(group)):
        members = (group == group[n]).nonzero()[:, 0].tolist()
        others = [m for m in members if m != n]
        if advantage == "rloo":
            s = reward + (utility * lam).sum(1) - penalty
            result[n] = s[n] - s[others].mean() if others else 0
            continue
        for x, factor in ((reward, 1.0), *zip(utility.T, lam, strict=True)):
            deviation = x[members].std(correction=0)
            if deviation > 1e-12 * x[members].abs().max():
                result[n] += factor * (x[n] - x[members].mean()) / deviation
        result[n] -= penalty[n] - penalty[members].mean()
    return result


class DualMoments(NamedTuple):
    """Result of `dual_moments`, float64."""

    value: Tensor
    gradient: Tensor  # [J]
    hessian: Tensor  # [J, J]
    ess: Tensor  # [P]


def dual_moments(
    reward_PG: Tensor,
    utility_PGJ: Tensor,
    lam_J: Tensor,
    beta: float,
    *,
    utility_mean: Tensor | float | None = None,
    threshold: Tensor | float | None = None,
) -> DualMoments:
    """Returns (beta / P) sum_p ln mean_i exp((r + lam . g') / beta) and its derivatives in lam, by autograd.

    g' = g - utility_mean - threshold; the mean defaults to that over prompts
    and responses, the threshold to 0.
    """
    reward, utility = reward_PG.double(), utility_PGJ.double()
    utility = utility - (utility.mean((0, 1)) if utility_mean is None else utility_mean)
    utility = utility - (0 if threshold is None else threshold)

    def value(lam: Tensor) -> Tensor:
        return beta * ((reward + utility @ lam) / beta).exp().mean(1).log().mean()

    lam = lam_J.double()
    gradient, hessian = (
        f(value, lam) for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
    )
    w = ((reward + utility @ lam) / beta).softmax(1)
    return DualMoments(value(lam), gradient, hessian, 1 / (w**2).sum(1))


def sample(
    logits: Tensor, arrival: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the token with the largest mass / arrival, and its log-prob among
    the tokens kept and among all.

    arrival [R, V]: exponential numbers; `kernels.sample` takes those of its keys.
    The top_k likeliest tokens are kept (0: all), then the fewest of these that hold top_p of their mass,
    the likelier ones and lower indices first.
    """
    p = (logits.double() / temperature).softmax(1)
    ordered, order = p.sort(dim=1, descending=True, stable=True)
    ordered[:, top_k or p.shape[1] :] = 0
    before = ordered.cumsum(1) - ordered
    ordered = ordered.where((before < top_p * ordered.sum(1, keepdim=True)) | (top_p == 1), 0)
    kept = torch.zeros_like(p).scatter(1, order, ordered)
    token = (kept / arrival).argmax(1)
    drawn = p.gather(1, token[:, None])[:, 0]
    return token, (drawn / kept.sum(1)).log(), drawn.log()


def decode_attention(
    query: Tensor,  # [R, H, d]
    prompt_keys: Tensor,  # [P, Hkv, Tp, d]
    prompt_values: Tensor,
    prompt_length: Tensor,  # [P]
    owner_offsets: Tensor,  # [P + 1]
    own_keys: Tensor,  # [R, Hkv, room, d]
    own_values: Tensor,
    used: Tensor,  # [1]
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns each row's attention to its prompt and to its own tokens, head by head, [R, H d]."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows, heads, width = query.shape
    group = heads // own_keys.shape[1]
    out = query.new_zeros(query.shape)
    for r in range(rows):
        p = int((owner_offsets[1:] <= r).sum())
        for h in range(heads):
            prompt, row = (p, h // group, slice(int(prompt_length[p]))), (r, h // group, slice(int(used)))
            k = torch.cat([prompt_keys[prompt], own_keys[row]]).to(wide)
            v = torch.cat([prompt_values[prompt], own_values[row]]).to(wide)
            if window is not None:
                k, v = k[-window:], v[-window:]
            scores = k @ query[r, h].to(wide) * (width**-0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[r, h] = (scores.softmax(0) @ v).to(query.dtype)
    return out.flatten(1)
