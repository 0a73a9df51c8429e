"""Seeded choices among prompts: subsets, splits, the prompts of an iteration and of its steps."""

import hashlib
import math
from collections.abc import Collection
from functools import lru_cache

from engine import keys
from engine.data.prompts import meanings
from engine.errors import UserError
from engine.records import Prompts

HELDOUT_SHARE = 0.2


def subset(
    prompts: Prompts, n: int, seed: int, purpose: str, first: Collection[int] = frozenset()
) -> list[int]:
    """Chooses n prompts and orders them by a hash of (seed, purpose, key).

    So the order of the file has no effect. first: indices of prompts that come before all others.
    Returns their indices. Raises: UserError where there are fewer than n prompts.
    """
    if n > len(prompts):
        raise UserError(
            f"{n} prompts asked for {purpose}, but there are only {len(prompts)}; "
            "ask for fewer or give more prompts."
        )
    key_P = prompts.key_P.tolist()

    def rank(i: int) -> tuple[bool, bytes]:
        digest = hashlib.blake2b(f"{seed} {key_P[i]} {purpose}".encode(), digest_size=16).digest()
        return i not in first, digest

    return sorted(range(len(prompts)), key=rank)[:n]


def enough_to_split(n_train: int, n_heldout: int) -> int:
    """Returns how many prompts are enough that `split` gives so many to either side."""
    return math.ceil(max(n_train / (1 - HELDOUT_SHARE), n_heldout / HELDOUT_SHARE))


def split(prompts: Prompts, seed: int, share: float = HELDOUT_SHARE) -> tuple[list[int], list[int]]:
    """Holds out a seeded share of the prompts, with at least one prompt on either side.

    Prompts that differ only in case or spaces are held out together, so that the share may be larger.
    Returns (training indices, held-out indices). Raises: UserError where there are fewer than two prompts.
    """
    same: dict[str, list[int]] = {}
    meaning = meanings(prompts)
    for i in subset(prompts, len(prompts), seed, keys.SPLIT):
        same.setdefault(meaning[i], []).append(i)
    if len(same) < 2:
        but = " that differ in more than case and spaces" if len(prompts) > 1 else ""
        raise UserError(
            f"{len(same)} prompt(s){but} cannot be split into training and held-out ones; "
            "give at least 2, or --heldout."
        )
    n_heldout = max(round(share * len(prompts)), 1)
    heldout: list[int] = []
    groups = list(same.values())
    while len(heldout) < n_heldout and len(groups) > 1:
        heldout += groups.pop(0)
    held = set(heldout)
    return [i for i in subset(prompts, len(prompts), seed, keys.SPLIT) if i not in held], heldout


def deal(
    prompts: Prompts, seed: int, iteration: int, n_pairs: int, n_slack: int
) -> tuple[list[int], list[int]]:
    """Deals the prompts of an iteration (counted from 1): disjoint ones for its pairs and for its slack.

    All iterations deal on from one seeded shuffle. So a prompt gives pairs again only after all prompts have
    been used, as a policy learns little from pairs that it knows by heart; and the slack is measured on the
    prompts that come next in the shuffle, which no pairs have used yet as long as the prompts last.
    """
    deck = subset(prompts, len(prompts), seed, keys.DECK)
    pool = min(n_pairs, len(deck) - n_slack)
    start = (iteration - 1) * pool % len(deck)
    turned = deck[start:] + deck[:start]
    return turned[:pool], turned[pool : pool + n_slack]


class Schedule:
    """The prompts of each step, from 0: seeded shuffles of all prompts, one after another, made when they are
    asked for.

    It depends only on (seed, purpose) and the prompts' keys.
    """

    def __init__(self, prompts: Prompts, seed: int, purpose: str, per_step: int) -> None:
        self._prompts, self._seed, self._purpose, self._per_step = prompts, seed, purpose, per_step
        self._shuffle = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, step: int) -> list[int]:
        first, P = step * self._per_step, len(self._prompts)
        return [self._shuffle(i // P)[i % P] for i in range(first, first + self._per_step)]

    def _shuffled(self, epoch: int) -> list[int]:
        return subset(self._prompts, len(self._prompts), self._seed, keys.epoch(self._purpose, epoch))
