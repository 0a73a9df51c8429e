"""Tensors of records that are spread over ranks: written whole or not at all, read on any number of them."""

import errno
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401, imported before the forks
import torch.distributed.checkpoint  # noqa: F401
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from engine.errors import LostRank, UserError
from engine.model.parallel import mesh_of, rows_here
from engine.ranks import Ranks
from engine.run import run, shards
from engine.run.display import Display
from engine.run.run import Run, Stage
from engine.run.shards import Stored, read_into
from engine.run.store import read_whole
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import files

PARTIAL, RESULT = "01-policy.partial.safetensors", "01-policy.safetensors"
REST = "model-00001-of-00001.safetensors"
# On 4 ranks, some have no row of the norm, and none as many of the matrix as another.
SHAPES = {"matrix": (21, 5), "norm": (2,), "half": (7, 3)}


@dataclass(frozen=True)
class State:
    """A record with tensors that are spread over ranks, and one that is not."""

    weights: dict[str, Tensor | Stored]
    plain: Tensor
    step: int


def values(step: int) -> dict[str, Tensor]:
    """Returns the whole tensors of a step."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return found | {"half": found["half"].bfloat16()}


def spread(ranks: Ranks, tensors: dict[str, Tensor], copies: int = 1) -> dict[str, Tensor]:
    """Spreads whole tensors over the ranks; of one process they stay as they are."""
    if ranks.size == 1:
        return tensors
    mesh = mesh_of(ranks, torch.device("cpu"), copies)
    placed = [Shard(0)] if copies == 1 else [Replicate(), Shard(0)]
    return {name: distribute_tensor(value, mesh, placed) for name, value in tensors.items()}


def state(ranks: Ranks, step: int, copies: int = 1) -> State:
    return State(weights=spread(ranks, values(step), copies), plain=torch.arange(step), step=step)


def wrong(ranks: Ranks, found: dict[str, Tensor | Stored], step: int, copies: int = 1) -> list[str]:
    """Reads the weights of a record, and lists those that are not those of a step."""
    targets = spread(ranks, {name: torch.zeros_like(value) for name, value in values(step).items()}, copies)
    read_into(targets, found)
    expected = spread(ranks, values(step), copies)
    return [name for name in targets if not torch.equal(rows_here(targets[name]), rows_here(expected[name]))]


def opened(ranks: Ranks, folder: Path) -> Run:
    """Makes a run, or goes on with it."""

    def first() -> Run:
        if folder.exists():
            return Run.resume(folder, fingerprint="f")
        return Run.create(folder, "caid", {}, versions={}, fingerprint="f")

    return Run.on(ranks, first, Display(silent=True))


def saving(ranks: Ranks, folder: Path, until: int, copies: int = 1) -> list:
    """Runs a stage of four steps, with a partial state after each, up to some step; then the run stops there.
    Returns the step that it went on from, and the record of the stage, once it is done."""
    began = []

    def compute(stage: Stage) -> State:
        known = stage.partial(State)
        began.append(known.step if known else 0)
        assert known is None or not wrong(ranks, known.weights, known.step, copies)
        for step in range(began[0] + 1, 4):
            stage.save_partial(state(ranks, step, copies))
            if step == until:
                raise KeyboardInterrupt
        return state(ranks, 4, copies)

    with opened(ranks, folder) as opened_run:
        try:
            found = opened_run.stage("policy", State, compute)
        except KeyboardInterrupt:
            return began
        return [*began, found.step, wrong(ranks, found.weights, 4, copies)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """Leaves a run of two ranks that stopped after its third step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert on_ranks(2, lambda ranks: saving(ranks, folder, until=3)) == [[0]] * 2
    assert len(list(folder.glob("stages/*.shards"))) == len(list(folder.glob("stages/*.safetensors"))) == 2
    return folder


def shards_left(folder: Path) -> int:
    """Counts the folders of shards of a run, whole or not."""
    return len(list(folder.glob("stages/*.shards*")))


def shard_of(folder: Path, record: str) -> Path:
    """Returns the first shard of the record at a path."""
    path = folder / "stages" / record
    return (
        path.parent / read_whole(path)[1]["shards"]["folder"] / "shard-00001-model-00001-of-00001.safetensors"
    )


def flip(file: Path) -> None:
    """Changes the last byte of a file, which is one of its numbers."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def swap(file: Path) -> None:
    """Exchanges two whole shards of one folder."""
    other = file.with_name(f"shard-00002-{REST}")
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGE = {
    "flipped": flip,
    "torn": lambda file: os.truncate(file, file.stat().st_size - 8),
    "missing": Path.unlink,
    "swapped": swap,
    "no folder": lambda file: shutil.rmtree(file.parent),
    "beside another one": lambda file: shutil.copy(file, file.with_name(f"shard-00003-{REST}")),
    "of another step": lambda file: shutil.copy(
        next(f for f in file.parent.parent.glob("*.shards/shard-00001*") if f.parent != file.parent), file
    ),
}


def test_a_stage_goes_on_from_shards_and_equal_runs_have_equal_files(tmp_path):
    def work(ranks: Ranks) -> list:
        first = saving(ranks, tmp_path / "whole", until=9)
        return first + saving(ranks, tmp_path / "a", until=2) + saving(ranks, tmp_path / "a", until=9)

    assert on_ranks(2, work) == [[0, 4, [], 0, 2, 4, []]] * 2
    whole, again = files(tmp_path / "whole"), files(tmp_path / "a")
    assert whole == again
    kept = sorted(name for name in whole if name.startswith("stages/"))
    assert len(kept) == 3 and kept[-1] == f"stages/{RESULT}"
    tensors, content = read_whole(tmp_path / "whole" / kept[-1])
    for name, value in values(4).items():
        assert tensors[f"weights.{name}"].whole().equal(value)
    assert torch.equal(tensors["plain"], torch.arange(4)) and len(content["shards"]["files"]) == 2

    # A result that is damaged is computed again.
    def damaged(ranks: Ranks) -> list:
        return saving(ranks, tmp_path / "whole", until=9)

    flip(shard_of(tmp_path / "whole", RESULT))
    assert on_ranks(2, damaged) == [[0, 4, []]] * 2
    assert files(tmp_path / "whole") == again


def test_other_numbers_of_ranks_read_the_same_rows(stopped, tmp_path):
    """One process, four ranks, and four with two copies go on; two ranks read what these have written."""
    folders = [shutil.copytree(stopped, tmp_path / name) for name in ("one", "four", "copies")]
    assert saving(Ranks(), folders[0], until=9) == [3, 4, []]

    def on_four(ranks: Ranks) -> list:
        return [saving(ranks, folder, until=9, copies=i + 1) for i, folder in enumerate(folders[1:])]

    assert on_ranks(4, on_four) == [[[3, 4, []]] * 2] * 4
    assert on_ranks(2, lambda ranks: [saving(ranks, f, until=9) for f in folders]) == [[[4, []]] * 3] * 2


def test_damaged_shards_are_refused_and_the_state_before_is_taken(stopped, tmp_path):
    folders = [shutil.copytree(stopped, tmp_path / name) for name in DAMAGE]
    for folder, damage in zip(folders, DAMAGE.values(), strict=True):
        damage(shard_of(folder, PARTIAL))

    def work(ranks: Ranks) -> list:
        return [saving(ranks, folder, until=9) for folder in folders]

    for results in on_ranks(2, work):
        assert dict(zip(DAMAGE, results, strict=True)) == dict.fromkeys(DAMAGE, [2, 4, []])
    for folder in folders:
        assert shards_left(folder) == 1 and not list(folder.glob("stages/*partial*"))


def test_a_disk_that_is_full_on_one_rank_is_told_by_all_and_the_state_before_stays(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    before = {name: data for name, data in files(folder).items() if name.startswith("stages/")}

    def full(ranks: Ranks) -> list:
        def refuse(*words) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if ranks.rank == 1:  # in the rank's own process
            torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data = refuse
        return saving(ranks, folder, until=9)

    for error in on_ranks(2, full):
        assert isinstance(error, UserError) and "rank 1 cannot write its shard" in str(error), error
        assert "No space left on device" in str(error) and "\n" not in str(error)
    after = files(folder)
    assert {name: after[name] for name in before} == before


def test_a_folder_that_a_record_names_stays_when_the_same_is_written_again(tmp_path):
    """Ctrl-C in an update's last step leaves a state that is its result too. A kill must not part it from its
    shards; a folder that is damaged, as no record names it, is made anew."""
    stem = tmp_path / "01-policy"

    def work(ranks: Ranks) -> list:
        def written() -> tuple[str, dict[Path, int]]:
            name = shards.write(ranks, spread(ranks, values(1)), stem)["folder"]
            ranks.gather(None)
            return name, {file: file.stat().st_ino for file in tmp_path.glob("*.shards*/*")}

        found = [written(), written()]
        if ranks.is_first:
            flip(next(iter(found[0][1])))
        return [*found, written(), wrong(ranks, shards.described(stem, shards_of(found[0][0])), 1)]

    def shards_of(name: str) -> dict:
        tensors = {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in values(1).items()}
        return {"folder": name, "tensors": tensors}

    for first, second, third, differing in on_ranks(2, work):
        assert first == second and first[0] == third[0] and differing == []
        assert first[1].keys() == third[1].keys() and not set(first[1].values()) & set(third[1].values())


def test_shards_that_may_not_be_read_are_refused_and_stay(stopped, tmp_path):
    """They may be whole, so the state before them is not taken."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    before = {name: data for name, data in files(folder).items() if name.startswith("stages/")}

    def refuse(file: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    def work(ranks: Ranks) -> list:
        if ranks.rank == 1:  # in the rank's own process
            shards.sha256_of_file = refuse
        return saving(ranks, folder, until=9)

    for error in on_ranks(2, work):
        assert isinstance(error, UserError) and str(error).endswith("; make it readable"), error
    after = files(folder)
    assert {name: after[name] for name in before} == before


def before_its_digest(ranks: Ranks) -> None:
    """Kills rank 1 when the files stand there under their names, and nothing has named them."""
    if ranks.rank == 1:
        shards._digest = lambda file: os.kill(os.getpid(), signal.SIGKILL)


def before_the_record(ranks: Ranks) -> None:
    """Kills rank 0 when the folder has its name, and the record is not written."""
    if ranks.rank == 0:
        run.save = lambda *words, **fields: os.kill(os.getpid(), signal.SIGKILL)


def test_a_save_that_was_killed_leaves_the_state_before_it_and_is_swept(stopped, tmp_path):
    folders = []
    for kill in (before_its_digest, before_the_record):
        folders.append(shutil.copytree(stopped, tmp_path / kill.__name__))

        def killed(ranks: Ranks, kill=kill) -> list:
            kill(ranks)  # in the rank's own process
            try:
                return saving(ranks, folders[-1], until=9)
            finally:
                ranks.leave()

        results = on_ranks(2, killed)
        assert {type(result) for result in results} == {LostRank, ChildProcessError}, results
        assert shards_left(folders[-1]) == 3
    assert on_ranks(2, lambda ranks: [saving(ranks, f, until=9) for f in folders]) == [[[3, 4, []]] * 2] * 2
    assert [shards_left(folder) for folder in folders] == [1, 1]
