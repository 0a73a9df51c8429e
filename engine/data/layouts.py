"""The layouts in which data sets are published: from a row to a conversation and the answers to it.

A row's layout is recognised by its columns, row by row, so that the files of one source may differ.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.data.chat import as_messages, content_of, messages_in
from engine.data.reading import Rules, Unusable
from engine.errors import UserError
from engine.files import escaped

Message = dict[str, str]
ANSWER = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
# How the turns of a conversation are named in ShareGPT's form and in the transcripts of HH-RLHF.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a row says.

    >>> Example(messages=[{"role": "user", "content": "Hi"}], responses=("Hello.", "Go away.")).labels
    ()
    """

    messages: list[Message]  # a conversation up to where an answer begins
    responses: tuple[str, ...] = ()  # none, one or two
    labels: tuple[str, ...] = ()  # columns with the number of the better response: for the reward, for a cost
    layout: str = ""  # what the display says of it; "" for the project's own forms


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A form of rows."""

    title: str  # what the display says; "" for the project's own forms
    columns: tuple[str, ...]  # a row with all of these ...
    read: "Reader"
    fits: Callable[[dict], bool] = lambda row: True  # ... for which this holds is of this form
    labels: tuple[str, ...] = ()


# From a row, its place and whether its answers are asked for too: columns that are not may hold anything.
# Raises: UserError naming the place; Unusable.
Reader = Callable[[dict, str, bool], Example]


def read_example(row: dict, place: str, rules: Rules, *, answers: bool) -> Example:
    """Reads a row of any layout; columns that `rules` names are read as they are.

    Raises: UserError naming the place; Unusable for a row without text.
    """
    if rules.prompt_column != Rules.prompt_column or rules.response_columns:
        usual = (TWO_RESPONSES, ("chosen", "rejected"), ("response",), ())
        there = next(names for names in usual if all(name in row for name in names))
        responses = rules.response_columns or there
        return _of(*responses, prompt=rules.prompt_column)(row, place, answers)
    layout = layout_of(row)
    if layout is None:
        raise no_column(row, place, rules.prompt_column)
    return replace(layout.read(row, place, answers), labels=layout.labels, layout=layout.title)


def layout_of(row: dict) -> Layout | None:
    """Recognises the layout of a row; None where it has none of these."""
    for layout in LAYOUTS:
        if all(column in row for column in layout.columns) and layout.fits(row):
            return layout
    return None


def no_column(row: dict, place: str, column: str) -> UserError:
    """Returns the error of a row in which a column is missing."""
    columns = escaped(", ".join(map(str, row)))[:300] or "none"
    return UserError(
        f"{place}: no column {column!r}; columns found: {columns}. See --prompt-column, --response-columns."
    )


def _of(*responses: str, prompt: str = Rules.prompt_column) -> Reader:
    """Returns the reader of a prompt, as text or messages, and of responses as texts, which may be empty."""

    def read(row: dict, place: str, answers: bool) -> Example:
        wanted = responses if answers else ()
        for column in (prompt, *wanted):
            if column not in row:
                raise no_column(row, place, column)
        return Example(
            messages=as_messages(row[prompt], prompt, place),
            responses=tuple(_text(row, name, place) for name in wanted),
        )

    return read


def _text(row: dict, column: str, place: str) -> str:
    value = row[column]
    if value is None:
        raise Unusable(f"{place}: {column} is None; give text, or remove the row.", "without text")
    if not isinstance(value, str):
        raise UserError(f"{place}: {column} is {value!r:.60}; give text, or remove the row.")
    return value


def _transcripts(row: dict, place: str, answers: bool) -> Example:
    """Reads two dialogues, each one text of turns such as "\\n\\nHuman: ..", that part in the last answer."""
    asked, told = zip(
        *((row[name] or "").rpartition(ANSWER)[::2] for name in ("chosen", "rejected")), strict=True
    )
    if not all(asked):
        raise Unusable(f"{place}: a dialogue without an answer; remove the row.", "without an answer")
    if asked[0].strip() != asked[1].strip():
        raise _parted(place)
    turns = TURN.split("\n\n" + asked[0].strip())
    messages = [
        {"role": ROLES[name.lower()], "content": said.strip()}
        for name, said in zip(turns[1::2], turns[2::2], strict=True)
    ]
    return Example(
        messages=_asked(messages, "chosen", place), responses=tuple(answer.strip() for answer in told)
    )


def _message_lists(row: dict, place: str, answers: bool) -> Example:
    """Reads two dialogues as lists of messages that share all but the last; where they hold no more than an
    answer, the prompt has a column of its own."""
    chosen, rejected = (_messages(row[name], name, place) for name in ("chosen", "rejected"))
    for messages in (chosen, rejected):
        if not messages or messages[-1]["role"] != "assistant":
            raise Unusable(f"{place}: a dialogue without an answer; remove the row.", "without an answer")
    if chosen[:-1] != rejected[:-1]:
        raise _parted(place)
    if len(chosen) == 1:
        messages = _of()(row, place, answers).messages
    else:
        messages = _asked(chosen[:-1], "chosen", place)
    return Example(messages=messages, responses=(chosen[-1]["content"], rejected[-1]["content"]))


def _conversation(column: str) -> Reader:
    """Returns the reader of a column with a whole conversation, its last answer included."""

    def read(row: dict, place: str, answers: bool) -> Example:
        messages = _messages(row[column], column, place)
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        asked = messages[:-1] if answered else messages
        return Example(
            messages=_asked(asked, column, place), responses=(messages[-1]["content"],) if answered else ()
        )

    return read


def _messages(value: object, column: str, place: str) -> list[Message]:
    """Reads messages of either form, {"role", "content"} or {"from", "value"}, also as text."""
    if isinstance(value, str) and value.strip():
        value = messages_in(value, column, place) or value
    if value is None or value == "":
        raise Unusable(f"{place}: no messages in column {column!r}; remove the row.", "without text")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{place}: column {column!r} holds no list of messages; see --prompt-column.")
    return [_message(message, column, place) for message in value]


def _message(message: dict, column: str, place: str) -> Message:
    role = message.get("role", message.get("from"))
    content = content_of(message, "content" if "content" in message else "value", place)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f'{place}: message {str(message)[:60]!r} in column {column!r} is neither {{"role", "content"}} '
            'nor {"from", "value"} of texts.'
        )
    if role not in ROLES:
        raise Unusable(
            f"{place}: a turn of {role[:40]!r}; known are {', '.join(ROLES)}.", "with turns of other roles"
        )
    return {"role": ROLES[role], "content": content}


def _asked(messages: list[Message], column: str, place: str) -> list[Message]:
    """Returns the messages before an answer where it is a user who speaks first and last."""
    spoken = [message for message in messages if message["role"] != "system"]
    if not spoken or spoken[0]["role"] != "user" or messages[-1]["role"] != "user":
        raise Unusable(
            f"{place}: in column {column!r} no user speaks first and last before the answer; remove the row.",
            "that no user begins and ends",
        )
    return as_messages(messages, column, place)


def _parted(place: str) -> Unusable:
    return Unusable(
        f"{place}: chosen and rejected differ before their last answer; remove the row.",
        "whose dialogues part before the last answer",
    )


def _filled(row: dict) -> list[object]:
    """Returns those of the two cells that hold something: a dialogue that is missing does not make its row
    another layout's."""
    return [row[name] for name in ("chosen", "rejected") if row[name] not in (None, "")]


def _are_transcripts(row: dict) -> bool:
    filled = _filled(row)
    told = all(isinstance(cell, str) and cell.lstrip().startswith("Human:") for cell in filled)
    return told and (bool(filled) or "prompt" not in row)


def _are_lists(row: dict) -> bool:
    filled = _filled(row)
    return bool(filled) and all(
        isinstance(cell, list) or (isinstance(cell, str) and cell.lstrip().startswith(("[{", "[ {")))
        for cell in filled
    )


TWO_RESPONSES = ("response_0", "response_1")
PKU = ("better_response_id", "safer_response_id")
LAYOUTS = (
    Layout(
        title=f"PKU-SafeRLHF: prompt, two responses, labels {' and '.join(PKU)}",
        columns=("prompt", *TWO_RESPONSES, *PKU),
        read=_of(*TWO_RESPONSES),
        labels=PKU,
    ),
    Layout(title="", columns=("prompt", *TWO_RESPONSES), read=_of(*TWO_RESPONSES)),
    Layout(
        title="HH-RLHF transcripts: chosen and rejected, parted at the last answer",
        columns=("chosen", "rejected"),
        fits=_are_transcripts,
        read=_transcripts,
    ),
    Layout(
        title="messages: chosen and rejected, which share all but the last answer",
        columns=("chosen", "rejected"),
        fits=_are_lists,
        read=_message_lists,
    ),
    Layout(title="", columns=("prompt", "chosen", "rejected"), read=_of("chosen", "rejected")),
    Layout(
        title="HelpSteer: prompt, one response, scores",
        columns=("prompt", "response", "helpfulness"),
        read=_of("response"),
    ),
    Layout(title="", columns=("prompt", "response"), read=_of("response")),
    Layout(title="", columns=("prompt",), read=_of()),
    Layout(
        title="ShareGPT conversations, up to the last answer",
        columns=("conversations",),
        read=_conversation("conversations"),
    ),
    Layout(
        title="conversations in the column messages, up to the last answer",
        columns=("messages",),
        read=_conversation("messages"),
    ),
)
