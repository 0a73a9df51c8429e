"""Files with two responses to each prompt: people's preferences, or pairs to learn from.

Preferences are the data set of Algorithm 2 in arXiv 2405.19544.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.data import tables
from engine.data.chat import (
    answer_ids,
    as_text,
    check_known,
    known_end_of_turn,
    lead_of_answers,
    write_prompt,
)
from engine.data.layouts import TWO_RESPONSES, Example, no_column, read_example
from engine.data.prompts import TextLimits, check_length, row_text
from engine.data.reading import EVERY_ROW, Pool, Rules, Tally, Unusable
from engine.errors import UserError
from engine.files import escaped, shown
from engine.records import Prompts, Rollouts

# The score that stands for a label of a file: the Bradley-Terry probability sigmoid(2 * SURE) is 1.
SURE = 1e3
# A label as people write it: the number of the better response, also where a program made a float of it.
NUMBERS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


@dataclass(frozen=True, kw_only=True)
class ResponsePairs:
    """The rows of a file. A prompt may stand in several rows, so its key here is the row's number."""

    prompts: Prompts
    rollouts: Rollouts  # n = 2, without log-probs
    texts: list[str]
    # float64 [P, 2, O]: in each of the O label columns SURE for the better response, -SURE for the other one.
    label_PGO: Tensor
    source: str
    n_read: int = 0  # pairs that were read, also those of which nothing can be learned
    n_cut: int = 0  # answers that were cut at the longest response of the run
    n_alike: int = 0  # pairs of which nothing can be learned, as their answers are equal; they are left out
    reading: list[str] = field(default_factory=list)  # says what rows were read as, and what was left out

    def notes(self) -> list[str]:
        """Says what was cut, and which pairs have equal answers, in lines."""
        notes = []
        if self.n_cut:
            notes.append(
                f"{shown(self.source)}: {self.n_cut} of {2 * self.n_read} answers are longer than "
                f"--max-new-tokens {self.rollouts.tokens.shape[1]} and were cut"
            )
        if self.n_alike:
            left_out = f"{self.n_alike} of {self.n_read} pairs have equal answers and were left out"
            notes.append(f"{shown(self.source)}: {left_out}")
        return notes

    def without(self, rows: Sequence[int], because: str) -> "ResponsePairs":
        """Returns the pairs but for these rows, and a note that says why they are left out.

        Raises: UserError where none is left.
        """
        out = set(rows)
        kept = [row for row in range(len(self.prompts)) if row not in out]
        note = f"{shown(self.source)}: left out of {len(self.prompts)} pairs: {len(out)} {because}"
        if not kept:
            raise UserError(f"{note}; none is left, so give others.")
        both = torch.tensor([[2 * row, 2 * row + 1] for row in kept]).flatten()
        tensors = {
            name: value[both] if isinstance(value, Tensor) else value
            for name, value in vars(self.rollouts).items()
        }
        return replace(
            self,
            prompts=self.prompts.select(kept),
            rollouts=Rollouts(**tensors),
            texts=[self.texts[row] for row in both.tolist()],
            label_PGO=self.label_PGO[kept],
            reading=[*self.reading, note],
        )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one conversation, as a row or two rows have them."""

    place: str
    messages: list[dict[str, str]]
    responses: tuple[str, str]
    # For each label column 1 where the first answer is the better one, -1 where the second is, 0 for neither.
    labels: list[int]
    kind: str
    row: str = ""  # that of the first answer, as JSON; "" where rows are not kept


def read_response_pairs(
    source: str, columns: Sequence[str], tokenizer, limits: TextLimits, rules: Rules = EVERY_ROW
) -> ResponsePairs:
    """Reads pairs of responses of any layout, and their labels, as `read_pairs` does.

    Answers are tokenised behind their prompt, and end as the policy's do. A pair whose answers are equal,
    also where they became so by the cut at the longest response, is left out.

    rules: with `enough`, a seeded choice of a large set is held and tokenised.
    Raises: UserError naming the row and the column: one that is missing, a prompt or response that is not
    text, a label that is neither 0 nor 1; a file whose pairs are all left out.
    """
    held = rules.held
    while True:
        tally, pool = Tally(source, rules.strict), Pool(held, rules.seed)
        for pair in read_pairs(source, columns, rules, tally):
            tally.usable += 1
            pool.offer(json.dumps([pair.messages, pair.responses, pair.labels]), pair)
        read = _tokenised(pool.items, columns, tokenizer, limits, tally)
        # Where too many of the pool are left out, the next ones by their hash take their places.
        if not pool.is_cut or len(read.prompts) >= rules.enough:
            return read
        held *= 2


def read_pairs(source: str, columns: Sequence[str], rules: Rules, tally: Tally) -> Iterator[Pair]:
    """Yields the pairs of a source: its rows of two responses, and of one response the next two of a prompt.

    columns: of labels. Beside two responses a label is 0 or 1, the number of the better one; of single
    responses it is a number, and the larger one is better, or of NAME=-COLUMN the smaller.
    Where the row lacks them, those that its layout is known to have take their places.
    Raises: UserError naming the row.
    """
    waiting: dict[str, tuple[str, dict, Example]] = {}
    for place, row in tables.read_rows(source):
        tally.rows += 1
        with tally.leaving_out():
            example = read_example(row, place, rules, answers=True)
            tally.layouts[example.layout] += 1
            chat = json.dumps(example.messages)
            if not example.responses:
                missing = "rejected" if "chosen" in row else next(c for c in TWO_RESPONSES if c not in row)
                raise no_column(row, place, missing)
            if len(example.responses) == 2:
                labels = [_label(row, name, place) for name in _known(columns, row, example)]
                yield _pair(place, row, example, labels, rules)
            elif chat in waiting:
                _, other, first = waiting.pop(chat)
                labels = [_larger(other, row, name, place) for name in columns]
                both = replace(first, responses=(*first.responses, *example.responses))
                yield _pair(place, other, both, labels, rules)
            else:
                waiting[chat] = (place, row, example)
    for place, _, _ in waiting.values():
        with tally.leaving_out():
            raise Unusable(
                f"{place}: no second response to this prompt; remove the row.", "without a second response"
            )
    if not tally.rows:
        raise UserError(f"{shown(source)}: no rows in it; give at least one.")


def _pair(place: str, row: dict, example: Example, labels: list[int], rules: Rules) -> Pair:
    first, second = example.responses
    return Pair(
        place=place,
        messages=example.messages,
        responses=(first, second),
        labels=labels,
        kind=str(row.get("kind") or ""),
        row=row_text(row) if rules.rows else "",
    )


def _known(columns: Sequence[str], row: dict, example: Example) -> Sequence[str]:
    """Returns the label columns, or those of the row's layout where it has as many and the row lacks them."""
    lacks = any(_bare(name, row)[0] not in row for name in columns)
    return example.labels if lacks and len(example.labels) == len(columns) else columns


def _bare(column: str, row: dict) -> tuple[str, int]:
    """Parts [NAME=][-]COLUMN, as flags spell it, into the column and -1 where a minus stands before it."""
    bare = column if column in row else column.partition("=")[2] or column
    return (bare, 1) if bare in row or not bare.startswith("-") else (bare[1:], -1)


def _cell(row: dict, column: str, place: str) -> tuple[object, int]:
    """Returns the cell of a label column, and its sign."""
    bare, sign = _bare(column, row)
    if bare not in row:
        raise UserError(
            f"{place}: no column {bare!r}; columns found: {escaped(', '.join(map(str, row)))[:300]}. "
            "Name the columns of labels with --preference-columns, a head's with --label-column."
        )
    return row[bare], sign


def _label(row: dict, column: str, place: str) -> int:
    value, sign = _cell(row, column, place)
    if str(value) not in NUMBERS:
        raise UserError(
            f"{place}: {column} is {value!r:.60}; give 0 or 1, the response that is better in it."
        )
    return -sign if NUMBERS[str(value)] else sign


def _larger(first: dict, second: dict, column: str, place: str) -> int:
    scores = []
    for row in (first, second):
        value, sign = _cell(row, column, place)
        try:
            scores.append(sign * float(value if isinstance(value, str | int | float) else math.nan))
        except ValueError:
            scores.append(math.nan)
        if not math.isfinite(scores[-1]) or isinstance(value, bool):
            raise UserError(
                f"{place}: {column} of a response to this prompt is {value!r:.60}; give a number."
            )
    return (scores[0] > scores[1]) - (scores[0] < scores[1])


def _tokenised(
    pairs: list[Pair], columns: Sequence[str], tokenizer, limits: TextLimits, tally: Tally
) -> ResponsePairs:
    """Tokenises pairs, and leaves out those whose prompts are too long or whose answers are equal."""
    source = tally.source
    prompts, tokens, labels = [], [], []
    kwargs = limits.template_kwargs
    end = known_end_of_turn(tokenizer, limits.vocab_size, shown(source), kwargs)
    lead = lead_of_answers(tokenizer, kwargs)
    n_read = n_cut = n_alike = 0
    for pair in pairs:
        tally.held += 1
        with tally.leaving_out():
            place = pair.place
            prompt = write_prompt(pair.messages, tokenizer, limits.system, place, limits.now, kwargs)
            ids = prompt.token_ids
            check_length(ids, limits.max_prompt_tokens, place)
            check_known(ids, limits.vocab_size, place)
            n_read += 1
            answers = []
            for text in pair.responses:
                response = answer_ids(prompt, text, tokenizer, lead, place)
                check_known(response, limits.vocab_size, place)
                answers.append((response + [end])[: limits.max_new_tokens])
                n_cut += len(response) >= limits.max_new_tokens
            if answers[0] == answers[1]:
                n_alike += 1
                continue
            prompts.append((as_text(pair.messages), pair.kind, ids, pair.messages, pair.row))
            tokens += answers
            labels.append([[SURE * label for label in pair.labels], [-SURE * label for label in pair.labels]])
    if n_alike and not prompts:
        raise UserError(
            f"{shown(source)}: the two answers of every pair are equal ({n_cut} of {2 * n_alike} answers "
            f"were cut at --max-new-tokens {limits.max_new_tokens}); give others, or raise that limit."
        )
    if not prompts:
        raise tally.first or UserError(f"{shown(source)}: no pairs in it; give at least one.")
    text, kind, token_ids, messages, rows = (list(column) for column in zip(*prompts, strict=True))
    return ResponsePairs(
        prompts=Prompts(
            text=text,
            kind=kind,
            token_ids=token_ids,
            key_P=torch.arange(len(text)),
            messages=messages,
            rows=[row for row in rows if row],
        ),
        rollouts=as_rollouts(tokens, 2, limits.max_new_tokens, end),
        texts=[tokenizer.decode(response, skip_special_tokens=True) for response in tokens],
        label_PGO=torch.tensor(labels, dtype=torch.float64).view(len(text), 2, len(columns)),
        source=source,
        n_read=n_read,
        n_cut=n_cut,
        n_alike=n_alike,
        reading=[*tally.lines(), *_ties(source, labels, columns)],
    )


def _ties(source: str, labels: list, columns: Sequence[str]) -> list[str]:
    """Says of how many pairs a label prefers neither answer, so that it is drawn as a coin is."""
    tied = [sum(pair[0][i] == 0 for pair in labels) for i in range(len(columns))]
    return [
        f"{shown(source)}: in {name} neither answer of {n} of {len(labels)} pairs is the better one"
        for name, n in zip(columns, tied, strict=True)
        if n
    ]


def as_rollouts(tokens: list[list[int]], n: int, max_new_tokens: int, end: int) -> Rollouts:
    """Pads the responses, n per prompt, as if they had been sampled; their log-probs are zeros.

    end: the token that ends a response which was not cut.
    """
    length = torch.tensor([len(response) for response in tokens])
    padded = torch.zeros(len(tokens), max_new_tokens, dtype=torch.int64)
    for row, response in enumerate(tokens):
        padded[row, : len(response)] = torch.tensor(response)
    zeros = torch.zeros(padded.shape)
    return Rollouts(
        n=n,
        tokens=padded,
        length=length,
        finished=torch.tensor([response[-1] == end for response in tokens]),
        logprob=zeros,
        model_logprob=zeros,
        near_tie=zeros.bool(),
    )
