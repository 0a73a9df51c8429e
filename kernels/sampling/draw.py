"""Draws tokens from logits: temperature, top-k, top-p and a keyed random number for every token."""

from numbers import Real

import torch
from torch import Tensor

from kernels import compiled
from kernels.checks import FLOATS, check_tensor, check_whole
from kernels.random import exponential, stream
from kernels.sampling import draw_native


def sample(
    logits: Tensor,
    *,
    key: Tensor,
    step: int | Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row: the token with the largest mass / E, where E is exponential and depends on
    (key, step, token) alone.

    This is the Gumbel-max trick. A change of rounding changes the token only where the two best tokens lie
    within it (see `sample_with_gap`), or where it moves a token across the bound of top-k or top-p.

    - logits: float [R, V]; key: int64 [R].
    - step: an int, or an int64 tensor [] or [1] beside the key. The host does not read the tensor, so a
      captured graph takes the next step.
    - top_k 0 and top_p 1 are off. temperature 0 is greedy: logprob is 0 and model_logprob
      that at temperature 1.

    Returns token int64 [R], logprob float32 [R] (of the processed distribution: temperature, then top-k, then
    top-p) and model_logprob float32 [R] (of temperature alone). Raises ValueError naming the argument, its
    value and what is accepted.
    """
    return sample_with_gap(logits, key=key, step=step, temperature=temperature, top_p=top_p, top_k=top_k)[:3]


def sample_with_gap(
    logits: Tensor,
    *,
    key: Tensor,
    step: int | Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws as `sample` does, and also returns the gap between the two best perturbed logits
    log(mass / E), float32 [R].

    At temperature 0 the gap is that of the logits themselves. Where no other token has mass it is
    infinity, on a GPU above 80.
    """
    check_tensor("logits", logits, (None, None), FLOATS, None)
    check_tensor("key", key, (len(logits),), (torch.int64,), (logits.device,))
    if logits.shape[1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}: expected at least one column")
    check_sampling(temperature, top_p, top_k)
    if logits.is_cuda:
        from kernels.sampling import draw_triton

        streams = draw_triton.streams(key, step) if temperature else None
        return draw_triton.sample_rows(logits, streams, temperature or 1.0, top_k, top_p)
    z = logits.detach().float()
    if temperature == 0:
        token = z.argmax(dim=1)
        return token, torch.zeros_like(z[:, 0]), _gather(z.log_softmax(dim=1), token), _lead(z, token)
    if compiled.serves(z.device, z.dtype):
        return draw_native.sample_rows(z, stream(key, step), temperature, top_k, top_p)
    return _sample_by_torch(z, stream(key, step), temperature, top_k, top_p)


def check_sampling(temperature: object, top_p: object, top_k: object) -> None:
    """Raises ValueError unless `sample` takes these settings.

    Other temperatures would leave the range of float32.
    """
    number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not number or not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise ValueError(f"temperature = {temperature!r}: expected 0 (greedy) or a number from 1e-6 to 1e6")
    if isinstance(top_p, bool) or not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p!r}: expected a number above 0 and at most 1 (1: off)")
    check_whole("top_k", top_k, 0)


def _sample_by_torch(
    logits: Tensor, streams: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = logits / temperature
    z = z - z.amax(dim=1, keepdim=True)
    mass = z.exp()
    model_total = mass.sum(dim=1)
    total = model_total
    if top_k > 0 or top_p < 1:
        mass = _truncate(mass, top_p, top_k)
        total = mass.sum(dim=1)
    speed = mass.double() / exponential(streams, z.shape[1])
    token = speed.argmax(dim=1)
    chosen = _gather(z, token)
    return token, chosen - total.log(), chosen - model_total.log(), _lead(speed.log(), token)


def _gather(z: Tensor, token: Tensor) -> Tensor:
    return z.gather(1, token[:, None])[:, 0]


def _lead(x: Tensor, token: Tensor) -> Tensor:
    """Returns how far each row of x [R, V] is larger at its token than anywhere else, float32 [R]."""
    others = x.scatter(1, token[:, None], -torch.inf)
    return (_gather(x, token) - others.amax(dim=1)).float()


def _truncate(mass: Tensor, top_p: float, top_k: int) -> Tensor:
    """Zeroes all but the top_k largest, then all but the smallest set that holds top_p of what is left.

    Of equal masses the lower index is kept.
    """
    ordered, order = mass.sort(dim=1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    if top_p < 1:
        before = ordered.double().cumsum(dim=1) - ordered.double()
        ordered = torch.where(before < top_p * ordered.double().sum(dim=1, keepdim=True), ordered, 0.0)
    return torch.zeros_like(mass).scatter_(1, order, ordered)
