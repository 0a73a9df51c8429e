"""r + lambda . g -> the pseudo-preference pairs of one policy step (arXiv 2505.19387,
Algorithm 2, the set D-dagger)."""

import itertools

import torch
from torch import Tensor

from engine.ranks import Ranks
from engine.records import Pairs


def within_prompts(
    score_PG: Tensor, prompts: list[int], per_prompt: int, dropped_PG: Tensor | None = None
) -> Pairs:
    """Forms all pairs of `per_prompt` responses within each prompt: of all G, or of those
    at both ends of the score.

    score: s [P, G]; prompts: the P's to use. M sequences of a prompt serve M (M - 1) / 2 pairs, so that the
    forward passes are used several times. A prompt drawn twice in one step counts once. Pairs of two
    responses that are both `dropped_PG` [P, G] are left out, and so are prompts without a pair.
    """
    prompt, row, pairs = [], [], []
    n = score_PG.shape[1]
    for p in dict.fromkeys(prompts):
        order = score_PG[p].argsort(stable=True).tolist()
        low = per_prompt // 2
        chosen = sorted(order[:low] + order[n - (per_prompt - low) :])
        base, dropped = len(row), [dropped_PG is not None and bool(dropped_PG[p, i]) for i in chosen]
        own = [
            (base + a, base + b)
            for a, b in itertools.combinations(range(len(chosen)), 2)
            if not (dropped[a] and dropped[b])
        ]
        if own:
            prompt += [p] * len(chosen)
            row += [p * n + i for i in chosen]
            pairs += own
    return Pairs(prompt=prompt, row=row, pairs=torch.tensor(pairs, dtype=torch.int64).view(-1, 2))


def own_pairs(pairs: Pairs, ranks: Ranks) -> tuple[Pairs, int]:
    """Returns the pairs of a rank's share of a step's prompts, which stay whole, and the number of sequences
    before them."""
    prompts = list(dict.fromkeys(pairs.prompt))
    own = {prompts[i] for i in ranks.share(len(prompts))}
    rows = [i for i, p in enumerate(pairs.prompt) if p in own]
    start, end = (rows[0], rows[-1] + 1) if rows else (0, 0)
    inside = (pairs.pairs[:, 0] >= start) & (pairs.pairs[:, 0] < end)
    return (
        Pairs(prompt=pairs.prompt[start:end], row=pairs.row[start:end], pairs=pairs.pairs[inside] - start),
        start,
    )
