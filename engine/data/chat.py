"""Conversations: from a cell to messages, and through the chat template to token ids."""

import ast
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from engine.data.formats import DuplicateKey, check_encodes, first_line, parse_json
from engine.data.reading import Unusable
from engine.errors import UserError

# A template writes a conversation in a millisecond; one that takes this long loops.
RENDERING_LIMIT_S = 5.0
NO_KWARGS: Mapping[str, Any] = MappingProxyType({})
LONGEST_FRAME = 1_000_000  # characters that a template may write around the messages
BEGINS_AS_MESSAGES = re.compile(
    r"""\s*(\{|\[\s*\{)\s*["'](role|content)["']\s*:|\s*\[\s*\{\s*["'](from|value)["']\s*:"""
)


def as_messages(value: object, column: str, place: str) -> list[dict[str, str]]:
    """Turns a cell into chat messages that end with a user turn.

    The cell is a text, a list of messages, one message, or any of these as JSON or as Python prints it. The
    content of a message is a text, or a list of parts that are texts.
    Raises: UserError where it is none of these.
    """
    if isinstance(value, str):
        value = messages_in(value, column, place) or [{"role": "user", "content": value}]
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        value = [value]
    if value is None or value == []:
        raise Unusable(f"{place}: empty prompt in column {column!r}; fill or remove the row.", "without text")
    if not isinstance(value, list):
        kind = type(value).__name__
        raise UserError(f"{place}: column {column!r} holds a {kind}; give text or a list of messages.")
    messages = [_as_message(message, place) for message in value]
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{place}: the messages end with role {messages[-1]['role']!r}; end them with a user turn."
        )
    if not messages[-1]["content"].strip():
        raise Unusable(f"{place}: empty prompt in column {column!r}; fill or remove the row.", "without text")
    return messages


def _as_message(value: object, place: str) -> dict[str, str]:
    """Turns one message into its role and its text. Raises: UserError for what is no message, and for a part
    that is no text; Unusable for a message without content."""
    role, content = None, None
    if isinstance(value, dict):
        role, content = value.get("role"), content_of(value, "content", place)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f'{place}: message {str(value)[:60]!r} is not {{"role": text, "content": text}}; '
            "write it so, or remove the row."
        )
    check_encodes(role + content, place)
    return {"role": role, "content": content}


def content_of(message: dict, key: str, place: str) -> object:
    """Returns the content of a message, None where there is no such key; of one in parts their texts, joined
    as templates write them, with nothing between.

    Raises: UserError for a part that is no text; Unusable for a message without content, as those are that
    call a tool.
    """
    content = message.get(key)
    if content is None and key in message:
        raise Unusable(
            f"{place}: message {str(message)[:60]!r} has no content; fill it, or remove the row.",
            "without text",
        )
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        return "".join(_text_of(part, place) for part in content)
    return content


def _text_of(part: dict, place: str) -> str:
    """Returns the text of a part of a message. Raises: UserError for any other kind of part."""
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UserError(
            f'{place}: part {str(part)[:60]!r} of a message is not {{"type": "text", "text": text}}, and '
            "nothing else is read; take it out, or remove the row."
        )
    return part["text"]


def messages_in(text: str, column: str, place: str) -> list | dict | None:
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


@dataclass(frozen=True)
class Written:
    """A prompt as the model is given it."""

    text: str
    # What the tokenizer itself puts before the text, such as its bos; none where a chat template writes it.
    before: list[int]
    token_ids: list[int]  # of the whole prompt


def write_prompt(
    messages: list[dict[str, str]],
    tokenizer,
    system: str,
    place: str,
    now: datetime | None = None,
    kwargs: Mapping[str, Any] = NO_KWARGS,
) -> Written:
    """Writes a prompt as the chat template does, up to where the answer begins, and tokenises it.

    A system line that the template refuses or leaves out is put into the first user turn.

    now: the date for templates that write one; by default that of the clock. kwargs: variables for the
    template.
    Raises: UserError where the tokenizer has no chat template for several messages, or its template fails;
    Unusable where the template itself refuses them.
    """
    if not tokenizer.chat_template:
        if len(messages) > 1:
            raise UserError(
                f"{place}: {len(messages)} messages, but the tokenizer has no chat template; give plain text "
                "or --template."
            )
        return _without_end(tokenizer, messages[0]["content"])

    own = system and all(message["role"] != "system" for message in messages)
    turns = [{"role": "system", "content": system}, *messages] if own else messages
    try:
        text = _with_system(turns, tokenizer, now, kwargs)
    except Exception as error:
        try:
            text = render(_system_in_user_turn(turns), tokenizer, now, kwargs)
        except Exception:
            said = (
                f"{place}: the chat template refuses these messages ({first_line(error)}); "
                "change the messages, or give a model whose template takes them."
            )
            # What a template itself refuses, such as two turns of one role, is no reason to stop a run.
            if type(error) is TemplateError:
                raise Unusable(said, "that the chat template refuses") from None
            raise UserError(said) from None
    # The template writes the special tokens itself: adding them again would double the bos.
    return Written(text, [], tokenizer.encode(text, add_special_tokens=False))


def takes_system(tokenizer, kwargs: Mapping[str, Any] = NO_KWARGS) -> bool:
    """Tells whether the chat template writes a system line; `write_prompt` says what becomes of it if not."""
    turns = [{"role": "system", "content": "A line"}, {"role": "user", "content": "A question"}]
    try:
        _with_system(turns, tokenizer, None, kwargs)
    except Exception:
        return False
    return True


def _with_system(
    turns: list[dict[str, str]], tokenizer, now: datetime | None, kwargs: Mapping[str, Any]
) -> str:
    """Renders turns. Raises: whatever the template raises, and ValueError where it leaves out a system line
    at the beginning."""
    text, first = render(turns, tokenizer, now, kwargs), turns[0]
    if first["role"] == "system" and first["content"].strip() not in text:
        # It may be there in another spelling.
        if text == render(turns[1:], tokenizer, now, kwargs):
            raise ValueError("it leaves out the system line")
    return text


def _system_in_user_turn(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Puts the system lines at the beginning of the first user turn, a blank line behind each."""
    lines = "".join(f"{turn['content']}\n\n" for turn in turns if turn["role"] == "system")
    others = [turn for turn in turns if turn["role"] != "system"]
    first = [turn["role"] for turn in others].index("user")
    asked = {"role": "user", "content": lines + others[first]["content"]}
    return [*others[:first], asked, *others[first + 1 :]]


def _without_end(tokenizer, text: str) -> Written:
    """Tokenises a text with what the tokenizer puts before it, and not with what it puts behind it.

    Some tokenizers end every text with eos, but an answer is to follow a prompt.
    """
    ids, bare = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return Written(text, ids[:start], ids[: start + len(bare)])
    return Written(text, [], ids)


def answer_ids(prompt: Written, answer: str, tokenizer, lead: str, place: str) -> list[int]:
    """Tokenises an answer together with its prompt and returns the ids that follow the prompt's own.

    Alone, a text gets what some tokenizers put before every text, such as the space of sentencepiece: a first
    token that the policy never samples there.

    lead: as `lead_of_answers` finds it; an answer that begins with white space already gets none.
    Raises: UserError naming the place of an answer whose beginning belongs to no token of its own.
    """
    if not answer:
        return []
    answer = answer if answer[0].isspace() else lead + answer
    # The policy samples behind the prompt's ids as they are without an answer, so these must not change.
    # Where the answer's first characters and the prompt's last are one token together, as two line breaks
    # often are, the answer is tokenised behind another character, with which they are not.
    prompt_ids = prompt.token_ids[len(prompt.before) :]
    for text, ids in ((prompt.text, prompt_ids), ("\n", None), ("a", None)):
        ids = tokenizer.encode(text, add_special_tokens=False) if ids is None else ids
        joint = tokenizer.encode(text + answer, add_special_tokens=False)
        if joint[: len(ids)] == ids:
            return joint[len(ids) :]
    raise UserError(
        f"{place}: the tokenizer joins the beginning of the response {answer[:20]!r} with whatever stands "
        "before it; begin it otherwise, or remove the row."
    )


def lead_of_answers(tokenizer, kwargs: Mapping[str, Any] = NO_KWARGS) -> str:
    """Finds the white space that the chat template writes between a prompt and its answer, as that of Llama 2
    does; "" where there is none. Models of such a template sample it, so it belongs to the answer."""
    asked, answer = {"role": "user", "content": "A question"}, "An answer"
    told = {"role": "assistant", "content": answer}
    try:
        prompt = render([asked], tokenizer, kwargs=kwargs)
        text = render([asked, told], tokenizer, kwargs=kwargs, answered=True)
    # A tokenizer without a template ends here too.
    except Exception:
        return ""
    between, found, _ = text.removeprefix(prompt).partition(answer)
    return between if text.startswith(prompt) and found and between.isspace() else ""


def end_of_turn(tokenizer, kwargs: Mapping[str, Any] = NO_KWARGS) -> int | None:
    """Finds the token that ends an answer.

    It is the control token that the chat template writes behind an answer, which models of many families
    sample in place of the tokenizer's eos; eos where the template writes none.
    """
    asked, answer = {"role": "user", "content": "A question"}, "An answer"
    told = {"role": "assistant", "content": answer}
    try:
        text = render([asked, told], tokenizer, kwargs=kwargs, answered=True)
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


def known_end_of_turn(tokenizer, vocab_size: int, place: str, kwargs: Mapping[str, Any] = NO_KWARGS) -> int:
    """Returns the `end_of_turn` of a tokenizer whose answers must have one. Raises: UserError."""
    end = end_of_turn(tokenizer, kwargs)
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
    messages: list[dict[str, str]],
    tokenizer,
    now: datetime | None = None,
    kwargs: Mapping[str, Any] = NO_KWARGS,
    *,
    answered: bool = False,
) -> str:
    """Writes messages as the chat template does, by default up to where the next answer begins.

    now: see `write_prompt`. kwargs: variables for the template, such as enable_thinking.

    Templates are programs: whatever they raise is raised here, TimeoutError for one that does not end, and
    ValueError for a text that no tokenizer reads.
    """
    with _time_limit(RENDERING_LIMIT_S), _dated(tokenizer, now):
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=not answered, tokenize=False, **kwargs
        )
    if len(text) > LONGEST_FRAME + sum(len(message["content"]) for message in messages):
        raise ValueError(f"it writes {len(text)} characters")
    text.encode()  # not half of a surrogate pair
    return text


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
    # It rings again, as Jinja swallows an error while it computes a constant.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
