"""The rows that a head is trained and judged on: read, checked, split, encoded."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data import tables
from engine.data.prompts import as_messages, chat_ids
from engine.errors import UserError
from engine.model.packing import Group
from engine.scorers.head_config import HeadConfig

NEUTRAL_PROMPT = "Answer the request."
HELDOUT_SHARE = 0.2
GROUP_SIZE = 6


@dataclass(frozen=True)
class Text:
    """One answer as it is encoded: the chat (JSON of its messages), the response, and whether it ended by itself."""

    chat: str
    response: str
    finished: bool


@dataclass(frozen=True)
class Row:
    """A pair (`other` is the rejected text) or a labelled text (`other` is None)."""

    text: Text
    other: Text | None
    label: int
    source: str
    kind: str
    group: str  # what is held out together
    weight: float

    @property
    def texts(self) -> tuple[Text, ...]:
        """One or two texts."""
        return (self.text,) if self.other is None else (self.text, self.other)


def read_rows(files: Sequence[str], config: HeadConfig) -> list[Row]:
    """The rows of all files. Raises: UserError naming file:line."""
    return [_row(row, place, Path(file).stem, config) for file in files for place, row in tables.read_rows(str(file))]


def _row(row: dict, place: str, source: str, config: HeadConfig) -> Row:
    pair = "chosen" in row or "rejected" in row
    for column in ("prompt", "chosen", "rejected") if pair else ("prompt", "response", "label"):
        if column not in row:
            raise UserError(f'{place}: no "{column}"; a row is {{"prompt", "chosen", "rejected"}} or {{"prompt", "response", "label"}}.')
    if config.loss != "auto" and (config.loss == "pairs") != pair:
        raise UserError(f"{place}: a {'pair' if pair else 'label'}, but --loss is {config.loss}; use --loss auto or remove the row.")
    for column in ("chosen", "rejected") if pair else ("response",):
        if not isinstance(row[column], str) or not row[column].strip():
            raise UserError(f'{place}: "{column}" is empty or not text; fill or remove the row.')
    if not pair and str(row["label"]) not in ("0", "1"):
        raise UserError(f'{place}: "label" is {row["label"]!r}; it must be 0 or 1.')
    if pair and row["chosen"].split() == row["rejected"].split() and row.get("finished", True):
        raise UserError(f'{place}: "chosen" and "rejected" are the same text; remove the row.')
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f'{place}: "weight" is {weight!r}; it must be a number above 0.')
    messages = as_messages(row["prompt"] or NEUTRAL_PROMPT, "prompt", place)
    chat = json.dumps(messages)
    # Texts without a prompt have only their own group, or themselves, to be held out by.
    group = row.get("group") if row.get("group") is not None else chat if row["prompt"] else row["chosen" if pair else "response"]
    # An answer that was cut is the worse one of a pair.
    ended = bool(row.get("finished", True))
    return Row(
        text=Text(chat, row["chosen" if pair else "response"], ended or pair),
        other=Text(chat, row["rejected"], ended) if pair else None,
        label=1 if pair else int(row["label"]),
        source=str(row.get("source") or source),
        kind=str(row.get("kind") or ""),
        group=str(group),
        weight=float(weight),
    )


def split(rows: list[Row], seed: int, share: float = HELDOUT_SHARE) -> tuple[list[Row], list[Row]]:
    """(train, held out): a seeded share of the groups (the prompts) is held out as a whole.

    Raises: UserError where there are fewer than two groups.
    """

    def rank(group: str) -> bytes:
        return hashlib.blake2b(f"{seed} head {group}".encode(), digest_size=16).digest()

    groups = sorted({row.group for row in rows}, key=rank)
    if len(groups) < 2:
        raise UserError(f"--data: all rows have one prompt ({len(groups)} in all), so none can be held out; give more prompts or --test.")
    heldout = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    return [r for r in rows if r.group not in heldout], [r for r in rows if r.group in heldout]


def without_shared(rows: list[Row], test: list[Row]) -> tuple[list[Row], int]:
    """The training rows whose response texts are not in `test`, and the count of the others. Case and white space do not matter."""

    def plain(text: Text) -> str:
        return " ".join(text.response.lower().split())

    seen = {plain(text) for row in test for text in row.texts}
    kept = [row for row in rows if not any(plain(text) in seen for text in row.texts)]
    return kept, len(rows) - len(kept)


def check_classes(rows: list[Row]) -> None:
    if not rows:
        raise UserError("--data: no training rows are left; give more rows.")
    labels = {row.label for row in rows if row.other is None}
    if len(labels) == 1 and all(row.other is None for row in rows):
        raise UserError(f"--data: all {len(rows)} training rows have label {labels.pop()}; give rows of both classes.")


def unique_texts(rows: Iterable[Row]) -> list[Text]:
    """Every text once, in order of appearance."""
    return list(dict.fromkeys(text for row in rows for text in row.texts))


def encode(texts: Sequence[Text], tokenizer, config: HeadConfig, context: int) -> list[Group]:
    """Groups of one chat and some of its responses each; `rows` are indices into `texts`."""
    of_chat: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        of_chat.setdefault(text.chat, []).append(i)
    groups = []
    for chat, rows in of_chat.items():
        prompt = chat_ids(json.loads(chat), tokenizer, config.system, "--data")
        if len(prompt) + config.max_new_tokens > context:
            raise UserError(f"--data: the prompt {chat[:60]!r} has {len(prompt)} tokens, too many for the model's {context}.")
        responses = [response_ids(texts[i], tokenizer, config.max_new_tokens) for i in rows]
        # Groups of like size: attention costs the square of the longest group of a batch.
        for k in range(0, len(rows), GROUP_SIZE):
            groups.append(Group(prompt, responses[k : k + GROUP_SIZE], rows[k : k + GROUP_SIZE]))
    return groups


def response_ids(text: Text, tokenizer, max_new_tokens: int) -> list[int]:
    """Token ids as a rollout would have sampled them: cut at the limit, the stop token included where the answer ended before it."""
    ids = tokenizer.encode(text.response, add_special_tokens=False)
    if text.finished and len(ids) < max_new_tokens:
        ids.append(tokenizer.eos_token_id)
    return ids[:max_new_tokens]
