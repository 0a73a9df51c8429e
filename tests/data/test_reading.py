"""What a run does with rows that it cannot use, and with sets that are too large to hold."""

import json
import tracemalloc
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.data import prompts as prompts_module
from engine.data import reading
from engine.data.prompts import TextLimits, read_prompts
from engine.data.reading import EVERY_ROW, Pool, Rules
from engine.data.response_pairs import read_response_pairs
from engine.errors import UserError
from engine.quickstart import tiny_model_folder

LIMIT = 90


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path_factory.mktemp("model")))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source, tokenizer, rules: Rules):
    return read_prompts(source, tokenizer, rules, max_prompt_tokens=LIMIT)


DIRTY = [
    {"prompt": "first", "kind": "x"},
    {"prompt": "second"},
    {"prompt": "first", "kind": "y"},
    {"prompt": None},
    {"prompt": " \n"},
    {"prompt": "long " * 40},
    {"prompt": [{"role": "user", "content": "second"}]},
    {"prompt": "third"},
]


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path, tokenizer):
    file, other = write(tmp_path / "a.jsonl", DIRTY), write(tmp_path / "b.jsonl", [{"prompt": "third"}])
    prompts, lines = read([file, other], tokenizer, Rules(strict=False))
    assert prompts.text == ["first", "second", "third"] and prompts.kind == ["x", "", ""]
    assert lines == [
        f"{file}: left out of 8 rows: 1 with a prompt of more than {LIMIT} tokens, "
        "2 with a prompt that stands there before, 2 without text (--strict refuses them)",
        f"{other}: left out of 1 rows: 1 with a prompt that stands there before (--strict refuses them)",
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (2, r"a.jsonl:2: the same prompt as .*a.jsonl:1;"),
        (3, "a.jsonl:2: empty prompt"),
        (4, "a.jsonl:2: empty prompt"),
        (5, rf"a.jsonl:2: the prompt has \d+ tokens, the limit is {LIMIT};"),
    ],
)
def test_strict_refuses_them_by_file_and_line(tmp_path, tokenizer, row, says):
    file = write(tmp_path / "a.jsonl", [DIRTY[0], DIRTY[row]])
    with pytest.raises(UserError, match=says):
        read(file, tokenizer, EVERY_ROW)
    # A file in which there is nothing else says the same.
    if row != 2:
        file = write(tmp_path / "a.jsonl", [{"prompt": ""} | DIRTY[row], DIRTY[row]])
        with pytest.raises(UserError, match=says.replace(":2:", ":1:")):
            read(file, tokenizer, Rules(strict=False))


def test_prompts_that_are_equal_as_tokens_are_one(tmp_path, tokenizer):
    trimming = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    trimming.chat_template = "{{ messages[-1].content | trim }}"
    file = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "a "}, {"prompt": "b"}])
    prompts, lines = read(file, trimming, Rules(strict=False))
    assert prompts.text == ["a", "b"]
    assert lines == [
        f"{file}: left out of 3 rows: 1 with a prompt that stands there before (--strict refuses them)"
    ]


def pairs_of(file: str, tokenizer, rules: Rules):
    limits = TextLimits(system="", max_positions=LIMIT + 8, max_new_tokens=8, vocab_size=384)
    return read_response_pairs(file, [], tokenizer, limits, rules)


def test_pairs_that_cannot_be_used_are_left_out_and_counted(tmp_path, tokenizer):
    answers = {"response_0": "yes", "response_1": "no"}
    rows = [{"prompt": f"q{i}", **answers} for i in range(5)]
    rows[1]["prompt"], rows[2]["response_1"], rows[3]["prompt"] = "", None, "long " * 40
    rows.append(rows[0] | {"response_0": "no", "response_1": "yes"})  # a prompt may stand in several rows
    file = write(tmp_path / "p.jsonl", rows)
    found = pairs_of(file, tokenizer, Rules(strict=False))
    assert found.prompts.text == ["q0", "q4", "q0"] and found.texts == ["yes", "no", "yes", "no", "no", "yes"]
    assert found.reading == [
        f"{file}: left out of 6 rows: 1 with a prompt of more than {LIMIT} tokens, 2 without text "
        "(--strict refuses them)"
    ]
    for row in (1, 2, 3):
        strict = write(tmp_path / "s.jsonl", [rows[0], rows[row]])
        with pytest.raises(UserError, match="s.jsonl:2: "):
            pairs_of(strict, tokenizer, EVERY_ROW)
    kept = found.without([0, 2], "with a held-out prompt")
    assert kept.prompts.text == ["q4"] and kept.texts == ["yes", "no"]
    assert kept.rollouts.tokens.tolist() == found.rollouts.tokens[2:4].tolist()
    assert kept.rollouts.n == 2 and kept.label_PGO.shape == (1, 2, 0)
    assert kept.reading[-1] == f"{file}: left out of 3 pairs: 2 with a held-out prompt"
    with pytest.raises(UserError, match="left out of 3 pairs: 3 with a held-out prompt; none is left"):
        found.without([0, 1, 2], "with a held-out prompt")


def test_a_pool_is_the_first_by_hash_whatever_the_order():
    texts = [f"text {i}" for i in range(200)]
    ends = []
    for order in (texts, texts[::-1]):
        pool = Pool(20, seed=3)
        for text in order:
            pool.offer(text, text)
        assert pool.is_cut and pool.items == [text for text in order if text in set(pool.items)]
        ends.append(set(pool.items))
    assert ends[0] == ends[1] and len(ends[0]) == 20
    small, other = Pool(5, seed=3), Pool(20, seed=4)
    for text in texts:
        small.offer(text, text)
        other.offer(text, text)
    assert set(small.items) < ends[0] != set(other.items)
    whole = Pool(None, seed=3)
    for text in texts:
        whole.offer(text, text)
    assert whole.items == texts and not whole.is_cut


@pytest.fixture
def small(monkeypatch):
    """Lets sets of more than 40 rows be too large to hold."""
    monkeypatch.setattr(reading, "HELD_WHOLE", 40)


def test_of_a_large_set_a_choice_by_hash_is_tokenised(tmp_path, tokenizer, small, monkeypatch):
    asked = []
    real = prompts_module.write_prompt
    monkeypatch.setattr(prompts_module, "write_prompt", lambda *args: asked.append(args) or real(*args))
    rows = [{"prompt": f"prompt {i}"} for i in range(300)]
    whole = write(tmp_path / "whole.jsonl", rows)
    parts = [
        write(tmp_path / "2.jsonl", rows[:100:-1]),
        write(tmp_path / "1.jsonl", [*rows[:101], *rows[50:60]]),
    ]
    rules = Rules(strict=False, enough=10, seed=1)
    chosen, lines = read(whole, tokenizer, rules)
    assert len(chosen) == 40 == len(asked), "no other prompt is tokenised"
    assert lines == [f"{whole}: 40 of 300 are drawn by a hash of their text"]
    again, lines = read(parts, tokenizer, rules)
    assert set(again.text) == set(chosen.text) and again.text != chosen.text
    first, second = (int(line.split(": ")[1].split()[0]) for line in lines[:2])
    assert (
        first + second == 40 and lines[0] == f"{parts[0]}: {first} of 199 are drawn by a hash of their text"
    )
    assert "10 with a prompt that stands there before" in lines[2]
    assert set(read(whole, tokenizer, Rules(enough=10, seed=2))[0].text) != set(chosen.text)
    assert len(read(whole, tokenizer, Rules(enough=70, seed=1))[0]) == 70
    assert read(whole, tokenizer, Rules())[0].text == [row["prompt"] for row in rows]
    held = write(tmp_path / "small.jsonl", rows[:40])
    prompts, lines = read(held, tokenizer, rules)
    assert prompts.text == [row["prompt"] for row in rows[:40]] and not lines


def test_the_next_by_hash_stand_in_for_those_that_are_too_long(tmp_path, tokenizer, small):
    rows = [{"prompt": f"prompt {i} " + "long " * (40 * (i % 3 > 0))} for i in range(300)]
    file = write(tmp_path / "p.jsonl", rows)
    prompts, lines = read(file, tokenizer, Rules(strict=False, enough=40))
    assert 40 <= len(prompts) < 100 and all(int(text.split()[1]) % 3 == 0 for text in prompts.text)
    assert "are drawn by a hash" in lines[0] and f"with a prompt of more than {LIMIT} tokens" in lines[1]
    everything, lines = read(file, tokenizer, Rules(strict=False, enough=250))
    assert len(everything) == 100 and "left out of 300 rows: 200 with a prompt of more than" in lines[-1]


def test_of_many_pairs_a_choice_by_hash_is_tokenised(tmp_path, tokenizer, small):
    rows = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": "b"} for i in range(120)]
    file, turned = write(tmp_path / "p.jsonl", rows), write(tmp_path / "t.jsonl", rows[::-1])
    found = pairs_of(file, tokenizer, Rules(strict=False, enough=10))
    assert len(found.prompts) == 40 and found.reading == [
        f"{file}: 40 of 120 are drawn by a hash of their text"
    ]
    assert set(found.prompts.text) == set(pairs_of(turned, tokenizer, Rules(enough=10)).prompts.text)
    assert len(pairs_of(file, tokenizer, EVERY_ROW).prompts) == 120


def test_memory_is_that_of_the_choice(tmp_path, tokenizer, small):
    """Rows that are not chosen leave no more than their hashes."""
    peaks, n_more = [], 2_000
    for n in (400, 400 + n_more):
        rows = [{"prompt": f"prompt {i}", "beside": f"{i} " * 150} for i in range(n)]
        file = write(tmp_path / "p.jsonl", rows)
        tracemalloc.start()
        read(file, tokenizer, Rules(strict=False, enough=10))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < n_more * 250 < Path(file).stat().st_size / 2
