"""The ranks of a run: what rank 0 tells, shares, gathers and sums, on 2 and 4 processes."""

import errno
import json
import os
import re
import signal
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

import engine.ranks
from engine.errors import LostRank, NonFiniteError, NotWritten, UserError
from engine.ranks import Ranks
from engine.scorers.answers import Answers
from engine.stages.run_inputs import DamagedInputs
from tests.helpers.ranks import on_ranks


@dataclass(frozen=True)
class Record:
    """Tensors, texts and numbers, as the records of stages hold them."""

    rows: Tensor
    flags: Tensor
    none: Tensor
    texts: list[str]
    inner: dict


def record(rank: int) -> Record:
    """Makes the record of a rank, of another size on each; rank 1's has no rows."""
    n = 0 if rank == 1 else rank + 2
    generator = torch.Generator().manual_seed(rank)
    return Record(
        rows=torch.randn(n, 3, generator=generator, dtype=torch.float64),
        flags=torch.arange(n) % 2 == 0,
        none=torch.zeros(n, 0),
        texts=[f"ü{i}" for i in range(n)],
        inner={"half": torch.full((), rank, dtype=torch.bfloat16), "big": 2**70, "pair": (1, None)},
    )


def same(a: Record, b: Record) -> bool:
    """Compares records bit for bit."""
    tensors = [(a.rows, b.rows), (a.flags, b.flags), (a.none, b.none), (a.inner["half"], b.inner["half"])]
    alike = all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in tensors)
    rest = [(r.texts, r.inner["big"], r.inner["pair"]) for r in (a, b)]
    return alike and rest[0] == rest[1]


def test_one_process_does_everything_itself():
    alone, value = Ranks(), object()
    assert alone.first(lambda: value) is value and alone.gather(value)[0] is value
    assert list(alone.share(3)) == [0, 1, 2] and alone.is_first and alone.says()
    grad = torch.ones(2)
    alone.add([grad])
    alone.check_alike({"--seed": "1"})
    alone.leave()
    assert grad.tolist() == [1, 1] and not torch.distributed.is_initialized()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 1001])
def test_shares_cover_everything_in_order_and_differ_by_one_at_most(n, size):
    shares = [Ranks(rank, size).share(n) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("size", "models"), [(2, 1), (4, 2), (6, 3)])
def test_ranks_that_hold_one_model_have_one_share(size, models):
    together = size // models
    every = [
        replace(Ranks(rank, size, rank, size), model=Ranks(rank % together, together)) for rank in range(size)
    ]
    assert [ranks.share(7) for ranks in every] == [
        Ranks(rank // together, models).share(7) for rank in range(size)
    ]
    assert [ranks.leads for ranks in every] == [rank % together == 0 for rank in range(size)]


def test_ranks_are_arranged_in_neighbours():
    """Ranks 0 and 1 hold one model, and so do 2 and 3: each pair sums by itself, all together add up."""

    def work(ranks: Ranks) -> tuple:
        pair, one = ranks.arranged(2), torch.tensor([2.0**ranks.rank])
        assert pair.arranged(2) is pair and pair.arranged(1).model is None
        added = one.clone()
        pair.add([added])
        told = pair.model.gather(ranks.rank), pair.model.first(lambda: ranks.rank), pair.of_shares(ranks.rank)
        return float(pair.model.summed(one)), float(one), float(added), told

    expected = [(3.0, 15.0, ([0, 1], 0, [0, 2])), (12.0, 15.0, ([2, 3], 2, [0, 2]))]
    for rank, (summed, own, added, told) in enumerate(on_ranks(4, work)):
        assert own == 2.0**rank, "summed changes its tensor"
        assert (summed, added, told) == expected[rank // 2]


@pytest.mark.parametrize(
    ("ranks", "model_ranks", "said"),
    [
        (Ranks(), 2, "--model-ranks 2: one process holds the whole model; start torchrun --nproc-per-node 2"),
        (Ranks(0, 6, 0, 6), 4, "--model-ranks 4 does not divide the 6 ranks of a machine, within which"),
        (Ranks(0, 8, 0, 4), 8, "--model-ranks 8 does not divide the 4 ranks of a machine"),
    ],
)
def test_slices_that_the_ranks_cannot_hold_are_refused(ranks, model_ranks, said):
    with pytest.raises(UserError) as error:
        ranks.arranged(model_ranks)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_told_gathered_and_added(size):
    summands = [torch.randn(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]

    def work(ranks: Ranks) -> tuple:
        called = []
        told = ranks.first(lambda: (called.append(1), record(0))[1])
        gathered = ranks.gather(record(ranks.rank))
        grads = [summands[ranks.rank][:990].clone(), summands[ranks.rank][990:].clone().view(2, 5)]
        figures = torch.tensor([0.1 * (ranks.rank + 1), 1.0], dtype=torch.float64)
        ranks.add([*grads, figures])
        return told, called, gathered, torch.cat([grads[0], grads[1].flatten()]), figures, ranks.says()

    results = on_ranks(size, work)
    exact = torch.stack(summands).double().sum(0)
    for rank, (told, called, gathered, total, figures, _) in enumerate(results):
        assert same(told, record(0)) and len(called) == (rank == 0)
        assert all(same(found, record(i)) for i, found in enumerate(gathered)) and len(gathered) == size
        assert torch.equal(total, results[0][3]), "other bits on another rank"
        assert (total.double() - exact).abs().max() < 1e-6
        expected = [0.1 * size * (size + 1) / 2, size]
        assert figures.tolist() == pytest.approx(expected, rel=1e-15) and figures.dtype == torch.float64
    assert sum(said for *_, said in results) == 1, "one rank speaks"


ERRORS = [
    UserError("--seed x: a number"),
    NonFiniteError("nan"),
    NotWritten("/a: full", again=True),
    DamagedInputs("a is missing", Path("run")),
    OSError(errno.ENOSPC, "No space left on device", "/a"),
    KeyboardInterrupt("stopped"),
]


def test_an_error_of_rank_0_is_raised_on_all_with_its_fields():
    def work(ranks: Ranks) -> list:
        found = []
        for error in ERRORS:

            def fail(error=error):
                raise error

            try:
                ranks.first(fail)
            except BaseException as raised:
                found.append(
                    (type(raised).__name__, str(raised), vars(raised), getattr(raised, "filename", 0))
                )
        return found

    expected = [(type(e).__name__, str(e), vars(e), getattr(e, "filename", 0)) for e in ERRORS]
    assert on_ranks(2, work) == [expected, expected]


def test_facts_that_differ_are_named_with_the_rank_on_all_ranks():
    def work(ranks: Ranks) -> None:
        ranks.check_alike({"--seed": "1"})
        ranks.check_alike({"--beta": "1", "--seed": "3" if ranks.rank == 2 else "1"})

    for error in on_ranks(4, work):
        assert isinstance(error, UserError)
        assert str(error).startswith(
            "--seed: rank 2 has 3, rank 0 has 1; start all ranks with the same command"
        )


def test_one_rank_of_a_machine_goes_first(tmp_path):
    def work(ranks: Ranks) -> bool:
        with ranks.node_first():
            existed = (tmp_path / "made").exists()
            (tmp_path / "made").touch()
        return existed

    assert on_ranks(2, work) == [False, True]


@pytest.mark.parametrize("call", ["first", "gather", "add"])
def test_a_rank_that_dies_is_noticed_at_once(call):
    def work(ranks: Ranks) -> None:
        ranks.gather(None)
        if ranks.rank == 1 - (call == "first"):
            os.kill(os.getpid(), signal.SIGKILL)
        {"first": lambda: ranks.first(int), "gather": lambda: ranks.gather(1),
         "add": lambda: ranks.add([torch.ones(2)])}[call]()  # fmt: skip

    results = on_ranks(2, work)
    error = results[call == "first"]
    assert isinstance(error, LostRank) and "another rank has ended" in str(error)
    assert isinstance(results[1 - (call == "first")], ChildProcessError)


@pytest.mark.parametrize("where", ["before a word", "inside a pass"])
def test_a_rank_that_hangs_is_named(monkeypatch, where):
    """Before a word that all exchange it has come less far than the others, of which one comes late; between
    the messages of a pass it does not give up as they do."""
    monkeypatch.setattr(engine.ranks, "TIMEOUT", timedelta(seconds=3))
    monkeypatch.setattr(engine.ranks, "ALIKE_S", 1.0)

    def work(ranks: Ranks) -> str:
        ranks.gather(None)
        time.sleep({1: 9, 2: 2 if where == "before a word" else 0}.get(ranks.rank, 0))
        try:
            ranks.gather(None) if where == "before a word" else ranks.summed(torch.ones(2))
        except LostRank as error:
            return ranks.missed(error)
        return "nothing"

    first, _, last = on_ranks(3, work)
    for said in (first, last):
        assert re.fullmatch(r"rank 1 does not answer \(Timed out waiting .*\): see to that", said)


def test_what_judges_have_answered_on_any_rank_is_known_to_all_and_kept_by_rank_0(tmp_path):
    file = tmp_path / "judge-cache.jsonl"

    def work(ranks: Ranks) -> list:
        answers = Answers()
        answers.put("asked by both", 0.5)
        answers.keep_in(file, read_only=not ranks.is_first)
        for step in range(2):
            answers.put(f"step {step} of rank {ranks.rank}", float(step))
            answers.share_out(ranks)
        return [answers.get(f"step {step} of rank {rank}") for step in range(2) for rank in range(2)]

    assert on_ranks(2, work) == [[0.0, 0.0, 1.0, 1.0]] * 2
    kept = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    assert sorted(kept) == [
        "asked by both",
        *(f"step {step} of rank {r}" for step in range(2) for r in range(2)),
    ]
