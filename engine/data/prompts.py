"""From rows of files to prompts: checked, put into the chat template once, as token ids with keys."""

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from sys import byteorder
from typing import Any, Literal

import torch

from engine.data.chat import NO_KWARGS, as_messages, as_text, chat_ids
from engine.data.tables import read_rows
from engine.errors import UserError
from engine.files import escaped, shown
from engine.records import Prompts


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
    """Reads prompts, applies the tokenizer's chat template once and tokenises.

    source: a jsonl, csv or parquet file, a name for `datasets.load_dataset`
    (split train), or a list of these.
    column: its cells are texts, chat messages (lists of {"role", "content"}) or such lists as JSON. The
    optional column "kind" is a label.
    system: put before messages that have no system message. A tokenizer without a chat template takes the
    text alone, and adds its bos itself.
    now: the date for chat templates that write one; by default that of the clock. template_kwargs: variables
    for the chat template.

    Raises: UserError naming the file and the line (where there are no lines, the row, counted from 1).
    """
    text, kind, token_ids, conversations = [], [], [], []
    place_of: dict[int, str] = {}
    for name in [source] if isinstance(source, str | Path) else source:
        rows = read_rows(str(name))
        if not rows:
            raise UserError(
                f"{shown(name)}: no prompts in it; give at least one row with the column {column!r}."
            )
        for place, row in rows:
            if column not in row:
                columns = escaped(", ".join(map(str, row)))[:300] or "none"
                raise UserError(
                    f"{place}: no column {column!r}; columns found: {columns}. See --prompt-column."
                )
            messages = as_messages(row[column], column, place)
            ids = chat_ids(messages, tokenizer, system, place, now, template_kwargs)
            check_length(ids, max_prompt_tokens, place)
            key = prompt_key(ids)
            if key in place_of:
                alike = conversations[list(place_of).index(key)] == messages
                raise UserError(
                    f"{place}: the same prompt as {place_of[key]}"
                    f"{'' if alike else ' as the chat template writes it'}; remove one, "
                    "as equal prompts get equal random numbers."
                )
            place_of[key] = place
            text.append(as_text(messages))
            conversations.append(messages)
            kind.append(_kind(row.get("kind"), place))
            token_ids.append(ids)
    key_P = torch.tensor(list(place_of), dtype=torch.int64)
    return Prompts(text=text, kind=kind, token_ids=token_ids, key_P=key_P, messages=conversations)


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
    """Refuses a prompt of more than `limit` tokens. Raises: UserError."""
    if len(token_ids) > limit:
        raise UserError(
            f"{place}: the prompt has {len(token_ids)} tokens, the limit is {limit}; shorten or remove it."
        )


def _kind(value: object, place: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: column 'kind' holds a {type(value).__name__}; give text.")
    return value or ""
