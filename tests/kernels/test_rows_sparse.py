"""Gradients of the loss head from the entries above a bound, against float64 and their own bound."""

import math

import pytest
import torch

import kernels
from bench.run.measure import peak_bytes
from kernels import compiled, reference
from kernels.loss_head import schemes
from kernels.loss_head.records import Head
from kernels.loss_head.rows_native import NativeRows
from kernels.loss_head.rows_sparse import SparseRows
from tests.helpers.losses import reordered

pytestmark = pytest.mark.skipif(not compiled.instructions, reason="kernels._native is not built")

# There are an empty sequence, one that stands in no pair, and an odd number of rows.
LENGTHS = (130, 101, 0, 97, 120, 88, 61)
PAIRS = torch.tensor([[0, 1], [3, 2], [4, 5]])
OFTEN = (0, 3, 4)  # sequences with a token that is often a target, each the better one of its pair
ROWS, WIDTH, VOCABULARY = sum(LENGTHS), 33, 2311
FULL, FROZEN = ("hidden", "weight", "bias"), ("hidden",)
SIZES = {"peaked": 1.5, "scattered": 1.5, "flat": 0.05, "mixed": 1.5}


def inputs(kind="peaked", bias=False, dtype=torch.float32, lengths=LENGTHS, seed=0):
    """Makes rows with targets drawn from the head itself.

    As on states of a trained model, the mass of a row lies on few tokens, and a token is the target of many
    rows ("peaked") or of a few ("scattered"); or it lies on all ("flat"), or both kinds take turns ("mixed").
    """
    g, rows = torch.Generator().manual_seed(seed), sum(lengths)
    size = torch.full((rows, 1), SIZES[kind])
    if kind == "mixed":
        size[::2] = SIZES["flat"]
    hidden, weight = torch.randn(rows, WIDTH, generator=g), torch.randn(VOCABULARY, WIDTH, generator=g)
    # Some tokens are frequent everywhere.
    hidden[:, 0], weight[:, 0] = 1, -torch.arange(1, VOCABULARY + 1).log()
    hidden = hidden * size
    target = torch.multinomial((hidden @ weight.t()).softmax(1), 1, generator=g)[:, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    if kind == "peaked":
        for n in OFTEN if len(lengths) > 4 else (0,):
            target[offsets[n] : offsets[n + 1] : 2] = 7
    data = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "target": target, "cu_seqlens": offsets}
    return data | ({"bias": torch.randn(VOCABULARY, generator=g).to(dtype)} if bias else {})


def loss_of(ops, op, data, tolerance, budget, options):
    n = len(data["cu_seqlens"]) - 1
    scores = {"reward": torch.arange(n) / n, "utility": torch.ones(n, 1), "lam": torch.tensor([0.5])}
    own = {} if ops is reference else {"gradient_tolerance": tolerance, "memory_budget_bytes": budget}
    if op == "preference":
        ref_logprob = torch.linspace(-300, -200, n)
        own |= {"pairs": PAIRS[: n // 2], "ref_logprob": ref_logprob, "beta": 0.05}
        return ops.lagrangian_preference_loss(**data, **scores, **own, **options)
    return ops.lagrangian_policy_loss(**data, **scores, **own, **options, group=torch.arange(n) % 2)


def run(
    data, op="preference", needs=FULL, tolerance=None, budget=1 << 30, ops=kernels, wide=False, **options
):
    """Returns loss and gradients by name, and what was left out."""
    leaves = {k: v.double() if wide and v.is_floating_point() else v.clone() for k, v in data.items()}
    needs = [name for name in needs if name in data]
    for name in needs:
        leaves[name].requires_grad_()
    result = loss_of(ops, op, leaves, tolerance, budget, options)
    result.loss.backward()
    got = {"loss": result.loss.detach()} | {f"d_{name}": leaves[name].grad for name in needs}
    return got, (None if ops is reference else (float(result.gradient_bound), float(result.left_out)))


def check(data, tolerance=None, **keywords):
    """Asserts that gradients are off by no more than they say and rounding, and say no more than was asked;
    returns what was left out."""
    got, left = run(data, tolerance=tolerance, **keywords)
    bound = left[0]
    keywords.pop("budget", None)
    true = run(data, ops=reference, wide=True, **keywords)[0]
    plain = reordered(lambda moved: run(moved, ops=reference, **keywords)[0], data)
    asked = schemes.tolerance_or_default(tolerance, data["hidden"], data["weight"], 1 << 30)
    assert 0 <= bound <= asked * (1 + 1e-5)
    for name, exact in true.items():
        scale = exact.abs().max().clamp_min(1e-30)

        def error(x, exact=exact, scale=scale):
            return float((x.double() - exact).abs().max() / scale)

        rounding = 2 * max(error(p[name]) for p in plain) + 4 * torch.finfo(got[name].dtype).eps
        off = error(got[name])
        assert off <= rounding + (bound if name != "loss" else 0), f"{name}: {off}, {rounding}, {bound}"
    return left


FEATURES = {
    "plain": ({}, {}),
    "bias": ({"bias": True}, {}),
    "temperature": ({}, {"temperature": 0.7}),
    "softcap": ({"bias": True}, {"softcap": 40.0, "temperature": 0.7}),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("needs", [FULL, FROZEN, ("weight",), ("bias",), ("hidden", "bias")], ids=str)
@pytest.mark.parametrize("op", ["preference", "policy"])
def test_errors_are_within_the_bound_that_is_told(op, needs, feature):
    made, options = FEATURES[feature]
    if needs == ("bias",) and "bias" not in made:
        pytest.skip("there is no bias")
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
