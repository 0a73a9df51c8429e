"""The loss ops as torch.library ops, each once for CPU and CUDA alike, with the shapes
of its results and its gradient.

A registered op takes flat arguments; each function here packs them into records at once. `row_workspace`
chooses what does the rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.loss_head.checks import (
    check_offset_values,
    check_policy_values,
    check_preference_values,
    check_row_values,
)
from kernels.loss_head.passes import (
    empty_values,
    policy_pass,
    preference_pass,
    sequence_logprob_backward,
    sequence_logprob_pass,
    within_tolerance,
)
from kernels.loss_head.policy import group_advantage, sequence_log_ratio
from kernels.loss_head.preference import GOALS, preference_labels, preference_terms
from kernels.loss_head.records import (
    Aims,
    Head,
    Labels,
    Needs,
    Policy,
    Rows,
    Scores,
    statistics_dtype,
)
from kernels.loss_head.schemes import plan, row_workspace

_ONCE = (
    "sequence_logprob and the losses on it have first derivatives only, so their gradients cannot be "
    "differentiated again"
)
_PACKED = "sequence_logprob and the losses on it take packed sequences instead of a batch dimension"


class _FirstOrderOnly(torch.autograd.Function):
    """Passes a gradient on; differentiating it again is an error instead of a silently missing term."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(f"double backward is not supported: {_ONCE}")


def _first_order_only(gradients: list[Tensor | None], *sources: Tensor | None) -> list[Tensor | None]:
    """Returns the gradients; where a graph of them is recorded, differentiating them again is an error."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if g is None else _FirstOrderOnly.apply(g, *sources) for g in gradients]


def _register(name: str, function: Callable, shapes: Callable) -> Callable:
    op = torch.library.custom_op(f"dualign::{name}", function, mutates_args=(), device_types=("cpu", "cuda"))
    op.register_fake(shapes)
    op.register_vmap(_refuse_vmap)
    return op


def _refuse_vmap(*arguments):
    raise RuntimeError(f"vmap is not supported: {_PACKED}")


def _gradient_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = zip((hidden, weight, bias), needs, strict=True)
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in inputs)


# The op sequence_logprob.


def _sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    cu_seqlens: Tensor,
    temperature: float,
    softcap: float | None,
    budget: int,
    needs_hidden: bool,
    needs_head: bool,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, head = Rows(hidden, target, token_weight, cu_seqlens), Head(weight, bias, temperature, softcap)
    check_row_values(rows, head, debug)
    return sequence_logprob_pass(rows, head, budget, needs_hidden, needs_head)


def _sequence_logprob_shapes(
    hidden,
    weight,
    bias,
    target,
    token_weight,
    cu_seqlens,
    temperature,
    softcap,
    budget,
    needs_hidden,
    needs_head,
    debug,
):
    workspace = row_workspace(hidden)
    head = Head(weight, bias, temperature, softcap)
    token, *kept = empty_values(
        workspace, hidden, weight, plan(workspace, hidden, head, budget, needs_hidden, needs_head)
    )
    return token.new_empty(cu_seqlens.shape[0] - 1), token, *kept


def _sequence_logprob_backward(
    d_logprob: Tensor,
    d_token: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    cu_seqlens: Tensor,
    kept: Tensor,
    state: Tensor,
    product: Tensor,
    temperature: float,
    softcap: float | None,
    budget: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, head = Rows(hidden, target, token_weight, cu_seqlens), Head(weight, bias, temperature, softcap)
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    return sequence_logprob_backward((d_logprob, d_token), rows, head, (kept, state, product), budget, needs)


def _sequence_logprob_backward_shapes(d_logprob, d_token, hidden, weight, bias, *rest):
    return _gradient_shapes(hidden, weight, bias, rest[-3:])


sequence_logprob_op = _register("sequence_logprob", _sequence_logprob, _sequence_logprob_shapes)
_backward_op = _register(
    "sequence_logprob_backward", _sequence_logprob_backward, _sequence_logprob_backward_shapes
)


def _save_sequence_logprob(ctx, inputs, output) -> None:
    hidden, weight, bias, target, token_weight, cu_seqlens, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, target, token_weight, cu_seqlens, *output[2:])


def _differentiate_sequence_logprob(ctx, d_logprob, d_token, *rest):
    saved = ctx.saved_tensors
    hidden, weight, bias, cu_seqlens = *saved[:3], saved[5]
    if d_logprob is None and d_token is None:
        return (None,) * 12
    if d_logprob is None:
        d_logprob = d_token.new_zeros(cu_seqlens.shape[0] - 1)
    needs = ctx.needs_input_grad[:3]
    with torch.no_grad():
        # The first three options are temperature, softcap and budget.
        gradients = _backward_op(d_logprob, d_token, *saved, *ctx.options[:3], *needs)
    gradients = [x if need else None for x, need in zip(gradients, needs, strict=True)]
    return *_first_order_only(gradients, d_logprob, d_token, hidden, weight, bias), *(None,) * 9


sequence_logprob_op.register_autograd(_differentiate_sequence_logprob, setup_context=_save_sequence_logprob)


# The ops of the preference loss.


def _preference_labels(
    hidden: Tensor,
    pairs: Tensor,
    reward: Tensor | None,
    utility: Tensor | None,
    lam: Tensor | None,
    ref_logprob: Tensor,
    labels: str,
    preference: Tensor | None,
    uniform: Tensor | None,
    value: Tensor | None,
    group: Tensor | None,
    beta: float,
    debug: bool,
) -> tuple[Tensor, Tensor]:
    scores, how = Scores(reward, utility, lam), Labels(labels, preference, uniform, value, group)
    check_preference_values(pairs, scores, ref_logprob, how, debug)
    q, goal = preference_labels(pairs, scores, how, beta, hidden.device, statistics_dtype(hidden.dtype))
    # An op must not hand back one of its arguments.
    return q.clone() if labels == "given" else q, goal


def _preference_labels_shapes(hidden, pairs, reward, utility, lam, ref_logprob, labels, *rest):
    length = pairs.shape[0] if labels == "regression" else ref_logprob.shape[0]
    q = hidden.new_empty(pairs.shape[0], dtype=statistics_dtype(hidden.dtype))
    return q, q.new_empty(length if labels in GOALS else 0, dtype=torch.float64)


preference_labels_op = _register("preference_labels", _preference_labels, _preference_labels_shapes)


def _preference_terms(
    logprob: Tensor,
    labels: str,
    pairs: Tensor,
    q: Tensor,
    goal: Tensor,
    group: Tensor | None,
    ref_logprob: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return preference_terms(logprob, Aims(labels, pairs, q, goal, group, ref_logprob, beta))


def _preference_terms_shapes(logprob, labels, pairs, *rest):
    margin = logprob.new_empty(pairs.shape[0])
    return logprob.new_empty(()), margin, logprob.new_empty(()), torch.empty_like(logprob)


preference_terms_op = _register("preference_terms", _preference_terms, _preference_terms_shapes)


def _save_coefficient(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], output[3])


def _scale_coefficient(ctx, d_loss, *rest):
    logprob, coefficient = ctx.saved_tensors
    if d_loss is None:
        return (None,) * 8
    with torch.no_grad():
        gradient = coefficient * d_loss
    return *_first_order_only([gradient], d_loss, logprob), *(None,) * 7


preference_terms_op.register_autograd(_scale_coefficient, setup_context=_save_coefficient)


def _preference_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    cu_seqlens: Tensor,
    labels: str,
    pairs: Tensor,
    q: Tensor,
    goal: Tensor,
    group: Tensor | None,
    ref_logprob: Tensor,
    beta: float,
    temperature: float,
    softcap: float | None,
    budget: int,
    tolerance: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = Rows(hidden, target, token_weight, cu_seqlens)
    head = Head(weight, bias, temperature, softcap, tolerance)
    check_row_values(rows, head, debug)
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    aims = Aims(labels, pairs, q, goal, group, ref_logprob, beta)
    return within_tolerance(lambda head: preference_pass(rows, head, aims, budget, needs), head)


def _preference_pass_shapes(hidden, weight, bias, target, token_weight, cu_seqlens, labels, pairs, *rest):
    dtype = statistics_dtype(hidden.dtype)
    loss, accuracy = (hidden.new_empty((), dtype=dtype) for _ in range(2))
    logprob = hidden.new_empty(cu_seqlens.shape[0] - 1, dtype=dtype)
    margin = hidden.new_empty(pairs.shape[0], dtype=dtype)
    left = loss.new_empty(2)
    return loss, logprob, margin, accuracy, left, *_gradient_shapes(hidden, weight, bias, rest[-4:-1])


preference_pass_op = _register("preference_pass", _preference_pass, _preference_pass_shapes)


# The ops of the policy loss.


def _group_advantage(
    hidden: Tensor,
    token_weight: Tensor | None,
    cu_seqlens: Tensor,
    group: Tensor,
    reward: Tensor,
    utility: Tensor,
    lam: Tensor,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    kl_coef: float,
    kl: str,
    advantage: str,
    debug: bool,
) -> tuple[Tensor, Tensor]:
    scores, device = Scores(reward, utility, lam), hidden.device
    check_policy_values(scores, old_logprob, ref_logprob, debug)
    if kl != "score" or ref_logprob is None:
        nats = torch.full((), torch.nan, dtype=torch.float64, device=device)
        return group_advantage(group, scores, advantage, None, device), nats
    check_offset_values(cu_seqlens, hidden.shape[0], debug)
    log_ratio = sequence_log_ratio(old_logprob, ref_logprob, token_weight, cu_seqlens, device)
    return group_advantage(group, scores, advantage, kl_coef * log_ratio, device), log_ratio.mean()


def _group_advantage_shapes(hidden, token_weight, cu_seqlens, group, *rest):
    return hidden.new_empty(group.shape[0], dtype=torch.float64), hidden.new_empty((), dtype=torch.float64)


group_advantage_op = _register("group_advantage", _group_advantage, _group_advantage_shapes)


def _policy_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    cu_seqlens: Tensor,
    advantage: Tensor,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    clip_low: float | None,
    clip_high: float | None,
    kl_coef: float,
    kl: str,
    normalize: str,
    temperature: float,
    softcap: float | None,
    budget: int,
    tolerance: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = Rows(hidden, target, token_weight, cu_seqlens)
    head = Head(weight, bias, temperature, softcap, tolerance)
    check_row_values(rows, head, debug)
    clip = None if clip_low is None else (clip_low, clip_high)
    policy = Policy(old_logprob, ref_logprob, clip, kl_coef, kl, normalize)
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    return within_tolerance(lambda head: policy_pass(rows, head, advantage, policy, budget, needs), head)


def _policy_pass_shapes(hidden, weight, bias, target, token_weight, cu_seqlens, *rest):
    dtype = statistics_dtype(hidden.dtype)
    loss, kl, clipped = (hidden.new_empty((), dtype=dtype) for _ in range(3))
    logprob = hidden.new_empty(cu_seqlens.shape[0] - 1, dtype=dtype)
    token = hidden.new_empty(hidden.shape[0], dtype=dtype)
    left = loss.new_empty(2)
    return loss, logprob, token, kl, clipped, left, *_gradient_shapes(hidden, weight, bias, rest[-4:-1])


policy_pass_op = _register("policy_pass", _policy_pass, _policy_pass_shapes)


# The last two ops form their gradients in the forward pass; these are their last three results.


def _save_gradients(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.n_inputs = len(inputs)
    ctx.save_for_backward(*inputs[:3], *output[-3:])


def _scale_gradients(ctx, d_loss, *rest):
    hidden, weight, bias, *gradients = ctx.saved_tensors
    if d_loss is None:
        return (None,) * ctx.n_inputs
    # Mostly d_loss is 1, and the gradients are large. But on a GPU the host does not look,
    # and a traced number has no value.
    if type(d_loss) is not Tensor or d_loss.device.type != "cpu" or float(d_loss) != 1:
        with torch.no_grad():
            gradients = [x * d_loss for x in gradients]
    gradients = [x if need else None for x, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)]
    return *_first_order_only(gradients, d_loss, hidden, weight, bias), *(None,) * (ctx.n_inputs - 3)


preference_pass_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
policy_pass_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
