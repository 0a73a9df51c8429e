"""r + lambda . g -> the pseudo-preference pairs of one policy step (arXiv 2505.19387, Algorithm 2, the set D-dagger)."""

import itertools

import torch
from torch import Tensor

from engine.data.prompts import subset
from engine.records import Pairs, Prompts


def deal(prompts: Prompts, seed: int, iteration: int, n_pairs: int, n_slack: int) -> tuple[list[int], list[int]]:
    """(prompts for pairs, prompts for the slack) of an iteration (from 1), disjoint.

    One seeded shuffle is dealt on from iteration to iteration: pairs repeat only when all prompts have been used, as a policy learns
    little from pairs that it knows by heart, and the slack is measured on the prompts that come next, as long as they last never seen.
    """
    deck = subset(prompts, len(prompts), seed, "deck")
    pool = min(n_pairs, len(deck) - n_slack)
    start = (iteration - 1) * pool % len(deck)
    turned = deck[start:] + deck[:start]
    return turned[:pool], turned[pool : pool + n_slack]


def schedule(prompts: Prompts, seed: int, purpose: str, per_step: int, steps: int) -> list[list[int]]:
    """The prompts of each step: seeded shuffles of all of them, one after another; depends on (seed, purpose) and prompt keys alone."""
    order: list[int] = []
    epoch = 0
    while len(order) < per_step * steps:
        order += subset(prompts, len(prompts), seed, f"{purpose}/epoch-{epoch}")
        epoch += 1
    return [order[i * per_step : (i + 1) * per_step] for i in range(steps)]


def within_prompts(score_PG: Tensor, prompts: list[int], per_prompt: int, dropped_PG: Tensor | None = None) -> Pairs:
    """All pairs of `per_prompt` responses within each prompt: of all G, or of those at both ends of the score.

    score: s [P, G]; prompts: the P's to use. M sequences of a prompt serve M (M - 1) / 2 pairs, so that the forward passes are used several
    times. A prompt drawn twice in one step counts once. Pairs of two responses that are both `dropped_PG` [P, G] are left out, and so are
    prompts without a pair.
    """
    prompt, row, pairs = [], [], []
    n = score_PG.shape[1]
    for p in dict.fromkeys(prompts):
        order = score_PG[p].argsort(stable=True).tolist()
        low = per_prompt // 2
        chosen = sorted(order[:low] + order[n - (per_prompt - low) :])
        base, dropped = len(row), [dropped_PG is not None and bool(dropped_PG[p, i]) for i in chosen]
        own = [(base + a, base + b) for a, b in itertools.combinations(range(len(chosen)), 2) if not (dropped[a] and dropped[b])]
        if own:
            prompt += [p] * len(chosen)
            row += [p * n + i for i in chosen]
            pairs += own
    return Pairs(prompt=prompt, row=row, pairs=torch.tensor(pairs, dtype=torch.int64).view(-1, 2))
