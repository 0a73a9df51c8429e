"""Chat templates by name, for tokenizers that have none, and those in files.

Each writes a conversation as the texts were written that models of its kind were trained on. Answers end with
the tokenizer's eos.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.data.chat import NO_KWARGS, render, takes_system
from engine.data.formats import first_line
from engine.errors import UserError
from engine.files import escaped, is_file, reading, shown

_REFUSE = "{% else %}{{ raise_exception('it has no turns of ' + m['role']) }}{% endif %}{% endfor %}"
# Line breaks stand inside expressions: those of the text around a tag are not kept.
TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        # The Beaver models and alpaca-7b-reproduced of PKU-Alignment, with no space before an answer.
        "safe-rlhf": r"BEGINNING OF CONVERSATION: {% for m in messages %}"
        r"{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ASSISTANT:' }}"
        r"{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}" + _REFUSE,
        # The transcripts of Anthropic's HH-RLHF. As the reward models made from them read them, the break
        # before the answer that is asked for has a space in front.
        "hh": r"{% for m in messages %}"
        r"{% if m['role'] == 'user' %}{{ '\n\nHuman: ' + (m['content'] | trim) }}"
        r"{% elif m['role'] == 'assistant' %}{{ (' ' if loop.last else '') + '\n\nAssistant: ' }}"
        r"{{ m['content'] | trim }}{% if loop.last %}{{ eos_token }}{% endif %}" + _REFUSE + ""
        r"{% if add_generation_prompt %}{{ ' \n\nAssistant:' }}{% endif %}",
        # Stanford Alpaca, whose data have one turn; the further ones follow in its form.
        "alpaca": r"{{ 'Below is an instruction that describes a task. Write a response that appropriately "
        r"completes the request.\n\n' }}{% for m in messages %}"
        r"{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n### Response:' }}"
        r"{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
        r"{% if not loop.last %}{{ '\n\n' }}{% endif %}" + _REFUSE,
        "chatml": r"{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        r"{{ '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        # A text that is gone on with.
        "plain": r"{% if messages | length > 2 %}{{ raise_exception('it takes one message') }}{% endif %}"
        r"{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
        r"{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}" + _REFUSE,
    }
)
SHOWN = 400  # characters of a prompt that is shown, at most


def use_template(tokenizer, name: str, kwargs: Mapping[str, Any] = NO_KWARGS) -> tuple[str, list[str]]:
    """Gives a tokenizer the template of --template: one of `TEMPLATES`, or that in a file.

    Returns its text, and in lines what is to be said of it.
    Raises: UserError where there is none of that name, or it cannot be used.
    """
    said = []
    if tokenizer.chat_template:
        said.append(f"--template {shown(name)} replaces the chat template that the tokenizer has")
    if name in TEMPLATES:
        text = TEMPLATES[name]
        # What the tokenizer puts before a text, a template has to write.
        if tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id:
            text = "{{ bos_token }}" + text
        if name == "chatml" and "<|im_end|>" not in tokenizer.get_added_vocab():
            said.append(
                "--template chatml: the tokenizer has no token <|im_end|>, so the marks are read as text"
            )
    else:
        text = _read(name)
    tokenizer.chat_template = text
    try:
        render([{"role": "user", "content": "A question"}], tokenizer, kwargs=kwargs)
    except Exception as error:
        raise UserError(
            f"--template {shown(name)}: it cannot write a prompt ({first_line(error)}); correct it."
        ) from None
    return text, said


def _read(name: str) -> str:
    names = ", ".join(TEMPLATES)
    if not is_file(name):
        raise UserError(f"--template {shown(name)}: no such file; give one of {names}, or a jinja file.")
    with reading(name, cure="give a jinja file to --template"):
        text = Path(name).read_text(encoding="utf-8-sig")
    if "messages" not in text:
        raise UserError(
            f"--template {shown(name)}: it reads no messages, so all prompts would be one; "
            "give a chat template."
        )
    return text


def check_kwargs(tokenizer, kwargs: Mapping[str, Any]) -> None:
    """Refuses variables that the chat template does not read. Raises: UserError naming the first one."""
    if not kwargs:
        return
    if not tokenizer.chat_template:
        raise UserError("--chat-template-kwargs: the tokenizer has no chat template; give --template.")
    own = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
    for name in kwargs:
        if name in own:
            raise UserError(f"--chat-template-kwargs {name}: it is set by this program; leave it out.")
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise UserError(
                f"--chat-template-kwargs {shown(name)}: the chat template reads no such variable; correct it."
            )


def remarks(tokenizer, first_ids: list[int], kwargs: Mapping[str, Any], *, has_system: bool) -> list[str]:
    """Says in lines what the tokenizer does to prompts that their writer may not expect.

    first_ids: of the first prompt. has_system: a prompt has a system line, the run's or its own.
    """
    if not tokenizer.chat_template:
        text = tokenizer.decode(first_ids)
        text = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} .. {text[-SHOWN // 2 :]}"
        bare = "as they are, without the system line" if has_system else "as they are"
        return [
            f"the tokenizer has no chat template, so prompts go in {bare}. The first one is "
            f'"{escaped(text)}". Name the template that the model was trained with: --template '
            f"{', '.join(TEMPLATES)} or a jinja file"
        ]
    if has_system and not takes_system(tokenizer, kwargs):
        return ["the chat template takes no system line, so it begins the first user turn"]
    return []
