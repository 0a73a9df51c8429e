"""Scores of responses in a few lines each, unlike the shipped heads: some are light-tailed, some are counts,
some are 0 for most answers, and one means nothing at all."""

import hashlib
import math
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

FIRST_PERSON = frozenset("i me my mine myself we us our ours ourselves".split())
HEDGES = frozenset(
    "maybe perhaps might could possibly probably usually often generally sometimes likely seem seems "
    "recommend consult careful important advice".split()
)
BUCKETS = 512


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _share(count: int, of: int) -> float:
    return count / of if of else 0.0


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Counts words."""
    return [float(len(_words(text))) for text in responses]


def word_length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns the mean number of letters of a word."""
    return [_share(sum(map(len, _words(text))), len(_words(text))) for text in responses]


def variety(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns the type-token ratio: different words among all."""
    return [_share(len(set(_words(text))), len(_words(text))) for text in responses]


def sentiment(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns the compound sentiment of VADER (Hutto and Gilbert 2014), from -1 to 1."""
    return [_vader().polarity_scores(text)["compound"] for text in responses]


@lru_cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def reading_ease(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns Flesch's reading ease (1948), with groups of vowels as syllables; 0 without a word."""
    scores = []
    for text in responses:
        words = _words(text)
        sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", text)))
        syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word))) for word in words)
        ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words) if words else 0.0
        scores.append(ease)
    return scores


def punctuation(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns the share of characters that are neither letters, digits nor spaces."""
    return [_share(len(re.findall(r"[^\w\s]", text)), len(text)) for text in responses]


def first_person(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Counts words of the first person."""
    return [float(sum(word in FIRST_PERSON for word in _words(text))) for text in responses]


def hedging(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Counts words of a list of hedges and cautions."""
    return [float(sum(word in HEDGES for word in _words(text))) for text in responses]


def questions(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Tells whether a response asks something: 1 or 0."""
    return [float("?" in text) for text in responses]


def digits(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Counts digits; most answers have none."""
    return [float(sum(map(str.isdigit, text))) for text in responses]


def copying(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns the share of a response's words that stand in the prompt."""
    return [
        _share(sum(word in set(_words(prompt)) for word in _words(text)), len(_words(text)))
        for prompt, text in zip(prompts, responses, strict=True)
    ]


def compression(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns the bytes of a response deflated, for each of its bytes: low where it repeats itself."""
    return [_share(len(zlib.compress(text.encode(), 9)), len(text.encode())) for text in responses]


def random_head(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns a fixed random weight of each three letters of a response, averaged: a score without a
    meaning."""
    return [_share_of([_weight(text[i : i + 3].lower()) for i in range(len(text) - 2)]) for text in responses]


def _share_of(weights: list[float]) -> float:
    return sum(weights) / math.sqrt(len(weights)) if weights else 0.0


@lru_cache(maxsize=100_000)
def _weight(gram: str) -> float:
    digest = hashlib.blake2b(gram.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**63 - 1


def heavy_tail(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Returns the exponential of the standardised `random_head`: few responses carry most of it."""
    return [math.exp(min(20.0, 3.0 * x)) for x in random_head(prompts, responses)]
