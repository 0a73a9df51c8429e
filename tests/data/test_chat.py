"""Chat templates: where a turn ends, what they refuse, and templates that fail or do not end."""

import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.data import chat
from engine.data.chat import chat_ids, end_of_turn
from engine.data.prompts import TextLimits
from engine.data.response_pairs import read_response_pairs
from engine.errors import UserError
from engine.scorers.head_data import Text, encode, response_ids

ASKED = [{"role": "user", "content": "Say it"}]
CHATML = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def made(template: str | None = CHATML, *, eos: str | None = "</s>", adds_eos: bool = False):
    """Makes a byte tokenizer with the control tokens <s> </s> <|turn|> <|end|>."""
    special = ["<s>", "</s>", "<|turn|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    raw.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


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
    assert response_ids(Text("", "yes", False), tokenizer, 16, answer[-1]) == answer[:-1]


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


def test_a_template_that_refuses_system_turns_names_the_cure():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r'^f:1: .* refuses a system line \(no system\); .*--system ""\.$'):
        chat_ids(ASKED, made(refuses), "Be brief.", "f:1")
    assert chat_ids(ASKED, made(refuses), "", "f:1") == chat_ids(ASKED, made(), "", "f:1")
    own = [{"role": "system", "content": "Sing."}, *ASKED]
    with pytest.raises(
        UserError, match=r"^f:1: the chat template refuses these messages \(no system\); change"
    ):
        chat_ids(own, made(refuses), "Be brief.", "f:1")


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
