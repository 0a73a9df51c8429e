"""The tiny model in the cache: made whole, made again where it is broken, and one line where it cannot
be made."""

import errno
import os
import pwd

import pytest

from engine.errors import UserError
from engine.quickstart import is_complete
from engine.stages.smoke import smoke_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dualign"


def test_it_is_made_whole_and_again_where_it_is_broken(cache):
    folder = smoke_folder()
    assert is_complete(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    (folder / "model.safetensors").write_bytes(b"cut")
    (cache / ".smoke-7").mkdir()  # left by a killed process
    assert is_complete(smoke_folder())
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert [p.name for p in cache.iterdir()] == ["smoke"]


def test_a_full_disk_is_one_line(cache, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"smoke: the tiny model cannot .*No space.*; set XDG_CACHE_HOME"):
        smoke_folder()
    monkeypatch.undo()
    assert not list(cache.iterdir())


def test_a_file_in_its_place_is_one_line(cache):
    cache.mkdir(parents=True)
    (cache / "smoke").write_text("x")
    with pytest.raises(UserError, match="the tiny model cannot be written there .*; set XDG_CACHE_HOME"):
        smoke_folder()
    assert (cache / "smoke").read_text() == "x"


def test_a_file_in_place_of_the_cache_is_one_line(cache):
    cache.parent.write_text("x")
    with pytest.raises(UserError, match="the tiny model cannot be written there .*; set XDG_CACHE_HOME"):
        smoke_folder()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def nobody(number):
        raise KeyError(number)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match="HOME is not set .*; set XDG_CACHE_HOME"):
        smoke_folder()
