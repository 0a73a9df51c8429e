"""The tiny model in the cache: one line where it cannot be made, and nothing is left."""

import errno
import os
import pwd

import pytest

from engine.errors import UserError
from engine.stages.smoke import smoke_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dualign"


def test_a_full_disk_is_one_line(cache, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="free"):
        smoke_folder()
    monkeypatch.undo()
    assert [p.name for p in cache.iterdir()] == [".smoke.lock"]


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
    with pytest.raises(UserError, match="no home folder .*; set XDG_CACHE_HOME"):
        smoke_folder()
