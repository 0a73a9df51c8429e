"""Guards as costs: the log-odds of a bad answer, read where the guard would write it.

The score is logsumexp of the logits of the bad answers' first tokens minus that of the good ones'. It is no
probability: that is 0 or 1 to rounding for most texts, and differences between responses would be lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import one_line, shown
from engine.model import packing
from engine.scorers.base import Asked, LoadContext
from engine.scorers.last_token import TOKENS_CPU
from engine.scorers.reader import LONGEST_TEXT, Reader
from engine.scorers.recipes import Recipe, Step

# (prompts, ids [N] of texts, tokens [K]) -> the logits [N, K] of these tokens behind each text
Logits = Callable[[list[Asked], list[list[int]], Sequence[int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A loaded language model whose next token is the score."""

    recipe: Recipe
    reader: Reader
    logits: Logits
    tokens: tuple[tuple[int, ...], ...]  # of each step's answers

    @staticmethod
    def of(spec: str, recipe: Recipe, reader: Reader, logits: Logits) -> "Guard":
        """Finds the tokens of the answers.

        Raises: UserError where two answers of a step begin with one token, or an answer changes how the text
        before it is tokenised; and where there is no chat template.
        """
        if not reader.chat:
            raise UserError(
                f"scorer {spec}: its tokenizer has no chat template, by which a guard is asked; "
                "give the complete folder."
            )
        (text,) = reader.texts(["A question"], ["An answer"])
        tokens = []
        for step in recipe.steps:
            text += _prefix(text, step)
            tokens.append(_first_tokens(spec, reader.tokenizer, text, step))
            text += step.answers[0]
        return Guard(recipe=recipe, reader=reader, logits=logits, tokens=tuple(tokens))

    def scores(self, prompts: list[Asked], responses: list[str]) -> list[float]:
        """Scores N responses. Of an earlier question the guard's likelier answer is taken."""
        if self.recipe.row is not None:
            ids = self.reader.encode(prompts, responses)["input_ids"]
            return self.logits(prompts, ids, [self.recipe.row])[:, 0].tolist()
        texts = self.reader.texts(prompts, responses)
        for step, tokens in zip(self.recipe.steps, self.tokens, strict=True):
            texts = [text + _prefix(text, step) for text in texts]
            first = step is self.recipe.steps[0]
            ids = self.reader.encode(prompts, responses, texts, counted=first)["input_ids"]
            logits_NK = self.logits(prompts, ids, tokens)
            chosen = logits_NK.argmax(dim=1).tolist()
            texts = [text + step.answers[i] for text, i in zip(texts, chosen, strict=True)]
        n_bad = len(step.bad)
        return (logits_NK[:, :n_bad].logsumexp(dim=1) - logits_NK[:, n_bad:].logsumexp(dim=1)).tolist()


def _prefix(text: str, step: Step) -> str:
    return "" if text.endswith(step.prefix) else step.prefix


def _first_tokens(spec: str, tokenizer, text: str, step: Step) -> tuple[int, ...]:
    """Returns the first token of each answer behind a text."""
    before, first = tokenizer.encode(text, add_special_tokens=False), []
    for answer in step.answers:
        ids = tokenizer.encode(text + answer, add_special_tokens=False)
        if ids[: len(before)] != before or len(ids) == len(before):
            raise UserError(
                f"scorer {spec}: its tokenizer joins the answer {answer!r} with what stands before it, so no "
                "token is the answer's; use the recipe's own model."
            )
        first.append(ids[len(before)])
    for answer, token in zip(step.answers, first, strict=True):
        other = step.answers[first.index(token)]
        if other != answer:
            raise UserError(
                f"scorer {spec}: the answers {other!r} and {answer!r} begin with the same token {token}, so "
                "they cannot be told apart; use the recipe's own model."
            )
    return tuple(first)


def load_other(spec: str, folder: Path, context: LoadContext) -> torch.nn.Module:
    """Loads a language model that is none of the project's decoders. Raises: UserError where it cannot be."""
    from transformers import AutoModelForCausalLM

    try:
        network, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=context.dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(
            f"scorer {spec}: no language model could be loaded ({shown(one_line(error))}); "
            "use one that transformers has the code of."
        ) from error
    if missing := loading["missing_keys"]:
        raise UserError(f"scorer {spec}: it lacks tensor {min(missing)}; give a complete model.")
    return network.eval()


def positions(network: torch.nn.Module) -> int:
    """Returns how many tokens a model of transformers reads."""
    return getattr(network.config.get_text_config(), "max_position_embeddings", None) or LONGEST_TEXT


def logits_of(network: Any, context: LoadContext) -> Logits:
    """Returns the `Logits` of a model of transformers. A pass has texts of one length: none is padded."""

    @torch.inference_mode()
    def logits(prompts: list[Asked], ids: list[list[int]], tokens: Sequence[int]) -> Tensor:
        found, lengths = torch.empty(len(ids), len(tokens)), list(map(len, ids))
        with context.placed(network):
            for batch in packing.of_like_length(lengths, TOKENS_CPU):
                for _, same in groupby(batch, key=lengths.__getitem__):
                    rows = list(same)
                    inputs = torch.tensor([ids[row] for row in rows], device=context.device)
                    last = network(input_ids=inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
                    found[rows] = last[:, list(tokens)].float().cpu()
        return found

    return logits
