"""Shared fixtures: one tiny model folder with heads, made once per session, and the makes of processor."""

import os
from pathlib import Path

import pytest
import torch

from kernels import compiled

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engine.stages.smoke import write_smoke_model

    return write_smoke_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the session's own: no test touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(params=compiled.MAKES)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> compiled.Make:
    """Each make of processor in turn; one whose instructions this processor lacks is skipped."""
    make = compiled.MAKES[request.param]
    if make.instructions not in (None, *compiled.instructions):
        pytest.skip(f"this processor does not run {make.instructions}")
    monkeypatch.setattr(compiled, "make", make)
    return make


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the compiled module was not built."""
    monkeypatch.setattr(compiled, "make", compiled.MAKES["none"])
