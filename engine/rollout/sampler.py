"""Prompts -> Rollouts: batched sampling with keyed random numbers.

A prompt is computed once for all its responses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.data.prompts import prompt_key as hash_tokens
from engine.errors import UserError
from engine.model.attention import KeepingAttention, Layout
from engine.model.decoder import Decoder
from engine.model.low_rank import ReadyAdapter
from engine.policy.finite import stop_non_finite
from engine.policy.weights import Weights, policy_of
from engine.records import Rollouts
from engine.rollout.cache import new_cache
from engine.rollout.decoding import Drawing, Rows, decode
from engine.rollout.states import Collector, States
from engine.run.needs import cache_bytes
from kernels.checks import check_tensor, check_whole
from kernels.random import combine
from kernels.sampling.draw import check_sampling


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: list[list[int]],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_new_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    seed: int,
    prompt_key: Tensor | None = None,
    adapter: Weights | None = None,
    max_rows: int = 256,
    on_step: Callable[[int], None] | None = None,
    states: States | None = None,
) -> Rollouts:
    """Samples n responses to each prompt (lists of token ids), prompt-major: row p * n + i.

    Random numbers depend only on (seed, prompt_key, sample, step), never on batch size or order; prompt_key
    int64 [P] defaults to a hash of the prompt's token ids. In float32 on a CPU the shape of a batch changes a
    response at most from its first near tie on. At most `max_rows` rows are decoded side by side; rows that
    finish are dropped from the batch. No stop token is drawn among the first `min_new_tokens`; model_logprob
    still counts them. `on_step(tokens)` is called after each step with the number of tokens drawn in it; it
    may raise to stop. `states` is filled with the states of the responses, for which each response's last
    token passes the layers below `states.top` too.

    Raises: UserError for an argument that cannot be used, an empty prompt, an unknown token id, or a prompt
    that leaves no room in the model's context; and where memory runs out. NonFiniteError naming the first
    layer where the model computes a NaN or an infinite number.
    """
    network, low_rank = policy_of(model, adapter)
    try:
        check_sampling(temperature, top_p, top_k)
        for name, value, least in (
            ("n", n, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("max_rows", max_rows, 1),
        ):
            check_whole(name, value, least)
        check_whole("min_new_tokens", min_new_tokens, 0, max_new_tokens)
        check_whole("seed", seed, -(2**63), 2**63 - 1)
        for token in stop_token_ids:
            check_whole("a token of stop_token_ids", token, 0, network.config.vocab_size - 1)
        if prompt_key is not None:
            check_tensor("prompt_key", prompt_key, (len(prompts),), (torch.int64,), (torch.device("cpu"),))
    except ValueError as error:
        raise UserError(f"generate: {error}.") from error
    _check_stop_tokens(network, min_new_tokens, stop_token_ids)
    _check_prompts(network, prompts, max_new_tokens)
    if prompt_key is None:
        prompt_key = torch.tensor([hash_tokens(p) for p in prompts], dtype=torch.int64)
    out = _empty_rollouts(len(prompts) * n, n, max_new_tokens)
    key = combine(seed, prompt_key[:, None], torch.arange(n)).reshape(-1)
    stop = torch.tensor(sorted(set(stop_token_ids)), dtype=torch.int64, device=network.device)
    drawing = Drawing(temperature, top_p, top_k, stop, min_new_tokens)
    ready = None if low_rank is None else ReadyAdapter(low_rank, network.config.num_layers)
    windows = [layer.window for layer in network.layers]

    def non_finite(tokens: Tensor, cu_seqlens: Tensor) -> None:
        layout = Layout.packed(cu_seqlens).to(network.device)
        stop_non_finite(network, low_rank, tokens, layout, reference=adapter is None)

    for start, end in _batches(len(out.tokens), n, max_rows):
        batch, each = prompts[start // n : -(-end // n)], min(n, end - start)
        tokens = torch.tensor([token for prompt in batch for token in prompt])
        cu_seqlens = torch.tensor([0, *map(len, batch)]).cumsum(0)
        with _explaining_memory(end - start, max(map(len, batch)) + max_new_tokens, network):
            collector = (
                None if states is None else Collector(states, start, batch, each, max_new_tokens, network)
            )
            tap = None if collector is None else collector.take_prompts
            attention = KeepingAttention(Layout.packed(cu_seqlens).to(network.device))
            hidden = network(tokens, attention, adapter=ready, tap=tap)[cu_seqlens[1:].to(network.device) - 1]
            if not hidden.isfinite().all():
                non_finite(tokens, cu_seqlens)
            cache = new_cache(attention.kept, cu_seqlens, each, max_new_tokens, windows)
            # The cache has copied them.
            del attention
            rows = Rows(
                network,
                cache,
                hidden.repeat_interleave(each, dim=0),
                key[start:end],
                drawing,
                max_new_tokens,
                adapter=ready,
                collector=collector,
            )
            decode(rows, max_new_tokens, on_step)
            if collector is not None:
                rows.feed(stop=states.top)
                collector.finish(rows.length)
        for name in ("tokens", "length", "finished", "logprob", "model_logprob", "near_tie"):
            getattr(out, name)[start:end] = getattr(rows, name).cpu()
        # The next batch needs their memory.
        del rows, cache, collector, tap, hidden
        if not out.model_logprob[start:end].isfinite().all():
            row = int((~out.model_logprob[start:end].isfinite()).any(dim=1).nonzero()[0, 0]) + start
            whole = torch.tensor([*prompts[row // n], *out.tokens[row, : out.length[row]].tolist()])
            non_finite(whole, torch.tensor([0, len(whole)]))
    return out


def _check_stop_tokens(model: Decoder, min_new_tokens: int, stop_token_ids: tuple[int, ...]) -> None:
    vocabulary = model.config.vocab_size
    if min_new_tokens and len(set(stop_token_ids)) == vocabulary:
        raise UserError(
            f"generate: min_new_tokens = {min_new_tokens} leaves no token to draw, as stop_token_ids holds "
            f"all {vocabulary}; set min_new_tokens to 0 or stop at fewer tokens."
        )


def _check_prompts(model: Decoder, prompts: list[list[int]], max_new_tokens: int) -> None:
    context, vocabulary = model.config.max_positions, model.config.vocab_size
    for p, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {p} is empty; give at least one token.")
        if len(prompt) + max_new_tokens > context:
            raise UserError(
                f"prompt {p}: {len(prompt)} tokens + {max_new_tokens} new ones pass the model's context of "
                f"{context}."
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise UserError(
                f"prompt {p} holds a token id outside 0..{vocabulary - 1}; use the model's own tokenizer."
            )


def _empty_rollouts(rows: int, n: int, max_new_tokens: int) -> Rollouts:
    return Rollouts(
        n=n,
        tokens=torch.zeros(rows, max_new_tokens, dtype=torch.int64),
        length=torch.zeros(rows, dtype=torch.int64),
        finished=torch.zeros(rows, dtype=torch.bool),
        logprob=torch.zeros(rows, max_new_tokens),
        model_logprob=torch.zeros(rows, max_new_tokens),
        near_tie=torch.zeros(rows, max_new_tokens, dtype=torch.bool),
    )


@contextmanager
def _explaining_memory(rows: int, tokens: int, model: Decoder) -> Iterator[None]:
    """Raises a UserError where memory runs out for `rows` rows side by side of at most `tokens` tokens."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        ran_out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(
            error
        )
        if not ran_out:
            raise
        row = tokens * cache_bytes(model.layer_config, model.dtype)
        raise UserError(
            f"memory ran out while sampling {rows} responses side by side, each of up to {tokens} tokens "
            f"with its prompt; keys and values take up to {row} bytes a response, {rows * row} in all: lower "
            "--rollout-rows or --max-new-tokens."
        ) from error


def _batches(rows: int, n: int, max_rows: int) -> list[tuple[int, int]]:
    """Returns first row and end of each batch.

    A batch has as many prompts with all their n rows as max_rows holds, else some rows of one prompt.
    """
    size, span = (max_rows // n * n, max(rows, 1)) if n <= max_rows else (max_rows, n)
    return [
        (row, min(row + size, first + span))
        for first in range(0, rows, span)
        for row in range(first, first + span, size)
    ]
