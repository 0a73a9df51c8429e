"""States of a model on responses that it sampled itself, as training meets them, and the entries of the
gradients there."""

from pathlib import Path

import torch
from torch import Tensor

from bench.run import shapes
from bench.run.work import real_work
from engine.model import packing
from engine.model.decoder import Decoder
from engine.model.packing import TOKENS_PER_FORWARD
from engine.policy.forward import states_and_head

NEW, PER_PROMPT = 48, 8  # most tokens of a response, and responses to each prompt


def sampled_states(
    rows: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `states_of` the quickstart's model."""
    with shapes.opened("", "", dtype, device) as (_, folder, model):
        return states_of(folder, model, rows, temperature)


@torch.no_grad()
def states_of(folder: Path, model: Decoder, rows: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns states [rows, D], the head [V, D] and the tokens that were sampled at `temperature` [rows].

    The responses are to prompts of the quickstart. folder: the model's, with its tokenizer.
    """
    # Responses have about half of the most tokens, and one at least.
    work = real_work(folder, -(-3 * rows // NEW // PER_PROMPT) * PER_PROMPT, PER_PROMPT, NEW)
    hidden, target = [], []
    for batch in packing.batches(work.groups(work.sampled(model, temperature)), TOKENS_PER_FORWARD):
        packed = packing.pack(batch, model.device)
        hidden.append(states_and_head(model, None, packed)[0])
        target.append(packed.target_T)
    hidden, target = torch.cat(hidden), torch.cat(target)
    if len(hidden) < rows:
        raise SystemExit(f"--rows {rows}: only {len(hidden)} tokens were sampled; nothing is timed")
    return hidden[:rows].clone(), model.head_weight.detach().clone(), target[:rows]


def entropy(hidden: Tensor, weight: Tensor, temperature: float) -> float:
    """Returns the mean entropy of the next token after the states, in nats."""
    total = 0.0
    for part in hidden.split(256):
        logprob = (part.float() @ weight.float().t() / temperature).log_softmax(1)
        total -= float((logprob.exp() * logprob).sum())
    return total / len(hidden)


def entries_above(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, bounds: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Counts the entries of softmax - onehot whose absolute value is at least each bound, in float32.

    Returns the counts of each row, int64 [rows, bounds], and the sum of the row's other absolute values,
    float64 [rows, bounds].
    """
    counts, left_out = [], []
    for h, y in zip(hidden.split(256), target.split(256), strict=True):
        entries = (h.float() @ weight.float().t() / temperature).softmax(1)
        entries[torch.arange(len(y), device=y.device), y] -= 1
        entries.abs_()
        kept = [entries >= bound for bound in bounds]
        counts.append(torch.stack([k.sum(1) for k in kept], 1))
        left_out.append(torch.stack([entries.masked_fill(k, 0).sum(1, dtype=torch.float64) for k in kept], 1))
    return torch.cat(counts), torch.cat(left_out)
