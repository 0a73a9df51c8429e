"""Gradients of the loss head from the entries above a bound, against float64 and their own bound."""

import math

import pytest
import torch

from bench.run.measure import peak_bytes
from kernels import compiled
from kernels.loss_head import schemes
from kernels.loss_head.records import Head
from kernels.loss_head.rows_native import NativeRows
from kernels.loss_head.rows_sparse import SparseRows
from tests.helpers.sparse import FROZEN, FULL, ROWS, SIZES, VOCABULARY, check, inputs, run

pytestmark = pytest.mark.skipif(not compiled.instructions, reason="kernels._native is not built")

FEATURES = {
    "plain": ({}, {}),
    "bias": ({"bias": True}, {}),
    "temperature": ({}, {"temperature": 0.7}),
    "softcap": ({"bias": True}, {"softcap": 40.0, "temperature": 0.7}),
}


# A policy loss gives rows other coefficients, and knows of no list.
@pytest.mark.parametrize(
    "op, needs, feature",
    [("preference", needs, feature) for needs in (FULL, FROZEN, ("weight",)) for feature in FEATURES]
    + [
        ("preference", needs, feature)
        for needs in (("bias",), ("hidden", "bias"))
        for feature in ("bias", "softcap")
    ]
    + [("policy", FULL, "softcap"), ("policy", FROZEN, "plain"), ("policy", ("bias",), "bias")],
    ids=str,
)
def test_errors_are_within_the_bound_that_is_told(op, needs, feature):
    made, options = FEATURES[feature]
    data = inputs(**made)
    for tolerance in (None, 1e-4, 1e-2):
        bound, mass = check(data, tolerance, op=op, needs=needs, **options)
        assert mass > 0 and (bound > 0 or "hidden" not in needs)


@pytest.mark.parametrize("op", ["preference", "policy"])
def test_a_head_whose_gradient_is_small_is_completed(op):
    """What no list has may be much beside the largest element of dW, where no column stands out."""
    data = inputs("scattered", bias=True)
    assert check(data, 1e-2, op=op, needs=("weight", "bias"))[0] == 0
    assert check(data, 1e-2, op=op)[0] > 0


@pytest.mark.parametrize("needs", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_a_head_whose_gradient_has_a_large_column_is_not(needs):
    assert check(inputs(bias=True), 1e-2, needs=needs)[0] > 0


@pytest.mark.parametrize("kind", ["flat", "mixed"])
@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
def test_flat_rows_are_dense_and_keep_their_bits(kind, needs):
    data = inputs(kind)
    assert check(data, needs=needs) == (0, 0)
    dense, sparse = (run(data, needs=needs, tolerance=tolerance)[0] for tolerance in (0.0, None))
    assert all(torch.equal(dense[name], sparse[name]) for name in dense)


@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
def test_rows_unlike_those_that_were_looked_at(needs):
    """All rows but those that choose the bound are flat, so that hardly any row is within it."""
    data = inputs("flat")
    pilots = torch.arange(SparseRows.PILOTS) * ROWS // SparseRows.PILOTS
    data["hidden"][pilots] *= SIZES["peaked"] / SIZES["flat"]
    for tolerance in (None, 1e-2):
        check(data, tolerance, needs=needs)
    some = torch.arange(0, ROWS, 5)
    data = inputs("peaked")
    data["hidden"][some] *= SIZES["flat"] / SIZES["peaked"]
    data["hidden"][pilots] = inputs("peaked")["hidden"][pilots]
    for tolerance in (None, 1e-2):
        check(data, tolerance, needs=needs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
@pytest.mark.parametrize("op", ["preference", "policy"])
def test_16_bits(op, needs, dtype):
    assert check(inputs(dtype=dtype, bias=True), op=op, needs=needs)[0] > 0


# Chunks hold whole pairs, or parts of a sequence (scheme E), or any rows.
@pytest.mark.parametrize(
    "lengths", [(150, 140, 160, 155, 150, 149), (400, 390, 30, 20)], ids=["short", "long"]
)
@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
@pytest.mark.parametrize("op", ["preference", "policy"])
def test_chunks(op, needs, lengths):
    """Each chunk has its share of what may be left out; where chunks cancel, all is done again in full."""
    data = inputs(bias=True, lengths=lengths)
    check(data, 1e-3, op=op, needs=needs, budget=5_000_000, temperature=0.8)


@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
@pytest.mark.parametrize("op", ["preference", "policy"])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_memory_stays_within_the_budget(op, needs, softcap):
    """The peak counts allocations beyond inputs, less the returned gradients and an accumulator of dW."""
    data, budget = inputs(lengths=(600, 500, 700, 400, 300, 500)), 6_000_000

    def step():
        run(data, op, needs, budget=budget, softcap=softcap)

    copies = sum(v.nbytes for v in data.values())
    allowed = copies + sum(data[name].nbytes for name in needs if name in data)
    allowed += data["weight"].nbytes if needs == FULL else 0
    assert peak_bytes(step, torch.device("cpu")) <= budget + allowed


def test_rows_that_are_not_finite():
    """A row of weight 0 may hold anything. A row of NaN that counts spoils what it enters."""
    for needs in (FULL, FROZEN):
        data = inputs()
        data["token_weight"] = torch.ones(ROWS)
        data["token_weight"][[3, 200, ROWS - 1]] = 0
        clean = run(data, needs=needs)[0]
        data["hidden"][[3, 200, ROWS - 1]] = math.nan
        spoiled = run(data, needs=needs)[0]
        for name in clean:
            torch.testing.assert_close(clean[name], spoiled[name], rtol=1e-4, atol=1e-7)
        data["hidden"][70] = math.nan
        got = run(data, needs=needs)[0]
        assert got["loss"].isnan() and got["d_hidden"][70].isnan().all()
        assert needs == FROZEN or got["d_weight"].isnan().all()


def test_tokens_that_cannot_be():
    """A bias of -inf takes tokens out, and their columns of J are 0."""
    data = inputs(bias=True)
    banned = torch.arange(VOCABULARY) % 3 == 1
    banned[data["target"]] = False
    data["bias"][banned] = -math.inf
    got, (bound, _) = run(data)
    assert bound > 0 and not got["d_bias"][banned].any() and not got["d_weight"][banned].any()
    check(data)


def test_a_token_that_is_certain():
    """Where p is 1 but for what float32 cannot hold beside it, the row keeps the digits of its gradient."""
    data = inputs()
    data["hidden"][:50] = 40 * data["weight"][data["target"][:50]]
    assert check(data)[0] > 0


def test_pairs_that_cancel():
    """Two equal responses: dH stands, and dW is the rounding of nothing."""
    data = inputs(lengths=(300, 300))
    for name in ("hidden", "target"):
        data[name][300:] = data[name][:300]
    got, _ = run(data)
    assert torch.equal(got["d_hidden"][:300], -got["d_hidden"][300:]) and got["d_hidden"].any()
    assert got["d_weight"].abs().max() <= 1e-5


@pytest.mark.parametrize("threshold,kept", [(0.0, 16), (0.99 / 16, 16), (1 / 16, 1), (2.0, 1)])
def test_ties_at_the_bound(threshold, kept):
    """Of 16 equal entries, beside 240 of 0, a bound of 1/16 leaves out all but the target's own. Sums of what
    is left out are exact."""
    weight = torch.full((256, 1), -200.0)
    weight[::16] = 0
    z, logprob, state = listed(weight, torch.arange(SparseRows.LEAST_ROWS) % 16 * 16, threshold)
    torch.testing.assert_close(logprob, torch.full_like(logprob, -math.log(16)))
    assert (state[:, 5] == kept).all() and (state[:, 3] == (16 - kept) / 16).all()
    own = z.view(torch.int32)[:, 128 : 128 + kept].long()
    jacobian = torch.zeros_like(z).scatter(1, own, z[:, :kept])
    target = torch.arange(SparseRows.LEAST_ROWS) % 16 * 16
    true = torch.zeros_like(z).scatter(1, target[:, None], -15 / 16)
    if kept > 1:
        true[:, ::16] = 1 / 16
        true.scatter_(1, target[:, None], -15 / 16)
    torch.testing.assert_close(jacobian, true, rtol=1e-6, atol=0)


def test_a_list_that_holds_all_is_a_row_in_full():
    """A bound of 0 lists every entry, which are more than a list holds."""
    target = torch.arange(SparseRows.LEAST_ROWS) % 64
    z, _, state = listed(torch.zeros(64, 1), target, 0.0)
    assert (state[:, 5] == -1).all() and not state[:, 3:5].any()
    jacobian = torch.full_like(z, 1 / 64)
    torch.testing.assert_close(z, jacobian.scatter(1, target[:, None], -63 / 64))


def listed(weight, target, threshold):
    """Returns z, log-probs and state of rows of the state 1 with a bound of this share of a row's mass."""
    head, rows = Head(weight, None, 1.0, None, 1e-3), len(target)
    work = SparseRows(head, SparseRows.sizes(head, rows, 1 << 24, "kept"), rows, "kept")
    hidden = torch.ones(rows, 1)
    work.survey(hidden, target)
    work.listing, work.threshold = True, threshold
    z = torch.empty(rows, len(weight))
    return z, *work.keep(hidden, target, z)


def on_threads(threads, function):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("needs", [FULL, FROZEN], ids=["full", "frozen"])
def test_neither_runs_nor_threads_change_a_bit(needs):
    data = inputs(bias=True)
    results = [on_threads(n, lambda: run(data, needs=needs, temperature=0.7)) for n in (1, 1, 2, 3)]
    for other, left in results[1:]:
        assert left == results[0][1] and left[0] > 0
        for name in other:
            assert torch.equal(results[0][0][name], other[name]), name


def test_few_rows_and_no_tolerance_leave_nothing_out(monkeypatch):
    monkeypatch.setattr(SparseRows, "survey", lambda *_: pytest.fail("nothing may be left out"))
    few = inputs(lengths=(300, 200))
    assert check(few)[0] == 0 and run(few, tolerance=1e-2)[1] == (0, 0)
    assert run(inputs(), tolerance=0)[1] == (0, 0)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs().items()}
    assert run(wide)[1] == (0, 0)


@pytest.mark.parametrize("value", [-1e-6, 1.0, math.nan, math.inf, True, "small"])
def test_tolerances_that_are_none(value):
    with pytest.raises(ValueError, match=f"gradient_tolerance = {value!r}: expected a number from 0"):
        run(inputs(), tolerance=value)


def test_rows_are_those_of_the_dense_workspace_where_they_are_full():
    """`SparseRows` is a `NativeRows` that may leave out, so that no caller has to ask which it is."""
    assert issubclass(SparseRows, NativeRows)
    hidden = torch.zeros(SparseRows.LEAST_ROWS, 4)
    assert schemes.row_workspace(hidden) is NativeRows and schemes.row_workspace(hidden, 1e-6) is SparseRows
