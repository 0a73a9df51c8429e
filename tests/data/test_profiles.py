"""Profiles: the published sets by their columns, and files of a user's own sets."""

import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from engine.data.profiles import SAFETY, PromptSet, profile_of
from engine.data.prompts import read_prompts
from engine.data.reading import Rules
from engine.data.tables import NotFound, read_rows
from engine.errors import UserError
from tests.helpers.published_sets import write_do_not_answer, write_sets


def kinds(one: PromptSet) -> list[str]:
    return [one.kind_of(row, place) for place, row in read_rows(one.source)]


def test_the_published_sets_are_read_from_folders_of_their_names(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    write_sets(tmp_path)
    write_do_not_answer(tmp_path / "LibrAI/do-not-answer/data/train-00000-of-00001.parquet")
    found = {one.name: Counter(kinds(one)) for one in SAFETY.sets}
    assert found == {
        "XSTest": {"safe": 3, "unsafe": 2},
        "BeaverTails-Evaluation": {"unsafe": 3},
        "Do-Not-Answer": {"unsafe": 2},
        "PKU-SafeRLHF test": {"": 4},
        "WildGuardTest": {"safe": 2, "unsafe": 2, "": 1},
    }
    # Training rows that lie beside the test rows are no part of a set.
    prompts = [row["prompt"] for one in SAFETY.sets[3:] for _, row in read_rows(one.source)]
    assert not [text for text in prompts if "oak" in text or "pear" in text]
    (tmp_path / "allenai/wildguardmix/test/wildguard_test.parquet").unlink()
    with pytest.raises(NotFound, match="no file's path tells that it is of the configuration wildguardtest"):
        kinds(SAFETY.sets[4])


def test_the_built_in_profile_is_named_and_its_sets_are_those_of_the_field():
    assert profile_of("safety") is SAFETY
    names = ("XSTest", "BeaverTails-Evaluation", "Do-Not-Answer", "PKU-SafeRLHF test", "WildGuardTest")
    assert tuple(one.name for one in SAFETY.sets) == names
    for named in ("safty", "safety.txt", "sets/mine"):
        with pytest.raises(UserError, match=f"--profile {named}: no profile of that name; give safety, or"):
            profile_of(named)


OWN = """\
sets:
  - name: wolves
    source: wolves.csv
    prompt: question
    label: is-harmful
    safe: [0, no]
    unsafe: true
  - {name: lambs, source: lambs.jsonl, every: unsafe}
"""


def test_a_file_lists_sets_with_the_same_fields(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(OWN)
    mine = profile_of(str(file))
    wolves = PromptSet(
        name="wolves",
        source="wolves.csv",
        prompt="question",
        label="is-harmful",
        safe=("0", "no"),
        unsafe=("true",),
    )
    lambs = PromptSet(name="lambs", source="lambs.jsonl", every="unsafe")
    assert (mine.name, mine.sets) == ("mine", (wolves, lambs))
    labels = [True, "TRUE", " true ", 0, "0", "No", 1, None, "maybe"]
    told = [wolves.kind_of({"question": "q", "is-harmful": label}, "f:1") for label in labels]
    assert told == ["unsafe"] * 3 + ["safe"] * 3 + [""] * 3
    assert lambs.kind_of({"messages": [{"role": "user", "content": "q"}]}, "f:1") == "unsafe"
    as_json = tmp_path / "mine.json"
    as_json.write_text(json.dumps({"sets": [{"name": "lambs", "source": "lambs.jsonl", "every": "unsafe"}]}))
    assert profile_of(str(as_json)).sets == (lambs,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"p\.yaml: no list of sets; a profile is a list of sets under the word sets"),
        ("sets: 3\n", r"p\.yaml:1: no list of sets"),
        ("sets: []\n", r"p\.yaml:1: no list of sets"),
        ("- a\n", r"p\.yaml:1: no mapping"),
        ("set: []\n", r"p\.yaml:1: unknown word 'set'; known here: sets\. Did you mean sets\?"),
        ("sets:\n  - a\n", r"p\.yaml:2: no mapping"),
        ("sets:\n  - source: a.csv\n", r"p\.yaml:2: a set without name"),
        ("sets:\n  - name: a\n", r"p\.yaml:2: a set without source"),
        ("sets:\n  - name: a\n    source:\n", r"p\.yaml:3: source must be one text"),
        ("sets:\n  - name: [a]\n    source: b\n", r"p\.yaml:2: name must be one text"),
        ("sets:\n  - name: 'a\n\n      b'\n    source: b\n", r"p\.yaml:2: name must be one text in one line"),
        ("sets:\n  - name: a\n    name: b\n", r"p\.yaml:3: the setting 'name' stands there twice"),
        (
            "sets:\n  - name: a\n    source: b\n    column: c\n",
            r"p\.yaml:4: unknown word 'column'; known here: ",
        ),
        ("sets:\n  - name: a\n    source: b\n    files: c\n", r"p\.yaml:4: unknown word 'files'"),
        ("sets:\n  - name: a\n    source: b\n    every: bad\n", r"every is 'bad'; it must be safe or unsafe"),
        ("sets:\n  - name: a\n    source: b\n    label: c\n", r"p\.yaml:2: label is a column"),
        ("sets:\n  - name: a\n    source: b\n    safe: c\n", r"p\.yaml:2: label is a column"),
        (
            "sets:\n  - {name: a, source: b, label: c, safe: d, every: safe}\n",
            r"p\.yaml:2: label and every both say",
        ),
        (
            "sets:\n  - {name: a, source: b, label: c, safe: [d], unsafe: [D]}\n",
            r"'d' is both safe and unsafe",
        ),
        ("sets:\n  - {name: a, source: b, label: c, safe: [[d]]}\n", r"p\.yaml:2: safe must be one text"),
        (
            "sets:\n  - {name: a, source: b}\n  - {name: a, source: c}\n",
            r"p\.yaml:3: two sets are named a; rename one of them",
        ),
        ("sets:\n  - {name: a\n", r"p\.yaml:3: no YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, text, says):
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        profile_of(str(file))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        profile_of(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("fields", "row", "says"),
    [
        (
            {"prompt": "question"},
            {"prompt": "a"},
            "f:2: no column 'question', which the set s needs; .*: prompt",
        ),
        ({}, {"text": "a"}, "f:2: no column 'prompt', which the set s needs; columns found: text"),
        ({"label": "type", "safe": ("x",)}, {"prompt": "a"}, "f:2: no column 'type', which the set s needs"),
        ({"label": "type", "safe": ("x",)}, {"prompt": "a", "type": ["x"]}, "column 'type' holds a list"),
    ],
)
def test_rows_without_the_columns_of_a_set_are_refused(fields, row, says):
    with pytest.raises(UserError, match=says):
        PromptSet(name="s", source="f", **fields).kind_of(row, "f:2")


def test_rows_that_lack_the_label_are_left_out_and_none_with_it_is_refused(tmp_path, tiny_folder):
    tokenizer, file = AutoTokenizer.from_pretrained(tiny_folder), tmp_path / "m.jsonl"
    one = PromptSet(name="m", source=str(file), label="S", safe=("0",), unsafe=("1",))

    def read(*rows: dict):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rules = Rules(strict=False, kind_of=one.kind_of)
        return read_prompts(one.source, tokenizer, rules, max_prompt_tokens=200)

    # As in OpenAI's moderation set, whose rows have the labels that were asked for.
    prompts, lines = read({"prompt": "a", "S": 1}, {"prompt": "b", "V": 0}, {"prompt": "c", "S": 0})
    assert prompts.kind == ["unsafe", "safe"]
    assert lines == [f"{file}: left out of 3 rows: 1 without the column S (--strict refuses them)"]
    with pytest.raises(UserError, match=r"m.jsonl:1: no column 'S', which the set m needs; .*: prompt, V"):
        read({"prompt": "b", "V": 0}, {"prompt": "c", "V": 0})
