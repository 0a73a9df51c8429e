"""Files are whole or refused; a run killed at any moment resumes to the same bytes as
one that was never killed."""

import errno
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import files as whole_files
from engine.errors import Interrupted, UserError
from engine.records import Pairs, Prompts
from engine.run import run as run_module
from engine.run.contents import read_contents
from engine.run.display import Display
from engine.run.rows import Row, raw_rows, read_rows
from engine.run.run import Run, Stage
from engine.run.store import Torn, load, pack, save, unpack
from tests.helpers.rows import SPEED


@dataclass(frozen=True, kw_only=True)
class Inner:
    weight: Tensor
    note: str


@dataclass(frozen=True, kw_only=True)
class Everything:
    tensor: Tensor
    nothing: Tensor | None
    flag: bool
    count: int
    value: float
    values: list[float]
    text: str
    tree: dict
    pair: tuple[int, float]
    inner: Inner
    maybe: Inner | None
    many: list[Inner]
    tensors: list[Tensor]
    named: dict[str, Tensor]


def everything() -> Everything:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return Everything(
        tensor=base.T,
        nothing=None,
        flag=True,
        count=2**60,
        value=float("nan"),
        values=[math.inf, -math.inf, 0.1, -0.0],
        text='quotes " and ü\n',
        tree={"a": [1, {"b": math.nan}], "c": {}},
        pair=(1, 2.5),
        inner=Inner(weight=base[0], note="shares memory with tensor"),
        maybe=Inner(weight=torch.tensor(True), note="0-dim bool"),
        many=[Inner(weight=torch.empty(0, 3, dtype=torch.int64), note="empty")],
        tensors=[
            torch.tensor([math.nan, -0.0, math.inf], dtype=torch.bfloat16),
            torch.ones(2, dtype=torch.float64),
        ],
        named={"layers.0.weight": base[:, 1], "x": base[:1, 1]},
    )


def identical(a: object, b: object) -> bool:
    """Tells whether types, values and bits are equal, also for NaN and -0."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        x, y = (t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (a, b))
        return torch.equal(x, y)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return all(identical(getattr(a, k), getattr(b, k)) for k in a.__dataclass_fields__)
    return repr(a) == repr(b)


# These tests are about one file.


def test_pack_round_trip() -> None:
    record = everything()
    assert identical(unpack(Everything, *pack(record)), record)


@pytest.mark.parametrize(
    "record",
    [
        {"layers.0.a": torch.randn(3, 2), "b": torch.tensor(1)},
        {},
        Prompts(text=["Hi"], kind=[""], token_ids=[[1, 9]], key_P=torch.tensor([7])),
        {"lam_J": torch.tensor([0.1], dtype=torch.float64)},
        {"rows": [{"lam": [math.nan]}]},
    ],
)
def test_file_round_trip(tmp_path: Path, record: object) -> None:
    save(tmp_path / "r.safetensors", record, stage="x")
    assert identical(load(tmp_path / "r.safetensors", type(record)), record)


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    record = everything()
    backwards = dict(reversed(record.named.items()))
    save(tmp_path / "a", record, stage="x", fingerprint="f")
    save(tmp_path / "b", Everything(**{**record.__dict__, "named": backwards}), fingerprint="f", stage="x")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    import safetensors.torch

    save(tmp_path / "a.safetensors", everything())
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "a.safetensors")["inner.weight"], everything().inner.weight
    )


def test_values_that_cannot_be_saved_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="note: cannot save a set"):
        save(tmp_path / "a", Inner(weight=torch.ones(1), note={1}))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_another_class_is_the_users_error(tmp_path: Path) -> None:
    save(tmp_path / "a", Inner(weight=torch.ones(1), note=""))
    with pytest.raises(UserError, match="Inner.*another version"):
        load(tmp_path / "a", Pairs)
    with pytest.raises(UserError, match="another version"):
        load(tmp_path / "a", dict)


def test_every_truncation_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save(path, Inner(weight=torch.arange(5), note="n"), stage="x")
    whole = path.read_bytes()
    for length in range(len(whole)):  # empty, length field cut, header cut, tensors cut
        path.write_bytes(whole[:length])
        with pytest.raises(Torn):
            load(path, Inner)
    path.write_bytes(whole + b"\0")
    with pytest.raises(Torn):
        load(path, Inner)
    path.unlink()
    path.mkdir()
    with pytest.raises(Torn):
        load(path, Inner)


def test_a_flipped_bit_in_any_byte_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save(path, Inner(weight=torch.arange(2), note="n"), stage="x")
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(2)
    for i in range(len(whole)):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            load(path, Inner)
        except Torn:
            continue
        raise AssertionError(
            f"byte {i} of {len(whole)} (the header ends at {header_end}) became {flipped[i]} unseen"
        )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str) -> None:
    path = tmp_path / "run" / "stages" / "01-a.safetensors"
    path.parent.mkdir(parents=True)
    save(path, {"x": torch.ones(3)})
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    class Full:
        def __init__(self, *args: object) -> None:
            self.file = open(*args)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[:7])
            full()

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(whole_files, "open", Full, raising=False)
        else:
            patch.setattr(whole_files.os, where, full)
        with pytest.raises(UserError) as caught:
            save(path, {"x": torch.zeros(500_000)})
    message = str(caught.value)
    assert message.startswith(f"disk full while saving {path} (needs 2.0 MB, ") and "MB free" in message
    assert message.endswith("free space") and "\n" not in message
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.read_bytes() == before


# These tests take a run of three stages with partials.

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class DrawnRow(Row):
    KIND = "drawn"

    reward: float
    kl: float
    lam: Tensor


@dataclass(frozen=True, kw_only=True)
class TakenRow(Row):
    KIND = "taken"

    step: int
    loss: float


ARGUMENTS = {"versions": {"commit": "abc", "torch": "2"}, "fingerprint": "f" * 64}


def reference(stage: Stage) -> Pairs:
    with stage.progress(2, "responses", "rollout") as progress:
        progress.advance(2)
    stage.log(DrawnRow(reward=0.1 + 0.2, kl=math.nan, lam=torch.tensor([0.1], dtype=torch.float64)))
    stage.log_speed(SPEED)
    return Pairs(prompt=[0, 1], row=[3, 4], pairs=torch.tensor([[0, 1]]))


def policy(stage: Stage, pairs: Pairs) -> dict[str, Tensor]:
    """Takes steps that depend on all earlier ones, and saves a partial after steps 2 and 4."""
    state = stage.partial(dict) or {"step": torch.tensor(0), "w": pairs.pairs.double() / 3}
    for step in range(int(state["step"]), STEPS):
        w = torch.sin(state["w"] * 3 + step)
        state = {"step": torch.tensor(step + 1), "w": w}
        stage.log(TakenRow(step=step, loss=float(w.sum())))
        if step % 2 and step < STEPS - 1:
            stage.save_partial(state)
        stage.check_stop()
    return {"w": state["w"]}


def program(run: Run) -> dict[str, Tensor]:
    pairs = run.stage("reference", Pairs, reference)
    first = run.stage("iteration-1/policy", dict, lambda stage: policy(stage, pairs))
    state = run.stage("dual", dict, lambda stage: {"lam_J": first["w"][0]})
    moved = Pairs(prompt=[], row=[], pairs=pairs.pairs + state["lam_J"].numel())
    return run.stage("iteration-2/policy", dict, lambda stage: policy(stage, moved))


def go(folder: Path) -> dict[str, Tensor]:
    """Starts or resumes the run, as the command line would."""
    if (folder / "config.json").exists():
        run = Run.resume(folder, fingerprint=ARGUMENTS["fingerprint"])
    else:
        shutil.rmtree(folder, ignore_errors=True)
        run = Run.create(
            folder,
            "caid",
            {"seed": 3, "out": str(folder), "cost": ("harm",), "max_kl": math.inf},
            **ARGUMENTS,
        )
    with run:
        return program(run)


def files(folder: Path) -> dict[str, bytes]:
    """Reads all files but timing.jsonl."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "timing.jsonl"
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(folder)
    return files(folder)


def test_files_of_a_run(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    stages = [
        f"stages/{name}.safetensors"
        for name in ("01-reference", "02-iteration-1-policy", "03-dual", "04-iteration-2-policy")
    ]
    assert sorted(uninterrupted) == [".lock", "config.json", "inputs.safetensors", "metrics.jsonl", *stages]
    go(tmp_path / "again")
    assert files(tmp_path / "again") == uninterrupted
    rows = raw_rows(tmp_path / "again")
    assert rows[0] == {"kind": "drawn", "stage": "reference", "reward": 0.1 + 0.2, "kl": None, "lam": [0.1]}
    steps = [(f"iteration-{t}/policy", s) for t in (1, 2) for s in range(STEPS)]
    assert [(row["stage"], row["step"]) for row in rows[1:]] == steps
    assert [(row.stage, row.step) for row in read_rows(tmp_path / "again", TakenRow)] == steps


def test_a_whole_stage_is_not_computed_again(tmp_path: Path) -> None:
    whole = go(tmp_path / "run")
    with Run.resume(tmp_path / "run", fingerprint=ARGUMENTS["fingerprint"]) as run:
        loaded = run.stage("reference", Pairs, lambda stage: pytest.fail("computed"))
        assert identical(loaded.pairs, torch.tensor([[0, 1]]))
    assert identical(go(tmp_path / "run"), whole)


def test_a_computed_stage_returns_what_a_resumed_one_loads(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", "caid", {}, **ARGUMENTS) as run:
        record = run.stage("a", dict, lambda stage: {"w": torch.ones(2, 3, requires_grad=True).T})
    assert record["w"].is_contiguous() and not record["w"].requires_grad


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) - 3
    path.write_bytes(
        {
            "empty": b"",
            "header": data[:30],
            "tensor": data[:-1],
            "flip": data[:middle] + b"\x55" + data[middle + 1 :],
        }[how]
    )


@pytest.mark.parametrize("how", ["empty", "header", "tensor", "flip", "missing", "swapped"])
def test_a_damaged_stage_and_all_later_ones_are_computed_again(
    tmp_path: Path, uninterrupted: dict[str, bytes], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    go(folder)
    second = folder / "stages" / "02-iteration-1-policy.safetensors"
    if how == "missing":
        second.unlink()
    elif how == "swapped":
        shutil.copy(folder / "stages" / "04-iteration-2-policy.safetensors", second)
    else:
        damage(second, how)
    (folder / "stages" / "04-iteration-2-policy.partial.safetensors").write_bytes(b"old")
    computed = []
    with Run.resume(folder, fingerprint=ARGUMENTS["fingerprint"]) as run:
        run.stage("reference", Pairs, lambda stage: pytest.fail("computed"))
        run.stage(
            "iteration-1/policy",
            dict,
            lambda stage: computed.append(sorted(os.listdir(second.parent))) or {"w": torch.ones(1)},
        )
    assert computed == [["01-reference.safetensors"]]
    printed = capsys.readouterr().out
    assert (
        "warning: " in printed
        and "02-iteration-1-policy" in printed
        and "computing it and all later stages again" in printed
    )
    shutil.rmtree(folder)
    go(folder)
    assert files(folder) == uninterrupted


def test_a_stage_after_a_replaced_result_is_computed_again(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        with Run.create(tmp_path / name, "caid", {}, **ARGUMENTS) as run:
            x = run.stage("x", dict, lambda stage, value=value: {"x": torch.tensor(value)})
            run.stage("y", dict, lambda stage, x=x: {"y": x["x"] * 10})
    shutil.copy(
        tmp_path / "b" / "stages" / "01-x.safetensors", tmp_path / "a" / "stages" / "01-x.safetensors"
    )
    with Run.resume(tmp_path / "a", fingerprint=ARGUMENTS["fingerprint"]) as run:
        x = run.stage("x", dict, lambda stage: pytest.fail("whole"))
        assert run.stage("y", dict, lambda stage: {"y": x["x"] * 10})["y"] == 20.0


class Stop(Exception):
    pass


def interrupted_in_policy(folder: Path) -> None:
    """Makes a run that ends by an error after step 5 of the first policy.

    It leaves partials of steps 2 and 4, and rows of all five steps.
    """

    def stopping(stage: Stage, pairs: Pairs) -> dict:
        policy(stage, pairs)
        raise Stop

    with (
        pytest.raises(Stop),
        Run.create(folder, "caid", {"seed": 3, "cost": ["harm"], "max_kl": math.inf}, **ARGUMENTS) as run,
    ):
        pairs = run.stage("reference", Pairs, reference)
        run.stage("iteration-1/policy", dict, lambda stage: stopping(stage, pairs))


@pytest.mark.parametrize("how", ["whole", "empty", "header", "tensor", "flip", "missing"])
@pytest.mark.parametrize("both", [False, True])
def test_partials(
    tmp_path: Path, uninterrupted: dict[str, bytes], how: str, both: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    interrupted_in_policy(folder)
    last = folder / "stages" / "02-iteration-1-policy.partial.safetensors"
    before = folder / "stages" / "02-iteration-1-policy.partial.previous.safetensors"
    assert load(last, dict)["step"] == 4 and load(before, dict)["step"] == 2
    for path in (last, before) if both else (last,):
        if how == "missing":
            path.unlink()
        elif how != "whole":
            damage(path, how)
    start = 4 if how == "whole" else 0 if both else 2
    seen = []

    def spy(stage: Stage, pairs: Pairs) -> dict:
        state = stage.partial(dict)
        # A damaged partial must be gone, else the next one would push it over the whole one before it.
        assert last.exists() == (how == "whole") and before.exists() == (how == "whole" or not both)
        seen.append((int(state["step"]) if state else 0, [row.step for row in read_rows(folder, TakenRow)]))
        return policy(stage, pairs)

    capsys.readouterr()
    with Run.resume(folder, fingerprint=ARGUMENTS["fingerprint"]) as run:
        pairs = run.stage("reference", Pairs, lambda stage: pytest.fail("computed"))
        run.stage("iteration-1/policy", dict, lambda stage: spy(stage, pairs))
    assert seen == [(start, list(range(start)))]
    assert ("warning: " in capsys.readouterr().out) == (how not in ("whole", "missing"))
    go(folder)
    assert files(folder) == uninterrupted


def test_stage_names_are_unique_and_never_nested(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", "caid", {}, **ARGUMENTS) as run:
        run.stage("a", dict, lambda stage: {})
        with pytest.raises(AssertionError, match="twice"):
            run.stage("a", dict, lambda stage: {})
        with pytest.raises(AssertionError, match="inside"):
            run.stage("b", dict, lambda stage: run.stage("c", dict, lambda stage: {}))


# These runs are killed at any moment.


def no_sync(handle: int) -> None:
    """Does nothing in place of fsync: a killed process loses nothing that the kernel
    holds, so tests need not wait."""


def go_and_die(folder: Path, events: int) -> None:
    """Runs the program and kills this process at the `events`-th write, sync, rename or removal.

    A write stops half-way.
    """
    count = 0

    def die_if_due() -> bool:
        nonlocal count
        count += 1
        return count == events

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying:
        def __init__(self, *args: object, **options: object) -> None:
            self.file = open(*args, **options)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> "Dying":
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def write(self, data: bytes | str) -> None:
            if die_if_due():
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()
            self.file.write(data)

    def dying(function: object) -> object:
        def call(*args: object, **options: object) -> object:
            if die_if_due():
                die()
            return function(*args, **options)

        return call

    whole_files.open = run_module.open = Dying
    os.fsync = no_sync
    for name in ("fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    go(folder)


def go_slowly(folder: Path, fsync_s: float) -> None:
    """Runs the program with a slow disk, so that a kill from outside often falls into a save."""
    os.fsync = lambda handle: time.sleep(fsync_s)
    go(folder)


@pytest.fixture(scope="module")
def start_process() -> object:
    # A fork server has imported what this file does and has no threads: each process starts in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "engine.run.run", "tests.helpers.rows"])

    def start(target: object, *args: object) -> multiprocessing.Process:
        process = context.Process(target=target, args=args)
        process.start()
        return process

    return start


def rows_are_a_prefix(folder: Path, uninterrupted: dict[str, bytes]) -> bool:
    path = folder / "metrics.jsonl"
    return not path.exists() or uninterrupted["metrics.jsonl"].startswith(path.read_bytes())


def test_killed_at_every_event(
    tmp_path: Path, uninterrupted: dict[str, bytes], start_process: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", no_sync)
    survived = 0
    for events in range(1, 200):
        folder = tmp_path / str(events)
        process = start_process(go_and_die, folder, events)
        process.join()
        if process.exitcode == 0:
            survived = events
            break
        assert process.exitcode == -signal.SIGKILL
        assert rows_are_a_prefix(folder, uninterrupted)
        go(folder)
        assert files(folder) == uninterrupted, events
    assert survived > 60, "the program has many more than 60 events, so the counting is broken"


def test_killed_again_and_again(
    tmp_path: Path, uninterrupted: dict[str, bytes], start_process: object
) -> None:
    rng = random.Random(0)
    for trial in range(4):
        folder = tmp_path / str(trial)
        kills = 0
        while True:
            process = start_process(go_and_die, folder, rng.randint(4, 40))
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            assert rows_are_a_prefix(folder, uninterrupted)
            kills += 1
        assert kills > 1
        assert files(folder) == uninterrupted


def test_killed_from_outside(
    tmp_path: Path, uninterrupted: dict[str, bytes], start_process: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", no_sync)
    rng = random.Random(1)
    killed = 0
    for trial in range(6):
        folder = tmp_path / str(trial)
        process = start_process(go_slowly, folder, 0.02)
        while not (folder / "config.json").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        go(folder)
        assert files(folder) == uninterrupted
    assert killed


# These tests are about the folder.


def test_create_refuses_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError) as caught:
        Run.create(tmp_path / "run", "caid", {}, **ARGUMENTS)
    folder = tmp_path / "run"
    assert (
        str(caught.value)
        == f"run folder {folder} exists; choose another --out, or go on with --resume {folder}"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*cannot be made .*name another place"):
        Run.create(tmp_path / "file" / "run", "caid", {}, **ARGUMENTS)


def test_create_refuses_an_unwritable_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(UserError, match="Permission denied.*name another place"):
            Run.create(tmp_path / "run", "caid", {}, **ARGUMENTS)


def test_a_failed_create_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk full"):
            Run.create(tmp_path / "run", "caid", {}, **ARGUMENTS)
    assert not list(tmp_path.iterdir())


def test_config_round_trip(tmp_path: Path) -> None:
    config = {"out": "x", "seed": 1, "cost": ["harm"], "threshold": (0.3,), "max_kl": math.inf, "model": ""}
    with Run.create(tmp_path / "run", "mocan", config, **ARGUMENTS):
        pass
    expected = {"seed": 1, "cost": ("harm",), "threshold": (0.3,), "max_kl": math.inf, "model": ""}
    contents = read_contents(tmp_path / "run")
    assert (contents.algorithm, contents.config) == ("mocan", expected)
    with Run.resume(tmp_path / "run", fingerprint=ARGUMENTS["fingerprint"]) as run:
        assert (run.algorithm, run.config, run.versions) == ("mocan", expected, ARGUMENTS["versions"])


def test_resume_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=f"run folder {folder} does not exist"):
        Run.resume(folder, fingerprint="f")
    folder.mkdir()
    with pytest.raises(UserError, match="has no config.json"):
        Run.resume(folder, fingerprint="f")
    folder.rmdir()
    Run.create(folder, "caid", {"seed": 1}, versions={}, fingerprint="a" * 64).close()
    with pytest.raises(
        UserError,
        match=f"{folder} was trained from another model .sha aaaaaaaaaaaa, here sha b.*put the original back",
    ):
        Run.resume(folder, fingerprint="b" * 64)


def test_a_damaged_config_is_restored_from_its_copy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    Run.create(folder, "caid", {"seed": 1}, versions={}, fingerprint="a" * 64).close()
    config, inputs = folder / "config.json", folder / "inputs.safetensors"
    whole = config.read_bytes()
    changed = whole.replace(b'"seed": 1', b'"seed": 2')
    for damage in (changed, b"", whole[:20], b"[]", b"\0", b"\xff" + whole, b"[" * 10**5, None, "a folder"):
        config.unlink()
        if damage == "a folder":
            config.mkdir()
        elif damage is not None:
            config.write_bytes(damage)
        assert read_contents(folder).config == {"seed": 1}
        assert config.read_bytes() == whole
        assert f"{config} " in (said := capsys.readouterr().err) and f": restored from {inputs}" in said
    copy = inputs.read_bytes()
    inputs.write_bytes(copy[:-1])
    config.write_bytes(changed)
    with pytest.raises(UserError, match="was changed after the run began, and so is its copy in .*inputs"):
        Run.resume(folder, fingerprint="a" * 64)
    inputs.unlink()
    with pytest.raises(UserError, match="was changed after the run began; start a new run"):
        read_contents(folder)
    config.unlink()
    with pytest.raises(UserError, match="has no config.json"):
        read_contents(folder)


def test_resume_removes_unfinished_files(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    go(tmp_path / "run")
    for name in ("metrics.jsonl.tmp", "stages/04-iteration-2-policy.partial.safetensors.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half")
    go(tmp_path / "run")
    assert files(tmp_path / "run") == uninterrupted


def hold(folder: Path, held: object, end: object) -> None:
    with Run.resume(folder, fingerprint=ARGUMENTS["fingerprint"]):
        held.set()
        end.wait(60)


def test_one_process_per_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        Run.create(folder, "caid", {}, **ARGUMENTS),
        pytest.raises(UserError, match=f"{folder} is in use by another process"),
    ):
        Run.resume(folder, fingerprint=ARGUMENTS["fingerprint"])
    context = multiprocessing.get_context("forkserver")
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder, held, end))
    process.start()
    assert held.wait(60)
    with pytest.raises(UserError, match="in use"):
        Run.resume(folder, fingerprint=ARGUMENTS["fingerprint"])
    process.kill()  # the lock of a killed process is gone
    process.join()
    Run.resume(folder, fingerprint=ARGUMENTS["fingerprint"]).close()


def test_the_users_full_disk_in_a_run_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    folder = tmp_path / "run"
    sync, calls = os.fsync, 0

    def full_later(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_later)
        with pytest.raises(UserError, match="disk full.*; free space$"):
            go(folder)
    assert not list(folder.rglob("*.tmp")) and len(list(folder.glob("stages/*"))) > 1
    go(folder)
    assert files(folder) == uninterrupted


# These tests press Ctrl-C.


def test_first_interrupt_ends_the_step_second_stops(
    tmp_path: Path, uninterrupted: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, before, done = tmp_path / "run", signal.getsignal(signal.SIGINT), []

    def one(stage: Stage) -> Pairs:
        assert not stage.stopping
        os.kill(os.getpid(), signal.SIGINT)
        done.append("goes on")
        assert stage.stopping
        return reference(stage)

    config = {"seed": 3, "cost": ("harm",), "max_kl": math.inf}
    with (
        pytest.raises(Interrupted, match=f"--resume {folder}"),
        Run.create(folder, "caid", config, **ARGUMENTS) as run,
    ):
        pairs = run.stage("reference", Pairs, one)
        run.stage("iteration-1/policy", dict, lambda stage: done.append("never") or policy(stage, pairs))
    assert done == ["goes on"] and signal.getsignal(signal.SIGINT) is before
    assert "finishing the current step, press Ctrl-C again to stop at once" in capfd.readouterr().err

    def two(stage: Stage) -> None:
        stage.log(TakenRow(step=0, loss=0.0))
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            stage.check_stop()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with (
        pytest.raises(KeyboardInterrupt) as caught,
        Run.resume(folder, fingerprint=ARGUMENTS["fingerprint"]) as run,
    ):
        run.stage("reference", Pairs, lambda stage: pytest.fail("was saved"))
        run.stage("iteration-1/policy", dict, two)
    assert type(caught.value) is KeyboardInterrupt and signal.getsignal(signal.SIGINT) is before
    go(folder)
    assert files(folder) == uninterrupted


def test_display_is_the_callers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.create(tmp_path / "run", "caid", {}, display=Display(n_stages=4), **ARGUMENTS) as run:
        run.stage("a/b", dict, lambda stage: {})
    assert capsys.readouterr().out == "stage 1 of 4: a/b\n"
