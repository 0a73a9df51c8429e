"""Shared fixtures: one tiny model folder with heads, made once per session."""

import os
from pathlib import Path

# Tests run side by side, a process on each core, so each has one thread. OpenBLAS reads this when numpy is
# imported first, which torch does; its second thread doubles the time of the exact problems' small matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engine.smoke import write_smoke_model

    return write_smoke_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the session's own: no test touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder
