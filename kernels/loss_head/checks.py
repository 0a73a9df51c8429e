"""Checks of the arguments of the loss ops: first all but the values of tensors,
then the values that may be read.
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from kernels.checks import (
    FLOATS,
    INTEGERS,
    check_finite,
    check_positive,
    check_tensor,
    check_values,
    readable,
)
from kernels.loss_head.records import Head, Labels, Policy, Rows, Scores


def check_rows(rows: Rows, head: Head, memory_budget_bytes: int | None) -> None:
    """Checks the arguments that the loss ops share, but for the values of tensors."""
    hidden, weight = rows.hidden, head.weight
    check_tensor("hidden", hidden, (None, None), FLOATS, None)
    here = (hidden.device,)
    here_or_cpu = (hidden.device, torch.device("cpu"))
    count, width = hidden.shape
    check_tensor("weight", weight, (None, width), (hidden.dtype,), here)
    vocabulary = weight.shape[0]
    if vocabulary == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}: expected at least one vocabulary row")
    check_tensor("target", rows.target, (count,), INTEGERS, here)
    check_tensor("cu_seqlens", rows.cu_seqlens, (None,), INTEGERS, here_or_cpu)
    if rows.cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens has shape [0]: expected one entry more than there are sequences")
    if rows.token_weight is not None:
        check_tensor("token_weight", rows.token_weight, (count,), FLOATS, here_or_cpu)
    if head.bias is not None:
        check_tensor("bias", head.bias, (vocabulary,), FLOATS, here)
    check_positive("temperature", head.temperature)
    if head.softcap is not None:
        check_positive("softcap", head.softcap)
    budget = memory_budget_bytes
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, Integral) or budget <= 0):
        raise ValueError(f"memory_budget_bytes = {budget!r}: expected a whole number of bytes above 0")


def check_tolerance(gradient_tolerance: float | None) -> None:
    """Raises ValueError unless this is a number from 0 to below 1, or None."""
    value = gradient_tolerance
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
        cure = "expected a number from 0, which leaves nothing out, to below 1, or None"
        raise ValueError(f"gradient_tolerance = {value!r}: {cure}")


def check_row_values(rows: Rows, head: Head, debug: bool) -> None:
    """Checks the values that `check_rows` leaves."""
    count, vocabulary = rows.hidden.shape[0], head.weight.shape[0]
    target, cu_seqlens = rows.target, rows.cu_seqlens
    if readable(target, debug):
        inside = (target >= 0) & (target < vocabulary)
        check_values("target", target, inside, f"a token id in [0, {vocabulary})")
    check_offset_values(cu_seqlens, count, debug)
    if rows.token_weight is not None:
        check_finite("token_weight", rows.token_weight, debug)


def check_offset_values(cu_seqlens: Tensor, count: int, debug: bool) -> None:
    """Checks that sequences begin at 0, end at `count` and do not overlap."""
    if readable(cu_seqlens, debug):
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != count:
            first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
            wanted = f"0 and {count}, the number of rows of hidden"
            raise ValueError(f"cu_seqlens starts at {first} and ends at {last}: expected {wanted}")
        grows = torch.ones_like(cu_seqlens, dtype=torch.bool)
        grows[1:] = cu_seqlens[1:] >= cu_seqlens[:-1]
        check_values("cu_seqlens", cu_seqlens, grows, "a value not below the one before it")


def check_preference(
    rows: Rows, pairs: Tensor, scores: Scores, ref_logprob: Tensor, beta: float, labels: Labels
) -> None:
    """Checks what `lagrangian_preference_loss` takes beyond `check_rows`, but for the values of tensors."""
    places = (rows.hidden.device, torch.device("cpu"))
    check_tensor("pairs", pairs, (None, 2), INTEGERS, places)
    check_tensor("ref_logprob", ref_logprob, (rows.sequences,), FLOATS, places)
    check_positive("beta", beta)
    kind, preference, uniform, value, group, generator = labels
    kinds = ("soft", "sampled", "given", "regression", "single", "listwise")
    if kind not in kinds:
        raise ValueError(f"labels = {kind!r}: expected {', '.join(map(repr, kinds[:-1]))} or {kinds[-1]!r}")
    for name, argument, owner in (
        ("preference", preference, "given"),
        ("value", value, "single"),
        ("group", group, "listwise"),
    ):
        if argument is not None and kind != owner:
            cure = f"pass labels={owner!r} or leave it out"
            raise ValueError(f"{name} is given with labels = {kind!r}: {cure}")
    if kind == "given":
        check_tensor("preference", preference, (pairs.shape[0],), FLOATS, places)
        return
    _check_scores(rows.sequences, scores, places)
    if kind == "single":
        check_tensor("value", value, (rows.sequences,), FLOATS, places)
    if kind == "listwise":
        check_tensor("group", group, (rows.sequences,), INTEGERS, places)
    if kind == "sampled":
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator = {generator!r}: expected a torch.Generator")
        if uniform is None and generator is None:
            raise ValueError("labels = 'sampled' has neither uniform nor generator: expected one of them")
        if uniform is not None:
            check_tensor("uniform", uniform, (pairs.shape[0],), FLOATS, places)


def _check_scores(sequences: int, scores: Scores, places: tuple[torch.device, ...]) -> None:
    check_tensor("reward", scores.reward, (sequences,), FLOATS, places)
    check_tensor("utility", scores.utility, (sequences, None), FLOATS, places)
    check_tensor("lam", scores.lam, (scores.utility.shape[1],), FLOATS, places)


def check_preference_values(
    pairs: Tensor, scores: Scores, ref_logprob: Tensor, labels: Labels, debug: bool
) -> None:
    """Checks the values that `check_preference` leaves. A group may be any integer."""
    sequences = len(ref_logprob)
    if readable(pairs, debug):
        inside = (pairs >= 0) & (pairs < sequences)
        check_values("pairs", pairs, inside, f"a sequence number in [0, {sequences})")
    check_finite("ref_logprob", ref_logprob, debug)
    preference, uniform = labels.preference, labels.uniform
    if preference is not None:
        if readable(preference, debug):
            inside = (preference >= 0) & (preference <= 1)
            check_values("preference", preference, inside, "a probability in [0, 1]")
        return
    for name, number in scores._asdict().items():
        check_finite(name, number, debug)
    if labels.value is not None:
        check_finite("value", labels.value, debug)
    if uniform is not None and readable(uniform, debug):
        check_values("uniform", uniform, (uniform >= 0) & (uniform <= 1), "a number in [0, 1]")


def check_policy(rows: Rows, group: Tensor, scores: Scores, policy: Policy, advantage: str) -> None:
    """Checks what `lagrangian_policy_loss` takes beyond `check_rows`, but for the values of tensors."""
    places = (rows.hidden.device, torch.device("cpu"))
    check_tensor("group", group, (rows.sequences,), INTEGERS, places)
    _check_scores(rows.sequences, scores, places)
    length = rows.sequences if policy.kl == "score" else rows.hidden.shape[0]
    for name, value, size in (
        ("old_logprob", policy.old_logprob, rows.hidden.shape[0]),
        ("ref_logprob", policy.ref_logprob, length),
    ):
        if value is not None:
            check_tensor(name, value, (size,), FLOATS, places)
    for name, value, accepted in (
        ("kl", policy.kl, ("k2", "k3", "score")),
        ("advantage", advantage, ("rloo", "group_norm")),
        ("normalize", policy.normalize, ("token", "sequence")),
    ):
        if value not in accepted:
            raise ValueError(f"{name} = {value!r}: expected {' or '.join(map(repr, accepted))}")
    kl_coef, clip = policy.kl_coef, policy.clip
    if not isinstance(kl_coef, Real) or isinstance(kl_coef, bool) or not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef = {kl_coef!r}: expected a finite number of at least 0")
    if kl_coef and policy.ref_logprob is None:
        cure = f"pass the reference's log-probs [{'N' if policy.kl == 'score' else 'T'}], or kl_coef = 0"
        raise ValueError(f"kl_coef = {kl_coef} with ref_logprob = None: {cure}")
    if policy.kl == "score" and policy.ref_logprob is not None and policy.old_logprob is None:
        cure = "pass the log-probs [T] under the policy that sampled"
        raise ValueError(f"kl = 'score' with old_logprob = None: {cure}")
    if clip is not None and not _is_clip(clip):
        wanted = "(low, high) with low in [0, 1] and high at least 0"
        raise ValueError(f"clip = {clip!r}: expected {wanted}")


def _is_clip(clip: object) -> bool:
    if not isinstance(clip, tuple) or len(clip) != 2:
        return False
    numbers = all(isinstance(x, Real) and not isinstance(x, bool) for x in clip)
    return numbers and 0 <= clip[0] <= 1 and 0 <= clip[1] < math.inf


def check_policy_values(
    scores: Scores, old_logprob: Tensor | None, ref_logprob: Tensor | None, debug: bool
) -> None:
    """Checks the values that `check_policy` leaves. A group may be any integer."""
    for name, value in (
        *scores._asdict().items(),
        ("old_logprob", old_logprob),
        ("ref_logprob", ref_logprob),
    ):
        if value is not None:
            check_finite(name, value, debug)
