"""Log-probs and states of given responses, for scoring, training and the comparison with the sampler."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.errors import UserError
from engine.model import packing
from engine.model.attention import goes_by_runs
from engine.model.decoder import Decoder, Tap
from engine.model.low_rank import LowRank
from engine.model.packing import Group, LowerStates, Packed
from engine.policy.finite import stop_non_finite
from engine.policy.weights import Weights, policy_of
from engine.records import Rollouts
from kernels import sequence_logprob
from kernels.gather import take


def states_and_head(
    network: Decoder,
    adapter: LowRank | None,
    packed: Packed,
    *,
    lower: tuple[int, Tensor] | None = None,
    tap: Tap | None = None,
    checkpointed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes the states [T, D] that predict a batch's response tokens; returns them with the head [V, D].

    network, adapter: a policy as `policy_of` gives it. The others: see `Decoder.forward`.
    """
    hidden = network(
        packed.tokens, packed.layout, adapter=adapter, lower=lower, tap=tap, checkpointed=checkpointed
    )
    return take(hidden, packed.predict), network.head_weight


def policy_states(
    config: RunConfig,
    model: Decoder,
    lower: LowerStates | None,
    batch: list[Group],
    packed: Packed,
    weights: Weights | None,
    *,
    dropout: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the states [T, D] under the weights (None: the reference's) that predict a batch's response
    tokens; returns them with the head [V, D].

    lower: the states of all samples below the adapter, where they were kept. dropout: keys the dropout of an
    adapter that a policy step trains; None: there is none.
    """
    network, low_rank = policy_of(model, weights)
    if low_rank is not None and dropout is not None and config.lora_dropout:
        low_rank = low_rank.with_dropout(config.lora_dropout, dropout)
    if lower is not None and weights is not None:
        assert low_rank is not None and low_rank.first_layer == lower.layer, "kept for adapters alone"
    known = None if lower is None else (lower.layer, lower.of(batch))
    return states_and_head(
        network, low_rank, packed, lower=known, checkpointed=config.activation_checkpointing
    )


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
    """Runs the reference, or the policy `adapter`, over all groups, response by response in their order.

    Returns: mean states of each response [N, D] before each of `layers` (the number of layers stands for the
    end of the last one), and log-probs float64 [N] at `temperature`. With temperature None the log-probs are
    0, and the layers above the highest one asked for are skipped.

    lower: the states of these groups below some layer, which need not be computed again.
    adapter: a policy of all weights has no `layers`, as heads read the reference.

    Raises: UserError for a layer that the model does not have; NonFiniteError naming the first layer where
    the model computes a NaN or an infinite number.
    """
    network, low_rank = policy_of(model, adapter)
    if adapter is not None and low_rank is None:
        assert not layers and lower is None, "heads read the reference's states"
    for layer in layers:
        if not 0 <= layer <= network.config.num_layers:
            raise UserError(
                f"a head reads layer {layer}, the model has {network.config.num_layers}; use a head "
                "made for this model."
            )
    pooled: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    logprobs, finite, batches = [], [], []
    for batch in scoring_batches(network, all_groups):
        packed = packing.pack(batch, network.device)
        known = None if lower is None else (lower.layer, lower.of(batch))
        tap = partial(_pool, pooled, packed) if layers else None
        if temperature is None:
            top = max(layers, default=0)
            network(packed.tokens, packed.layout, adapter=low_rank, lower=known, tap=tap, stop=top)
            zeros = torch.zeros(len(packed.cu_seqlens) - 1, dtype=torch.float64, device=network.device)
            logprobs.append(zeros)
        else:
            states = states_and_head(network, low_rank, packed, lower=known, tap=tap)
            logprob, _ = _logprobs(network, packed, states, temperature, memory_budget_bytes)
            logprobs.append(logprob.double())
        finite.append(_all_finite(logprobs[-1], pooled))
        batches.append(batch)
        # A GPU is asked at the end, so that the host packs the next batch meanwhile.
        if not finite[-1].is_cuda and not finite[-1]:
            break
        on_tokens(len(packed.tokens))
    for batch, is_finite in zip(batches, torch.stack(finite).tolist(), strict=True):
        if not is_finite:
            packed = packing.pack(batch, network.device)
            stop_non_finite(network, low_rank, packed.tokens, packed.layout, reference=adapter is None)
    return {layer: torch.cat(parts).cpu() for layer, parts in pooled.items()}, torch.cat(logprobs).cpu()


def scoring_batches(network: Decoder, all_groups: list[Group]) -> Iterator[list[Group]]:
    """Batches groups for passes without a gradient: long ones, in which no group is cut, where a kernel for
    runs serves."""
    c = network.config
    if goes_by_runs(network.device, network.dtype, c.head_dim, c.attention_softcap):
        return packing.batches(all_groups, packing.TOKENS_BY_RUNS, packing.WHOLE)
    return packing.batches(all_groups, packing.TOKENS_PER_FORWARD)


def _all_finite(logprob: Tensor, pooled: dict[int, list[Tensor]]) -> Tensor:
    """Tells, on the device, whether the log-probs and mean states of the last batch are finite."""
    parts = (logprob, *(parts[-1] for parts in pooled.values()))
    return torch.stack([x.isfinite().all() for x in parts]).all()


def _pool(pooled: dict[int, list[Tensor]], packed: Packed, layer: int, hidden: Tensor) -> None:
    """Adds the mean states of a batch before `layer` where they are wanted."""
    if layer in pooled:
        pooled[layer].append(mean_states(hidden, packed))


def _logprobs(
    network: Decoder,
    packed: Packed,
    states_and_head: tuple[Tensor, Tensor],
    temperature: float,
    memory_budget_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """Computes the log-probs [N] of a batch's responses and [T] of their tokens."""
    return sequence_logprob(
        *states_and_head,
        packed.target_T,
        packed.cu_seqlens,
        temperature=temperature,
        softcap=network.config.logit_softcap,
        memory_budget_bytes=memory_budget_bytes,
        return_token_logprob=True,
    )


@dataclass(frozen=True, kw_only=True)
class LogprobGap:
    """How far the sampler's log-probs of its tokens lie from the training forward's, in nats per token."""

    mean: float  # of absolute differences
    max: float
    kl: float  # of the sampler to the training forward: mean of exp(d) - 1 - d, d the difference

    def __str__(self) -> str:
        sizes = f"{self.mean:.0e} nats per token on average, {self.max:.0e} at most, KL {self.kl:.0e}"
        return f"sampled and recomputed log-probs differ by {sizes}"


@torch.no_grad()
def logprob_gap(
    model: Decoder,
    all_groups: list[Group],
    rollouts: Rollouts,
    *,
    temperature: float,
    memory_budget_bytes: int | None = None,
    adapter: Weights | None = None,
) -> LogprobGap:
    """Compares the rollouts at the groups' rows, which have at least one token, with the training forward."""
    network, low_rank = policy_of(model, adapter)
    trained, sampled = [], []
    for batch in scoring_batches(network, all_groups):
        packed = packing.pack(batch, network.device)
        states = states_and_head(network, low_rank, packed)
        trained.append(_logprobs(network, packed, states, temperature, memory_budget_bytes)[1])
        rows = [(r, len(response)) for g in batch for r, response in zip(g.rows, g.responses, strict=True)]
        sampled += [rollouts.model_logprob[r, :length] for r, length in rows]
    d = torch.cat(trained).double().cpu() - torch.cat(sampled).double()
    return LogprobGap(mean=float(d.abs().mean()), max=float(d.abs().max()), kl=float((d.expm1() - d).mean()))


def mean_states(hidden: Tensor, packed: Packed) -> Tensor:
    """Computes the mean state of each response's tokens [N, D] in float32; zeros for an empty response."""
    length = packed.cu_seqlens.diff().to(hidden.device, non_blocking=True)
    states = hidden[packed.state_T].float()
    return torch.segment_reduce(states, "sum", lengths=length, unsafe=True) / length.clamp(min=1)[:, None]
