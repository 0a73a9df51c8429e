"""The tiny model in the cache: one line where it cannot be made, and nothing is left."""

import errno
import os
import pwd
import shutil

import pytest

from engine.errors import UserError
from engine.quickstart.llama_folder import MANIFEST, faults
from engine.stages import smoke
from engine.stages.smoke import smoke_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dualign"


def test_it_is_made_whole_and_leaves_nothing_beside_it(cache):
    folder = smoke_folder()
    assert not faults(folder) and [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_a_full_disk_is_one_line(cache, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full; free 1 MB, or pass --model FOLDER"):
        smoke_folder()
    monkeypatch.undo()
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_file_in_its_place_is_one_line(cache):
    cache.mkdir(parents=True)
    (cache / "smoke").write_text("x")
    with pytest.raises(UserError, match="cannot write the model there .*; set XDG_CACHE_HOME"):
        smoke_folder()
    assert (cache / "smoke").read_text() == "x"


def test_a_file_in_place_of_the_cache_is_one_line(cache):
    cache.parent.write_text("x")
    with pytest.raises(UserError, match="cannot write the model there .*; set XDG_CACHE_HOME"):
        smoke_folder()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def nobody(number):
        raise KeyError(number)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match="no home folder.*; set XDG_CACHE_HOME"):
        smoke_folder()


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
