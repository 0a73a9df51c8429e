"""The terms of the preference loss in each form of labels: labels and goals from scores, the loss, and its
derivative in the log-probs in closed form."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.loss_head.records import Aims, Labels, Scores
from kernels.loss_head.terms import Groups

# Forms whose log-probs have a goal; the others have the label q of each pair.
GOALS = ("regression", "single", "listwise")
# Least squares: coefficients grow with the distance from the goal.
UNBOUNDED = ("regression", "single")


class PreferenceLoss(NamedTuple):
    """Result of `lagrangian_preference_loss`; all but `loss` carry no gradient."""

    loss: Tensor  # scalar
    logprob: Tensor  # [N]
    margin: Tensor  # [K]
    preference: Tensor  # [K], q
    accuracy: Tensor  # scalar
    gradient_bound: Tensor  # scalar: the largest error of dH and dW by what was left out, relative
    left_out: Tensor  # scalar: the probability left out of a row's gradient, on average


def draw_uniform(labels: Labels, pairs: Tensor) -> Labels:
    """Draws the uniform numbers [K] of sampled labels where they are not given."""
    if labels.kind != "sampled" or labels.uniform is not None:
        return labels
    generator = labels.generator
    uniform = torch.rand(len(pairs), generator=generator, device=generator.device, dtype=torch.float64)
    return labels._replace(uniform=uniform)


def preference_labels(
    pairs: Tensor,
    scores: Scores,
    labels: Labels,
    beta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns q [K] of `lagrangian_preference_loss` and the goal of `Aims`, from scores
    s = reward + utility @ lam in float64.
    """

    def here(value: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return value.detach().to(device, dtype, non_blocking=True)

    no_goal = torch.zeros(0, dtype=torch.float64, device=device)
    if labels.kind == "given":
        return here(labels.preference, dtype), no_goal
    first, second = here(pairs, torch.int64).unbind(1)
    score = here(scores.reward) + here(scores.utility) @ here(scores.lam)
    difference = score[first] - score[second]
    q = torch.sigmoid(difference)
    if labels.kind == "sampled":
        q = (here(labels.uniform) < q).double()
    if labels.kind == "regression":
        return q.to(dtype), difference
    if labels.kind == "single":
        return q.to(dtype), score - here(labels.value)
    if labels.kind == "listwise":
        return q.to(dtype), Groups(labels.group, device).log_softmax(score / beta).exp()
    return q.to(dtype), no_goal


def aims_on_device(aims: Aims, device: torch.device) -> Aims:
    """Returns the aims where the log-probs are, numbers in float64."""
    group = aims.group
    return aims._replace(
        pairs=aims.pairs.to(device, torch.int64, non_blocking=True),
        q=aims.q.double(),
        group=None if group is None else group.to(device, non_blocking=True),
        ref_logprob=aims.ref_logprob.detach().to(device, torch.float64, non_blocking=True),
    )


def preference_loss(logprob: Tensor, aims: Aims) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the preference loss, margins [K] and accuracy of logprob [N]; the loss is differentiable in it.

    With rho = L - ref, x = beta (rho_a - rho_b) and s the modified reward r + lam . g: "soft", "sampled" and
    "given" take the mean of -q log sigmoid(x) - (1 - q) log sigmoid(-x), the DPO objective (Rafailov et al.
    2023, eq. 7); "regression" that of (x - (s_a - s_b))^2 / 2; "single" that of (beta rho - (s - V))^2 / 2
    over sequences (DRO, arXiv 2405.19107); "listwise" that of the cross-entropy of softmax(s / beta) and
    softmax(rho) over groups. All is computed in float64. aims: from `aims_on_device`.
    """
    first, second = aims.pairs.unbind(1)
    ratio = logprob.double() - aims.ref_logprob
    margin = aims.beta * (ratio[first] - ratio[second])
    if aims.labels == "listwise":
        groups = Groups(aims.group, logprob.device)
        loss = -(aims.goal * groups.log_softmax(ratio)).sum() / groups.count.clamp_min(1)
    elif aims.labels == "single":
        loss = (aims.beta * ratio - aims.goal).square().sum() / (2 * max(1, len(ratio)))
    elif aims.labels == "regression":
        loss = (margin - aims.goal).square().sum() / (2 * max(1, len(margin)))
    else:
        entropy = -aims.q * F.logsigmoid(margin) - (1 - aims.q) * F.logsigmoid(-margin)
        loss = entropy.sum() / max(1, len(margin))
    margin = margin.detach()
    tie = (margin == 0) | (aims.q == 0.5)
    accuracy = torch.where(tie, 0.5, ((margin > 0) == (aims.q > 0.5)).double()).mean()
    return loss.to(logprob.dtype), margin.to(logprob.dtype), accuracy.to(logprob.dtype)


class Ends(NamedTuple):
    """The 2 K ends of pairs by sequence, so that sums over a sequence's ends have a fixed order."""

    order: Tensor  # [2 K]
    offsets: Tensor  # [N + 1]: where each sequence begins


def order_of(aims: Aims, sequences: int) -> Ends | Groups | None:
    """Returns what `preference_coefficient` sums by; it is the same for all log-probs.

    aims: from `aims_on_device`.
    """
    device = aims.pairs.device
    if aims.labels == "listwise":
        return Groups(aims.group, device)
    if aims.labels == "single":
        return None
    ends, order = aims.pairs.t().reshape(-1).sort(stable=True)
    return Ends(order, torch.searchsorted(ends, torch.arange(sequences + 1, device=device)))


def preference_coefficient(logprob: Tensor, aims: Aims, by: Ends | Groups | None) -> Tensor:
    """Returns d loss / d logprob [N] of the preference loss.

    aims: from `aims_on_device`; by: from `order_of`.
    """
    beta = aims.beta
    ratio = logprob.double() - aims.ref_logprob
    if aims.labels == "listwise":
        return ((by.log_softmax(ratio).exp() - aims.goal) / by.count.clamp_min(1)).to(logprob.dtype)
    if aims.labels == "single":
        return ((beta * ratio - aims.goal) * (beta / max(1, len(ratio)))).to(logprob.dtype)
    margin = beta * (ratio[aims.pairs[:, 0]] - ratio[aims.pairs[:, 1]])
    residual = margin - aims.goal if aims.labels == "regression" else torch.sigmoid(margin) - aims.q
    kappa = residual * (beta / max(1, len(margin)))
    signed = torch.cat([kappa, -kappa])[by.order]
    return torch.segment_reduce(signed, "sum", offsets=by.offsets, unsafe=True).to(logprob.dtype)


def preference_terms(logprob: Tensor, aims: Aims) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, margin [K], accuracy and d loss / d logprob [N]."""
    aims = aims_on_device(aims, logprob.device)
    by = order_of(aims, len(logprob))
    return *preference_loss(logprob, aims), preference_coefficient(logprob, aims, by)


def preference_links(aims: Aims) -> list[tuple[int, int]]:
    """Returns pairs of sequences whose coefficients depend on each other's log-probs; a sequence that stands
    in none has no gradient. The host reads pairs and group.
    """
    if aims.labels == "single":
        return [(n, n) for n in range(len(aims.ref_logprob))]
    if aims.labels == "listwise":
        first: dict[int, int] = {}
        return [(first.setdefault(g, n), n) for n, g in enumerate(aims.group.tolist())]
    return [(a, b) for a, b in aims.pairs.tolist()]


def largest_coefficient(aims: Aims) -> float | None:
    """Returns the size that a sequence's coefficient has at most for each pair or group that it stands in;
    None where the form of labels does not bound it. The host reads the group.
    """
    if aims.labels in UNBOUNDED:
        return None
    if aims.labels == "listwise":
        return 1 / max(1, len(set(aims.group.tolist())))
    return aims.beta / max(1, len(aims.pairs))
