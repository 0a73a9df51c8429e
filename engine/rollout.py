"""Prompts -> Rollouts: batched sampling with keyed random numbers. A prompt is prefilled once for its n responses."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.cache import new_cache
from engine.data import prompt_key as hash_tokens
from engine.errors import UserError
from engine.full import Weights, policy_of
from engine.model import Decoder
from engine.packing import LowerStates
from engine.records import Rollouts
from kernels.sampling import combine, sample


@dataclass
class States:
    """The reference's states of sampled responses, taken while they are sampled: adapters sit above these layers, so the policy's
    states there are the reference's, and heads need no forward of their own."""

    layers: list[int]  # to pool for heads
    lower: LowerStates | None  # keeps the states below its layer
    pooled: dict[int, Tensor] = field(default_factory=dict)  # layer -> mean states of each response, float32 [R, D]

    @property
    def top(self) -> int:
        """The highest layer whose input is wanted."""
        return max([*self.layers, *([self.lower.layer] if self.lower else [])])


class _Collector:
    """Takes the states of one batch of prompts and of their responses, step by step."""

    def __init__(self, states: States, first_row: int, batch: list[list[int]], n: int, max_new_tokens: int, model: Decoder) -> None:
        self.states, self.first_row, self.n = states, first_row, n
        self.lengths = [len(prompt) for prompt in batch]
        rows, hidden = len(batch) * n, model.config.hidden_size
        self.sums = {layer: torch.zeros(rows, hidden, device=model.device) for layer in states.layers}
        self.kept = None
        if states.lower is not None:
            self.kept = torch.empty(rows, max_new_tokens, hidden, dtype=model.dtype, device=model.device)
        self.prompts: tuple[Tensor, ...] = ()

    def take_prompts(self, layer: int, states: Tensor) -> None:
        """Before each layer of the prefill: states [M, D]."""
        if self.kept is not None and layer == self.states.lower.layer:
            self.prompts = states.split(self.lengths)

    def expect(self, step: int, fed: Tensor, row: Tensor) -> None:
        """The next forward holds response token `step` of the rows where `fed` (bool, of all rows side by side) is set."""
        self.step, self.chosen = step, fed.nonzero()[:, 0]
        self.local = row.to(fed.device)[self.chosen] - self.first_row

    def __call__(self, layer: int, states: Tensor) -> None:
        """Before each layer of a decoding step: states [rows side by side, D]."""
        if layer in self.sums:
            self.sums[layer][self.local] += states[self.chosen].float()
        if self.kept is not None and layer == self.states.lower.layer:
            self.kept[self.local, self.step] = states[self.chosen]

    def finish(self, length: Tensor) -> None:
        """Pool the batch's states and hand them over; length: int64 [rows]."""
        for layer, total in self.sums.items():
            mean = (total / length.to(total.device)[:, None].clamp(min=1)).cpu()
            self.states.pooled[layer] = torch.cat([self.states.pooled[layer], mean]) if layer in self.states.pooled else mean
        if self.kept is not None:
            for i, size in enumerate(length.tolist()):
                self.states.lower.prompt[self.first_row + i] = self.prompts[i // self.n]
                self.states.lower.response[self.first_row + i] = self.kept[i, :size].clone()


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
    hash of the prompt's token ids. `max_rows` rows are decoded side by side; rows that finish are dropped from the batch.
    `on_step(tokens)` is called after each step with the number of tokens made; it may raise to stop. `states` is filled with the states
    of the responses, for which each response's last token passes the layers below `states.top` too.

    Raises: UserError for an empty prompt, an unknown token id, or a prompt that leaves no room in the model's context.
    """
    model, adapter = policy_of(model, adapter)
    context, vocabulary = model.config.max_positions, model.config.vocab_size
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
    )
    key = combine(seed, prompt_key[:, None], torch.arange(n)).reshape(-1)
    stop = torch.tensor(sorted(set(stop_token_ids)), dtype=torch.int64, device=model.device)
    fused = None if adapter is None else adapter.fused(0, model.config.num_layers)
    per_batch = max(1, max_rows // n)
    for start in range(0, len(prompts), per_batch):
        batch = prompts[start : start + per_batch]
        cu = torch.tensor([0, *map(len, batch)]).cumsum(0)
        collector = None if states is None else _Collector(states, start * n, batch, n, max_new_tokens, model)
        hidden, kept = model.prefill(torch.tensor([t for p in batch for t in p]), cu, adapter, collector and collector.take_prompts)
        length = torch.tensor([len(p) for p in batch], device=model.device).repeat_interleave(n)
        cache = new_cache(kept, cu, n, max_new_tokens)
        del kept
        hidden, position = hidden.repeat_interleave(n, dim=0), length
        row = torch.arange(start * n, start * n + len(batch) * n)
        alive = torch.ones(len(row), dtype=torch.bool, device=model.device)
        for step in range(max_new_tokens):
            logits = model.logits(hidden)
            if step < min_new_tokens and len(stop):
                logits[:, stop] = -torch.inf
            token, logprob, model_logprob = sample(
                logits, key=key[row].to(model.device), step=step, temperature=temperature, top_p=top_p, top_k=top_k
            )
            ended = torch.isin(token, stop) if len(stop) else torch.zeros_like(alive)
            live, live_row = alive.cpu(), row[alive.cpu()]
            out.tokens[live_row, step] = token.cpu()[live]
            out.logprob[live_row, step] = logprob.cpu()[live]
            out.model_logprob[live_row, step] = model_logprob.cpu()[live]
            out.length[live_row] += 1
            out.finished[live_row] = ended.cpu()[live]
            if on_step is not None:
                on_step(len(live_row))
            # A row's last token is fed too where its states are wanted.
            fed = alive if collector is not None else alive & ~ended
            alive = alive & ~ended
            if not alive.any() or step + 1 == max_new_tokens:
                if collector is not None:
                    collector.expect(step, fed, row)
                    model.decode(token, position, cache, fused, collector, stop=states.top)
                break
            if int(fed.sum()) <= 0.85 * len(fed):
                keep = fed.nonzero()[:, 0]
                cache.keep(keep)
                token, position, row, alive, fed = token[keep], position[keep], row[keep.cpu()], alive[keep], fed[keep]
            if collector is not None:
                collector.expect(step, fed, row)
            hidden = model.decode(token, position, cache, fused, collector)
            position = position + 1
        if collector is not None:
            collector.finish(out.length[start * n : start * n + len(batch) * n])
    return out
