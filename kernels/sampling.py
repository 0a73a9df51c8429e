"""Sampling from logits: temperature, top-k, top-p, one keyed uniform number per row and step, the token with both its log-probs."""

import torch
from torch import Tensor

from kernels import native

_BLOCK = 128


def sample(
    logits: Tensor, *, key: Tensor, step: int | Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row, by inversion of the cumulative distribution at a uniform number that depends on (key, step) alone.

    logits: float [R, V]; key: int64 [R]; step: an int, or an int64 tensor [] or [1] beside the key, which the host does not read, so that a
    captured graph takes the next step. Returns token int64 [R], logprob float32 [R] (of the processed distribution: temperature,
    then top-k, then top-p), model_logprob float32 [R] (of temperature alone). top_k 0 and top_p 1 are off. temperature 0 is greedy:
    logprob 0, model_logprob at temperature 1.

    Raises: ValueError naming the argument, its value and what is accepted.
    """
    if logits.dim() != 2 or key.shape != logits.shape[:1] or key.dtype != torch.int64:
        raise ValueError(f"logits {tuple(logits.shape)} and key {tuple(key.shape)} {key.dtype}: want [R, V] and int64 [R].")
    if temperature < 0:
        raise ValueError(f"temperature {temperature}: must be at least 0.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: must lie in (0, 1].")
    if top_k < 0:
        raise ValueError(f"top_k {top_k}: must be at least 0.")
    if logits.is_cuda and (temperature == 0 or (top_k == 0 and top_p == 1)):
        from kernels import triton_sampling

        if temperature == 0:
            token, model_logprob = triton_sampling.sample_rows(logits, None, 1.0)
            return token, torch.zeros_like(model_logprob), model_logprob
        token, logprob = triton_sampling.sample_rows(logits, uniform(key, step), temperature)
        return token, logprob, logprob.clone()
    z = logits.float()
    if temperature == 0:
        token = z.argmax(dim=1)
        return token, torch.zeros_like(z[:, 0]), _gather(z.log_softmax(dim=1), token)
    if top_k == 0 and top_p == 1 and native.serves(z.device, z.dtype):
        token, logprob = native.sample_rows(z, uniform(key, step), temperature)
        return token, logprob, logprob.clone()
    z = z / temperature
    z = z - z.amax(dim=1, keepdim=True)
    mass = z.exp()
    model_total = mass.sum(dim=1)
    total = model_total
    if top_k > 0 or top_p < 1:
        mass = _truncate(mass, model_total, top_p, top_k)
        total = mass.sum(dim=1)
    token = _invert(mass, uniform(key, step))
    chosen = _gather(z, token)
    return token, chosen - total.log(), chosen - model_total.log()


def uniform(key: Tensor, step: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64 [R], from int64 keys [R] and a step number, an int or an int64 tensor [] or [1] (splitmix64
    finaliser)."""
    step = step if isinstance(step, Tensor) else torch.full_like(key, step)
    return (_mix(_mix(key) + step * -7046029254386353131) >> 11 & (1 << 53) - 1).double() * 2.0**-53 + 2.0**-54


def combine(*parts: Tensor | int) -> Tensor:
    """One int64 key from several integers or int64 tensors (broadcast), for keyed random numbers."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _mix(key * 31 + torch.as_tensor(part, dtype=torch.int64) - 7046029254386353131)
    return key


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 with wrap-around; the shifts are made logical by masks."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)


def _gather(z: Tensor, token: Tensor) -> Tensor:
    return z.gather(1, token[:, None])[:, 0]


def _invert(mass: Tensor, u: Tensor) -> Tensor:
    """First index at which the cumulative mass [R, V] passes u times its total: blocks first, then inside one block, in float64."""
    rows, vocabulary = mass.shape
    padded = torch.nn.functional.pad(mass, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    blocks = padded.sum(dim=2, dtype=torch.float32).double().cumsum(dim=1)
    goal = (u * blocks[:, -1])[:, None]
    block = torch.searchsorted(blocks, goal, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = padded.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(dim=1)
    within = torch.searchsorted(inside, goal - before, right=True)
    # Rounding may put the goal past the block's own sum: then take the block's last token that has mass.
    last = _BLOCK - 1 - (padded.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0] > 0).flip(1).int().argmax(dim=1, keepdim=True)
    return (block * _BLOCK + torch.minimum(within, last))[:, 0]


def _truncate(mass: Tensor, total: Tensor, top_p: float, top_k: int) -> Tensor:
    """Zero all but the top_k largest, then all but the smallest set that holds top_p of what is left; ties keep the lower index."""
    ordered, order = mass.sort(dim=1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
        total = ordered.sum(dim=1)
    before = ordered.double().cumsum(dim=1) - ordered.double()
    ordered = torch.where(before < top_p * total.double()[:, None], ordered, 0.0)
    return torch.zeros_like(mass).scatter_(1, order, ordered)
