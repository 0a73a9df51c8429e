"""Chat templates by name and from files, and their variables."""

import pytest
from tokenizers import processors

from engine.config.template import template_kwargs
from engine.data.chat import end_of_turn, lead_of_answers, render, write_prompt
from engine.data.templates import TEMPLATES, check_kwargs, remarks, use_template
from engine.errors import UserError
from engine.model.tokenizer import load_tokenizer
from tests.helpers.byte_tokenizer import made
from tests.helpers.chat import chat_ids
from tests.helpers.published import write_llama1

TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How?"},
]
LAST = {"role": "assistant", "content": "So."}
# As they are published: where the second answer begins, and what follows there.
PUBLISHED = {
    "safe-rlhf": (
        "<s>BEGINNING OF CONVERSATION: USER: hello ASSISTANT:Hello</s>USER: How? ASSISTANT:",
        "So.</s>",
    ),
    "hh": ("<s>\n\nHuman: hello\n\nAssistant: Hello\n\nHuman: How? \n\nAssistant:", " So.</s>"),
    "alpaca": (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nhello\n\n### Response:Hello</s>\n\n### Instruction:\nHow?\n\n"
        "### Response:",
        "So.</s>",
    ),
    "chatml": (
        "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n",
        "So.<|im_end|>\n",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama1(tmp_path_factory.mktemp("llama1"))


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_write_the_published_forms(tokenizer, name):
    text, said = use_template(tokenizer, name)
    prompt, answer = PUBLISHED[name]
    assert write_prompt(TURNS, tokenizer, "", "p").text == prompt
    assert render([*TURNS, LAST], tokenizer, answered=True) == prompt + answer
    assert tokenizer.chat_template == text and len(said) == (name == "chatml")
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id == 2
    assert lead_of_answers(tokenizer) == (" " if name == "hh" else "")
    # White space around the texts of a transcript stands there once.
    if name == "hh":
        spaced = [{**turn, "content": f" {turn['content']}\n"} for turn in TURNS]
        assert write_prompt(spaced, tokenizer, "", "p").text == prompt


def test_a_plain_template_is_the_bare_text(tokenizer):
    bare = chat_ids(TURNS[:1], tokenizer, "", "p")
    use_template(tokenizer, "plain")
    assert chat_ids(TURNS[:1], tokenizer, "", "p") == bare and bare[0] == tokenizer.bos_token_id
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id and lead_of_answers(tokenizer) == ""
    with pytest.raises(UserError, match=r"^p: the chat template refuses these messages \(it takes one"):
        chat_ids(TURNS, tokenizer, "", "p")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_bos_is_written_where_the_tokenizer_adds_one(tokenizer, name):
    use_template(tokenizer, name)
    assert chat_ids(TURNS[:1], tokenizer, "", "p").count(tokenizer.bos_token_id) == 1
    # GPT-2 has one too, and adds none.
    none = made(None)
    none.backend_tokenizer.post_processor = processors.ByteLevel()
    use_template(none, name)
    assert none.bos_token_id not in chat_ids(TURNS[:1], none, "", "p")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "chatml"])
def test_a_system_line_begins_the_first_user_turn_of_forms_without_one(tokenizer, name):
    use_template(tokenizer, name)
    asked = [{"role": "user", "content": "Be brief.\n\nhello"}]
    expected = chat_ids(asked, tokenizer, "", "p")
    assert chat_ids(TURNS[:1], tokenizer, "Be brief.", "p") == expected
    assert "system line" in remarks(tokenizer, [], {}, has_system=True)[0]


def test_chatml_ends_with_its_own_token_where_the_tokenizer_has_it():
    tokenizer = made(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert use_template(tokenizer, "chatml")[1] == []
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat_ids(TURNS[:1], tokenizer, "Be.", "p")[1] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_file_replaces_the_tokenizers_own_template_and_this_is_said(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + b"{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = made()
    _, said = use_template(tokenizer, str(file))
    assert said == [f"--template {file} replaces the chat template that the tokenizer has"]
    assert write_prompt(TURNS[:1], tokenizer, "", "p").text == "[hello]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no such file; give one of safe-rlhf, hh, alpaca, chatml, plain, or a jinja file\."),
        (b"", "it reads no messages"),
        (b'{"chat_template": "x"}', "it reads no messages"),
        (b"{{ messages", r"it cannot write a prompt \(unexpected end of template.*; correct it"),
        (b"{{ messages[3].content }}", r"it cannot write a prompt \("),
        (b"\xff messages", "not UTF-8 text"),
    ],
)
def test_templates_that_cannot_be_used_are_one_line(tmp_path, text, message):
    file = tmp_path / "t.jinja"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(UserError, match=f"{file}.*{message}") as error:
        use_template(made(None), str(file))
    assert "\n" not in str(error.value)


def test_bare_prompts_are_shown_as_the_model_sees_them(tokenizer):
    ids = chat_ids([{"role": "user", "content": "hello\nHello"}], tokenizer, "Be brief.", "p")
    (said,) = remarks(tokenizer, ids, {}, has_system=True)
    assert 'without the system line. The first one is "<s> hello\\nHello". Name the template' in said
    assert "--template safe-rlhf, hh, alpaca, chatml, plain or a jinja file" in said
    (said,) = remarks(tokenizer, [3 + 97] * 2000, {}, has_system=False)
    assert len(said) < 800 and "system" not in said


def test_variables_are_json_or_texts():
    assert template_kwargs([]) == {}
    words = ["a=false", "b=False", "c=none", "d=two words", 'e={"x": [1, {"y": 2}]}', "f=", "g=a=b", "h=2.5"]
    expected = {"a": False, "b": False, "c": None, "d": "two words", "e": {"x": [1, {"y": 2}]}, "f": ""}
    assert template_kwargs(words) == expected | {"g": "a=b", "h": 2.5}
    assert template_kwargs(['{"a": false, "e": {"x": [1, {"y": 2}]}}']) == {"a": False, "e": expected["e"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["thinking"], "'thinking': give NAME=VALUE, or a JSON object"),
        (["=1"], "'' is no name of a variable"),
        (["a b=1"], "'a b' is no name of a variable"),
        (["a=1", "a=2"], "a is given twice"),
        (['{"a": 1, "a": 2}'], "a is given twice"),
        (['{"a": 1'], "no JSON object"),
        (["{}}"], "no JSON object"),
    ],
)
def test_variables_that_cannot_be_read_are_refused(words, message):
    with pytest.raises(UserError, match=f"^--chat-template-kwargs .*{message}"):
        template_kwargs(words)


def test_variables_that_a_template_does_not_read_are_refused():
    tokenizer = made("{% if think is defined and not think %}-{% endif %}{{ messages[0].content }}")
    check_kwargs(tokenizer, {"think": False})
    assert write_prompt(TURNS[:1], tokenizer, "", "p", kwargs={"think": False}).text == "-hello"
    assert write_prompt(TURNS[:1], tokenizer, "", "p", kwargs={"think": True}).text == "hello"
    for name, message in (
        ("thin", "the chat template reads no such variable"),
        ("tokenize", "it is set by this program"),
        ("messages", "it is set by this program"),
    ):
        with pytest.raises(UserError, match=f"^--chat-template-kwargs {name}: {message}"):
            check_kwargs(tokenizer, {name: 1})
    with pytest.raises(UserError, match="the tokenizer has no chat template; give --template"):
        check_kwargs(made(None), {"think": 1})
    check_kwargs(made(None), {})
