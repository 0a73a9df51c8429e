"""From rows of files to prompts: checked, put into the chat template once, as token ids with keys."""

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from sys import byteorder
from typing import Any, Literal

import torch

from engine.data.chat import NO_KWARGS, as_text, write_prompt
from engine.data.layouts import read_example
from engine.data.reading import REPEATED, Pool, Rules, Tally, Unusable
from engine.data.tables import read_rows
from engine.errors import UserError
from engine.files import shown
from engine.records import Prompts

FIRST_LOOK = 48


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """How texts become token ids that a model can read in a run."""

    system: str  # put before messages that have no system message
    max_positions: int  # the longest prompt and response together that the model reads
    max_new_tokens: int  # responses are cut to this many tokens
    vocab_size: int  # token ids from here on are unknown to the model
    now: datetime | None = None  # the date for chat templates that write one; None: that of the clock
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables for the chat template

    @property
    def max_prompt_tokens(self) -> int:
        """Returns the length of the longest prompt that leaves room for a response."""
        return self.max_positions - self.max_new_tokens


def load_prompts(
    source: str | list[str],
    tokenizer,
    *,
    column: str = "prompt",
    system: str = "",
    now: datetime | None = None,
    template_kwargs: Mapping[str, Any] = NO_KWARGS,
    max_prompt_tokens: int,
) -> Prompts:
    """Reads all prompts of a source, refusing rows that cannot be used; see `read_prompts`."""
    return read_prompts(
        source,
        tokenizer,
        Rules(prompt_column=column),
        system=system,
        now=now,
        template_kwargs=template_kwargs,
        max_prompt_tokens=max_prompt_tokens,
    )[0]


def read_prompts(
    source: str | list[str],
    tokenizer,
    rules: Rules,
    *,
    system: str = "",
    now: datetime | None = None,
    template_kwargs: Mapping[str, Any] = NO_KWARGS,
    max_prompt_tokens: int,
) -> tuple[Prompts, list[str]]:
    """Reads prompts of any layout, applies the tokenizer's chat template once and tokenises.

    source: what `engine.data.tables.read_rows` reads, or a list of these.
    rules: with `enough`, a large set is read row by row, and a seeded choice of it is held and tokenised.
    system: put before messages that have no system message. A tokenizer without a chat template takes the
    text alone, and adds its bos itself.
    now: the date for chat templates that write one; by default that of the clock. template_kwargs: variables
    for the chat template.

    The optional column "kind" is a label; of equal prompts the first is kept, with its kind.
    Returns the prompts in the order of the rows, and what to say of the reading.
    Raises: UserError naming the file and the line (where there are no lines, the row, counted from 1).
    """
    names = [str(name) for name in ([source] if isinstance(source, str | Path) else source)]
    held = rules.held
    while True:
        pool, tallies = _offered(names, rules, held)
        prompts = _tokenised(
            pool.items,
            lambda talk, place: write_prompt(talk, tokenizer, system, place, now, template_kwargs).token_ids,
            max_prompt_tokens,
        )
        # Where too many of the pool are too long, the next ones by their hash take their places.
        if not pool.is_cut or len(prompts) >= rules.enough:
            if not len(prompts):
                raise next(tally.first for tally in tallies if tally.first)
            return prompts, [line for tally in tallies for line in tally.lines()]
        held *= 2


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of a pool of prompts."""

    place: str
    messages: list[dict[str, str]]
    kind: str
    row: str  # as JSON; "" where rows are not kept
    tally: Tally


def _offered(names: list[str], rules: Rules, held: int | None) -> tuple[Pool[_Row], list[Tally]]:
    """Offers the different conversations of all sources to a pool. Raises: UserError."""
    pool: Pool[_Row] = Pool(held, rules.seed)
    place_of: dict[bytes, str] = {}
    tallies = []
    for name in names:
        tally = Tally(name, rules.strict)
        tallies.append(tally)
        for place, row in read_rows(name):
            tally.rows += 1
            with tally.leaving_out():
                # It comes first, as it says of a missing column where that was named.
                known = rules.kind_of(row, place) if rules.kind_of else None
                example = read_example(row, place, rules, answers=False)
                kind = kind_of(row.get("kind"), place) if known is None else known
                tally.layouts[example.layout] += 1
                text = json.dumps(example.messages)
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if digest in place_of:
                    raise _twice(place, place_of[digest])
                # Places are named by --strict alone, and a large set has many.
                place_of[digest] = place if rules.strict else ""
                tally.usable += 1
                offered = _Row(
                    place=place,
                    messages=example.messages,
                    kind=kind,
                    row=row_text(row) if rules.rows else "",
                    tally=tally,
                )
                pool.offer(text, offered)
        if not tally.rows:
            raise UserError(
                f"{shown(name)}: no prompts in it; give at least one row with the column "
                f"{rules.prompt_column!r}."
            )
    return pool, tallies


def _tokenised(rows: list[_Row], ids_of: Callable, max_prompt_tokens: int) -> Prompts:
    """Tokenises conversations; leaves out those that are too long, or equal once they are tokens."""
    kept: dict[int, tuple[_Row, list[int]]] = {}
    for row in rows:
        row.tally.held += 1
        with row.tally.leaving_out():
            ids = ids_of(row.messages, row.place)
            check_length(ids, max_prompt_tokens, row.place)
            key = prompt_key(ids)
            if key in kept:
                raise _twice(row.place, f"{kept[key][0].place} as the chat template writes it")
            kept[key] = (row, ids)
    return Prompts(
        text=[as_text(row.messages) for row, _ in kept.values()],
        kind=[row.kind for row, _ in kept.values()],
        token_ids=[ids for _, ids in kept.values()],
        key_P=torch.tensor(list(kept), dtype=torch.int64),
        messages=[row.messages for row, _ in kept.values()],
        rows=[row.row for row, _ in kept.values() if row.row],
    )


def row_text(row: Mapping[str, Any]) -> str:
    """Writes a row as JSON; of a cell that JSON has no form for, such as a date, its text is kept."""
    return json.dumps(row, default=str)


def _twice(place: str, first: str) -> Unusable:
    return Unusable(
        f"{place}: the same prompt as {first}; remove one, as equal prompts get equal random numbers.",
        REPEATED,
    )


def prompt_key(token_ids: list[int]) -> int:
    """Hashes token ids to a number in [0, 2^63), the same in every process and on every machine.

    The hash is BLAKE2b over little-endian int64.
    """
    packed = array("q", token_ids)
    if byteorder == "big":
        packed.byteswap()
    return int.from_bytes(hashlib.blake2b(packed.tobytes(), digest_size=8).digest(), "little") >> 1


def by_tokens(prompts: Prompts) -> Prompts:
    """Returns the prompts with the keys that `load_prompts` gives them, where theirs are others, such as the
    numbers of rows in a file of pairs."""
    return replace(prompts, key_P=torch.tensor([prompt_key(ids) for ids in prompts.token_ids]))


def assert_disjoint(train: Prompts, heldout: Prompts, use: str = "training prompt") -> None:
    """Refuses held-out prompts that are also among `train`; `use` says in the message what the latter are.

    Prompts are the same where their tokens are, or their `meanings`.
    Raises: UserError naming the first such prompt, and the other where it is written differently.
    """
    train_keys = set(train.key_P.tolist())
    written = dict(zip(reversed(meanings(train)), reversed(train.text), strict=True))
    for key, text, meaning in zip(heldout.key_P.tolist(), heldout.text, meanings(heldout), strict=True):
        other = text if key in train_keys else written.get(meaning)
        if other == text:
            raise UserError(
                f"the held-out prompt {text[:60]!r} is also a {use}; remove it from one of the two."
            )
        if other is not None:
            raise UserError(
                f"the held-out prompt {text[:60]!r} is the {use} {other[:60]!r} but for case or spaces; "
                "remove it from one of the two."
            )


def shipped_prompts(split: Literal["train", "heldout"]) -> list[str]:
    """Returns the paths of the prompts that come with the project, for `load_prompts`."""
    folder = files("engine") / "assets" / "prompts"
    return [str(folder / f"{kind}_{split}.jsonl") for kind in ("everyday", "delicate")]


def first_look(shipped: Prompts) -> set[int]:
    """Returns the indices of those shipped held-out prompts that come before the others in every verdict: the
    first `FIRST_LOOK` of each kind, on which the verdicts in the docs were given."""
    of_kind: dict[str, list[int]] = {}
    for i, kind in enumerate(shipped.kind):
        of_kind.setdefault(kind, []).append(i)
    return {i for indices in of_kind.values() for i in indices[:FIRST_LOOK]}


def lookalike_prompts() -> str:
    """Returns the path of the shipped harmless prompts that sound dangerous: no run trains on them."""
    return str(files("engine") / "assets" / "prompts" / "lookalike.jsonl")


def overlap(prompts: Prompts, train: Prompts) -> list[int]:
    """Returns the indices of the prompts that are training prompts too, by their tokens or `meanings`."""
    keys, seen = set(train.key_P.tolist()), set(meanings(train))
    found = zip(prompts.key_P.tolist(), meanings(prompts), strict=True)
    return [i for i, (key, meaning) in enumerate(found) if key in keys or meaning in seen]


def meanings(prompts: Prompts) -> list[str]:
    """Returns whole conversations without case, ligatures, and how much white space stands between words.

    Prompts of which these are equal ask the same, so that one tells of the other.
    """

    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    return [
        json.dumps([(message["role"], plain(message["content"])) for message in messages])
        for messages in prompts.conversations
    ]


def check_length(token_ids: list[int], limit: int, place: str) -> None:
    """Refuses a prompt of more than `limit` tokens. Raises: Unusable."""
    if len(token_ids) > limit:
        raise Unusable(
            f"{place}: the prompt has {len(token_ids)} tokens, the limit is {limit}; shorten or remove it.",
            f"with a prompt of more than {limit} tokens",
        )


def kind_of(value: object, place: str) -> str:
    """Reads a cell of the column kind. Raises: UserError."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: column 'kind' holds a {type(value).__name__}; give text.")
    return value or ""
