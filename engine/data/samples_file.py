"""Files of responses that were sampled elsewhere, with or without their scores: what --samples reads.

A row holds a prompt and its `responses`, or one response of any known layout, so that a prompt has as many
rows as responses. The columns of scores are named as in a file for `engine.dual`: reward, and the costs by
their names; beside `responses` they hold a list, too.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.config.bounds import LARGEST_SCORE
from engine.data.chat import (
    answer_ids,
    as_text,
    check_known,
    known_end_of_turn,
    lead_of_answers,
    write_prompt,
)
from engine.data.formats import parse_json
from engine.data.layouts import no_column, read_example
from engine.data.prompts import TextLimits, check_length, kind_of, prompt_key, row_text
from engine.data.reading import REPEATED, Pool, Rules, Tally, Unusable
from engine.data.response_pairs import as_rollouts
from engine.data.tables import read_rows
from engine.errors import UserError
from engine.files import shown
from engine.records import Prompts, Rollouts

RESPONSES = "responses"


@dataclass(frozen=True, kw_only=True)
class GivenSamples:
    """The responses of a file, G to each prompt, and the scores that stand there."""

    prompts: Prompts
    rollouts: Rollouts  # without log-probs
    texts: list[str]  # [P * G], prompt-major
    names: list[str]  # [C]: the scores that the file has
    score_PGC: Tensor  # float64 [P, G, C]: of a cost larger is worse
    source: str
    reading: list[str] = field(default_factory=list)  # says what rows were read as, and what was left out

    def of(self, prompts: Prompts) -> "GivenSamples":
        """Returns the responses to these of the file's prompts, in their order."""
        place = {key: p for p, key in enumerate(self.prompts.key_P.tolist())}
        index, n = [place[key] for key in prompts.key_P.tolist()], self.rollouts.n
        rows = torch.tensor([p * n + i for p in index for i in range(n)], dtype=torch.int64)
        tensors = {
            name: value[rows] if isinstance(value, Tensor) else value
            for name, value in vars(self.rollouts).items()
        }
        return replace(
            self,
            prompts=prompts,
            rollouts=Rollouts(**tensors),
            texts=[self.texts[row] for row in rows.tolist()],
            score_PGC=self.score_PGC[index],
        )

    def known(self, names: Sequence[str]) -> list[Tensor | None]:
        """Returns the scores [P, G] of each of these names; None for one that the file does not have."""
        columns = dict(zip(self.names, self.score_PGC.unbind(2), strict=True))
        return [columns.get(name) for name in names]

    def notes(self) -> list[str]:
        """Says what was cut, in lines."""
        n_cut = int((~self.rollouts.finished).sum())
        if not n_cut:
            return []
        n, longest = len(self.texts), self.rollouts.tokens.shape[1]
        longer = f"{n_cut} of {n} responses are longer than --max-new-tokens {longest} and were cut"
        return [f"{shown(self.source)}: {longer}"]


@dataclass(kw_only=True)
class _Asked:
    """A prompt with what all its rows hold."""

    place: str
    messages: list[dict[str, str]]
    kind: str
    row: str  # the first one, as JSON; "" where rows are not kept
    rows: int = 0
    responses: list[str] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)  # of each response


def read_samples(
    source: str, names: Sequence[str], tokenizer, limits: TextLimits, rules: Rules, most: int
) -> GivenSamples:
    """Reads responses to prompts, and those scores of `names` that the rows have.

    Responses are tokenised behind their prompt, and end as the policy's do. Every prompt keeps as many: those
    of the prompt that has the fewest, and at most `most`, the first of each in the order of the rows.
    rules: as for prompts; with strict, prompts with unequal numbers of responses are an error.
    Raises: UserError naming the row and the column.
    """
    tally, found = Tally(source, rules.strict), list[str]()
    asked = [one for one in _grouped(source, names, rules, tally, found) if _answered(one, tally)]
    if not asked:
        raise tally.first or UserError(f"{shown(source)}: no rows in it; give at least one.")
    counts = [len(one.responses) for one in asked]
    if rules.strict and min(counts) < max(counts):
        one = asked[counts.index(min(counts))]
        raise UserError(
            f"{one.place}: {min(counts)} responses to the prompt {as_text(one.messages)[:60]!r}, and "
            f"{max(counts)} to another; give all the same number."
        )
    tally.usable, n, held, left_out = len(asked), min(*counts, most), rules.held, tally.left_out
    while True:
        tally.held, tally.left_out, pool = 0, left_out.copy(), Pool[_Asked](held, rules.seed)
        for one in asked:
            pool.offer(json.dumps(one.messages), one)
        read = _tokenised(pool.items, n, tokenizer, limits, tally)
        # Where too many of the pool are too long, the next ones by their hash take their places.
        if not pool.is_cut or len(read.prompts) >= rules.enough:
            break
        held *= 2
    _check_differ(read, limits)
    return replace(read, names=found, reading=[*tally.lines(), _summary(read, counts, found, names)])


def _summary(read: GivenSamples, counts: list[int], found: Sequence[str], names: Sequence[str]) -> str:
    n, there = read.rollouts.n, f"{min(counts)}" if min(counts) == max(counts) else ""
    there = there or f"{min(counts)} to {max(counts)}"
    first = "" if there == str(n) else f", the first of the {there} there (see --n-responses)"
    given = f"scores of {', '.join(found)} are given" if found else "no scores are given"
    asked = [name for name in names if name not in found]
    scored = f", scored here: {', '.join(asked)}" if asked else ""
    return (
        f"{shown(read.source)}: {len(read.prompts)} prompts with {n} responses each{first}; {given}{scored}"
    )


def _grouped(
    source: str, names: Sequence[str], rules: Rules, tally: Tally, found: list[str]
) -> Iterable[_Asked]:
    """Reads all rows, and gathers those of one prompt; `found` is filled with the scores that rows have."""
    asked: dict[str, _Asked] = {}
    for place, row in read_rows(source):
        tally.rows += 1
        with tally.leaving_out():
            messages, responses, layout = _read(row, place, rules)
            there = [name for name in names if name in row]
            if not tally.layouts:
                found += there
            if there != found:
                (name, *_) = sorted({*there} ^ {*found})
                has = "and" if name in there else "but no"
                raise UserError(
                    f"{place}: {has} column {name!r}, unlike the rows before; fill it in everywhere, or take "
                    "it out."
                )
            columns = [_scores(row[name], name, len(responses), place) for name in there]
            tally.layouts[layout] += 1
            kind, kept = kind_of(row.get("kind"), place), row_text(row) if rules.rows else ""
            new = _Asked(place=place, messages=messages, kind=kind, row=kept)
            one = asked.setdefault(json.dumps(messages), new)
            one.rows += 1
            one.responses += responses
            one.scores += [list(scores) for scores in zip(*columns, strict=True)] or [[] for _ in responses]
    return asked.values()


def _read(row: dict, place: str, rules: Rules) -> tuple[list[dict[str, str]], list[str], str]:
    """Returns the messages, the responses and the layout of a row."""
    if RESPONSES not in row or rules.response_columns:
        example = read_example(row, place, rules, answers=True)
        if not example.responses:
            raise no_column(row, place, RESPONSES)
        return example.messages, list(example.responses), example.layout
    responses = _listed(row[RESPONSES])
    if responses is None:
        raise UserError(f"{place}: {RESPONSES} is {row[RESPONSES]!r:.60}; give a list of texts.")
    if not responses or any(text is None for text in responses):
        raise Unusable(f"{place}: {RESPONSES} lacks a text; remove the row.", "without text")
    for text in responses:
        if not isinstance(text, str):
            raise UserError(f"{place}: {RESPONSES} holds {text!r:.60}; give texts.")
    example = read_example(row, place, rules, answers=False)
    return example.messages, responses, example.layout


def _listed(value: object) -> list | None:
    """Reads a list, also as JSON in a text, as cells of a csv file are; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    return list(value) if isinstance(value, list | tuple) else None


def _scores(value: object, name: str, n: int, place: str) -> list[float]:
    """Reads the scores of a row's n responses. Raises: UserError."""
    values = _listed(value)
    if values is None:
        values = [value]
    if len(values) != n:
        raise UserError(f"{place}: {len(values)} value(s) of {name} for {n} response(s); give one of each.")
    return [_number(each, name, place) for each in values]


def _number(value: object, name: str, place: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool) or not abs(number) <= LARGEST_SCORE:
        raise UserError(
            f"{place}: column {name!r} holds {value!r:.60}; give a finite number of at most "
            f"{LARGEST_SCORE:g} in size, or take the column out."
        )
    return number


def _answered(one: _Asked, tally: Tally) -> bool:
    """Tells whether a prompt has the two responses that the dual weighs against each other."""
    with tally.leaving_out(one.rows):
        if len(one.responses) < 2:
            raise Unusable(
                f"{one.place}: one response to this prompt, and at least 2 are weighed against each other; "
                "give more, or remove the row.",
                "with a single response to their prompt",
            )
        return True
    return False


def _check_differ(read: GivenSamples, limits: TextLimits) -> None:
    """Refuses samples of which nothing can be learned. Raises: UserError."""
    tokens_PG, cut = (
        read.rollouts.tokens.view(len(read.prompts), read.rollouts.n, -1),
        ~read.rollouts.finished,
    )
    if bool((tokens_PG == tokens_PG[:, :1]).all()):
        raise UserError(
            f"{shown(read.source)}: the responses to every prompt are equal ({int(cut.sum())} of {len(cut)} "
            f"were cut at --max-new-tokens {limits.max_new_tokens}); give others, or raise that limit."
        )


def _tokenised(asked: list[_Asked], n: int, tokenizer, limits: TextLimits, tally: Tally) -> GivenSamples:
    """Tokenises prompts with their first n responses; leaves out prompts that are too long, or equal once
    they are tokens."""
    kwargs = limits.template_kwargs
    end = known_end_of_turn(tokenizer, limits.vocab_size, shown(tally.source), kwargs)
    lead = lead_of_answers(tokenizer, kwargs)
    kept: dict[int, tuple[_Asked, list[int]]] = {}
    tokens: list[list[int]] = []
    for one in asked:
        tally.held += 1
        with tally.leaving_out(one.rows):
            place = one.place
            prompt = write_prompt(one.messages, tokenizer, limits.system, place, limits.now, kwargs)
            check_length(prompt.token_ids, limits.max_prompt_tokens, place)
            check_known(prompt.token_ids, limits.vocab_size, place)
            key = prompt_key(prompt.token_ids)
            if key in kept:
                raise Unusable(
                    f"{place}: the same prompt as {kept[key][0].place} as the chat template writes it; "
                    "remove one.",
                    REPEATED,
                )
            answers = [answer_ids(prompt, text, tokenizer, lead, place) for text in one.responses[:n]]
            for ids in answers:
                check_known(ids, limits.vocab_size, place)
            tokens += [[*ids, end][: limits.max_new_tokens] for ids in answers]
            kept[key] = one, prompt.token_ids
    if not kept:
        raise tally.first or UserError(f"{shown(tally.source)}: no prompts in it; give at least one.")
    chosen = [one for one, _ in kept.values()]
    return GivenSamples(
        prompts=Prompts(
            text=[as_text(one.messages) for one in chosen],
            kind=[one.kind for one in chosen],
            token_ids=[ids for _, ids in kept.values()],
            key_P=torch.tensor(list(kept), dtype=torch.int64),
            messages=[one.messages for one in chosen],
            rows=[one.row for one in chosen if one.row],
        ),
        rollouts=as_rollouts(tokens, n, limits.max_new_tokens, end),
        texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens],
        names=[],
        score_PGC=torch.tensor([one.scores[:n] for one in chosen], dtype=torch.float64),
        source=tally.source,
    )
