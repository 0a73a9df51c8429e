"""Sequence log-probs and the Lagrangian preference loss on them in one op."""

import torch

from kernels.checks import check_preference, check_rows
from kernels.reference import PreferenceLoss, preference_loss, sequence_sum, token_logprob
from kernels.sequence_logprob import row_workspace


def lagrangian_preference_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    pairs: torch.Tensor,
    reward: torch.Tensor | None,
    utility: torch.Tensor | None,
    lam: torch.Tensor | None,
    ref_logprob: torch.Tensor,
    *,
    beta: float,
    labels: str = "soft",
    preference: torch.Tensor | None = None,
    uniform: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    token_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget_bytes: int | None = None,
    debug: bool = False,
) -> PreferenceLoss:
    """Preference loss of pairs whose labels come from the Lagrangian score s = reward + utility @ lam.

    margin_k = beta * ((L_a - ref_a) - (L_b - ref_b)) for (a, b) = pairs[k], L = `sequence_logprob`; loss = mean_k of the binary
    cross-entropy of sigmoid(margin_k) against q_k; 0 with zero gradients where there is no pair.

    - hidden, weight, target, cu_seqlens, token_weight, bias, temperature, softcap, memory_budget_bytes, debug: as in `sequence_logprob`.
    - pairs [K, 2], int32 or int64: sequence numbers; a sequence may be in several pairs or in none.
    - reward [N], utility [N, J], lam [J], ref_logprob [N] (same weights and temperature): any float dtype, on the CPU or hidden's device,
      no gradients.
    - labels "soft": q = sigmoid(s_a - s_b). "sampled": q = 1 if u < sigmoid(s_a - s_b) else 0, with u = uniform [K], or drawn from
      generator. "given": q = preference [K] in [0, 1]; reward, utility and lam may be None.

    Returns `.loss`, differentiable once in hidden, weight and bias, and without gradients `.logprob` [N], `.margin` [K], `.preference`
    [K] (q) and `.accuracy`: the share of pairs with (margin > 0) == (q > 1/2), ties counting 1/2, NaN without pairs. Raises ValueError
    for arguments that cannot be used.
    """
    check_rows(hidden, weight, target, cu_seqlens, token_weight, bias, temperature, softcap, memory_budget_bytes, debug)
    labelling = (reward, utility, lam, ref_logprob, beta, labels, preference, uniform, generator)
    check_preference(len(cu_seqlens) - 1, hidden.device, pairs, *labelling, debug)
    token = token_logprob(hidden, weight, target, bias, temperature, softcap, memory_budget_bytes, row_workspace(hidden))
    return preference_loss(sequence_sum(token, token_weight, cu_seqlens), pairs, *labelling)
