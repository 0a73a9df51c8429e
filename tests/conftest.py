"""Shared fixtures: a tiny model folder with heads, a cache folder, the makes of processor, and what keeps
runs within tests cheap."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

# Tests run side by side, a process on each core, so each has one thread. OpenBLAS reads this when numpy is
# imported first, which torch does; its second thread doubles the time of the exact problems' small matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from kernels import compiled

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engine.stages.smoke import write_smoke_model

    return write_smoke_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives the session a cache folder of its own, so that no test touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_measurement() -> None:
    """Measures the machine's speed once in each process and in float32 alone, not in each run and dtype.

    A measurement takes half a second of computing, six in 16 bits where a processor has no products of these,
    and only the estimate of a run's time depends on it.
    """
    from engine.run import plan

    measure = functools.cache(plan.matmul_rate)
    plan.matmul_rate = lambda dtype, device: measure(torch.float32, device)


@pytest.fixture(scope="session", autouse=True)
def shipped_prompts_once() -> None:
    """Tokenises the prompts that come with the project once in each process, not in each run.

    A third of a small run goes by with it, and the prompts are always the same.
    """
    from engine.stages import inputs
    from tests.helpers.shipped import remembered

    inputs.prompts_of = remembered(inputs.prompts_of)


@pytest.fixture(scope="session", autouse=True)
def no_waits_for_the_disk() -> None:
    """Leaves what is written to the kernel, which keeps it for a killed process too.

    A run of a second would wait for the disk a quarter of a second more. A handle is looked at all the same.
    """
    os.fsync = os.fstat


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> None:
    """Writes what a run's picture is drawn from in its place; tests of pictures ask for `in_pixels`."""
    from tests.helpers import pictures

    pictures.leave_out()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Fails a test that leaves several threads to the tests after it, as a run without --threads 1 does.

    Two processes with two threads each on two cores wait for each other most of the time.
    """
    yield
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1, f"{threads} threads: give the test's runs --threads 1"


@pytest.fixture(params=compiled.MAKES)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> compiled.Make:
    """Pretends each make of processor in turn; skips one whose instructions this processor lacks."""
    make = compiled.MAKES[request.param]
    if make.instructions not in (None, *compiled.instructions):
        pytest.skip(f"this processor does not run {make.instructions}")
    monkeypatch.setattr(compiled, "make", make)
    return make


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that the compiled module was not built."""
    monkeypatch.setattr(compiled, "make", compiled.MAKES["none"])
