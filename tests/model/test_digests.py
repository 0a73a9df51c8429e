"""The SHA-256 of each file of a model folder that a run depends on."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from engine.model.folder import INDEX, digests


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_every_file_that_a_run_depends_on_and_no_other(folder):
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja", "merges.txt", "spiece.model"):
        (folder / name).write_text(name)
    for name in ("README.md", "notes.txt", "trainer_state.json", "other.safetensors"):
        (folder / name).write_text(name)
    found = digests(folder)
    assert list(found) == [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert found == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in found}


def test_one_flipped_bit_far_inside_the_weights_changes_their_digest_alone(folder):
    before, file = digests(folder), folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    after = digests(folder)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_every_part_of_a_checkpoint_and_its_index(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for part in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == part}, folder / part)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    found = digests(folder)
    assert {"model-0.safetensors", "model-1.safetensors", INDEX} < set(found)
    assert "model.safetensors" not in found


def test_a_folder_without_config_json_is_refused_by_name(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model: no config\.json; give a Hugging Face model folder"):
        digests(folder)
