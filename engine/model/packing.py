"""Packs prompts with their responses: a prompt stands once, and its responses see it but not each other."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.model.attention import Layout
from engine.records import Prompts, Rollouts
from kernels.gather import Picks

# Of a pass without a gradient. Where attention goes by runs, which need no mask, passes are long enough to
# keep a GPU busy.
TOKENS_PER_FORWARD, TOKENS_BY_RUNS = 2048, 32768
# As the longest group of `batches`: nothing is cut, since a pair needs both its responses.
WHOLE = sys.maxsize


@dataclass(frozen=True)
class Group:
    """A prompt and some of its responses as token ids, stop token included, and their rows in rollouts."""

    prompt: list[int]
    responses: list[list[int]]
    rows: list[int]

    @property
    def tokens(self) -> int:
        """Counts the tokens of the group, the prompt once."""
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass(frozen=True)
class Packed:
    """A batch of groups, with its sequences in the order of groups and their responses.

    T counts response tokens, M all tokens.
    """

    tokens: Tensor  # int64 [M]
    layout: Layout
    state_T: Tensor  # int64 [T]: where each response token stands among the M
    # Of the M, T in all: where the state stands that predicts it. None where a prompt is empty, so that the
    # first token of a response has no state before it.
    predict: Picks | None
    target_T: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int64 [N+1] over the T


def groups(prompts: Prompts, rollouts: Rollouts) -> list[Group]:
    """Makes one group per prompt, with all its responses."""
    n = rollouts.n
    rows = [list(range(p * n, (p + 1) * n)) for p in range(len(prompts))]
    return [
        Group(
            prompts.token_ids[p],
            [rollouts.tokens[r, : int(rollouts.length[r])].tolist() for r in chosen],
            chosen,
        )
        for p, chosen in enumerate(rows)
    ]


def batches(all_groups: list[Group], token_budget: int, longest: int = 1024) -> Iterator[list[Group]]:
    """Batches consecutive groups to about `token_budget` tokens.

    A group longer than `longest` is cut, and its prompt repeated.
    """
    batch: list[Group] = []
    for whole in all_groups:
        for group in _cut(whole, longest):
            if batch and sum(g.tokens for g in batch) + group.tokens > token_budget:
                yield batch
                batch = []
            batch.append(group)
    if batch:
        yield batch


def of_like_length(lengths: list[int], token_budget: int) -> Iterator[list[int]]:
    """Batches sequences of these lengths, shortest first, and yields their places.

    A batch has at most `token_budget` tokens with its padding, or one sequence.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _cut(group: Group, longest: int) -> Iterator[Group]:
    start, size = 0, len(group.prompt)
    for i, response in enumerate(group.responses):
        if i > start and size + len(response) > longest:
            yield Group(group.prompt, group.responses[start:i], group.rows[start:i])
            start, size = i, len(group.prompt)
        size += len(response)
    yield Group(group.prompt, group.responses[start:], group.rows[start:])


def pack(batch: list[Group], device: torch.device) -> Packed:
    """Packs a batch on `device`. Empty responses have no rows."""
    tokens, state, predict, target, lengths, base = [], [], [], [], [], 0
    for group in batch:
        tokens += group.prompt
        last, base = base + len(group.prompt) - 1, base + len(group.prompt)
        for response in group.responses:
            tokens += response
            target += response
            stand = range(base, base + len(response))
            state += stand
            predict += [last, *stand[:-1]] if response else []
            lengths.append(len(response))
            base += len(response)
    layout = Layout.shared_prompt(
        [len(g.prompt) for g in batch], [[len(r) for r in g.responses] for g in batch]
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    # The host goes on while a GPU is still busy with what it was given before.
    all_tokens, states, targets = (
        torch.tensor(x, dtype=torch.int64).to(device, non_blocking=True) for x in (tokens, state, target)
    )
    picks = None
    if min(predict, default=0) >= 0:
        picks = Picks.of(torch.tensor(predict, dtype=torch.int64), len(tokens)).to(device)
    return Packed(all_tokens, layout.to(device), states, picks, targets, cu_seqlens)


@dataclass(frozen=True)
class LowerStates:
    """The reference's residual stream before `layer`, kept per prompt and response while they are sampled.

    So the layers below an adapter run once per sample for sampling, scores, reference
    log-probs and all policy steps.
    """

    layer: int
    prompt: dict[int, Tensor] = field(default_factory=dict)  # row -> states of its prompt [tokens, D]
    response: dict[int, Tensor] = field(default_factory=dict)  # row -> states [tokens, D]

    def keep(self, batch: list[Group], hidden: Tensor) -> None:
        """Takes over the states [M, D] of a packed batch."""
        parts = iter(hidden.split([n for g in batch for n in (len(g.prompt), *map(len, g.responses))]))
        for group in batch:
            prompt = next(parts)
            for row in group.rows:
                self.prompt[row], self.response[row] = prompt, next(parts)

    def of(self, batch: list[Group]) -> Tensor:
        """Returns the states [M, D] of kept groups, or parts of them, as `pack` orders the tokens."""
        return torch.cat(
            [x for g in batch for x in (self.prompt[g.rows[0]], *(self.response[r] for r in g.rows))]
        )
