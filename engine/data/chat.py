"""Conversations: from a cell to messages, and through the chat template to token ids."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from engine.data.tables import check_encodes, first_line
from engine.errors import UserError

# A template writes a conversation in a millisecond; one that takes this long loops.
RENDERING_LIMIT_S = 5.0


def as_messages(value: object, column: str, place: str) -> list[dict[str, str]]:
    """Turns a cell into chat messages that end with a user turn.

    Raises: UserError where it is neither text nor messages.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            parsed = None
        # A plain text may start with "[" and even be a JSON list: only a list of objects counts as messages.
        if isinstance(parsed, list) and parsed and all(isinstance(message, dict) for message in parsed):
            value = parsed
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if value is None or value == []:
        raise UserError(f"{place}: empty prompt in column {column!r}; fill or remove the row.")
    if not isinstance(value, list):
        kind = type(value).__name__
        raise UserError(f"{place}: column {column!r} holds a {kind}; give text or a list of messages.")
    for message in value:
        if not (
            isinstance(message, dict)
            and all(isinstance(message.get(key), str) for key in ("role", "content"))
        ):
            raise UserError(
                f'{place}: message {str(message)[:60]!r} is not {{"role": text, "content": text}}.'
            )
        check_encodes(message["content"], place)
    if value[-1]["role"] != "user":
        raise UserError(
            f"{place}: the messages end with role {value[-1]['role']!r}; end them with a user turn."
        )
    if not value[-1]["content"].strip():
        raise UserError(f"{place}: empty prompt in column {column!r}; fill or remove the row.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def as_text(messages: list[dict[str, str]]) -> str:
    """Writes a conversation for people and text scorers: one message as it is, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def chat_ids(
    messages: list[dict[str, str]], tokenizer, system: str, place: str, now: datetime | None = None
) -> list[int]:
    """Tokenises a whole prompt, with its special tokens once.

    now: the date for templates that write one; by default that of the clock.
    Raises: UserError where the tokenizer has no chat template for several messages,
    or its template refuses them.
    """
    if not tokenizer.chat_template:
        if len(messages) > 1:
            raise UserError(
                f"{place}: {len(messages)} messages, but the tokenizer has no chat template; give plain text."
            )
        return tokenizer.encode(messages[0]["content"])

    own = system and all(message["role"] != "system" for message in messages)
    try:
        text = render([{"role": "system", "content": system}, *messages] if own else messages, tokenizer, now)
    except Exception as error:
        reason = first_line(error)
        if own and _renders(messages, tokenizer, now):
            raise UserError(
                f"{place}: the chat template refuses a system line ({reason}); go on without one: "
                '--system "".'
            ) from None
        raise UserError(f"{place}: the chat template refuses these messages ({reason}).") from None
    # The template writes the special tokens itself: adding them again would double the bos.
    return tokenizer.encode(text, add_special_tokens=False)


def render(
    messages: list[dict[str, str]], tokenizer, now: datetime | None = None, *, answered: bool = False
) -> str:
    """Writes messages as the chat template does, by default up to where the next answer begins.

    Templates are programs: whatever they raise is raised here, and TimeoutError for one that does not end.
    """
    with _time_limit(RENDERING_LIMIT_S), _dated(tokenizer, now):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=not answered, tokenize=False)


@contextmanager
def _dated(tokenizer, now: datetime | None) -> Iterator[None]:
    """Gives a chat template that writes the date (`strftime_now`) that of `now`."""
    template = tokenizer.chat_template
    if now is None or "strftime_now" not in str(template):
        yield
        return
    # apply_chat_template takes no functions, but renders the compiled template that this call caches.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(tokenizer.get_chat_template())
    compiled.globals["strftime_now"] = now.strftime
    try:
        yield
    finally:
        del compiled.globals["strftime_now"]


def _renders(messages: list[dict[str, str]], tokenizer, now: datetime | None) -> bool:
    """Tells whether the chat template takes these messages."""
    try:
        render(messages, tokenizer, now)
    except Exception:
        return False
    return True


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer.

    It needs the alarm of the process, which exists on Unix and rings in the main thread only; elsewhere
    nothing is limited.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it does not end within {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
