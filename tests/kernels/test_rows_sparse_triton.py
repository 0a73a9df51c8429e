"""Lists of the entries of J that matter by Triton, in its interpreter: the kernels against float64, and the
losses against float64 and their own bound."""

import math
from types import SimpleNamespace

import pytest
import torch

from kernels.loss_head import losses as losses_module
from kernels.loss_head import ops, passes, schemes
from kernels.loss_head.records import Head
from tests.helpers import sparse
from tests.helpers.interpreter import interpreted

pytest.importorskip("triton")

LENGTHS, WIDTH, VOCABULARY = (13, 11, 0, 9, 12, 8, 6), 17, 311
FULL, FROZEN = sparse.FULL, sparse.FROZEN


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Makes the losses leave entries out of few rows, with Triton, on the CPU; returns the workspace."""
    from kernels.loss_head import lists_triton
    from kernels.loss_head.rows_sparse_triton import SparseTritonRows
    from kernels.loss_head.rows_triton import TritonRows

    for module in (ops, passes, losses_module, schemes):
        monkeypatch.setattr(
            module,
            "row_workspace",
            lambda hidden, tolerance=0.0: SparseTritonRows if tolerance else TritonRows,
        )
    for name, value in {"LEAST_ROWS": 32, "PILOTS": 8, "DENSE_SHARE": {2: 0.25, 4: 0.25}, "ROOM": 2}.items():
        monkeypatch.setattr(SparseTritonRows, name, value)
    monkeypatch.setattr(lists_triton, "BLOCK", 16)
    monkeypatch.setattr(lists_triton, "shape_of", lambda vocabulary: lists_triton.Shape(64, 4, 4))
    return SparseTritonRows


def listed(logits, target, threshold, room=64, bias=None, temperature=1.0, softcap=None):
    """Returns lists, log p and what is left out; the head's largest elements are 1, 2, ..."""
    from kernels.loss_head import lists_triton

    lists = lists_triton.Lists.empty(len(logits), room, logits)
    lists.value.fill_(math.nan), lists.column.fill_(-1)
    widest = torch.arange(1.0, logits.shape[1] + 1)
    head = Head(logits, bias, temperature, softcap)
    return lists, *lists_triton.select(logits, head, widest, target, threshold, lists)


def truth(logits, target, bias=None, temperature=1.0, softcap=None):
    """Returns log p, J and each entry's share of its row times the cap's slope, in float64."""
    z = logits.double() if bias is None else logits.double() + bias.double()
    z.requires_grad_()
    value = z if softcap is None else softcap * torch.tanh(z / softcap)
    logprob = (value / temperature).log_softmax(1).gather(1, target[:, None].long())[:, 0]
    (jacobian,) = torch.autograd.grad(-logprob.sum(), z)
    return logprob.detach(), jacobian


ROWS = {
    "random": lambda g: 2 * torch.randn(6, 300, generator=g),
    "peaked": lambda g: 9 * torch.randn(6, 300, generator=g),
    "flat": lambda g: torch.zeros(6, 300),
    "late": lambda g: torch.randn(6, 300, generator=g) + (torch.arange(300) > 290) * 150,
    "early": lambda g: torch.randn(6, 300, generator=g) - (torch.arange(300) > 5) * 150,
    "far from 0": lambda g: torch.randn(6, 300, generator=g).round() + 2.0**20,
    "one block": lambda g: 5 * torch.randn(6, 31, generator=g),
    "two tokens": lambda g: torch.randn(6, 2, generator=g),
    "-inf": lambda g: torch.randn(6, 300, generator=g).masked_fill_(torch.arange(300) % 3 == 1, -math.inf),
}
OPTIONS = {"temperature": 0.7}, {"softcap": 4.0, "temperature": 1.3}


@interpreted
@pytest.mark.parametrize(
    "rows, options",
    [(rows, {}) for rows in ROWS] + [(rows, x) for rows in ("peaked", "late", "-inf") for x in OPTIONS],
    ids=str,
)
def test_lists_against_float64(rows, options):
    """Each list holds exactly what is above the bound, its target first and then rising columns; what it
    leaves out is what is told."""
    g, threshold = torch.Generator().manual_seed(1), 2.0**-10
    logits = ROWS[rows](g)
    vocabulary = logits.shape[1]
    bias = torch.randn(vocabulary, generator=g) if options.get("softcap") else None
    target = torch.arange(6) * (vocabulary - 1) // 5 if rows != "-inf" else torch.arange(6) * 3
    lists, logprob, left = listed(logits, target, threshold, 400, bias, **options)
    true, jacobian = truth(logits, target, bias, **options)
    torch.testing.assert_close(logprob.double(), true, rtol=1e-5, atol=1e-5)
    bound = threshold / options.get("temperature", 1.0)
    for r in range(6):
        count, y = int(lists.count[r]), int(target[r])
        column = lists.column[r, :count].tolist()
        assert column[0] == y and column[1:] == sorted(set(column[1:])) and y not in column[1:]
        others = [v for v in range(vocabulary) if v not in column]
        assert all(jacobian[r, v] > bound * (1 - 1e-4) for v in column[1:])
        assert all(jacobian[r, v] <= bound * (1 + 1e-4) for v in others)
        scale = jacobian[r].abs().max()
        error = (lists.value[r, :count].double() - jacobian[r, column]).abs().max()
        assert error <= 2e-5 * max(scale, 1e-6)
        sums = jacobian[r, others].sum(), (jacobian[r, others] * (torch.tensor(others) + 1)).sum()
        torch.testing.assert_close(left[r].double(), torch.stack(sums), rtol=1e-4, atol=1e-9)


@interpreted
@pytest.mark.parametrize("threshold, kept", [(0.0, 16), (0.99 / 16, 16), (1 / 16, 1), (2.0, 1)])
def test_ties_at_the_bound(threshold, kept):
    logits, target = torch.full((4, 256), -200.0), torch.arange(4) * 16
    logits[:, ::16] = 0
    lists, logprob, left = listed(logits, target, threshold)
    torch.testing.assert_close(logprob, torch.full((4,), -math.log(16)))
    assert (lists.count == kept).all() and (left[:, 0] == (16 - kept) / 16).all()
    torch.testing.assert_close(lists.value[:, 0], torch.full((4,), -15 / 16))


@interpreted
def test_rows_without_a_list():
    """A list that has no room, and rows of NaN, of -inf alone and with a target that cannot be."""
    logits = torch.zeros(5, 100)
    logits[1, 3], logits[2], logits[3, 7] = math.nan, -math.inf, -math.inf
    logits[4] = -50 * torch.arange(100)
    target = torch.tensor([5, 5, 5, 7, 0])
    lists, logprob, _ = listed(logits, target, 1e-3, room=99)
    assert lists.count.tolist() == [-1, -1, -1, -1, 1]
    assert logprob.isnan().tolist() == [False, True, True, False, False] and logprob[3] == -math.inf
    assert listed(logits, target, 1e-3, room=100)[0].count.tolist() == [100, -1, -1, 100, 1]
    # No list writes into the next one.
    lists, *_ = listed(logits[[0, 4, 4]], target[[0, 4, 4]], 1e-3, room=16)
    assert lists.count.tolist() == [-1, 1, 1] and lists.value[1:, 1:].isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gathered_sums_against_float64(dtype):
    """Rows have no entry, one, some and all of them; columns too."""
    from kernels.loss_head import lists_triton

    g = torch.Generator().manual_seed(2)
    count = torch.tensor([0, 1, 37, 0, 5, 37], dtype=torch.int32)
    value = torch.randn(6, 40, generator=g)
    column = torch.stack([torch.randperm(37, generator=g) for _ in range(6)]).int()
    column = torch.nn.functional.pad(column, (0, 3), value=-1).contiguous()
    column[2] = column[2].clamp(max=35)
    ends, factor = torch.tensor([0, *count.tolist()]).cumsum(0), torch.randn(6, generator=g)
    packed = lists_triton.pack(lists_triton.Lists(value, column, count), ends, factor, int(ends[-1]))
    dense = torch.zeros(6, 38, dtype=torch.float64)
    for r in range(6):
        for i in range(int(count[r])):
            dense[r, column[r, i]] += (value[r, i] * factor[r]).double()
    head, hidden = torch.randn(38, 17, generator=g).to(dtype), torch.randn(6, 17, generator=g).to(dtype)
    one, two = torch.ones(1), torch.tensor([2.0])
    rows, columns = torch.full((6, 17), math.nan).to(dtype), torch.ones(38, 17).to(dtype)
    lists_triton.gather(head, packed.column, packed.value, ends, two, rows, False)
    by, order = lists_triton.by_column(packed, 38)
    assert (by.column.diff() >= 0).all() and torch.equal(packed.value[order], by.value)
    assert (by.row.diff()[by.column.diff() == 0] >= 0).all()
    lists_triton.gather(hidden, by.row, by.value, by.ends, one, columns, True)
    for got, true in (rows, 2 * dense @ head.double()), (columns, 1 + dense.t() @ hidden.double()):
        assert (got.double() - true).abs().max() <= 4 * torch.finfo(dtype).eps * true.abs().max()
    assert not rows[0].any() and (columns[37] == 1).all()


def inputs(kind="peaked", **keywords):
    return sparse.inputs(kind, **{"lengths": LENGTHS, "width": WIDTH, "vocabulary": VOCABULARY} | keywords)


CAPPED = {"softcap": 40.0, "temperature": 0.7}
SMALL = 200_000  # bytes: a sequence takes several chunks


@interpreted
@pytest.mark.parametrize(
    "op, needs, dtype, budget",
    [
        ("preference", FULL, torch.float32, 1 << 30),
        ("preference", FULL, torch.float16, 1 << 30),
        ("preference", FULL, torch.bfloat16, SMALL),
        ("preference", FROZEN, torch.bfloat16, 1 << 30),
        ("preference", ("bias",), torch.float32, 1 << 30),
        ("policy", ("hidden", "weight"), torch.bfloat16, 1 << 30),
        ("policy", FROZEN, torch.float32, SMALL),
    ],
    ids=str,
)
def test_errors_are_within_the_bound_that_is_told(op, needs, dtype, budget):
    """The error rule for the losses, in one chunk and in several."""
    data, options = inputs(bias=True, dtype=dtype), CAPPED if dtype == torch.float32 else {}
    bound, mass = sparse.check(data, 1e-2, op=op, needs=needs, budget=budget, **options)
    assert mass > 0 and bound > 0


@interpreted
@pytest.mark.parametrize("kind", ["flat", "mixed"])
@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
def test_flat_rows_are_dense_and_keep_their_bits(kind, needs):
    data = inputs(kind, dtype=torch.bfloat16)
    dense, chosen = (sparse.run(data, needs=needs, tolerance=tolerance) for tolerance in (0.0, 1e-2))
    assert dense[1] == chosen[1] == (0, 0)
    assert all(torch.equal(dense[0][name], chosen[0][name]) for name in dense[0])


@interpreted
@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
@pytest.mark.parametrize("flat", [slice(1, None, 9), slice(1, None)], ids=["some", "nearly all"])
def test_rows_unlike_the_pilots(needs, flat, few_rows):
    """Flat rows have no list, or lack too much; single ones are done in full, and many make a dense chunk."""
    data = inputs(bias=True)
    pilots = torch.arange(few_rows.PILOTS) * len(data["hidden"]) // few_rows.PILOTS
    kept = data["hidden"][pilots].clone()
    data["hidden"][flat] *= sparse.SIZES["flat"] / sparse.SIZES["peaked"]
    data["hidden"][pilots] = kept
    bound, _ = sparse.check(data, 1e-2, needs=needs)
    assert (bound > 0) == (flat.step is not None)


@interpreted
@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
def test_rows_that_are_not_finite(needs):
    """A row of weight 0 may hold anything. A row of NaN that counts spoils what it enters."""
    data, unused = inputs(), [3, 20, 58]
    data["token_weight"] = torch.ones(len(data["hidden"]))
    data["token_weight"][unused] = 0
    clean = sparse.run(data, needs=needs, tolerance=1e-2)
    data["hidden"][unused] = math.nan
    spoiled = sparse.run(data, needs=needs, tolerance=1e-2)
    assert clean[1][0] > 0 and spoiled[1][0] > 0
    for name in clean[0]:
        scale = clean[0][name].abs().max()
        assert (clean[0][name] - spoiled[0][name]).abs().max() <= (clean[1][0] + spoiled[1][0]) * scale, name
    data["hidden"][30] = math.nan
    got, _ = sparse.run(data, needs=needs, tolerance=1e-2)
    assert got["loss"].isnan() and got["d_hidden"][30].isnan().all()
    assert needs == FROZEN or got["d_weight"].isnan().all()


@interpreted
def test_few_rows_and_no_tolerance_leave_nothing_out(monkeypatch, few_rows):
    monkeypatch.setattr(few_rows, "survey", lambda *_: pytest.fail("nothing may be left out"))
    assert sparse.run(inputs(lengths=(9, 8)), tolerance=1e-2)[1] == (0, 0)
    assert sparse.run(inputs(), tolerance=0)[1] == (0, 0)


def test_a_gpu_takes_lists_where_there_is_a_tolerance_and_float64_does_not(monkeypatch, few_rows):
    monkeypatch.undo()
    there = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert schemes.row_workspace(there, 1e-3) is few_rows
    there.dtype = torch.float64
    assert schemes.row_workspace(there, 1e-3).LEAST_ROWS == math.inf
