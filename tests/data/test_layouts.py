"""Data as it is published: each layout is recognised by its columns and read as its card says."""

import json
import lzma
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.data.layouts import read_example
from engine.data.prompts import TextLimits, read_prompts
from engine.data.reading import EVERY_ROW, Rules, Tally
from engine.data.response_pairs import SURE, read_pairs, read_response_pairs
from engine.errors import UserError
from engine.quickstart import tiny_model_folder
from engine.scorers.head_data import read_head_rows

LENIENT = Rules(strict=False)
LIMITS = TextLimits(system="", max_positions=400, max_new_tokens=20, vocab_size=384)
PKU_OLD = {
    "prompt": "How do I pick a lock?",
    "response_0": "With a pick.",
    "response_1": "Ask a locksmith.",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}
PKU_NEW = PKU_OLD | {
    "prompt_source": "x",
    "response_0_source": "Alpaca-7B",
    "response_0_harm_category": {"Theft": True},
    "response_0_severity_level": 2,
    "response_0_sha256": "00",
}
HH = {
    "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: A joke? \n\nAssistant: No.",
    "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: A joke? \n\nAssistant: Knock.\n\nKnock.",
}
HH_CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "A joke?"},
]


def said(*turns: str) -> list[dict[str, str]]:
    """Returns messages, of the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


ULTRA = {"prompt": "Q", "prompt_id": "0", "chosen": said("Q", "good"), "rejected": said("Q", "bad"),
         "score_chosen": 8.5, "score_rejected": 2.0}  # fmt: skip
TULU = {"chosen": said("a", "b", "Q", "good"), "rejected": said("a", "b", "Q", "bad"), "source": "x"}
EXPLICIT = {"prompt": said("Q"), "chosen": said("Q", "good")[1:], "rejected": said("Q", "bad")[1:]}
SYSTEM = {"role": "system", "content": "Be brief."}
HELP = {"prompt": "Q", "response": "so so", "helpfulness": 3, "correctness": 2, "verbosity": 1}
GPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
# Layout -> (row, messages, responses, what the display begins with).
LAYOUTS = {
    "PKU, 2023": (PKU_OLD, said(PKU_OLD["prompt"]), ("With a pick.", "Ask a locksmith."), "PKU-SafeRLHF: "),
    "PKU, 2024": (PKU_NEW, said(PKU_OLD["prompt"]), ("With a pick.", "Ask a locksmith."), "PKU-SafeRLHF: "),
    "HH": (HH, HH_CHAT, ("No.", "Knock.\n\nKnock."), "HH-RLHF transcripts"),
    "UltraFeedback": (ULTRA, said("Q"), ("good", "bad"), "messages: chosen and rejected"),
    "Tulu": (TULU, said("a", "b", "Q"), ("good", "bad"), "messages: chosen and rejected"),
    "with a system turn": (
        {"chosen": [SYSTEM, *said("Q", "good")], "rejected": [SYSTEM, *said("Q", "bad")]},
        [SYSTEM, *said("Q")],
        ("good", "bad"),
        "messages: ",
    ),
    "answers apart": (EXPLICIT, said("Q"), ("good", "bad"), "messages: "),
    "lists as JSON": (
        TULU | {name: json.dumps(TULU[name]) for name in ("chosen", "rejected")},
        said("a", "b", "Q"), ("good", "bad"), "messages: ",
    ),
    "lists as Python prints them": (
        TULU | {name: str(TULU[name]) for name in ("chosen", "rejected")},
        said("a", "b", "Q"), ("good", "bad"), "messages: ",
    ),
    "HelpSteer": (HELP, said("Q"), ("so so",), "HelpSteer: prompt, one response, scores"),
    "ShareGPT": ({"id": "1", "conversations": GPT}, said("Q"), ("A",), "ShareGPT conversations"),
    "ShareGPT as Python prints it": ({"conversations": str(GPT)}, said("Q"), ("A",), "ShareGPT"),
    "ShareGPT, asked last": (
        {"conversations": [*GPT, {"from": "human", "value": "R"}]}, said("Q", "A", "R"), (), "ShareGPT",
    ),
    "messages": ({"messages": [SYSTEM, *said("Q", "A")]}, [SYSTEM, *said("Q")], ("A",), "conversations in"),
    "own pairs": ({"prompt": "Q", "response_0": "a", "response_1": ""}, said("Q"), ("a", ""), ""),
    "own ends": ({"prompt": "Q", "chosen": "a", "rejected": "b"}, said("Q"), ("a", "b"), ""),
    "own messages": ({"prompt": said("a", "b", "Q"), "chosen": "a", "rejected": "b"}, said("a", "b", "Q"),
                     ("a", "b"), ""),
    "one response": ({"prompt": "Q", "response": "a", "label": 1}, said("Q"), ("a",), ""),
    "a prompt": ({"prompt": "Q", "conversations": 3}, said("Q"), (), ""),
    "a text that begins with an object": ({"prompt": '{"value": 1} is'}, said('{"value": 1} is'), (), ""),
    "a text that is an object": ({"prompt": '{"value": 1}'}, said('{"value": 1}'), (), ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path_factory.mktemp("model")))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts_of(source, tokenizer, rules=LENIENT, limit: int = 200):
    return read_prompts(source, tokenizer, rules, max_prompt_tokens=limit)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised_by_their_columns(name):
    row, messages, responses, title = LAYOUTS[name]
    found = read_example(row, "f:1", EVERY_ROW, answers=True)
    assert (found.messages, found.responses) == (messages, responses)
    assert found.layout.startswith(title) and bool(found.layout) == bool(title)
    assert found.labels == (("better_response_id", "safer_response_id") if "PKU" in name else ())
    # Answers that are not asked for may be anything.
    odd = {key: 7 if key.startswith("response") else cell for key, cell in row.items()}
    assert read_example(odd, "f:1", EVERY_ROW, answers=False).messages == messages


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"chosen": HH["chosen"], "rejected": HH["rejected"].replace("Hi", "Ho")},
            "differ before their last",
        ),
        ({"chosen": "\n\nHuman: a", "rejected": HH["rejected"]}, "a dialogue without an answer"),
        (
            {name: "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c" for name in ("chosen", "rejected")},
            "no user speaks first and last",
        ),
        ({"chosen": HH["chosen"], "rejected": None}, "a dialogue without an answer"),
        ({"chosen": "", "rejected": None}, "a dialogue without an answer"),
        ({"chosen": said("Q", "a"), "rejected": None}, "no messages in column 'rejected'"),
        ({"chosen": said("Q", "a"), "rejected": said("R", "a")}, "differ before their last answer"),
        ({"chosen": said("Q"), "rejected": said("Q", "a")}, "a dialogue without an answer"),
        ({"conversations": GPT[1:] + GPT}, "no user speaks first and last"),
        (
            {"conversations": [{"from": "tool", "value": "x"}, *GPT]},
            "a turn of 'tool'; known are human, user",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "has no content; fill it"),
        ({"prompt": [{"role": "user", "content": None}]}, "has no content; fill it"),
        ({"conversations": None}, "no messages in column 'conversations'"),
        ({"conversations": []}, "no user speaks first and last"),
        ({"prompt": " "}, "empty prompt in column 'prompt'"),
    ],
)
def test_rows_of_a_layout_that_say_nothing_are_left_out_or_refused(tmp_path, tokenizer, row, says):
    file = write(tmp_path / "d.jsonl", [row, {"prompt": "Q"}])
    with pytest.raises(UserError) as error:
        prompts_of(file, tokenizer, EVERY_ROW)
    assert str(error.value).startswith(f"{file}:1: ") and says in str(error.value)
    prompts, lines = prompts_of(file, tokenizer)
    assert prompts.text == ["Q"] and lines[-1].startswith(f"{file}: left out of 2 rows: 1 ")
    assert lines[-1].endswith(" (--strict refuses them)")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversations": [{"from": "human", "text": "Q"}]}, "is neither {"),
        ({"conversations": ["Q", "A"]}, "column 'conversations' holds no list of messages"),
        ({"conversations": "Q"}, "column 'conversations' holds no list of messages"),
        ({"chosen": "[{'role': 'user', 'content': 'Q'}\n {'role': 'a'}]", "rejected": "[{}]"}, "is no JSON"),
        ({"instruction": "Q", "output": "A"}, "no column 'prompt'; columns found: instruction, output."),
    ],
)
def test_what_is_no_layout_is_refused_by_name(tmp_path, tokenizer, row, says):
    file = write(tmp_path / "d.jsonl", [row])
    with pytest.raises(UserError) as error:
        prompts_of(file, tokenizer)
    assert str(error.value).startswith(f"{file}:1: ") and says in str(error.value)


def test_columns_that_flags_name_are_read_as_they_are(tmp_path, tokenizer):
    rows = [PKU_OLD | {"Question": f"q{i}", "Best": "b", "Worst": "w", "response": "r"} for i in range(2)]
    file = write(tmp_path / "d.jsonl", rows)
    asked = Rules(prompt_column="Question", strict=False)
    assert prompts_of(file, tokenizer, asked)[0].text == ["q0", "q1"]
    tally = Tally(file, strict=True)
    both = Rules(prompt_column="Question", response_columns=("Best", "Worst"))
    assert [pair.responses for pair in read_pairs(file, [], both, tally)] == [("b", "w")] * 2
    # Without names of responses, those that are there.
    pairs = list(read_pairs(file, [], asked, Tally(file, strict=True)))
    assert [(p.messages, p.responses) for p in pairs] == [
        (said(f"q{i}"), ("With a pick.", "Ask a locksmith.")) for i in range(2)
    ]
    (found, _), _ = read_head_rows([file], "auto", both)
    assert (found.text.response, found.other.response) == ("b", "w")
    one = Rules(prompt_column="Question", response_columns=("response",))
    (found, _), _ = read_head_rows([file], "auto", one, "safer_response_id")
    assert (found.text.response, found.label) == ("r", 1)


def test_labels_of_pku_are_known_and_others_are_named(tmp_path, tokenizer):
    rows = [PKU_OLD | {"prompt": f"q{i}", "better_response_id": i % 2, "mine": 0.0} for i in range(4)]
    file = str(tmp_path / "train.jsonl.xz")
    Path(file).write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    read = read_response_pairs(file, ["reward", "harm"], tokenizer, LIMITS, LENIENT)
    assert read.label_PGO[:, 0, 0].tolist() == [SURE, -SURE] * 2
    assert read.label_PGO[:, 1, 1].tolist() == [SURE] * 4
    assert read.reading == [
        f"{file}: read as PKU-SafeRLHF: prompt, two responses, labels better_response_id and "
        "safer_response_id"
    ]
    read = read_response_pairs(file, ["mine", "x=-mine"], tokenizer, LIMITS, LENIENT)
    assert read.label_PGO[:, 0].tolist() == [[SURE, -SURE]] * 4
    for columns, missing in ((["reward", "harm", "rude"], "reward"), (["mine", "gone"], "gone")):
        if missing == "gone":
            columns = [*columns, "safer_response_id"]
        with pytest.raises(UserError, match=f"no column '{missing}'.*--preference-columns"):
            read_response_pairs(file, columns, tokenizer, LIMITS, LENIENT)


def test_single_responses_are_paired_by_prompt_and_compared_by_score(tmp_path, tokenizer):
    rows = [
        HELP | {"prompt": "a", "response": "a0", "helpfulness": "4", "verbosity": 2},
        HELP | {"prompt": "b", "response": "b0", "helpfulness": 1, "verbosity": 3},
        HELP | {"prompt": "b", "response": "b1", "helpfulness": 1, "verbosity": 1},
        HELP | {"prompt": "c", "response": "c0"},
        HELP | {"prompt": "a", "response": "a1", "helpfulness": 0.5, "verbosity": 2},
    ]
    file = write(tmp_path / "h.jsonl", rows)
    read = read_response_pairs(file, ["helpfulness", "terse=-verbosity"], tokenizer, LIMITS, LENIENT)
    assert read.texts == ["b0", "b1", "a0", "a1"]
    assert read.label_PGO.tolist() == [[[0, -SURE], [0, SURE]], [[SURE, 0], [-SURE, 0]]]
    assert read.reading == [
        f"{file}: read as HelpSteer: prompt, one response, scores",
        f"{file}: left out of 5 rows: 1 without a second response (--strict refuses them)",
        f"{file}: in helpfulness neither answer of 1 of 2 pairs is the better one",
        f"{file}: in terse=-verbosity neither answer of 1 of 2 pairs is the better one",
    ]
    with pytest.raises(UserError, match=r"h.jsonl:4: no second response to this prompt"):
        read_response_pairs(file, ["helpfulness"], tokenizer, LIMITS)
    for bad in ("high", None, True, float("nan")):
        file = write(tmp_path / "bad.jsonl", [rows[0], rows[4] | {"helpfulness": bad}])
        with pytest.raises(
            UserError, match="bad.jsonl:2: helpfulness of a response to this prompt is .*number"
        ):
            read_response_pairs(file, ["helpfulness"], tokenizer, LIMITS)


def test_contents_in_parts_are_texts_in_every_layout():
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "!"}]
    asked = [{"role": "user", "content": parts}]
    told = [*asked, {"role": "assistant", "content": parts[:1]}]
    for row in ({"prompt": asked}, {"messages": told}, {"chosen": told, "rejected": told}):
        found = read_example(row, "f:1", EVERY_ROW, answers=True)
        assert found.messages == said("Q!") and set(found.responses) <= {"Q"}
    picture = [{"role": "user", "content": [{"type": "image", "image": "p.png"}]}]
    for row in ({"prompt": picture}, {"messages": picture}):
        with pytest.raises(UserError, match=r"^f:1: part .* and nothing else is read"):
            read_example(row, "f:1", EVERY_ROW, answers=True)


def test_pairs_have_whole_conversations(tmp_path, tokenizer):
    read = read_response_pairs(write(tmp_path / "hh.jsonl", [HH]), [], tokenizer, LIMITS)
    assert read.prompts.messages == [HH_CHAT] and read.texts == ["No.", "Knock.\n\nKnock."]
    assert read.prompts.text == ["user: Hi there\n\nassistant: Hello.\n\nuser: A joke?"]
    expected = tokenizer.apply_chat_template(
        HH_CHAT, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert read.prompts.token_ids == [expected]


def test_heads_learn_from_published_layouts(tmp_path):
    files = {
        "hh": ([HH], "", ("No.", "Knock.\n\nKnock.")),
        "tulu": ([TULU], "", ("good", "bad")),
        "better": ([PKU_NEW], "better_response_id", ("With a pick.", "Ask a locksmith.")),
        "safer": ([PKU_NEW], "safer_response_id", ("Ask a locksmith.", "With a pick.")),
        "helpsteer": (
            [HELP, HELP | {"response": "great", "helpfulness": 4}], "helpfulness", ("great", "so so"),
        ),
        "terse": ([HELP, HELP | {"response": "long", "verbosity": 4}], "terse=-verbosity", ("so so", "long")),
    }  # fmt: skip
    for name, (rows, label, (chosen, rejected)) in files.items():
        file = write(tmp_path / f"{name}.jsonl", rows)
        ((row,), lines) = read_head_rows([file], "auto", LENIENT, label)
        assert (row.text.response, row.other.response, row.label, row.source) == (chosen, rejected, 1, name)
        assert lines[0].startswith(f"{file}: read as ")
    assert row.text.chat == json.dumps(said("Q"))
    file = write(tmp_path / "pku.jsonl", [PKU_OLD])
    with pytest.raises(UserError, match="pku.jsonl: read as PKU-SafeRLHF: .*--label-column"):
        read_head_rows([file], "auto")
    file = write(tmp_path / "tied.jsonl", [HELP, HELP | {"response": "x"}, {**HELP, "prompt": "P"}])
    rows, lines = read_head_rows([file], "auto", LENIENT, "helpfulness")
    assert rows == [] and lines[1] == (
        f"{file}: left out of 3 rows: 1 in which neither response is the better one, 1 without a second "
        "response (--strict refuses them)"
    )
