"""Chat templates: where a turn ends, what they refuse, and templates that fail or do not end."""

import contextlib
import json
import time

import pytest

from engine.data import chat
from engine.data.chat import end_of_turn, takes_system, write_prompt
from engine.data.prompts import TextLimits, read_prompts
from engine.data.reading import Rules
from engine.data.response_pairs import read_response_pairs
from engine.data.templates import remarks
from engine.errors import UserError
from engine.scorers.head_data import Text, encode, read_head_rows, response_ids, without_unusable_prompts
from tests.helpers.byte_tokenizer import CHATML, made
from tests.helpers.chat import chat_ids

ASKED = [{"role": "user", "content": "Say it"}]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }} </s>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n\n<|end|>{% endfor %}", "<|end|>"),
        # Text, no token, comes first: the turn ends as texts do.
        ("{% for m in messages %}{{ m.content }} [over]<|end|>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "</s>"),
        ("{{ messages[0].content }}", "</s>"),
        ("{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}", "</s>"),
        (None, "</s>"),
    ],
)
def test_a_turn_ends_with_the_token_of_the_template(template, end):
    tokenizer = made(template)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_answers_of_files_end_as_the_template_ends_them(tmp_path):
    tokenizer = made()
    whole = tokenizer.encode(
        tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": "yes"}], tokenize=False),
        add_special_tokens=False,
    )
    limits = TextLimits(system="", max_positions=200, max_new_tokens=16, vocab_size=260)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Say it", "chosen": "yes", "rejected": "no"}')
    pairs = read_response_pairs(str(tmp_path / "p.jsonl"), [], tokenizer, limits)
    prompt, length = pairs.prompts.token_ids[0], int(pairs.rollouts.length[0])
    answer = whole[len(prompt) : len(prompt) + 4]
    assert whole[: len(prompt)] == prompt and pairs.rollouts.tokens[0, :length].tolist() == answer
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    (group,) = encode([Text('[{"role": "user", "content": "Say it"}]', "yes", True)], tokenizer, limits)
    assert group.prompt == prompt and group.responses == [answer]
    written = write_prompt(ASKED, tokenizer, "", "p")
    assert response_ids(Text("", "yes", False), written, tokenizer, "", 16, answer[-1]) == answer[:-1]


def test_answers_without_an_end_are_refused(tmp_path):
    limits = TextLimits(system="", max_positions=200, max_new_tokens=16, vocab_size=260)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Say it", "chosen": "yes", "rejected": "no"}')
    with pytest.raises(UserError, match=r"p.jsonl: the tokenizer has no eos token.*; set eos_token"):
        read_response_pairs(str(tmp_path / "p.jsonl"), [], made(None, eos=None), limits)
    # The end of a template needs no eos.
    assert len(read_response_pairs(str(tmp_path / "p.jsonl"), [], made(eos=None), limits).prompts) == 1


def test_an_appended_eos_does_not_end_a_prompt():
    plain, adds = made(None), made(None, adds_eos=True)
    assert adds.encode("Hi")[-1] == adds.eos_token_id
    assert chat_ids(ASKED, adds, "", "p") == chat_ids(ASKED, plain, "", "p") == plain.encode("Say it")
    # One that the text itself ends with stays.
    ended = [{"role": "user", "content": "Hi</s>"}]
    assert chat_ids(ended, adds, "", "p") == plain.encode("Hi</s>")


@pytest.mark.parametrize(
    "refuses",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
        # It takes one, and leaves it out.
        CHATML.replace("in messages", "in messages if m.role != 'system'"),
    ],
)
def test_a_system_line_that_a_template_does_not_take_begins_the_first_user_turn(refuses):
    tokenizer = made(refuses)
    expected = chat_ids([{"role": "user", "content": "Be brief.\n\nSay it"}], made(), "", "p")
    assert chat_ids(ASKED, tokenizer, "Be brief.", "p") == expected
    own = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert chat_ids(own, tokenizer, "Sing.", "p") == expected
    assert chat_ids(ASKED, tokenizer, "", "p") == chat_ids(ASKED, made(), "", "p")
    opened = [{"role": "assistant", "content": "Hello"}, *ASKED]
    assert chat_ids(opened, tokenizer, "Be brief.", "p") == chat_ids(
        [opened[0], {"role": "user", "content": "Be brief.\n\nSay it"}], made(), "", "p"
    )
    assert takes_system(made()) and not takes_system(tokenizer)
    shouts = made(CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"))
    assert "system\nBE BRIEF.<|end|>" in shouts.decode(chat_ids(ASKED, shouts, "Be brief.", "p"))
    (said,) = remarks(tokenizer, [], {}, has_system=True)
    assert "takes no system line, so it begins the first user turn" in said
    assert remarks(tokenizer, [], {}, has_system=False) == remarks(made(), [], {}, has_system=True) == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[5].content }}",
        "{{ messages.nothing.further }}",
        "{{ messages",
        "{% if %}",
        "{{ messages[0].content.encode('ascii', 'no such handler') }}{{ 'x'.join([1]) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('') }}",
        "{{ '\\ud800' }}",  # no UTF-8
        "{{ 'a' * 10 ** 7 }}",  # a text that a tokenizer would read for minutes
        {"tool_use": CHATML, "rag": CHATML},
        5,
        ["a", "list"],
    ],
)
def test_templates_that_fail_are_one_line(template):
    for system in ("", "Be brief."):
        with pytest.raises(
            UserError, match=r"^f:1: the chat template refuses these messages \(.+\); change .*\.$"
        ) as error:
            chat_ids(ASKED, made(template), system, "f:1")
        assert "\n" not in str(error.value)


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat, "RENDERING_LIMIT_S", 0.3)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"refuses these messages \(it does not end within 0.3 s\)"):
        chat_ids(ASKED, made(loops), "", "f:1")
    assert time.monotonic() - start < 20
    # The alarm is off again.
    time.sleep(0.4)


def test_a_template_whose_compiler_swallows_the_first_alarm_is_stopped(monkeypatch):
    monkeypatch.setattr(chat, "RENDERING_LIMIT_S", 0.1)

    class Swallows:
        chat_template = "any"

        def apply_chat_template(self, *_, **__):
            with contextlib.suppress(TimeoutError):
                time.sleep(20)
            time.sleep(20)

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        chat.render(ASKED, Swallows())
    assert time.monotonic() - start < 20


def test_conversations_that_a_template_refuses_are_left_out_and_counted(tmp_path):
    # As those of Llama 2, Mistral and Gemma; HH-RLHF has dialogues in which one side speaks twice.
    alternates = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|turn|>{{ m.content }}<|end|>{% endfor %}"
    )
    tokenizer, file = made(alternates), tmp_path / "hh.jsonl"
    asked = ["\n\nHuman: a", "\n\nHuman: b\n\nHuman: c", "\n\nHuman: d\n\nAssistant: e\n\nHuman: f"]
    rows = [{name: f"{a}\n\nAssistant: {name}" for name in ("chosen", "rejected")} for a in asked]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lenient, note = Rules(strict=False), f"{file}: left out of 3 rows: 1 that the chat template refuses"
    prompts, lines = read_prompts(str(file), tokenizer, lenient, max_prompt_tokens=90)
    assert prompts.text == ["a", "user: d\n\nassistant: e\n\nuser: f"]
    assert lines[-1] == f"{note} (--strict refuses them)"
    limits = TextLimits(system="", max_positions=99, max_new_tokens=9, vocab_size=999)
    pairs = read_response_pairs(str(file), [], tokenizer, limits, lenient)
    assert len(pairs.prompts) == 2 and pairs.reading[-1] == f"{note} (--strict refuses them)"
    head_rows, _ = read_head_rows([str(file)], "auto", lenient)
    kept, left_out = without_unusable_prompts(head_rows, tokenizer, limits)
    assert [row.text.chat for row in kept] == [json.dumps(talk) for talk in prompts.messages]
    assert left_out == {"that the chat template refuses": 1}
    with pytest.raises(UserError, match=r"hh.jsonl:2: the chat template refuses .*\(roles must alternate\)"):
        read_prompts(str(file), tokenizer, Rules(), max_prompt_tokens=90)
