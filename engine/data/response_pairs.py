"""Files with two responses to each prompt: people's preferences, or pairs to learn from.

Preferences are the data set of Algorithm 2 in arXiv 2405.19544.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data import tables
from engine.data.chat import answer_ids, check_known, known_end_of_turn, lead_of_answers, write_prompt
from engine.data.prompts import TextLimits, check_length
from engine.errors import UserError
from engine.files import shown
from engine.records import Prompts, Rollouts

# The score that stands for a label of a file: the Bradley-Terry probability sigmoid(2 * SURE) is 1.
SURE = 1e3


@dataclass(frozen=True, kw_only=True)
class ResponsePairs:
    """The rows of a file. A prompt may stand in several rows, so its key here is the row's number."""

    prompts: Prompts
    rollouts: Rollouts  # n = 2, without log-probs
    texts: list[str]
    # float64 [P, 2, O]: in each of the O label columns SURE for the better response, -SURE for the other one.
    label_PGO: Tensor
    source: str
    n_cut: int = 0  # answers that were cut at the longest response of the run
    n_alike: int = 0  # pairs of which nothing can be learned, as their answers are equal; they are left out

    def notes(self) -> list[str]:
        """Says what was cut and left out, in lines."""
        notes = []
        if self.n_cut:
            answers = 2 * (len(self.prompts) + self.n_alike)
            notes.append(
                f"{shown(self.source)}: {self.n_cut} of {answers} answers are longer than --max-new-tokens "
                f"{self.rollouts.tokens.shape[1]} and were cut"
            )
        if self.n_alike:
            pairs = len(self.prompts) + self.n_alike
            left_out = f"{self.n_alike} of {pairs} pairs have equal answers and were left out"
            notes.append(f"{shown(self.source)}: {left_out}")
        return notes


def read_response_pairs(source: str, columns: Sequence[str], tokenizer, limits: TextLimits) -> ResponsePairs:
    """Reads a jsonl, csv or parquet file with the columns prompt, response_0, response_1, and `columns`.

    The column "kind" is optional. Each of `columns` holds 0 or 1: the number of the better response. Where no
    columns are asked for, the responses may also stand in chosen and rejected. Answers are tokenised behind
    their prompt, and end as the policy's do. A pair whose answers are equal, also where they became so by the
    cut at the longest response, is left out.

    Raises: UserError naming the row and the column: one that is missing, a prompt or response that is not
    text, a label that is neither 0 nor 1; a file whose pairs are all left out.
    """
    prompts, tokens, labels = [], [], []
    kwargs = limits.template_kwargs
    end = known_end_of_turn(tokenizer, limits.vocab_size, shown(source), kwargs)
    lead = lead_of_answers(tokenizer, kwargs)
    n_cut = n_alike = 0
    for place, row in tables.read_rows(source):
        pair = ("chosen", "rejected") if not columns and "chosen" in row else ("response_0", "response_1")
        _check_row(row, pair, columns, place)
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = write_prompt(messages, tokenizer, limits.system, place, limits.now, kwargs)
        ids = prompt.token_ids
        check_length(ids, limits.max_prompt_tokens, place)
        check_known(ids, limits.vocab_size, place)
        answers = []
        for name in pair:
            response = answer_ids(prompt, row[name], tokenizer, lead, place)
            check_known(response, limits.vocab_size, place)
            answers.append((response + [end])[: limits.max_new_tokens])
            n_cut += len(response) >= limits.max_new_tokens
        if answers[0] == answers[1]:
            n_alike += 1
            continue
        prompts.append((row["prompt"], str(row.get("kind") or ""), ids))
        tokens += answers
        labels.append([[SURE if int(row[name]) == i else -SURE for name in columns] for i in (0, 1)])
    if n_alike and not prompts:
        raise UserError(
            f"{shown(source)}: the two answers of every pair are equal ({n_cut} of {2 * n_alike} answers "
            f"were cut at --max-new-tokens {limits.max_new_tokens}); give others, or raise that limit."
        )
    if not prompts:
        raise UserError(f"{shown(source)}: no rows in it; give at least one.")
    text, kind, token_ids = (list(column) for column in zip(*prompts, strict=True))
    return ResponsePairs(
        prompts=Prompts(text=text, kind=kind, token_ids=token_ids, key_P=torch.arange(len(text))),
        rollouts=_as_rollouts(tokens, limits.max_new_tokens),
        texts=[tokenizer.decode(response, skip_special_tokens=True) for response in tokens],
        label_PGO=torch.tensor(labels, dtype=torch.float64).view(len(text), 2, len(columns)),
        source=source,
        n_cut=n_cut,
        n_alike=n_alike,
    )


def _check_row(row: dict, pair: tuple[str, str], columns: Sequence[str], place: str) -> None:
    wanted = ("prompt", *pair, *columns)
    missing = [name for name in wanted if name not in row]
    if missing:
        raise UserError(f"{place}: no column {missing[0]!r}; wanted are {', '.join(wanted)}.")
    for name in ("prompt", *pair):
        # A response may be empty, a prompt may not.
        if not isinstance(row[name], str) or not (row[name].strip() or name in pair):
            raise UserError(f"{place}: {name} is {row[name]!r:.60}; give text, or remove the row.")
    for name in columns:
        if str(row[name]) not in ("0", "1"):
            raise UserError(
                f"{place}: {name} is {row[name]!r}; give 0 or 1, the response that is better in it."
            )


def _as_rollouts(tokens: list[list[int]], max_new_tokens: int) -> Rollouts:
    """Pads the responses, two per prompt, as if they had been sampled; their log-probs are zeros."""
    length = torch.tensor([len(response) for response in tokens])
    padded = torch.zeros(len(tokens), max_new_tokens, dtype=torch.int64)
    for row, response in enumerate(tokens):
        padded[row, : len(response)] = torch.tensor(response)
    zeros = torch.zeros(padded.shape)
    return Rollouts(
        n=2,
        tokens=padded,
        length=length,
        finished=length < max_new_tokens,
        logprob=zeros,
        model_logprob=zeros,
        near_tie=zeros.bool(),
    )
