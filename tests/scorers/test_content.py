"""A scorer is known by its content, so that a run sees that one has changed."""

import hashlib
import json
import shutil

import pytest
import torch

from engine.errors import UserError
from engine.scorers.base import Head
from engine.scorers.find import content


@pytest.fixture
def world(tmp_path, monkeypatch, tiny_folder):
    """Makes a head, a classifier's folder and a module; returns their place and `content` of them."""
    Head(name="kind", layer=1, weight_D=torch.ones(8).double(), bias=0.0, trunk="x").save(tmp_path / "head")
    shutil.copytree(tiny_folder, tmp_path / "judge")
    (tmp_path / "content_guest.py").write_text("raise RuntimeError('it was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    specs = f"kind={tmp_path}/head", [f"{tmp_path}/judge"], ["mine=-content_guest:length"]
    return tmp_path, lambda: content(*specs, folder=tiny_folder)


def test_content_is_a_digest_of_the_files_that_a_scorer_is_read_from(world):
    place, contents = world
    found = contents()
    head, module = place / "head/head.safetensors", place / "content_guest.py"

    def one(file):
        of_file = hashlib.sha256(file.read_bytes()).hexdigest()
        return hashlib.sha256(f"{of_file} {file.name}\n".encode()).hexdigest()

    assert found["reward"] == {"form": "head", "source": str(head), "sha256": one(head)}
    assert found["mine"] == {"form": "function", "source": str(module), "sha256": one(module)}
    assert (found["judge"]["form"], found["judge"]["source"]) == ("classifier", str(place / "judge"))
    json.dumps(found)


@pytest.mark.parametrize(
    "file, changed",
    [
        ("head/head.safetensors", "reward"),
        ("content_guest.py", "mine"),
        ("judge/model.safetensors", "judge"),
        ("judge/tokenizer.json", "judge"),
        ("judge/additional_chat_templates/b.jinja", "judge"),
        ("judge/.git", None),
        ("head/README.md", None),
    ],
)
def test_content_changes_with_any_of_these_files_and_no_other(world, file, changed):
    place, contents = world
    before = contents()
    (place / file).parent.mkdir(exist_ok=True)
    if changed == "reward":
        Head(name="kind", layer=1, weight_D=torch.ones(8).double(), bias=0.5, trunk="x").save(place / "head")
    else:
        with open(place / file, "ab") as stream:
            stream.write(b"x")
    after = contents()
    assert {name for name in before if after[name] != before[name]} == ({changed} if changed else set())


def test_a_module_that_is_not_there_is_refused(tiny_folder):
    for spec in ("nowhere_at_all:f", "sys:exit", ":f", ".a:f"):
        with pytest.raises(UserError, match="module:function"):
            content(spec, [], [], folder=tiny_folder)
