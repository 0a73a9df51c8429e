"""The Lagrangian losses on sequence log-probs: the preference form and the policy-gradient form."""

import torch
from torch import Tensor

from kernels.loss_head.checks import check_policy, check_preference, check_rows, check_tolerance
from kernels.loss_head.logprob import needs_gradient
from kernels.loss_head.ops import (
    group_advantage_op,
    policy_pass_op,
    preference_labels_op,
    preference_pass_op,
    preference_terms_op,
    sequence_logprob_op,
)
from kernels.loss_head.policy import PolicyLoss
from kernels.loss_head.preference import UNBOUNDED, PreferenceLoss, draw_uniform
from kernels.loss_head.records import Aims, Head, Labels, Needs, Policy, Rows, Scores
from kernels.loss_head.schemes import budget_or_default, plan, row_workspace, tolerance_or_default


def lagrangian_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    reward: Tensor | None,
    utility: Tensor | None,
    lam: Tensor | None,
    ref_logprob: Tensor,
    *,
    beta: float,
    labels: str = "soft",
    preference: Tensor | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
    value: Tensor | None = None,
    group: Tensor | None = None,
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget_bytes: int | None = None,
    gradient_tolerance: float | None = None,
    debug: bool = False,
) -> PreferenceLoss:
    """Returns the loss that fits log-ratios to the Lagrangian score s = reward + utility @ lam.

    margin_k = beta * ((L_a - ref_a) - (L_b - ref_b)) for (a, b) = pairs[k], L = `sequence_logprob`.
    By labels the loss is

    - "soft", "sampled", "given": mean_k of the binary cross-entropy of sigmoid(margin_k) against q_k
    - "regression": mean_k of (margin_k - (s_a - s_b))^2 / 2
    - "single": mean over all sequences of (beta * (L_n - ref_n) - (s_n - value_n))^2 / 2
    - "listwise": mean over groups of the cross-entropy of softmax(s / beta) and softmax(L - ref)

    and 0 with zero gradients where there is nothing to take a mean of.

    - hidden, weight, target, cu_seqlens, token_weight, bias, temperature, softcap, memory_budget_bytes,
      debug: as in `sequence_logprob`.
    - gradient_tolerance: the largest error that entries of softmax - onehot left out of the gradients may
      make, relative to the largest element of each. None: what rounding makes anyway, 4e-6 in float32, 1e-3
      in bfloat16 and 1e-4 in float16; 0: nothing is left out. Compiled code on the CPU leaves any out of 512
      rows or more, Triton on a GPU of 1024, where most of a row's mass lies on few tokens; the host then
      waits for the GPU.
    - pairs [K, 2], int32 or int64: sequence numbers; a sequence may be in several pairs or in none. With
      "single" and "listwise" only margin, preference and accuracy come from them, and there may be none.
    - reward [N], utility [N, J], lam [J], ref_logprob [N] (same weights and temperature): any float dtype, on
      the CPU or hidden's device, no gradients.
    - labels: q = sigmoid(s_a - s_b), but with "sampled" q = 1 if u < sigmoid(s_a - s_b) else 0, with u =
      uniform [K] or drawn from generator, and with "given" q = preference [K] in [0, 1], where reward,
      utility and lam may be None.
    - value [N], with "single": stands for V(x) of a sequence's prompt (DRO, arXiv 2405.19107), for example
      beta * ln E_ref exp(s / beta); any float dtype, no gradient.
    - group [N], int32 or int64, with "listwise": sequences of one prompt have one number.

    cu_seqlens, pairs and group on the CPU let chunks hold whole pairs and groups, which is faster in a small
    budget; to capture the call in a CUDA graph give them on the GPU. `torch.compile` takes uniform, not
    generator.

    Returns `.loss`, differentiable once in hidden, weight and bias, and without gradients `.logprob` [N],
    `.margin` [K], `.preference` [K] (q) and `.accuracy`: the share of pairs with (margin > 0) == (q > 1/2),
    ties counting 1/2, NaN without pairs; `.gradient_bound`: a bound on the relative error of the gradients by
    what was left out, and `.left_out`: the probability left out of a row, on average. Raises ValueError for
    arguments that cannot be used.
    """
    rows, head = Rows(hidden, target, token_weight, cu_seqlens), Head(weight, bias, temperature, softcap)
    scores = Scores(reward, utility, lam)
    how = Labels(labels, preference, uniform, value, group, generator)
    check_rows(rows, head, memory_budget_bytes)
    check_tolerance(gradient_tolerance)
    check_preference(rows, pairs, scores, ref_logprob, beta, how)
    how = draw_uniform(how, pairs)
    with torch.no_grad():
        q, goal = preference_labels_op(hidden, pairs, *scores, ref_logprob, *how[:-1], float(beta), debug)
    aims = Aims(labels, pairs, q, goal, group, ref_logprob, float(beta))
    temperature, budget = float(temperature), budget_or_default(memory_budget_bytes, hidden.device)
    needs = Needs(needs_gradient(hidden), needs_gradient(weight), needs_gradient(bias))
    arguments = hidden, weight, bias, target, token_weight, cu_seqlens
    options = temperature, softcap, budget
    tolerance = tolerance_or_default(gradient_tolerance, hidden, weight, budget)
    planned = plan(row_workspace(hidden), hidden, head, budget, needs.hidden, needs.head)
    if needs.head:
        on_cpu = all(x is None or x.device.type == "cpu" for x in (cu_seqlens, pairs, group))
        # In float16 the head's gradient is added up relative to the size of coefficients, which must be known
        # or bounded.
        sized = hidden.dtype != torch.float16 or labels not in UNBOUNDED
        # What may be left out depends on the coefficients.
        in_forward_pass = (planned.kept < hidden.shape[0] or tolerance > 0) and on_cpu and sized
    else:
        in_forward_pass = needs.hidden and (planned.kind == "values" or tolerance > 0)
    if in_forward_pass:
        loss, logprob, margin, accuracy, left, *_ = preference_pass_op(
            *arguments, *aims, *options, tolerance, *needs, debug
        )
    else:
        logprob, *_ = sequence_logprob_op(*arguments, *options, needs.hidden, needs.head, debug)
        loss, margin, accuracy, _ = preference_terms_op(logprob, *aims)
        left = logprob.new_zeros(2)
    return PreferenceLoss(loss, logprob.detach(), margin, q, accuracy, *left.unbind())


def lagrangian_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,
    reward: Tensor,
    utility: Tensor,
    lam: Tensor,
    *,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    kl_coef: float = 0.0,
    kl: str = "k2",
    advantage: str = "rloo",
    normalize: str = "token",
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget_bytes: int | None = None,
    gradient_tolerance: float | None = None,
    debug: bool = False,
) -> PolicyLoss:
    """Returns the policy-gradient loss of sampled sequences, whose advantages come from the Lagrangian score
    s = reward + utility @ lam.

    loss = -mean min(rho A, clip(rho, 1 - low, 1 + high) A) + kl_coef * mean KL term, per token, A that of its
    sequence, rho = exp(log p - old_logprob).

    - hidden, weight, target, cu_seqlens, bias, temperature, softcap, memory_budget_bytes, debug:
      as in `sequence_logprob`.
    - gradient_tolerance: as in `lagrangian_preference_loss`.
    - group, int32 or int64 [N]: sequences of one prompt have one number. reward [N],
      utility [N, J], lam [J]: no gradients.
    - old_logprob [T]: log-probs under the policy that sampled; None takes the present ones (rho = 1).
      clip = (low, high) or None.
    - ref_logprob [T]: with d = ref_logprob - log p the KL term is d^2 / 2 (kl="k2") or exp(d) - d - 1 ("k3");
      needed with kl_coef > 0. Both see the KL of each token alone. kl="score" has no term and takes
      ref_logprob [N] and old_logprob: kl_coef * (sum of old_logprob - ref_logprob_n) is taken off s_n, whose
      gradient at the policy that sampled is that of the KL of whole sequences.
    - advantage "rloo": A_n = s_n - mean of the others in its group (Ahmadian et al. 2024). "group_norm": A_n
      = Z(reward) + sum_j lam_j Z(utility_j), Z = (x - group mean) / population standard deviation of the
      group, 0 where that is 0 (Shao et al. 2024, each part standardised first); what kl="score" takes off
      counts there less its group mean. A group of one gives 0.
    - normalize "token": mean over all tokens; "sequence": mean over sequences of per-sequence means, an empty
      one counting 0. Means are weighted by token_weight.

    Returns `.loss`, differentiable once in hidden, weight and bias, and without gradients `.logprob` [N] (as
    `sequence_logprob`), `.token_logprob` [T], `.advantage` [N] (float64), `.kl` (mean KL term in nats a
    token; with kl="score" mean log-ratio in nats a sequence; NaN without ref_logprob), `.clip_fraction`
    (share of tokens that the clip cuts off), `.gradient_bound` and `.left_out` (as the preference loss).
    Raises ValueError for arguments that cannot be used.
    """
    rows, head = Rows(hidden, target, token_weight, cu_seqlens), Head(weight, bias, temperature, softcap)
    scores = Scores(reward, utility, lam)
    policy = Policy(old_logprob, ref_logprob, clip, kl_coef, kl, normalize)
    check_rows(rows, head, memory_budget_bytes)
    check_tolerance(gradient_tolerance)
    check_policy(rows, group, scores, policy, advantage)
    with torch.no_grad():
        options = float(kl_coef), kl, advantage, debug
        advantage_N, nats = group_advantage_op(
            hidden, token_weight, cu_seqlens, group, *scores, old_logprob, ref_logprob, *options
        )
    in_score = kl == "score"
    low, high = (None, None) if clip is None else map(float, clip)
    budget = budget_or_default(memory_budget_bytes, hidden.device)
    loss, logprob, token, divergence, clipped, left, *_ = policy_pass_op(
        hidden,
        weight,
        bias,
        target,
        token_weight,
        cu_seqlens,
        advantage_N,
        old_logprob,
        None if in_score else ref_logprob,
        low,
        high,
        0.0 if in_score else float(kl_coef),
        kl,
        normalize,
        float(temperature),
        softcap,
        budget,
        tolerance_or_default(gradient_tolerance, hidden, weight, budget),
        needs_gradient(hidden),
        needs_gradient(weight),
        needs_gradient(bias),
        debug,
    )
    divergence = nats.to(loss.dtype) if in_score else divergence
    return PolicyLoss(loss, logprob, token, advantage_N, divergence, clipped, *left.unbind())
