"""Answers are tokenised behind their prompt, so that they have the tokens that a policy samples there."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from engine import quickstart
from engine.data.chat import NO_KWARGS, answer_ids, lead_of_answers, render, write_prompt
from engine.data.prompts import TextLimits, load_prompts
from engine.data.response_pairs import read_response_pairs
from engine.data.templates import use_template
from engine.errors import UserError
from engine.model import fingerprint
from engine.model.tokenizer import load_tokenizer
from engine.scorers.base import Head, LoadContext
from engine.scorers.head_data import encode, read_head_rows, unique_texts
from engine.scorers.heads import load_head
from engine.stages.inputs import stop_tokens
from tests.helpers.byte_tokenizer import CHATML, made
from tests.helpers.published import write_llama1
from tests.helpers.runs import write

ASKED = [{"role": "user", "content": "hello"}]
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llama1(tmp_path_factory):
    return write_llama1(tmp_path_factory.mktemp("llama1"))


@pytest.fixture
def tokenizer(llama1):
    tokenizer = load_tokenizer(llama1)
    use_template(tokenizer, "safe-rlhf")
    return tokenizer


def limits(tokenizer, **more) -> TextLimits:
    return TextLimits(system="", max_positions=900, max_new_tokens=16, vocab_size=len(tokenizer), **more)


@pytest.mark.parametrize(
    "asked", ["hello", "hello  hello", "a\nb\n", "Ünïcode ☃ 1.5", "hello </s>hello", " x"]
)
def test_ids_of_the_template_are_those_of_tokenizer_json(llama1, tokenizer, asked):
    published = Tokenizer.from_file(str(llama1 / "tokenizer.json"))
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Hello"}, *ASKED]
    for messages, text in (
        (turns[:1], f"BEGINNING OF CONVERSATION: USER: {asked} ASSISTANT:"),
        (turns, f"BEGINNING OF CONVERSATION: USER: {asked} ASSISTANT:Hello</s>USER: hello ASSISTANT:"),
    ):
        prompt = write_prompt(messages, tokenizer, "", "p")
        assert prompt.token_ids == published.encode(text).ids
        whole = published.encode(text + "Hello: you").ids
        assert prompt.token_ids + answer_ids(prompt, "Hello: you", tokenizer, "", "p") == whole


def test_answers_of_files_begin_without_the_space_of_sentencepiece(tokenizer, tmp_path):
    expected = [*tokenizer.convert_tokens_to_ids(["Hello", "▁hello"]), tokenizer.eos_token_id]
    row = {"prompt": "hello", "response_0": "Hello hello", "response_1": "x", "reward": 0}
    for columns in ([], ["reward"]):
        pairs = read_response_pairs(write(tmp_path / "p.jsonl", [row]), columns, tokenizer, limits(tokenizer))
        assert pairs.rollouts.tokens[0, :3].tolist() == expected
    file = write(tmp_path / "h.jsonl", [{"prompt": "hello", "chosen": "Hello hello", "rejected": "x"}])
    texts = unique_texts(read_head_rows([file], "auto")[0])
    (group,) = encode(texts, tokenizer, limits(tokenizer))
    assert group.responses[0] == expected
    assert group.prompt == pairs.prompts.token_ids[0] == write_prompt(ASKED, tokenizer, "", "p").token_ids


def test_a_head_on_another_model_reads_answers_behind_their_prompt(llama1, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "model_folder", lambda: llama1)
    weight_D = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    head = Head(name="h", layer=1, weight_D=weight_D, bias=0.0, trunk=fingerprint(llama1))
    scorer = load_head(head, LoadContext(trunk="another", device=torch.device("cpu"), loaded={}), tmp_path)
    network = AutoModelForCausalLM.from_pretrained(llama1, dtype=torch.float32, attn_implementation="eager")
    # The fixture's own tokenizer has no template, so the prompt stands alone.
    prompt = [1, *tokenizer.convert_tokens_to_ids(["▁hello"])]
    answer = [*tokenizer.convert_tokens_to_ids(["Hello"]), 2]
    with torch.no_grad():
        states_TD = network(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[1][0]
    expected = states_TD[len(prompt) :].double().mean(0) @ weight_D
    assert float(scorer(["hello"], ["Hello"])[0]) == pytest.approx(float(expected), abs=1e-4)


def test_the_space_that_a_template_writes_before_an_answer_belongs_to_it(llama1):
    tokenizer = load_tokenizer(llama1)
    tokenizer.chat_template = LLAMA2
    assert lead_of_answers(tokenizer) == " "
    prompt = write_prompt(ASKED, tokenizer, "", "p")
    told = {"role": "assistant", "content": "Hello"}
    whole = tokenizer.encode(render([*ASKED, told], tokenizer, answered=True), add_special_tokens=False)
    answer = answer_ids(prompt, "Hello", tokenizer, " ", "p")
    assert answer == tokenizer.convert_tokens_to_ids(["▁", "Hello"])
    assert whole[: len(prompt.token_ids) + 2] == prompt.token_ids + answer
    assert answer_ids(prompt, " Hello", tokenizer, " ", "p") == answer, "it is not written twice"
    assert answer_ids(prompt, "", tokenizer, " ", "p") == []
    # These write none, or another text stands between.
    for template in (CHATML, None, LLAMA2.replace("' ' + m", "' Well: ' + m")):
        tokenizer.chat_template = template
        assert lead_of_answers(tokenizer) == ""


def test_an_answer_that_would_melt_into_its_prompt_leaves_the_prompt_as_it_is():
    letters = {"\n": "Ċ", " ": "Ġ"}
    tokenizer = made(merges=[(letters["\n"], letters["\n"]), (letters["\n"], letters[" "]), ("a", "b")])
    prompt = write_prompt(ASKED, tokenizer, "", "p")
    assert prompt.text.endswith("assistant\n")
    for answer in ("\nabc", "\n\nabc", " abc", "abc", "\n"):
        joint = tokenizer.encode(prompt.text + answer, add_special_tokens=False)
        assert (joint[: len(prompt.token_ids)] != prompt.token_ids) == (answer[0] in "\n ")
        alone = tokenizer.encode(answer, add_special_tokens=False)
        assert answer_ids(prompt, answer, tokenizer, "", "p") == alone


def test_an_answer_without_a_beginning_of_its_own_is_refused_by_its_place():
    class Melting:
        """A tokenizer whose every text is one token."""

        chat_template = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [len(text)]

    prompt = write_prompt(ASKED, Melting(), "", "p")
    with pytest.raises(UserError, match="^f:3: the tokenizer joins the beginning of the response 'Sure'"):
        answer_ids(prompt, "Sure", Melting(), "", "f:3")


def test_variables_reach_the_template_from_every_reader(tmp_path):
    thinks = CHATML.replace("assistant\n", "assistant\n{% if not think %}[none]{% endif %}")
    tokenizer = made(thinks)
    row = {"prompt": "Say it", "chosen": "yes", "rejected": "no"}
    file = write(tmp_path / "p.jsonl", [row])
    for kwargs in (NO_KWARGS, {"think": False}, {"think": True}):
        asked = limits(tokenizer, template_kwargs=kwargs)
        read = load_prompts(file, tokenizer, max_prompt_tokens=99, template_kwargs=kwargs).token_ids[0]
        pairs = read_response_pairs(file, [], tokenizer, asked).prompts.token_ids[0]
        (group,) = encode(unique_texts(read_head_rows([file], "auto")[0]), tokenizer, asked)
        assert read == pairs == group.prompt
        assert tokenizer.decode(read).endswith("[none]") == (not kwargs.get("think"))


def test_the_end_of_a_turn_is_that_of_the_template_with_its_variables(tmp_path):
    tokenizer = made(CHATML.replace("<|end|>", "{{ '<|end|>' if ends else '</s>' }}"))
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|end|>")]
    file = write(tmp_path / "p.jsonl", [{"prompt": "Say it", "chosen": "yes", "rejected": "no"}])
    for kwargs, end in (({"ends": False}, ends[0]), ({"ends": True}, ends[1])):
        asked = limits(tokenizer, template_kwargs=kwargs)
        rollouts = read_response_pairs(file, [], tokenizer, asked).rollouts
        (group,) = encode(unique_texts(read_head_rows([file], "auto")[0]), tokenizer, asked)
        assert rollouts.tokens[0, 3] == group.responses[0][3] == end
        assert set(stop_tokens(tmp_path, tokenizer, kwargs)) == {ends[0], end}
