"""Prompts -> Rollouts: batched sampling with keyed random numbers. A prompt is prefilled once for its n responses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from engine.data.prompts import prompt_key as hash_tokens
from engine.errors import UserError
from engine.model.decoder import Decoder
from engine.policy.weights import Weights, policy_of
from engine.records import Rollouts
from engine.rollout.cache import AnyCache, GpuCache, new_cache
from engine.rollout.states import Collector, States
from engine.run.plan import cache_bytes
from kernels.checks import check_sampling, check_tensor, check_whole
from kernels.sampling import combine, sample_with_gap

# Rows that have ended are dropped once no more than this share of those side by side is left; a GPU pays for it with a new graph.
KEPT, KEPT_ON_GPU = 0.85, 0.5
# Two best perturbed logits this close may change places with the shape of a batch, which decides how sums are rounded.
NEAR_TIE = 1e-4
# Steps of a GPU between two looks of the host.
STEPS_UNSEEN = 8


class _Rows:
    """The rows of a batch that are decoded side by side, and what has been drawn for all rows of the batch.

    Everything lies on the model's device and changes in place; `draw` and `feed` never wait for it, so that a CUDA graph can hold them.
    """

    def __init__(
        self, hidden: Tensor, position: Tensor, key: Tensor, room: int, model: Decoder, cache: AnyCache, fused: dict | None,
        collector: Collector | None, *, draw: Callable, temperature: float, stop: Tensor, min_new_tokens: int,
    ) -> None:  # fmt: skip
        rows, device = len(hidden), hidden.device
        self.model, self.cache, self.fused, self.collector = model, cache, fused, collector
        self.sample, self.temperature, self.stop, self.min_new_tokens = draw, temperature, stop, min_new_tokens
        self.tokens = torch.zeros(rows, room, dtype=torch.int64, device=device)
        self.logprob, self.model_logprob = (torch.zeros(rows, room, device=device) for _ in range(2))
        self.near_tie = torch.zeros(rows, room, dtype=torch.bool, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # tokens of each row that have been fed
        # Of the rows side by side: place in the batch, last token, whether it is still to be fed and whether others follow it.
        self.row, self.token = torch.arange(rows, device=device), torch.zeros_like(self.length)
        self.fed, self.alive = torch.ones_like(self.finished), torch.ones_like(self.finished)
        self.hidden, self.position, self.key = hidden, position, key.to(device)

    def draw(self) -> None:
        """The next token of each row, from the states of its last one."""
        logits = self.model.logits(self.hidden)
        if self.min_new_tokens and len(self.stop):
            allowed = torch.where(self.step < self.min_new_tokens, logits.index_fill(1, self.stop, -torch.inf), logits)
            token, logprob, _, gap = self.sample(allowed, key=self.key, step=self.step)
            model_logprob = (logits.float() / (self.temperature or 1)).log_softmax(1).gather(1, token[:, None])[:, 0]
        else:
            token, logprob, model_logprob, gap = self.sample(logits, key=self.key, step=self.step)
        ended = (token[:, None] == self.stop).any(dim=1)
        for kept, drawn in ((self.tokens, token), (self.logprob, logprob), (self.model_logprob, model_logprob)):
            kept[self.row, self.step] = torch.where(self.alive, drawn, 0)
        self.near_tie[self.row, self.step] = self.alive & (gap < NEAR_TIE)
        self.length[self.row] += self.alive
        self.finished[self.row] |= self.alive & ended
        self.token.copy_(token)
        # A row's last token is fed too where its states are wanted.
        self.fed.copy_(self.alive if self.collector is not None else self.alive & ~ended)
        self.alive &= ~ended

    def feed(self, stop: int | None = None) -> None:
        """The states of the tokens just drawn; with `stop` only below that layer."""
        tap = None if self.collector is None else partial(self.collector.take, self.row, self.step, self.fed)
        hidden = self.model.decode(self.token, self.position, self.cache, self.fused, tap, stop=stop)
        if stop is None:
            self.hidden.copy_(hidden)
        self.position += 1
        self.step += 1

    def drop(self) -> None:
        """Leave out the rows that need not be fed."""
        keep = self.fed.nonzero()[:, 0]
        self.cache.keep(keep)
        for name in ("row", "token", "fed", "alive", "hidden", "position", "key"):
            setattr(self, name, getattr(self, name)[keep])


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
    """n responses to each prompt (lists of token ids), prompt-major: row p * n + i.

    Random numbers depend only on (seed, prompt_key, sample, step), never on batch size or order; prompt_key int64 [P] defaults to a
    hash of the prompt's token ids. In float32 on a CPU the shape of a batch changes a response at most from its first near tie on.
    At most `max_rows` rows are decoded side by side; rows that finish are dropped from the batch.
    No stop token is drawn among the first `min_new_tokens`; model_logprob still counts them.
    `on_step(tokens)` is called after each step with the number of tokens made; it may raise to stop. `states` is filled with the states
    of the responses, for which each response's last token passes the layers below `states.top` too.

    Raises: UserError for an argument that cannot be used, an empty prompt, an unknown token id, or a prompt that leaves no room in the
    model's context; and where memory runs out.
    """
    model, adapter = policy_of(model, adapter)
    context, vocabulary = model.config.max_positions, model.config.vocab_size
    try:
        check_sampling(temperature, top_p, top_k)
        for name, value, least in (("n", n, 1), ("max_new_tokens", max_new_tokens, 1), ("max_rows", max_rows, 1)):
            check_whole(name, value, least)
        check_whole("min_new_tokens", min_new_tokens, 0, max_new_tokens)
        check_whole("seed", seed, -(2**63), 2**63 - 1)
        for token in stop_token_ids:
            check_whole("a token of stop_token_ids", token, 0, vocabulary - 1)
        if prompt_key is not None:
            check_tensor("prompt_key", prompt_key, (len(prompts),), (torch.int64,), (torch.device("cpu"),))
    except ValueError as error:
        raise UserError(f"generate: {error}.") from error
    if min_new_tokens and len(set(stop_token_ids)) == vocabulary:
        raise UserError(
            f"generate: min_new_tokens = {min_new_tokens} leaves no token to draw, as stop_token_ids holds all {vocabulary}; "
            "set min_new_tokens to 0 or stop at fewer tokens."
        )
    for p, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {p} is empty; give at least one token.")
        if len(prompt) + max_new_tokens > context:
            raise UserError(f"prompt {p}: {len(prompt)} tokens + {max_new_tokens} new ones pass the model's context of {context}.")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise UserError(f"prompt {p} holds a token id outside 0..{vocabulary - 1}; use the model's own tokenizer.")
    if prompt_key is None:
        prompt_key = torch.tensor([hash_tokens(p) for p in prompts], dtype=torch.int64)
    rows = len(prompts) * n
    out = Rollouts(
        n=n,
        tokens=torch.zeros(rows, max_new_tokens, dtype=torch.int64),
        length=torch.zeros(rows, dtype=torch.int64),
        finished=torch.zeros(rows, dtype=torch.bool),
        logprob=torch.zeros(rows, max_new_tokens),
        model_logprob=torch.zeros(rows, max_new_tokens),
        near_tie=torch.zeros(rows, max_new_tokens, dtype=torch.bool),
    )
    key = combine(seed, prompt_key[:, None], torch.arange(n)).reshape(-1)
    stop = torch.tensor(sorted(set(stop_token_ids)), dtype=torch.int64, device=model.device)
    fused = None if adapter is None else adapter.fused(0, model.config.num_layers)
    draw = partial(sample_with_gap, temperature=temperature, top_p=top_p, top_k=top_k)
    for start, end in _batches(rows, n, max_rows):
        batch, each = prompts[start // n : -(-end // n)], min(n, end - start)
        cu, own = torch.tensor([0, *map(len, batch)]).cumsum(0), slice(start, end)
        with _told_memory(end - start, max(map(len, batch)) + max_new_tokens, model):
            collector = None if states is None else Collector(states, start, batch, each, max_new_tokens, model)
            hidden, kept = model.prefill(torch.tensor([t for p in batch for t in p]), cu, adapter, collector and collector.take_prompts)
            cache = new_cache(kept, cu, each, max_new_tokens, [layer.window for layer in model.layers])
            del kept
            hidden, position = hidden.repeat_interleave(each, dim=0), cu.diff().to(model.device).repeat_interleave(each)
            made = _Rows(
                hidden, position, key[own], max_new_tokens, model, cache, fused, collector,
                draw=draw, temperature=temperature, stop=stop, min_new_tokens=min_new_tokens,
            )  # fmt: skip
            _decode(made, max_new_tokens, on_step)
            if collector is not None:
                made.feed(stop=states.top)
                collector.finish(made.length)
        for name in ("tokens", "length", "finished", "logprob", "model_logprob", "near_tie"):
            getattr(out, name)[own] = getattr(made, name).cpu()
    return out


@contextmanager
def _told_memory(rows: int, tokens: int, model: Decoder) -> Iterator[None]:
    """Raises: UserError where memory runs out for `rows` rows side by side of at most `tokens` tokens."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        row = tokens * cache_bytes(model.config, model.dtype)
        raise UserError(
            f"memory ran out while sampling {rows} responses side by side, each of up to {tokens} tokens with its prompt; keys and "
            f"values take up to {row} bytes a response, {rows * row} in all: lower --rollout-rows or --max-new-tokens."
        ) from error


def _batches(rows: int, n: int, max_rows: int) -> list[tuple[int, int]]:
    """First row and end of each batch: as many prompts with all their n rows as max_rows holds, else some rows of one prompt."""
    size, span = (max_rows // n * n, max(rows, 1)) if n <= max_rows else (max_rows, n)
    return [(row, min(row + size, first + span)) for first in range(0, rows, span) for row in range(first, first + span, size)]


def _decode(made: _Rows, room: int, on_step: Callable[[int], None] | None) -> None:
    """Draw up to `room` tokens of each row; those drawn last are not fed."""
    told, graph, on_gpu = 0, None, isinstance(made.cache, GpuCache)
    made.draw()
    for step in range(1, room):
        if not on_gpu or step % STEPS_UNSEEN == 0:
            if on_step is not None:
                on_step(int(made.length.sum()) - told)
                told = int(made.length.sum())
            if not made.alive.any():
                return
            if int(made.fed.sum()) <= (KEPT_ON_GPU if on_gpu else KEPT) * len(made.fed):
                made.drop()
                graph = None
        if graph is not None:
            graph.replay()
            continue
        made.feed()
        made.draw()
        # The rest is worth a graph only where some steps are left to replay.
        if made.hidden.is_cuda and on_gpu and room - step > STEPS_UNSEEN:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, computes nothing
                made.feed()
                made.draw()
    if on_step is not None:
        on_step(int(made.length.sum()) - told)
