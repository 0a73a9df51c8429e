"""Files of samples: the forms of their rows, what is taken of them and what is left out."""

import csv
import json
from pathlib import Path

import pytest
import torch

from engine.data.prompts import TextLimits
from engine.data.reading import Rules
from engine.data.samples_file import GivenSamples, read_samples
from engine.errors import UserError
from engine.model.tokenizer import load_tokenizer
from tests.helpers.runs import write

LENIENT = Rules(strict=False)
NAMES = ("reward", "harm")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path):
    return load_tokenizer(tiny_folder)


@pytest.fixture
def read(tokenizer):
    def read(source: str, rules: Rules = LENIENT, most: int = 8, longest: int = 12) -> GivenSamples:
        limits = TextLimits(system="", max_positions=256, max_new_tokens=longest, vocab_size=len(tokenizer))
        return read_samples(source, NAMES, tokenizer, limits, rules, most)

    return read


def table_of(given: GivenSamples) -> dict[str, list[tuple]]:
    """Returns text and scores of the responses by prompt."""
    n = given.rollouts.n
    return {
        prompt: [(given.texts[p * n + i].strip(), *given.score_PGC[p, i].tolist()) for i in range(n)]
        for p, prompt in enumerate(given.prompts.text)
    }


EXPECTED = {"One?": [("a", 1.0, -2.0), ("b c", 0.5, 3.0)], "Two?": [("", 2.0, 0.0), ("d", -1.0, 1.0)]}


def test_all_forms_of_rows_say_the_same(tmp_path, read):
    single = [
        {"prompt": prompt, "response": text, "reward": reward, "harm": harm}
        for i in (0, 1)
        for prompt, answers in EXPECTED.items()
        for text, reward, harm in [answers[i]]
    ]
    listed = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "responses": list(texts),
            "reward": list(rewards),
            "harm": list(harms),
        }
        for prompt, answers in EXPECTED.items()
        for texts, rewards, harms in [zip(*answers, strict=True)]
    ]
    talks = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ],
            "reward": row["reward"],
            "harm": row["harm"],
        }
        for row in single
    ]
    with open(tmp_path / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "responses", "reward", "harm"])
        for row in listed:
            lists = (json.dumps(row[name]) for name in ("responses", "reward", "harm"))
            table.writerow([row["prompt"][0]["content"], *lists])
    sources = [write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((single, listed, talks))]
    first = None
    for source in [*sources, str(tmp_path / "table.csv")]:
        given = read(source)
        assert table_of(given) == EXPECTED and given.names == ["reward", "harm"], source
        first = first or given
        assert torch.equal(given.rollouts.tokens, first.rollouts.tokens)
        assert torch.equal(given.prompts.key_P, first.prompts.key_P)


def test_responses_end_as_the_policys_do_and_are_cut_at_its_longest(tmp_path, read, tokenizer):
    text = "one two three four"
    ids = tokenizer.encode(text, add_special_tokens=False)
    rows = [{"prompt": "Q?", "responses": [text, "", text[:3]]}]
    file = write(tmp_path / "s.jsonl", rows)
    end = tokenizer.eos_token_id
    for longest, whole in ((len(ids) + 1, True), (len(ids), False)):
        given = read(file, longest=longest)
        tokens, length = given.rollouts.tokens, given.rollouts.length.tolist()
        assert tokens[0, : length[0]].tolist() == [*ids, end][:longest] and length[1] == 1
        assert tokens[1, 0] == end and given.rollouts.finished.tolist() == [whole, True, True]
        cut = f"1 of 3 responses are longer than --max-new-tokens {longest} and were cut"
        assert given.notes() == ([] if whole else [f"{file}: {cut}"])


def test_the_first_of_unequal_numbers_are_taken_and_some_prompts_are_left_out(tmp_path, read):
    rows = [{"prompt": f"P{p}", "responses": [f"r{i}" for i in range(3 + p % 2)]} for p in range(6)]
    rows += [{"prompt": "P0", "responses": ["late"]}, {"prompt": "alone", "responses": ["x"]}]
    rows += [{"prompt": "", "responses": ["x", "y"]}, {"prompt": "w " * 300, "responses": ["x", "y", "z"]}]
    rows += [{"prompt": "none", "responses": []}]
    given = read(file := write(tmp_path / "s.jsonl", rows))
    assert {len(r) for r in table_of(given).values()} == {3} and "late" not in given.texts
    assert given.prompts.text == [f"P{p}" for p in range(6)] and given.score_PGC.shape == (6, 3, 0)
    too_long, alone = "1 with a prompt of more than 244 tokens", "1 with a single response to their prompt"
    taken = "6 prompts with 3 responses each, the first of the 3 to 4 there (see --n-responses)"
    assert given.reading == [
        f"{file}: left out of 11 rows: {too_long}, {alone}, 2 without text (--strict refuses them)",
        f"{file}: {taken}; no scores are given, scored here: reward, harm",
    ]
    assert read(file, most=2).rollouts.n == 2
    part = given.of(given.prompts.select([4, 1]))
    assert part.texts == ["r0", "r1", "r2"] * 2 and part.prompts.text == ["P4", "P1"]


def test_a_large_file_is_drawn_by_the_hash_of_its_prompts(tmp_path, read, monkeypatch):
    monkeypatch.setattr("engine.data.reading.HELD_WHOLE", 4)
    rows = [{"prompt": f"P{p}", "responses": ["a", "b"]} for p in range(20)]
    rules = Rules(strict=False, enough=3, seed=1)
    drawn = read(write(tmp_path / "s.jsonl", rows), rules)
    other = read(write(tmp_path / "t.jsonl", rows[::-1]), rules)
    assert len(drawn.prompts) == 4 and {*drawn.prompts.text} == {*other.prompts.text}
    assert "4 of 20 are drawn by a hash of their text" in drawn.reading[0]


def test_a_file_without_a_usable_row_says_why(tmp_path, read):
    for rows, says in (
        ([{"prompt": "P", "responses": ["x"]}], ":1: one response to this prompt"),
        ([{"prompt": "P"}], ":1: no column 'responses'; columns found: prompt"),
        ([{"prompt": "P", "responses": ["x", "x"]}], r"are equal \(0 of 2 were cut at --max-new-tokens 12\)"),
        ([], "no rows in it"),
    ):
        with pytest.raises(UserError, match=says):
            read(write(tmp_path / "s.jsonl", rows))
