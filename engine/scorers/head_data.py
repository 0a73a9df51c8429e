"""The rows that a head is trained and judged on: read, checked, split, and turned into token ids."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data import tables
from engine.data.chat import (
    Written,
    answer_ids,
    as_messages,
    check_known,
    known_end_of_turn,
    lead_of_answers,
    write_prompt,
)
from engine.data.formats import COMPRESSED
from engine.data.layouts import layout_of
from engine.data.prompts import TextLimits, check_length
from engine.data.reading import EVERY_ROW, Rules, Tally, Unusable
from engine.data.response_pairs import read_pairs
from engine.errors import UserError
from engine.files import escaped, shown
from engine.model.packing import Group

NEUTRAL_PROMPT = "Answer the request."
HELDOUT_SHARE = 0.2
GROUP_SIZE = 6
# What the cells of a csv file, which are texts, say of a flag; None is its default.
FLAGS = {"": None, "true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Text:
    """A response to a chat, as it will be encoded."""

    chat: str  # its messages as JSON, so that texts can be keys
    response: str
    finished: bool  # the response ended by itself; False where it was cut


@dataclass(frozen=True)
class Row:
    """A pair (`other` is the rejected text) or a labelled text (`other` is None)."""

    text: Text
    other: Text | None
    label: int
    source: str
    kind: str
    group: str  # rows of one group are held out together
    weight: float

    @property
    def texts(self) -> tuple[Text, ...]:
        """Returns both texts of a pair, or the labelled one."""
        return (self.text,) if self.other is None else (self.text, self.other)


def read_head_rows(
    files: Sequence[str], loss: str, rules: Rules = EVERY_ROW, label: str = ""
) -> tuple[list[Row], list[str]]:
    """Reads the rows of all files, of the project's own forms or in a layout that is recognised.

    loss: the setting of that name. label: column that says which of two responses is the better one, or by
    which score two rows of a prompt compare; of labelled texts their label.
    Returns the rows, and what to say of the reading. Raises: UserError naming file:line.
    """
    rows, said = [], []
    for file in map(str, files):
        tally = Tally(file, rules.strict)
        rows += _rows_of(file, loss, rules, label, tally)
        said += tally.lines()
    return rows, said


def _rows_of(file: str, loss: str, rules: Rules, label: str, tally: Tally) -> Iterator[Row]:
    _, first = next(tables.read_rows(file), ("", {}))
    bare = Path(file).stem if Path(file).suffix in COMPRESSED else file
    layout, source = layout_of(first), Path(bare).stem
    named = rules.response_columns or rules.prompt_column != Rules.prompt_column
    if named or layout is None or not layout.title:
        for place, row in tables.read_rows(file):
            tally.rows += 1
            with tally.leaving_out():
                yield _as_row(_own_form(row, rules, label), place, source, loss)
        return
    if not label and "chosen" not in layout.columns:
        raise UserError(
            f"{shown(file)}: read as {layout.title}; say by --label-column which column tells the better one."
        )
    for pair in read_pairs(file, [label] if label else [], rules, tally):
        with tally.leaving_out():
            better = pair.labels[0] if label else 1
            if not better:
                raise Unusable(
                    f"{pair.place}: {label} prefers neither response; remove the row.",
                    "in which neither response is the better one",
                )
            chosen, rejected = pair.responses[::better]
            row = {"prompt": pair.messages, "chosen": chosen, "rejected": rejected, "kind": pair.kind}
            yield _as_row(row, pair.place, source, loss)


def _own_form(row: dict, rules: Rules, label: str) -> dict:
    """Returns a row with the columns that flags name under the project's own names."""
    responses = {1: ("response",), 2: ("chosen", "rejected")}.get(len(rules.response_columns), ())
    named = dict(zip(responses, rules.response_columns, strict=True)) | {"prompt": rules.prompt_column}
    if label:
        named["label"] = label
    return row | {own: row[theirs] for own, theirs in named.items() if theirs in row}


def _as_row(row: dict, place: str, source: str, loss: str) -> Row:
    is_pair = "chosen" in row or "rejected" in row
    _check_row(row, place, is_pair, loss)
    # An empty cell says that there is no prompt; 0 and false are no prompts either, but mistakes.
    prompt = NEUTRAL_PROMPT if row["prompt"] in (None, "", []) else row["prompt"]
    messages = as_messages(prompt, "prompt", place)
    chat, response = json.dumps(messages), row["chosen" if is_pair else "response"]
    group = row.get("group")
    if group is None or group == "":
        # A text without a prompt shares no prompt with others, so it is held out by itself.
        group = chat if row["prompt"] else response
    finished = _finished(row, place)
    # "finished": false of a pair is said of the rejected response: one that was cut is the worse one.
    return Row(
        text=Text(chat, response, finished or is_pair),
        other=Text(chat, row["rejected"], finished) if is_pair else None,
        label=1 if is_pair else int(row["label"]),
        source=str(row.get("source") or source),
        kind=str(row.get("kind") or ""),
        group=str(group),
        weight=_weight(row, place),
    )


def _check_row(row: dict, place: str, is_pair: bool, loss: str) -> None:
    for column in ("prompt", "chosen", "rejected") if is_pair else ("prompt", "response", "label"):
        if column not in row:
            forms = '{"prompt", "chosen", "rejected"} or {"prompt", "response", "label"}'
            found = escaped(", ".join(map(str, row)))[:300] or "none"
            raise UserError(
                f'{place}: no "{column}"; a row is {forms}, and columns found are {found}: name others by '
                "--prompt-column, --response-columns and --label-column."
            )
    if loss != "auto" and (loss == "pairs") != is_pair:
        kind = "pair" if is_pair else "label"
        raise UserError(f"{place}: a {kind}, but --loss is {loss}; use --loss auto or remove the row.")
    for column in ("chosen", "rejected") if is_pair else ("response",):
        if row[column] is None or (isinstance(row[column], str) and not row[column].strip()):
            raise Unusable(f'{place}: "{column}" is empty; fill or remove the row.', "without text")
        if not isinstance(row[column], str):
            raise UserError(f'{place}: "{column}" is {row[column]!r:.60}; give text, or remove the row.')
    if not is_pair and str(row["label"]) not in ("0", "1"):
        raise UserError(f'{place}: "label" is {row["label"]!r}; it must be 0 or 1.')
    if is_pair and row["chosen"].split() == row["rejected"].split() and _finished(row, place):
        raise Unusable(
            f'{place}: "chosen" and "rejected" are the same text; remove the row.', "with equal texts"
        )


def _weight(row: dict, place: str) -> float:
    """Reads the weight of a row, 1 where the cell is empty. The cells of a csv file are texts."""
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if isinstance(value, bool) or not 0 < weight < math.inf:
        raise UserError(f'{place}: "weight" is {value!r:.60}; it must be a number above 0.')
    return weight


def _finished(row: dict, place: str) -> bool:
    """Reads whether a response ended by itself, True where the cell is empty."""
    value = row.get("finished")
    if isinstance(value, str):
        value = FLAGS.get(value.strip().lower(), value)
    if value is None:
        return True
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(f'{place}: "finished" is {value!r:.60}; it must be true or false.')
    return bool(value)


def without_unusable_prompts(
    rows: list[Row], tokenizer, limits: TextLimits
) -> tuple[list[Row], Counter[str]]:
    """Returns the rows whose prompts the chat template takes and that leave room for a response, and counts
    the others by what is wrong with them."""
    reasons: dict[str, str] = {}
    for chat in {row.text.chat for row in rows}:
        try:
            talk, kwargs = json.loads(chat), limits.template_kwargs
            prompt = write_prompt(talk, tokenizer, limits.system, "--data", limits.now, kwargs)
            check_length(prompt.token_ids, limits.max_prompt_tokens, "--data")
        except Unusable as error:
            reasons[chat] = error.reason
    kept = [row for row in rows if row.text.chat not in reasons]
    return kept, Counter(reasons[row.text.chat] for row in rows if row.text.chat in reasons)


def hold_out(rows: list[Row], seed: int, share: float = HELDOUT_SHARE) -> tuple[list[Row], list[Row]]:
    """Holds out a seeded share of the groups (by default the prompts), each as a whole.

    Returns (training rows, held-out rows). Raises: UserError where there are fewer than two groups.
    """

    def rank(group: str) -> bytes:
        return hashlib.blake2b(f"{seed} head {group}".encode(), digest_size=16).digest()

    groups = sorted({row.group for row in rows}, key=rank)
    if len(groups) < 2:
        raise UserError(
            f"--data: all rows have one prompt ({len(groups)} in all), so none can be held out; "
            "give more prompts or --test."
        )
    heldout = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    return [row for row in rows if row.group not in heldout], [row for row in rows if row.group in heldout]


def without_shared_texts(rows: list[Row], test: list[Row]) -> list[Row]:
    """Returns the training rows whose responses are in no test row, whatever their case and white space."""

    def plain(text: Text) -> str:
        return " ".join(text.response.lower().split())

    seen = {plain(text) for row in test for text in row.texts}
    return [row for row in rows if not any(plain(text) in seen for text in row.texts)]


def check_classes(rows: list[Row], test: list[Row]) -> None:
    """Refuses training rows from which nothing can be learned, and a head that nothing is judged by.

    Raises: UserError where no training or no held-out rows are left, or all training rows have one label.
    """
    if not rows:
        raise UserError("--data: no training rows are left; give more rows.")
    if not test:
        raise UserError("--data, --test: no held-out rows are left to judge the head on; give more rows.")
    labels = {row.label for row in rows if row.other is None}
    if len(labels) == 1 and all(row.other is None for row in rows):
        raise UserError(
            f"--data: all {len(rows)} training rows have label {labels.pop()}; give rows of both classes."
        )


def unique_texts(rows: Iterable[Row]) -> list[Text]:
    """Lists every text once, in order of appearance."""
    return list(dict.fromkeys(text for row in rows for text in row.texts))


def encode(texts: Sequence[Text], tokenizer, limits: TextLimits) -> list[Group]:
    """Tokenises the texts, in groups of one chat with some of its responses; `rows` are indices into `texts`.

    Raises: UserError where a prompt is too long, or the model does not know a token.
    """
    rows_of: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows_of.setdefault(text.chat, []).append(row)
    groups = []
    kwargs = limits.template_kwargs
    end = known_end_of_turn(tokenizer, limits.vocab_size, "--model", kwargs)
    lead = lead_of_answers(tokenizer, kwargs)
    for chat, rows in rows_of.items():
        written = write_prompt(json.loads(chat), tokenizer, limits.system, "--data", limits.now, kwargs)
        prompt = written.token_ids
        if len(prompt) > limits.max_prompt_tokens:
            raise UserError(
                f"--data: the prompt {chat[:60]!r} has {len(prompt)} tokens, too many for the model's "
                f"{limits.max_positions} and --max-new-tokens {limits.max_new_tokens}; shorten or remove it."
            )
        responses = [
            response_ids(texts[row], written, tokenizer, lead, limits.max_new_tokens, end) for row in rows
        ]
        for row, response in zip(rows, responses, strict=True):
            place = f"--data: the text {texts[row].response[:60]!r} or its prompt"
            check_known([*prompt, *response], limits.vocab_size, place)
        # Small groups are of like size: attention costs the square of the longest group of a batch.
        for k in range(0, len(rows), GROUP_SIZE):
            groups.append(Group(prompt, responses[k : k + GROUP_SIZE], rows[k : k + GROUP_SIZE]))
    return groups


def without_equal_pairs(rows: list[Row], index: dict[Text, int], groups: list[Group]) -> list[Row]:
    """Returns the rows but for pairs whose two responses became equal token ids by the cut at the limit.

    index: place of each text in what `encode` was given; groups: what it returned.
    """
    ids = {row: response for g in groups for row, response in zip(g.rows, g.responses, strict=True)}
    return [row for row in rows if row.other is None or ids[index[row.text]] != ids[index[row.other]]]


def response_ids(
    text: Text, prompt: Written, tokenizer, lead: str, max_new_tokens: int, end: int
) -> list[int]:
    """Tokenises a response as a rollout would have sampled it behind its prompt; lead: see `answer_ids`.

    It is cut at the limit, and has the token `end` of a turn where it ended by itself before the limit.
    """
    ids = answer_ids(prompt, text.response, tokenizer, lead, "--data")
    if text.finished and len(ids) < max_new_tokens:
        ids.append(end)
    return ids[:max_new_tokens]
