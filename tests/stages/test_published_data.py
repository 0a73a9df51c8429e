"""A run on data as it is published: what is said, what the run keeps, and what --strict refuses."""

import json
import lzma
from pathlib import Path

import pytest

from engine import train
from engine.config import CaidConfig, EvaluateConfig, smoke
from engine.data import reading
from engine.stages.evaluate import ask
from engine.stages.inputs import read_inputs
from engine.stages.run_inputs import owned_inputs
from tests.helpers.runs import SMOKE, write


def pku(prompt: str, number: int) -> dict:
    """Makes a row in the columns of PKU-SafeRLHF."""
    return {
        "prompt": prompt,
        "response_0": "yes" * (1 + number % 2),
        "response_1": "no",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": number % 2,
        "safer_response_id": 0,
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Writes a folder as it comes from a hub: train and test, packed by xz; three prompts are in both."""
    folder = tmp_path_factory.mktemp("published") / "PKU-SafeRLHF-30K"
    prompts = {"train": [*range(20), *range(5)], "test": range(17, 27)}
    (folder / "round0").mkdir(parents=True)
    for split, numbers in prompts.items():
        rows = [pku(f"Question {number}?", number) for number in numbers]
        if split == "train":
            rows += [pku("", 1), pku("long " * 600, 1)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "round0" / f"{split}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


@pytest.fixture(scope="module")
def flags(published) -> list[str]:
    train_rows, test_rows = str(published), f"{published}:test"
    return [
        "pecan", *SMOKE, "--prompts", train_rows, "--heldout", test_rows, "--pairs", train_rows,
        "--preferences", train_rows, "--preference-steps", "1", "--steps", "11", "--force",
    ]  # fmt: skip


def test_published_files_run_as_they_are(published, flags, tmp_path, capsys):
    assert train.main([*flags, "--out", str(tmp_path / "r")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    title = "PKU-SafeRLHF: prompt, two responses, labels better_response_id and safer_response_id"
    left_out = (
        f"{published}: left out of 27 rows: 1 with a prompt of more than 2040 tokens, 5 with a prompt that "
        "stands there before, 1 without text (--strict refuses them)"
    )
    shared = "3 training prompts are held-out ones too and were left out of the training"
    own = f"{published}: left out of 25 pairs: 3 with a held-out prompt"
    for line in (
        f"{published}: read as {title}",
        f"{published}:test: read as {title}",
        left_out,
        shared,
        own,
    ):
        assert line in said
    record = owned_inputs(tmp_path / "r").record
    assert record.reading == [
        f"{published}: read as {title}", left_out, f"{published}:test: read as {title}", shared,
    ]  # fmt: skip
    assert sorted(record.train.text) == sorted(f"Question {i}?" for i in range(17))
    assert record.heldout.text == [f"Question {i}?" for i in range(17, 27)]
    numbers = [*range(17), *range(5)]
    for pairs in (record.pairs, record.preferences):
        assert pairs.prompts.text == [f"Question {i}?" for i in numbers] and pairs.reading[-1] == own
        assert [pairs.texts[2 * row] for row in range(22)] == ["yes" * (1 + i % 2) for i in numbers]
    assert (record.preferences.label_PGO[:, 1, 0] > 0).tolist() == [i % 2 == 1 for i in numbers]
    assert (record.preferences.label_PGO[:, 0, 1] > 0).all()
    files = {flag: [Path(name).name for name in files] for flag, files in record.sources.items()}
    assert files == {
        "--prompts": ["train.jsonl.xz"], "--heldout": ["test.jsonl.xz"], "--pairs": ["train.jsonl.xz"],
        "--preferences": ["train.jsonl.xz"],
    }  # fmt: skip
    # Judging says the same of its own prompts.
    fresh = write(tmp_path / "fresh.jsonl", [{"prompt": f"New {i % 3}?"} for i in range(4)])
    question = ask(tmp_path / "r", EvaluateConfig(prompts=fresh, threads=1))
    assert question.prompts.text and question.pool == 3
    assert f"{fresh}: left out of 4 rows: 1 with a prompt that stands there before" in question.notes[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ([], "train.jsonl.xz:21: the same prompt as"),
        (["--prompts", "clean"], "is also a training prompt; remove it"),
        (["--prompts", "apart"], "train.jsonl.xz:26: empty prompt in column 'prompt'"),
        (
            ["--prompts", "apart", "--preferences", "apart", "--pairs", "shared"],
            "is also a prompt of --pairs; remove it",
        ),
        (["--prompts", "apart", "--pairs", "reference"], "train.jsonl.xz:26: empty prompt"),
    ],
)
def test_strict_refuses_the_rows_that_are_left_out_otherwise(flags, tmp_path, capsys, change, says):
    numbers = {"clean": range(10, 20), "apart": range(10), "shared": range(15, 20)}
    files = {
        name: write(tmp_path / f"{name}.jsonl", [pku(f"Question {i}?", i) for i in rows])
        for name, rows in numbers.items()
    }
    given = [files.get(word, word) for word in change]
    again = [word for word in flags if word != "--force"]
    for flag, value in zip(given[::2], given[1::2], strict=True):
        again[again.index(flag) + 1] = value
    assert train.main([*again, "--strict", "--out", str(tmp_path / "r")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (
            range(17, 20),
            "3 training prompts are held-out ones too and were left out of the training; none is",
        ),
        ([], ": no prompts in it"),
    ],
)
def test_prompts_of_which_none_is_left_are_refused(flags, tmp_path, capsys, prompts, says):
    file = write(tmp_path / "p.jsonl", [pku(f"Question {i}?", i) for i in prompts])
    again = [file if word == flags[flags.index("--prompts") + 1] else word for word in flags]
    assert train.main([*again, "--out", str(tmp_path / "r")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_the_fifth_that_is_held_out_of_a_large_set_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "HELD_WHOLE", 10)
    file = write(tmp_path / "p.jsonl", [{"prompt": f"Question {i}?"} for i in range(300)])
    inputs = read_inputs(smoke(CaidConfig(prompts=file, threads=1)))
    # 12 training prompts want 15 in all, 8 held-out ones 40.
    assert (len(inputs.train), len(inputs.heldout)) == (32, 8)
    assert inputs.reading == [f"{file}: 40 of 300 are drawn by a hash of their text"]
