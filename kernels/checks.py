"""Argument checks of the public ops: every ValueError names the argument, the value and what is accepted.

Shapes, dtypes and devices are always checked. Values are read where the tensor lies on the CPU, and on a GPU only with `debug=True`,
because reading them makes the host wait for the device.
"""

import math
from numbers import Integral, Real

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str, value: object, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], devices: tuple[torch.device, ...] | None
) -> None:
    """Raise ValueError unless `value` is a tensor of this shape (None: any length), one of these dtypes and one of these devices (None:
    any)."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} = {value!r}: expected a tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}: expected a dense tensor, see Tensor.to_dense")
    if value.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=True)):
        wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise ValueError(f"{name} has shape {list(value.shape)}: expected {wanted}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {_names((value.dtype,))}: expected {_names(dtypes)}")
    if devices is not None and value.device not in devices:
        raise ValueError(f"{name} is on {value.device}: expected {' or '.join(sorted({str(device) for device in devices}))}")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite number above 0")


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least or (most is not None and value > most):
        accepted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} = {value!r}: expected a whole number {accepted}")


def check_sampling(temperature: object, top_p: object, top_k: object) -> None:
    """The settings of `sample`. Temperatures beyond the range would leave float32's."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise ValueError(f"temperature = {temperature!r}: expected 0 (greedy) or a number from 1e-6 to 1e6")
    if isinstance(top_p, bool) or not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p!r}: expected a number above 0 and at most 1 (1: off)")
    check_whole("top_k", top_k, 0)


def check_values(name: str, value: torch.Tensor, good: torch.Tensor, accepted: str) -> None:
    """Raise ValueError naming the first element of `value` where `good` is false."""
    if not bool(good.all()):
        index = (~good).nonzero()[0].tolist()
        raise ValueError(f"{name}{index} = {value[tuple(index)].item()}: expected {accepted}")


def readable(value: torch.Tensor, debug: bool) -> bool:
    return debug or value.device.type == "cpu"


def check_finite(name: str, value: torch.Tensor, debug: bool) -> None:
    if readable(value, debug):
        check_values(name, value, value.isfinite(), "a finite number")


def check_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget_bytes: int | None,
) -> None:
    """The arguments that the loss ops share, but for the values of tensors."""
    check_tensor("hidden", hidden, (None, None), FLOATS, None)
    here = (hidden.device,)
    here_or_cpu = (hidden.device, torch.device("cpu"))
    rows, width = hidden.shape
    check_tensor("weight", weight, (None, width), (hidden.dtype,), here)
    vocabulary = weight.shape[0]
    if vocabulary == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}: expected at least one vocabulary row")
    check_tensor("target", target, (rows,), INTEGERS, here)
    check_tensor("cu_seqlens", cu_seqlens, (None,), INTEGERS, here_or_cpu)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens has shape [0]: expected one entry more than there are sequences")
    if token_weight is not None:
        check_tensor("token_weight", token_weight, (rows,), FLOATS, here_or_cpu)
    if bias is not None:
        check_tensor("bias", bias, (vocabulary,), FLOATS, here)
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    budget = memory_budget_bytes
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, Integral) or budget <= 0):
        raise ValueError(f"memory_budget_bytes = {budget!r}: expected a whole number of bytes above 0")


def check_row_values(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_weight: torch.Tensor | None,
    debug: bool,
) -> None:
    """The values that `check_rows` leaves, where they may be read."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    if readable(target, debug):
        check_values("target", target, (target >= 0) & (target < vocabulary), f"a token id in [0, {vocabulary})")
    if readable(cu_seqlens, debug):
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != rows:
            first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
            raise ValueError(f"cu_seqlens starts at {first} and ends at {last}: expected 0 and {rows}, the number of rows of hidden")
        grows = torch.ones_like(cu_seqlens, dtype=torch.bool)
        grows[1:] = cu_seqlens[1:] >= cu_seqlens[:-1]
        check_values("cu_seqlens", cu_seqlens, grows, "a value not below the one before it")
    if token_weight is not None:
        check_finite("token_weight", token_weight, debug)


def check_preference(
    sequences: int,
    device: torch.device,
    pairs: torch.Tensor,
    reward: torch.Tensor | None,
    utility: torch.Tensor | None,
    lam: torch.Tensor | None,
    ref_logprob: torch.Tensor,
    beta: float,
    labels: str,
    preference: torch.Tensor | None,
    uniform: torch.Tensor | None,
    generator: torch.Generator | None,
) -> None:
    """The arguments of `lagrangian_preference_loss` beyond those of `check_rows`, but for the values of tensors."""
    places = (device, torch.device("cpu"))
    check_tensor("pairs", pairs, (None, 2), INTEGERS, places)
    check_tensor("ref_logprob", ref_logprob, (sequences,), FLOATS, places)
    check_positive("beta", beta)
    if labels not in ("soft", "sampled", "given"):
        raise ValueError(f"labels = {labels!r}: expected 'soft', 'sampled' or 'given'")
    if labels == "given":
        check_tensor("preference", preference, (pairs.shape[0],), FLOATS, places)
        return
    if preference is not None:
        raise ValueError(f"preference is given with labels = {labels!r}: pass labels='given' or leave it out")
    check_tensor("reward", reward, (sequences,), FLOATS, places)
    check_tensor("utility", utility, (sequences, None), FLOATS, places)
    check_tensor("lam", lam, (utility.shape[1],), FLOATS, places)
    if labels == "sampled":
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator = {generator!r}: expected a torch.Generator")
        if uniform is None and generator is None:
            raise ValueError("labels = 'sampled' has neither uniform nor generator: expected one of them")
        if uniform is not None:
            check_tensor("uniform", uniform, (pairs.shape[0],), FLOATS, places)


def check_preference_values(
    sequences: int,
    pairs: torch.Tensor,
    reward: torch.Tensor | None,
    utility: torch.Tensor | None,
    lam: torch.Tensor | None,
    ref_logprob: torch.Tensor,
    preference: torch.Tensor | None,
    uniform: torch.Tensor | None,
    debug: bool,
) -> None:
    """The values that `check_preference` leaves, where they may be read."""
    if readable(pairs, debug):
        check_values("pairs", pairs, (pairs >= 0) & (pairs < sequences), f"a sequence number in [0, {sequences})")
    check_finite("ref_logprob", ref_logprob, debug)
    if preference is not None:
        if readable(preference, debug):
            check_values("preference", preference, (preference >= 0) & (preference <= 1), "a probability in [0, 1]")
        return
    for name, value in (("reward", reward), ("utility", utility), ("lam", lam)):
        check_finite(name, value, debug)
    if uniform is not None and readable(uniform, debug):
        check_values("uniform", uniform, (uniform >= 0) & (uniform <= 1), "a number in [0, 1]")


def check_policy(
    sequences: int,
    hidden: torch.Tensor,
    group: torch.Tensor,
    reward: torch.Tensor,
    utility: torch.Tensor,
    lam: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    clip: tuple[float, float] | None,
    kl_coef: float,
    kl: str,
    advantage: str,
    normalize: str,
) -> None:
    """The arguments of `lagrangian_policy_loss` beyond those of `check_rows`, but for the values of tensors."""
    places = (hidden.device, torch.device("cpu"))
    check_tensor("group", group, (sequences,), INTEGERS, places)
    check_tensor("reward", reward, (sequences,), FLOATS, places)
    check_tensor("utility", utility, (sequences, None), FLOATS, places)
    check_tensor("lam", lam, (utility.shape[1],), FLOATS, places)
    for name, value in (("old_logprob", old_logprob), ("ref_logprob", ref_logprob)):
        if value is not None:
            check_tensor(name, value, (hidden.shape[0],), FLOATS, places)
    for name, value, accepted in (
        ("kl", kl, ("k2", "k3")),
        ("advantage", advantage, ("rloo", "group_norm")),
        ("normalize", normalize, ("token", "sequence")),
    ):
        if value not in accepted:
            raise ValueError(f"{name} = {value!r}: expected {' or '.join(map(repr, accepted))}")
    if not isinstance(kl_coef, Real) or isinstance(kl_coef, bool) or not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef = {kl_coef!r}: expected a finite number of at least 0")
    if kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef = {kl_coef} with ref_logprob = None: pass the reference's log-probs [T], or kl_coef = 0")
    if clip is not None:
        numbers = isinstance(clip, tuple) and len(clip) == 2 and all(isinstance(x, Real) and not isinstance(x, bool) for x in clip)
        if not numbers or not (0 <= clip[0] <= 1 and 0 <= clip[1] < math.inf):
            raise ValueError(f"clip = {clip!r}: expected (low, high) with low in [0, 1] and high at least 0")


def check_policy_values(
    group: torch.Tensor,
    reward: torch.Tensor,
    utility: torch.Tensor,
    lam: torch.Tensor,
    old_logprob: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    debug: bool,
) -> None:
    """The values that `check_policy` leaves, where they may be read. A group may be any integer."""
    for name, value in (
        ("reward", reward),
        ("utility", utility),
        ("lam", lam),
        ("old_logprob", old_logprob),
        ("ref_logprob", ref_logprob),
    ):
        if value is not None:
            check_finite(name, value, debug)


def check_dual(
    reward_PG: torch.Tensor,
    utility_PGJ: torch.Tensor,
    lam_J: torch.Tensor,
    beta: float,
    utility_mean: torch.Tensor | float | None,
    threshold: torch.Tensor | float | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The arguments of `dual_moments` but for the values of tensors; returns utility_mean and threshold as tensors."""
    check_tensor("reward_PG", reward_PG, (None, None), FLOATS, None)
    prompts, responses = reward_PG.shape
    if prompts == 0 or responses == 0:
        raise ValueError(f"reward_PG has shape {list(reward_PG.shape)}: expected at least one prompt and one response")
    places = (reward_PG.device, torch.device("cpu"))
    check_tensor("utility_PGJ", utility_PGJ, (prompts, responses, None), FLOATS, (reward_PG.device,))
    constraints = utility_PGJ.shape[2]
    check_tensor("lam_J", lam_J, (constraints,), FLOATS, places)
    check_positive("beta", beta)
    levels = []
    for name, value in (("utility_mean", utility_mean), ("threshold", threshold)):
        if value is not None:
            if not isinstance(value, (torch.Tensor, Real)) or isinstance(value, bool):
                raise ValueError(f"{name} = {value!r}: expected a number or a tensor [{constraints}]")
            value = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64)
            check_tensor(name, value, (constraints,) if value.dim() else (), FLOATS, places)
        levels.append(value)
    return tuple(levels)


def check_dual_values(
    reward_PG: torch.Tensor,
    utility_PGJ: torch.Tensor,
    lam_J: torch.Tensor,
    utility_mean: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> None:
    """The values that `check_dual` leaves, where they may be read."""
    for name, value in (
        ("reward_PG", reward_PG),
        ("utility_PGJ", utility_PGJ),
        ("lam_J", lam_J),
        ("utility_mean", utility_mean),
        ("threshold", threshold),
    ):
        if value is not None:
            check_finite(name, value, False)


def check_decode(
    query: torch.Tensor,
    prompt_keys: torch.Tensor,
    prompt_values: torch.Tensor,
    prompt_length: torch.Tensor,
    owner_offsets: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    used: torch.Tensor,
    scale: float | None,
    softcap: float | None,
    window: int | None,
) -> None:
    """The arguments of `decode_attention`, but for the values of tensors."""
    check_tensor("query", query, (None, None, None), FLOATS, None)
    (rows, heads, width), here, dtypes = query.shape, (query.device,), (query.dtype,)
    check_tensor("prompt_keys", prompt_keys, (None, None, None, width), dtypes, here)
    prompts, kv_heads = prompt_keys.shape[:2]
    check_tensor("prompt_values", prompt_values, tuple(prompt_keys.shape), dtypes, here)
    check_tensor("own_keys", own_keys, (rows, kv_heads, None, width), dtypes, here)
    check_tensor("own_values", own_values, tuple(own_keys.shape), dtypes, here)
    for name, value in (
        ("prompt_keys", prompt_keys), ("prompt_values", prompt_values), ("own_keys", own_keys), ("own_values", own_values)
    ):  # fmt: skip
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {list(value.stride())}: expected a contiguous tensor")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads and prompt_keys {kv_heads}: expected a multiple")
    check_tensor("prompt_length", prompt_length, (prompts,), (torch.int64,), here)
    check_tensor("owner_offsets", owner_offsets, (prompts + 1,), (torch.int64,), here)
    check_tensor("used", used, (1,), (torch.int64,), here)
    if scale is not None:
        check_positive("scale", scale)
    if softcap is not None:
        check_positive("softcap", softcap)
    if window is not None and (isinstance(window, bool) or not isinstance(window, Integral) or window < 1):
        raise ValueError(f"window = {window!r}: expected a whole number of tokens above 0")


def check_decode_values(
    query: torch.Tensor,
    prompt_keys: torch.Tensor,
    prompt_length: torch.Tensor,
    owner_offsets: torch.Tensor,
    own_keys: torch.Tensor,
    used: torch.Tensor,
) -> None:
    """The values that `check_decode` leaves, where they may be read."""
    if not readable(query, False):
        return
    longest, room, rows = prompt_keys.shape[2], own_keys.shape[2], len(query)
    check_values("prompt_length", prompt_length, (prompt_length >= 0) & (prompt_length <= longest), f"a number in [0, {longest}]")
    check_values("used", used, (used >= 1) & (used <= room), f"a number in [1, {room}]")
    first, last = int(owner_offsets[0]), int(owner_offsets[-1])
    if (first, last) != (0, rows) or not bool((owner_offsets.diff() >= 0).all()):
        raise ValueError(f"owner_offsets = {owner_offsets.tolist()}: expected numbers that start at 0, never decrease and end at {rows}")
