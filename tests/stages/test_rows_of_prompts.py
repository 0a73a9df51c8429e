"""Scorers that take the rows of prompts: the run keeps these for them, and for them alone."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from engine import evaluate, train
from engine.data.prompts import TextLimits
from engine.data.reading import Rules
from engine.data.response_pairs import read_response_pairs
from engine.data.samples_file import read_samples
from engine.stages.run_inputs import owned_inputs
from tests.helpers.runs import SMOKE, files, write

MODULE = """
def by_level(prompts, responses, row):
    assert [one["prompt"] for one in row] == list(prompts), (row, prompts)
    return [one["level"] * len(set(r)) for one, r in zip(row, responses)]
def variety(prompts, responses):
    return [len(set(r)) for r in responses]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, cache):
    """Makes two runs on rows with a column level, one with a scorer that takes it; returns their place."""
    place = tmp_path_factory.mktemp("rows")
    (place / "rows_of_tests.py").write_text(MODULE)
    rows = [{"prompt": f"Question {i}?", "level": i % 3 + 1, "note": "x" * 9} for i in range(14)]
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        for name in ("by_level", "variety"):
            assert train.main(command(place, name, name)) == 0
        yield place


def command(place, scorer, out):
    reward = ["--reward", f"rows_of_tests:{scorer}", "--prompts", str(place / "p.jsonl")]
    return ["mocan", *SMOKE, *reward, "--force", "--out", str(place / out)]


def test_rows_are_kept_where_a_scorer_takes_them(world):
    kept, without = (owned_inputs(world / name).record for name in ("by_level", "variety"))
    for part in ("train", "heldout"):
        prompts = getattr(kept, part)
        found = [json.loads(row) for row in prompts.rows]
        assert [row["prompt"] for row in found] == prompts.text and len(found) > 1
        assert getattr(without, part).rows == []
    stored = {name: (world / name / "inputs.safetensors").read_bytes() for name in ("by_level", "variety")}
    assert b"xxxxxxxxx" in stored["by_level"] and b"xxxxxxxxx" not in stored["variety"]


def test_a_run_goes_on_with_its_own_rows(world, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(world / "by_level", out)
    (out / "stages" / "05-heldout-policy.safetensors").unlink()
    before = (world / "p.jsonl").read_text()
    (world / "p.jsonl").write_text(before.replace('"level": ', '"level": 9'))
    try:
        assert train.main(["--resume", str(out)]) == 0
    finally:
        (world / "p.jsonl").write_text(before)
    first, second = files(world / "by_level"), files(out)
    assert first.keys() == second.keys() and [name for name in first if first[name] != second[name]] == []


def test_an_audit_that_takes_rows_is_refused_where_none_were_kept(world, tmp_path, capsys):
    flags = ["--audit", "level=rows_of_tests:by_level", "--out", str(tmp_path / "e")]
    assert evaluate.main([str(world / "variety"), *flags]) == 2
    assert (
        "scorer level: it takes row, and the rows of these prompts were not kept" in capsys.readouterr().err
    )
    (tmp_path / "new.jsonl").write_text('{"prompt": "One?", "level": 1}\n{"prompt": "Two?", "level": 2}\n')
    prompts = ["--prompts", str(tmp_path / "new.jsonl")]
    assert evaluate.main([str(world / "variety"), *flags, *prompts]) == 0


def test_pairs_and_given_samples_have_their_rows_too(tmp_path, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    limits = TextLimits(system="", max_positions=300, max_new_tokens=8, vocab_size=384)
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "level": i} for i in range(4)]
    rows[1]["rejected"] = rows[1]["chosen"]
    source = write(tmp_path / "pairs.jsonl", rows)
    pairs = read_response_pairs(source, [], tokenizer, limits, Rules(rows=True))
    assert [json.loads(row) for row in pairs.prompts.rows] == [rows[0], *rows[2:]]
    left = pairs.without([0], "for the test").prompts
    assert [json.loads(row)["level"] for row in left.rows] == [2, 3] and left.text == ["2?", "3?"]
    assert read_response_pairs(source, [], tokenizer, limits, Rules()).prompts.rows == []
    rows = [{"prompt": f"{i}?", "responses": ["a", "b"], "level": i} for i in range(3)]
    source = write(tmp_path / "samples.jsonl", rows)
    given = read_samples(source, ["reward"], tokenizer, limits, Rules(rows=True), 2)
    assert [json.loads(row) for row in given.prompts.rows] == rows
    assert read_samples(source, ["reward"], tokenizer, limits, Rules(), 2).prompts.rows == []
