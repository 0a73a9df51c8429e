"""Scorers that need no model: `length` and `refusal`; and which scorer tells refusals."""

import json
from collections.abc import Sequence

from engine.scorers.base import Asked, LoadContext, Sampled, Scorer, Scorers, TextScorer
from engine.verdict.refusals import REFUSALS, SYMPATHY, is_refusal

# By name: what each depends on, in texts that tell one version from another.
BUILT_IN = {"length": ("tokens of the response",), "refusal": (json.dumps([REFUSALS, SYMPATHY]),)}
TELLER = "refusal"  # the name of the cost or audit that tells refusals


def built_in(name: str, context: LoadContext) -> TextScorer:
    """Returns the scorer of one of the names in `BUILT_IN`."""
    if name == "refusal":
        return TextScorer(name=name, function=_refusal, counts=True)
    tokenizer = context.tokenizer

    def length(prompts: list[Asked], responses: list[str], sampled: Sampled | None) -> list[float]:
        if sampled is not None:
            return [float(len(ids)) for ids in sampled.response_ids]
        # A response that was not sampled has ended, by a token that its text does not show.
        return [float(1 + len(tokenizer.encode(text, add_special_tokens=False))) for text in responses]

    return TextScorer(name=name, function=length, keywords=("sampled",), counts=True)


def _refusal(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(is_refusal(response)) for response in responses]


def teller_of_refusals(scorers: Scorers) -> Scorer | None:
    """Finds the cost or audit that is named refusal: a response is a refusal where its score lies above 0, as
    log-odds and flags do. None where there is none but the built-in one, which goes by first words."""
    named = [s for s in (*scorers.costs, *scorers.audits) if s.name == TELLER]
    first_words = named and isinstance(named[0], TextScorer) and named[0].function is _refusal
    return named[0] if named and not first_words else None
