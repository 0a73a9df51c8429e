"""The smoke model's folder in the user's cache: whatever is damaged there is made again."""

import os
import shutil

import pytest

from engine.errors import UserError
from engine.quickstart.llama_folder import MANIFEST
from engine.stages import smoke


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return smoke.smoke_folder()


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, os.unlink])
@pytest.mark.parametrize("name", ["heads/harm/head.safetensors", "model.safetensors", MANIFEST])
def test_a_damaged_file_is_made_again(folder, name, damage, capsys):
    before = contents(folder)
    damage(folder / name)
    assert smoke.smoke_folder() == folder and contents(folder) == before
    assert "is damaged or missing; the model is made again" in capsys.readouterr().err


def test_a_whole_folder_is_left_alone(folder, capsys):
    (folder / "heads" / "mine").mkdir()
    assert smoke.smoke_folder() == folder and (folder / "heads" / "mine").is_dir()
    assert not capsys.readouterr().err


def test_a_folder_of_an_older_version_that_does_not_list_its_heads(folder):
    before = contents(folder)
    shutil.rmtree(folder)
    smoke.write_smoke_model(folder)
    assert contents(folder) != before
    assert smoke.smoke_folder() == folder and contents(folder) == before


def test_what_a_killed_process_left_is_removed(folder):
    left = folder.with_name(".smoke.partial")
    (left / "model").mkdir(parents=True)
    smoke.smoke_folder()
    assert not left.exists()


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the model there .*; set XDG_CACHE_HOME"):
        smoke.smoke_folder()
