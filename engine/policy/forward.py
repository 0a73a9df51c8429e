"""Log-probs and states of given responses, by the same forward that training uses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model import packing
from engine.model.decoder import Decoder
from engine.model.packing import Group, LowerStates
from engine.policy.full import FullWeights
from engine.policy.weights import Weights, policy_of
from engine.records import Rollouts
from kernels import sequence_logprob

TOKENS_PER_FORWARD = 2048


@torch.no_grad()
def frozen_forward(
    model: Decoder,
    all_groups: list[Group],
    layers: list[int],
    *,
    temperature: float | None,
    memory_budget_bytes: int | None = None,
    lower: LowerStates | None = None,
    adapter: Weights | None = None,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> tuple[dict[int, Tensor], Tensor]:
    """One forward of the reference, or of the policy `adapter`, over all groups: layer -> mean states of each response [N, D], and
    log-probs float64 [N].

    The log-probs are those at `temperature`; with None the layers above the highest one asked for are skipped and they are 0. With
    `adapter` states and log-probs are those of its policy; whose weights are all trained has no `layers`, as heads read the reference.
    `lower` holds the states of these groups already, so that only the layers above them run. Sequences stand in the order of groups
    and their responses.
    """
    if isinstance(adapter, FullWeights):
        assert not layers and lower is None, "heads read the reference's states"
    model, adapter = policy_of(model, adapter)
    for layer in layers:
        if not 0 <= layer <= model.config.num_layers:
            raise UserError(f"a head reads layer {layer}, the model has {model.config.num_layers}; use a head made for this model.")
    pooled: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    logprobs = []
    for batch in packing.batches(all_groups, TOKENS_PER_FORWARD):
        packed = packing.pack(batch, model.device)
        hidden, done = (lower.of(batch), lower.layer) if lower else (model.embed_tokens(packed.tokens), 0)
        for layer in layers:
            hidden, done = model.run(hidden, packed.layout, done, layer, adapter), layer
            pooled[layer].append(mean_states(hidden, packed))
        if temperature is None:
            logprobs.append(torch.zeros(len(packed.cu_seqlens) - 1, dtype=torch.float64))
        else:
            hidden = model.run(hidden, packed.layout, done, model.config.num_layers, adapter)
            logprobs.append(_logprob(model, hidden, packed, temperature, memory_budget_bytes)[0].double().cpu())
        on_tokens(len(packed.tokens))
    return {layer: torch.cat(parts).cpu() for layer, parts in pooled.items()}, torch.cat(logprobs)


def _logprob(
    model: Decoder, hidden: Tensor, packed: packing.Packed, temperature: float, memory_budget_bytes: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] of the responses and [T] of their tokens, from the residual stream after the last layer."""
    return sequence_logprob(
        model.final_norm(hidden)[packed.predict_T], model.head_weight, packed.target_T, packed.cu_seqlens, temperature=temperature,
        softcap=model.config.logit_softcap, memory_budget_bytes=memory_budget_bytes, return_token_logprob=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LogprobGap:
    """How far the sampler's log-probs of the tokens that it drew lie from those of the training forward; nats per token."""

    mean: float  # of absolute differences
    max: float
    kl: float  # of the sampler to the training forward: mean of exp(d) - 1 - d, d the difference

    def __str__(self) -> str:
        sizes = f"{self.mean:.0e} nats per token on average, {self.max:.0e} at most, KL {self.kl:.0e}"
        return f"sampled and recomputed log-probs differ by {sizes}"


@torch.no_grad()
def logprob_gap(
    model: Decoder, all_groups: list[Group], rollouts: Rollouts, *, temperature: float, memory_budget_bytes: int | None = None,
    adapter: Weights | None = None,
) -> LogprobGap:  # fmt: skip
    """Of the rollouts at the groups' rows, which have at least one token."""
    model, adapter = policy_of(model, adapter)
    differences = []
    for batch in packing.batches(all_groups, TOKENS_PER_FORWARD):
        packed = packing.pack(batch, model.device)
        hidden = model.run(model.embed_tokens(packed.tokens), packed.layout, 0, model.config.num_layers, adapter)
        trained = _logprob(model, hidden, packed, temperature, memory_budget_bytes)[1].double().cpu()
        sampled = torch.cat([rollouts.model_logprob[r, : len(t)] for g in batch for r, t in zip(g.rows, g.responses, strict=True)])
        differences.append(trained - sampled.double())
    d = torch.cat(differences)
    return LogprobGap(mean=float(d.abs().mean()), max=float(d.abs().max()), kl=float((d.expm1() - d).mean()))


def mean_states(hidden: Tensor, packed: packing.Packed) -> Tensor:
    """Mean state of each response's tokens [N, D] in float32; zeros for an empty response."""
    length = (packed.cu_seqlens[1:] - packed.cu_seqlens[:-1]).to(hidden.device)
    states = hidden[packed.state_T].float()
    return torch.segment_reduce(states, "sum", lengths=length, unsafe=True) / length.clamp(min=1)[:, None]
