"""Sampling from logits: temperature, top-k, top-p, a keyed random number for every token, the drawn token with both its log-probs."""

import torch
from torch import Tensor

from kernels.checks import FLOATS, check_sampling, check_tensor
from kernels.loss_head import rows_native as native

_WORD = (1 << 32) - 1


def sample(
    logits: Tensor, *, key: Tensor, step: int | Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row: the one with the largest mass / E, its E exponential and dependent on (key, step, token) alone. This is Gumbel's
    maximum; a change of rounding changes the token only where the two best lie within it, see `sample_with_gap`, or where it moves a token
    across the bound of top-k or top-p.

    logits: float [R, V]; key: int64 [R]; step: an int, or an int64 tensor [] or [1] beside the key, which the host does not read, so that a
    captured graph takes the next step. Returns token int64 [R], logprob float32 [R] (of the processed distribution: temperature,
    then top-k, then top-p), model_logprob float32 [R] (of temperature alone). top_k 0 and top_p 1 are off. temperature 0 is greedy:
    logprob 0, model_logprob at temperature 1.

    Raises: ValueError naming the argument, its value and what is accepted.
    """
    return sample_with_gap(logits, key=key, step=step, temperature=temperature, top_p=top_p, top_k=top_k)[:3]


def sample_with_gap(
    logits: Tensor, *, key: Tensor, step: int | Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sample`, and by how much the best perturbed logit log(mass / E) passes the second best, float32 [R]: at temperature 0 of the logits
    themselves; infinity, or above 80 on a GPU, where no other token has mass."""
    check_tensor("logits", logits, (None, None), FLOATS, None)
    check_tensor("key", key, (len(logits),), (torch.int64,), (logits.device,))
    if logits.shape[1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}: expected at least one column")
    check_sampling(temperature, top_p, top_k)
    if logits.is_cuda:
        from kernels.sampling import draw_triton as triton_sampling

        return triton_sampling.sample_rows(logits, stream(key, step) if temperature else None, temperature or 1.0, top_k, top_p)
    z = logits.detach().float()
    if temperature == 0:
        token = z.argmax(dim=1)
        return token, torch.zeros_like(z[:, 0]), _gather(z.log_softmax(dim=1), token), _lead(z, token)
    if native.serves(z.device, z.dtype):
        return native.sample_rows(z, stream(key, step), temperature, top_k, top_p)
    z = z / temperature
    z = z - z.amax(dim=1, keepdim=True)
    mass = z.exp()
    model_total = mass.sum(dim=1)
    total = model_total
    if top_k > 0 or top_p < 1:
        mass = _truncate(mass, top_p, top_k)
        total = mass.sum(dim=1)
    speed = mass.double() / exponential(stream(key, step), z.shape[1])
    token = speed.argmax(dim=1)
    chosen = _gather(z, token)
    return token, chosen - total.log(), chosen - model_total.log(), _lead(speed.log(), token)


def stream(key: Tensor, step: int | Tensor) -> Tensor:
    """int64 [R] that names the random numbers of (key, step); key: int64 [R]; step: an int, or an int64 tensor [] or [1]."""
    step = step if isinstance(step, Tensor) else torch.full_like(key, step)
    return _mix(_mix(key) + step * -7046029254386353131)


def uniform(key: Tensor, step: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64 [R], of (key, step), see `stream`."""
    return (stream(key, step) >> 11 & (1 << 53) - 1).double() * 2.0**-53 + 2.0**-54


def exponential(streams: Tensor, count: int) -> Tensor:
    """Exponential numbers of mean 1, float64 [R, count], of int64 streams [R]: number i is -log(1 - v) with v of 64 bits of its own."""
    low, high = streams[:, None] & _WORD, streams[:, None] >> 32 & _WORD
    bits = _bits(torch.arange(count, device=streams.device), low, high)
    more = _bits(bits, high, low) | 1
    return -torch.log1p(-(bits.double() * 2.0**-32 + more.double() * 2.0**-64))


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


def _bits(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """32 random bits of each number x."""
    return _scrambled(_scrambled((x * 0x9E3779B9 + low) & _WORD) ^ high)


def _scrambled(x: Tensor) -> Tensor:
    """lowbias32 on 32 bits in an int64."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def _gather(z: Tensor, token: Tensor) -> Tensor:
    return z.gather(1, token[:, None])[:, 0]


def _lead(x: Tensor, token: Tensor) -> Tensor:
    """How far each row of x [R, V] is larger at its token than anywhere else, float32 [R]."""
    others = x.scatter(1, token[:, None], -torch.inf)
    return (_gather(x, token) - others.amax(dim=1)).float()


def _truncate(mass: Tensor, top_p: float, top_k: int) -> Tensor:
    """Zero all but the top_k largest, then all but the smallest set that holds top_p of what is left; ties keep the lower index."""
    ordered, order = mass.sort(dim=1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    if top_p < 1:
        before = ordered.double().cumsum(dim=1) - ordered.double()
        ordered = torch.where(before < top_p * ordered.double().sum(dim=1, keepdim=True), ordered, 0.0)
    return torch.zeros_like(mass).scatter_(1, order, ordered)
