"""Conversations: from a cell to messages, and through the chat template to token ids."""

import ast
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from engine.data.tables import DuplicateKey, check_encodes, first_line, parse_json
from engine.errors import UserError

# A template writes a conversation in a millisecond; one that takes this long loops.
RENDERING_LIMIT_S = 5.0
BEGINS_AS_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content)["']\s*:""")


def as_messages(value: object, column: str, place: str) -> list[dict[str, str]]:
    """Turns a cell into chat messages that end with a user turn.

    The cell is a text, a list of messages, one message, or any of these as JSON or as Python prints it. The
    content of a message is a text, or a list of parts that are texts.
    Raises: UserError where it is none of these.
    """
    if isinstance(value, str):
        value = _messages_in(value, column, place) or [{"role": "user", "content": value}]
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        value = [value]
    if value is None or value == []:
        raise UserError(f"{place}: empty prompt in column {column!r}; fill or remove the row.")
    if not isinstance(value, list):
        kind = type(value).__name__
        raise UserError(f"{place}: column {column!r} holds a {kind}; give text or a list of messages.")
    messages = [_as_message(message, place) for message in value]
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{place}: the messages end with role {messages[-1]['role']!r}; end them with a user turn."
        )
    if not messages[-1]["content"].strip():
        raise UserError(f"{place}: empty prompt in column {column!r}; fill or remove the row.")
    return messages


def _as_message(value: object, place: str) -> dict[str, str]:
    """Turns one message into its role and its text; content in parts is joined as templates write parts, with
    nothing between them. Raises: UserError for what is no message, and for a part that is no text."""
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        content = "".join(_text_of(part, place) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f'{place}: message {str(value)[:60]!r} is not {{"role": text, "content": text}}; '
            "write it so, or remove the row."
        )
    check_encodes(role + content, place)
    return {"role": role, "content": content}


def _text_of(part: dict, place: str) -> str:
    """Returns the text of a part of a message. Raises: UserError for any other kind of part."""
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UserError(
            f'{place}: part {str(part)[:60]!r} of a message is not {{"type": "text", "text": text}}, and '
            "nothing else is read; take it out, or remove the row."
        )
    return part["text"]


def _messages_in(text: str, column: str, place: str) -> list | dict | None:
    """Returns the messages that a text writes down, or None for a plain text.

    A plain text may start with a bracket and even be JSON: only objects in a list, or one with a role, count.
    Raises: UserError where it begins as messages do, and cannot be read as such.
    """
    if not text.lstrip().startswith(("[", "{")):
        return None
    begun = BEGINS_AS_MESSAGES.match(text)
    try:
        parsed = parse_json(text)
    except DuplicateKey as error:
        if not begun:
            return None
        raise UserError(f"{place}: column {column!r}: {error}; keep one of them.") from None
    except ValueError as error:
        if not begun:
            return None
        parsed = _as_python_prints(text)
        if parsed is None:
            raise UserError(
                f"{place}: column {column!r} begins as messages do, but is no JSON ({error}); write it as "
                'JSON, a plain text as [{"role": "user", "content": TEXT}].'
            ) from None
    if isinstance(parsed, list) and parsed and all(isinstance(message, dict) for message in parsed):
        return parsed
    return parsed if isinstance(parsed, dict) and begun else None


def _as_python_prints(text: str) -> object:
    """Reads a value that str() of Python wrote; None for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


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
        return _without_end(tokenizer, messages[0]["content"])

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
        raise UserError(
            f"{place}: the chat template refuses these messages ({reason}); "
            "change the messages, or give a model whose template takes them."
        ) from None
    # The template writes the special tokens itself: adding them again would double the bos.
    return tokenizer.encode(text, add_special_tokens=False)


def _without_end(tokenizer, text: str) -> list[int]:
    """Tokenises a text with what the tokenizer puts before it, and not with what it puts behind it.

    Some tokenizers end every text with eos, but an answer is to follow a prompt.
    """
    ids, bare = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    return ids


def end_of_turn(tokenizer) -> int | None:
    """Finds the token that ends an answer.

    It is the control token that the chat template writes behind an answer, which models of many families
    sample in place of the tokenizer's eos; eos where the template writes none.
    """
    asked, answer = {"role": "user", "content": "A question"}, "An answer"
    try:
        text = render([asked, {"role": "assistant", "content": answer}], tokenizer, answered=True)
    # A tokenizer without a template ends here too.
    except Exception:
        return tokenizer.eos_token_id
    _, found, behind = text.rpartition(answer)
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for number in tokenizer.encode(behind, add_special_tokens=False) if found else []:
        if number in control:
            return number
        if tokenizer.decode([number]).strip():
            break
    return tokenizer.eos_token_id


def known_end_of_turn(tokenizer, vocab_size: int, place: str) -> int:
    """Returns the `end_of_turn` of a tokenizer whose answers must have one. Raises: UserError."""
    end = end_of_turn(tokenizer)
    if end is None:
        raise UserError(
            f"{place}: the tokenizer has no eos token, and its chat template ends an answer with none, so "
            "answers have no end; set eos_token in tokenizer_config.json."
        )
    check_known([end], vocab_size, place)
    return end


def check_known(token_ids: list[int], vocab_size: int, place: str) -> None:
    """Refuses a text with a special token that the model does not know. Raises: UserError."""
    if max(token_ids, default=0) >= vocab_size:
        raise UserError(
            f"{place}: it has token id {max(token_ids)}, the model knows {vocab_size} tokens; "
            "remove that special token."
        )


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
