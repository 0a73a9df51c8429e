"""The loss ops on a CPU against dense float64 autograd, by the error rule of tests/helpers/losses.py."""

import importlib
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import compiled, lagrangian_policy_loss, lagrangian_preference_loss, reference, sequence_logprob
from kernels.loss_head.rows import TorchRows
from kernels.loss_head.rows_native import NativeRows
from tests.helpers.losses import (
    FEATURES,
    assert_close,
    check_against,
    check_against_dense,
    dense_dpo,
    dense_logprob,
    dense_results,
    gradients,
    make,
    preference_gradients,
    reordered,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])
def test_values_and_gradients(either_rows, dtype, feature, needs):
    shape, options = FEATURES[feature]
    check_against_dense(sequence_logprob, make(dtype=dtype, **shape), needs, **options)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])
def test_values_and_gradients_on_each_make_of_processor(processor, feature, needs):
    shape, options = FEATURES[feature]
    for dtype in (torch.float32, torch.bfloat16):
        check_against_dense(sequence_logprob, make(dtype=dtype, **shape), needs, **options)


@pytest.mark.parametrize("needs", [("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias")])
def test_any_subset_of_gradients(needs):
    check_against_dense(sequence_logprob, make(bias=True, weighted=True), needs, softcap=5.0)


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_change_the_result(needs, dtype, monkeypatch):
    """The rows take several chunks, and the head a few of its rows at a time."""
    sizes = []
    for cls, name in ((TorchRows, "_logprob"), (NativeRows, "_forward")):
        original = getattr(cls, name)
        monkeypatch.setattr(
            cls,
            name,
            lambda self, h, *rest, original=original: sizes.append(len(h)) or original(self, h, *rest),
        )
    data = make(rows=130, vocabulary=257, lengths=(50, 0, 79, 1), bias=True, weighted=True, dtype=dtype)
    check_against_dense(
        sequence_logprob,
        data,
        needs,
        softcap=4.0,
        memory_budget_bytes=14_000 if needs == ("hidden",) else 22_000,
    )
    assert max(sizes) < 100 and len(sizes) > 2


@pytest.mark.parametrize(
    "vocabulary,width,needs",
    [
        (7, 8192, ("hidden", "weight")),
        (32001, 896, ("hidden",)),
        (49152, 64, ("hidden", "weight")),
        (50257, 576, ("hidden",)),
        (128256, 128, ("hidden",)),
        (151936, 64, ("hidden", "weight")),
        (262144, 64, ("hidden",)),
        (2000, 4096, ("hidden", "weight")),
    ],
)
def test_real_vocabulary(vocabulary, width, needs):
    check_against_dense(
        sequence_logprob, make(rows=6, width=width, vocabulary=vocabulary, lengths=(2, 4)), needs
    )


class InTurn(torch.autograd.Function):
    """hidden @ weight.T, each sum one product after another in groups of 128."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        total = hidden.new_zeros(len(hidden), len(weight))
        for columns in torch.arange(hidden.shape[1]).split(128):
            part = torch.zeros_like(total)
            for i in columns.tolist():
                part += hidden[:, i, None] * weight[:, i]
            total += part
        return total

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ hidden


def added_in_turn(hidden, weight, **data):
    """Returns logprob and token_logprob from logits that `InTurn` adds."""
    # A product with the identity is exact.
    return dense_logprob(hidden=InTurn.apply(hidden, weight), weight=torch.eye(len(weight)), **data)


@pytest.mark.parametrize(
    "rows,width,vocabulary,needs",
    [
        (6, 4096, 2000, ("hidden",)),
        (64, 4096, 500, ("hidden", "weight")),
        (64, 4096, 500, ("hidden",)),
        (1, 16, 151936, ("hidden", "weight")),
    ],
)
def test_width_of_a_large_model_on_each_make_of_processor(rows, width, vocabulary, needs, monkeypatch):
    """Logits are sums of up to 4096 products, and J W of up to 151936.

    How exact plain torch's are depends on the processor: so the bound is also that of sums one product after
    another, in groups of 128, as the compiled kernels add.
    """
    data = make(rows=rows, width=width, vocabulary=vocabulary, lengths=(rows // 3, rows - rows // 3))
    plain, exact = dense_results(data, needs, {})
    if width > 128:
        plain = [*plain, gradients(added_in_turn, data, {}, needs)]
    dense = plain, exact
    for processor in compiled.MAKES.values():
        if processor.instructions in (None, *compiled.instructions):
            monkeypatch.setattr(compiled, "make", processor)
            check_against(dense, sequence_logprob, data, needs)


def test_long_row_sum_is_not_rounded_term_by_term():
    rows = 20000
    data = make(rows=rows, width=4, vocabulary=5, lengths=(rows,))
    check_against_dense(sequence_logprob, data, ("hidden",))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_integer_dtypes(integers):
    data = make()
    want = sequence_logprob(**data)
    got = sequence_logprob(**data | {k: data[k].to(integers) for k in ("target", "cu_seqlens")})
    assert torch.equal(got, want)


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])
def test_gradcheck(needs):
    data = make(
        rows=4, width=3, vocabulary=5, lengths=(3, 0, 1), dtype=torch.float64, bias=True, weighted=True
    )
    leaves = [data[name].requires_grad_() for name in needs]

    def call(*values):
        keywords = data | dict(zip(needs, values, strict=True))
        return sequence_logprob(**keywords, softcap=2.0, temperature=0.8, return_token_logprob=True)

    assert torch.autograd.gradcheck(call, leaves)


def test_large_common_offset_keeps_small_differences():
    """Two equal logits of 2^24 give log 2, which the sum m + log(total) would round away."""
    hidden = torch.tensor([[2.0**24]])
    weight = torch.ones(2, 1)
    got = sequence_logprob(hidden, weight, torch.tensor([1]), torch.tensor([0, 1]))
    assert got.item() == pytest.approx(-math.log(2), rel=1e-6)


def test_minus_infinity_in_the_bias_removes_a_token():
    data = make(bias=True, dtype=torch.float64)
    data["bias"][3] = -math.inf
    data["target"].clamp_(min=4)
    check_against_dense(sequence_logprob, data)
    data["target"][0] = 3
    got = sequence_logprob(**data)
    assert got[0] == -math.inf and got[2:].isfinite().all()


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
def test_row_of_weight_zero_adds_nothing_even_nan(needs):
    data = make(dtype=torch.float64)
    data["token_weight"] = torch.ones(13)
    data["token_weight"][[2, 8]] = 0
    clean = {k: v.clone() for k, v in data.items()}
    data["hidden"][[2, 8]] = math.nan
    results = []
    for case in (data, clean):
        for name in needs:
            case[name].requires_grad_()
        logprob = sequence_logprob(**case)
        logprob.sum().backward()
        results.append([logprob.detach(), *(case[name].grad for name in needs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
        assert got.abs().sum() > 0


def test_nan_spreads_to_its_sequence_only():
    data = make()
    data["hidden"][6] = math.nan
    got = sequence_logprob(**data)
    assert got.isnan().tolist() == [False, False, True, False]


def test_empty_inputs():
    empty = make(rows=0, lengths=(0, 0))
    empty["hidden"].requires_grad_()
    empty["weight"].requires_grad_()
    got = sequence_logprob(**empty)
    got.sum().backward()
    assert got.tolist() == [0, 0] and empty["hidden"].grad.shape == (0, 8) and not empty["weight"].grad.any()
    assert sequence_logprob(**make(rows=0, lengths=())).shape == (0,)
    data = make()
    assert sequence_logprob(**data)[1].item() == 0


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
def test_double_backward_is_a_clear_error(needs):
    data = make()
    for name in needs:
        data[name].requires_grad_()
    (gradient,) = torch.autograd.grad(sequence_logprob(**data).sum(), data["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_backward_twice_and_no_grad():
    data = make()
    data["hidden"].requires_grad_()
    logprob = sequence_logprob(**data)
    first = torch.autograd.grad(logprob.sum(), data["hidden"], retain_graph=True)[0]
    second = torch.autograd.grad(2 * logprob.sum(), data["hidden"])[0]
    torch.testing.assert_close(second, 2 * first)
    with torch.no_grad():
        silent = sequence_logprob(**data)
    assert not silent.requires_grad and torch.equal(silent, logprob.detach())


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
def test_autocast_does_not_round(needs):
    def run(enabled):
        leaves = [make()[name].requires_grad_() for name in needs]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logprob = sequence_logprob(**make() | dict(zip(needs, leaves, strict=True)))
            return [logprob, *torch.autograd.grad(logprob.sum(), leaves)]

    for got, want in zip(run(True), run(False), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=["forward", "frozen", "full"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_budget(needs, options, dtype):
    """The peak counts all allocations beyond inputs, less the returned gradients
    and the float32 accumulator."""
    data = make(rows=300, width=16, vocabulary=4099, lengths=(100, 200), dtype=dtype)
    for name in needs:
        data[name].requires_grad_()
    budget = 500_000

    def step():
        logprob = sequence_logprob(**data, **options, memory_budget_bytes=budget)
        if needs:
            logprob.sum().backward()

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    used = peak = 0
    for event in events:
        used += event.nbytes()
        peak = max(peak, used)
    allowed = sum(data[name].nbytes for name in needs) + (
        4 * data["weight"].numel() if "weight" in needs else 0
    )
    # Below, the profile has not seen the tiles.
    assert 0.05 * budget < peak <= budget + allowed
    assert budget < 300 * 4099 * 4


def test_budget_too_small_for_one_row():
    with pytest.raises(ValueError, match=r"memory_budget_bytes = 100: expected at least \d+"):
        sequence_logprob(**make(), memory_budget_bytes=100)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 999),
    st.integers(4000, 9000),
)
def test_any_shape_agrees_with_dense(lengths, vocabulary, width, seed, budget):
    data = make(
        sum(lengths), width, vocabulary, tuple(lengths), torch.float64, seed, bias=True, weighted=True
    )
    check_against_dense(sequence_logprob, data, memory_budget_bytes=budget, temperature=0.9)
    check_against_dense(sequence_logprob, data, ("hidden",), memory_budget_bytes=budget, softcap=1.5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(-50, 50))
def test_a_constant_on_all_logits_changes_nothing(seed, constant):
    data = make(dtype=torch.float64, seed=seed)
    moved = sequence_logprob(**data, bias=torch.full((33,), constant, dtype=torch.float64))
    torch.testing.assert_close(moved, sequence_logprob(**data), rtol=1e-11, atol=1e-11)


PAIRS = torch.tensor([[0, 2], [3, 0], [1, 2], [2, 2]])


def make_pairs(dtype=torch.float32, seed=1, **shape):
    g = torch.Generator().manual_seed(seed)
    data = make(dtype=dtype, seed=seed, **shape)
    labels = {
        "pairs": PAIRS,
        "reward": torch.randn(4, generator=g),
        "utility": torch.randn(4, 2, generator=g),
        "lam": torch.tensor([0.5, 2.0], dtype=torch.float64),
        "ref_logprob": sequence_logprob(
            **{k: data[k] for k in ("hidden", "weight", "target", "cu_seqlens")}
        ).float()
        + torch.randn(4, generator=g),
    }
    return data, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])
@pytest.mark.parametrize("feature", FEATURES)
def test_preference_loss_against_autograd(either_rows, dtype, needs, feature):
    shape, options = FEATURES[feature]
    data, labels = make_pairs(dtype, **shape)

    def fused(leaves):
        result = lagrangian_preference_loss(**leaves, **labels, beta=0.4, **options)
        assert not any(x.requires_grad for x in result[1:])
        return result.loss, result.margin, result.preference

    got = preference_gradients(fused, data, needs=needs)
    plain = reordered(
        lambda moved: preference_gradients(lambda d: dense_dpo(d, options, labels, 0.4), moved, needs=needs),
        data,
    )
    exact = preference_gradients(lambda d: dense_dpo(d, options, labels, 0.4), data, torch.float64, needs)
    assert_close(got, plain, exact)


def test_preference_gradcheck():
    data, labels = make_pairs(torch.float64, rows=13, width=2, vocabulary=4)
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
    assert torch.autograd.gradcheck(
        lambda h, w: lagrangian_preference_loss(**data | {"hidden": h, "weight": w}, **labels, beta=0.7).loss,
        leaves,
    )


def test_label_kinds():
    data, labels = make_pairs(torch.float64)
    score = labels["reward"].double() + labels["utility"].double() @ labels["lam"]
    p = torch.sigmoid(score[PAIRS[:, 0]] - score[PAIRS[:, 1]])
    uniform = torch.tensor([0.0, 0.999999, p[2].item(), 0.49], dtype=torch.float64)
    sampled = lagrangian_preference_loss(**data, **labels, beta=1.0, labels="sampled", uniform=uniform)
    assert sampled.preference.tolist() == [1, 0, 0, 1]
    bare = {
        "pairs": PAIRS,
        "reward": None,
        "utility": None,
        "lam": None,
        "ref_logprob": labels["ref_logprob"],
    }
    fixed = lagrangian_preference_loss(
        **data, **bare, beta=1.0, labels="given", preference=sampled.preference
    )
    assert fixed.loss == sampled.loss
    expected, _, _ = dense_dpo(data, {}, labels, 1.0, sampled.preference)
    torch.testing.assert_close(fixed.loss, expected)
    draws = [
        lagrangian_preference_loss(
            **data,
            **labels | {"pairs": PAIRS[:1].expand(4000, 2)},
            beta=1.0,
            labels="sampled",
            generator=torch.Generator().manual_seed(7),
        ).preference
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert abs(draws[0].mean() - p[0]) < 5 * (p[0] * (1 - p[0]) / 4000).sqrt()


def test_accuracy_and_ties():
    data, labels = make_pairs(torch.float64)
    logprob = sequence_logprob(**data)
    labels["ref_logprob"] = logprob - torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    labels["pairs"] = torch.tensor([[0, 1], [1, 0], [2, 3], [0, 2]])
    q = torch.tensor([1.0, 0.9, 1.0, 0.5])  # right, wrong, no margin, no preference
    labels |= {"reward": None, "utility": None, "lam": None}
    result = lagrangian_preference_loss(**data, **labels, beta=1.0, labels="given", preference=q)
    torch.testing.assert_close(result.margin, torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64))
    assert result.accuracy.item() == 0.5
    three = labels | {"pairs": labels["pairs"][[0, 0, 0, 2]]}
    assert (
        lagrangian_preference_loss(
            **data, **three, beta=1.0, labels="given", preference=torch.ones(4)
        ).accuracy.item()
        == 0.875
    )


def test_no_pairs_and_no_rows():
    data, labels = make_pairs()
    data["hidden"].requires_grad_()
    result = lagrangian_preference_loss(
        **data, **labels | {"pairs": torch.zeros(0, 2, dtype=torch.int64)}, beta=1.0
    )
    result.loss.backward()
    assert result.loss.item() == 0 and data["hidden"].grad.eq(0).all() and result.accuracy.isnan()
    data = make(rows=0, lengths=(0, 0, 0, 0))
    data["hidden"].requires_grad_()
    result = lagrangian_preference_loss(**data, **labels, beta=1.0)
    result.loss.backward()
    empty = dense_dpo(make(rows=0, lengths=(0, 0, 0, 0)), {}, labels, 1.0)[0]
    torch.testing.assert_close(result.loss.detach(), empty)
    assert empty > 0 and data["hidden"].grad.shape == (0, 8)


def test_extreme_margins_keep_finite_loss_and_gradient():
    data, labels = make_pairs()
    data["hidden"].requires_grad_()
    labels["ref_logprob"] = torch.tensor([-1e6, 0, 1e6, 0])
    for q in (0.0, 0.3, 1.0):
        given = labels | {"reward": None, "utility": None, "lam": None}
        result = lagrangian_preference_loss(
            **data, **given, beta=1.0, labels="given", preference=torch.full((4,), q)
        )
        (gradient,) = torch.autograd.grad(result.loss, data["hidden"])
        assert result.loss.isfinite() and gradient.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 5))
def test_swapping_pairs_flips_margins_only(seed, beta):
    data, labels = make_pairs(torch.float64, seed=seed)
    one = lagrangian_preference_loss(**data, **labels, beta=beta)
    two = lagrangian_preference_loss(**data, **labels | {"pairs": PAIRS.flip(1)}, beta=beta)
    torch.testing.assert_close(one.margin, -two.margin)
    torch.testing.assert_close(one.preference, 1 - two.preference)
    torch.testing.assert_close(one.loss, two.loss)


def test_double_backward_of_the_loss_is_a_clear_error():
    data, labels = make_pairs()
    data["hidden"].requires_grad_()
    loss = lagrangian_preference_loss(**data, **labels, beta=1.0).loss
    (gradient,) = torch.autograd.grad(loss, data["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def bad(name, value, message):
    return pytest.param(name, value, message, id=f"{name}-{message[:24]}")


@pytest.mark.parametrize(
    "name,value,message",
    [
        bad("hidden", torch.zeros(13), r"hidden has shape \[13\]"),
        bad("hidden", None, "hidden = None: expected a tensor"),
        bad("hidden", torch.zeros(13, 8, dtype=torch.int64), "hidden has dtype int64"),
        bad("weight", torch.zeros(33, 8, dtype=torch.float64), "weight has dtype float64: expected float32"),
        bad("weight", torch.zeros(33, 9), r"weight has shape \[33, 9\]: expected \[any, 8\]"),
        bad(
            "weight",
            torch.eye(33, 8).to_sparse(),
            "weight has layout torch.sparse_coo: expected a dense tensor",
        ),
        bad("weight", torch.zeros(0, 8), "at least one vocabulary row"),
        bad("target", torch.full((13,), 33), r"target\[0\] = 33: expected a token id in \[0, 33\)"),
        bad("target", torch.full((13,), -100), r"target\[0\] = -100"),
        bad("target", torch.zeros(13), "target has dtype float32"),
        bad("target", torch.zeros(12, dtype=torch.int64), r"target has shape \[12\]"),
        bad("cu_seqlens", torch.tensor([0, 5, 4, 13]), r"cu_seqlens\[2\] = 4"),
        bad("cu_seqlens", torch.tensor([0, 12]), "ends at 12: expected 0 and 13"),
        bad("cu_seqlens", torch.tensor([1, 13]), "starts at 1"),
        bad("cu_seqlens", torch.tensor([], dtype=torch.int64), "cu_seqlens has shape"),
        bad("cu_seqlens", torch.tensor([0, 13], dtype=torch.int16), "cu_seqlens has dtype int16"),
        bad("token_weight", torch.full((13,), math.nan), r"token_weight\[0\] = nan"),
        bad("token_weight", torch.ones(12), r"token_weight has shape \[12\]"),
        bad("bias", torch.ones(32), r"bias has shape \[32\]: expected \[33\]"),
        bad("temperature", 0.0, "temperature = 0.0"),
        bad("temperature", "1", "temperature = '1'"),
        bad("softcap", -1.0, "softcap = -1.0"),
        bad("softcap", math.inf, "softcap = inf"),
        bad("memory_budget_bytes", 0, "memory_budget_bytes = 0"),
        bad("memory_budget_bytes", 1.5, "memory_budget_bytes = 1.5"),
    ],
)
@pytest.mark.parametrize("op", [sequence_logprob, lagrangian_preference_loss, lagrangian_policy_loss])
def test_bad_row_arguments(op, name, value, message):
    """Every loss op checks what it shares with the others."""
    n = max(0, len(value) - 1) if name == "cu_seqlens" else 4
    more, scores = {}, {"reward": torch.zeros(n), "utility": torch.zeros(n, 2), "lam": torch.zeros(2)}
    if op is lagrangian_preference_loss:
        pairs = torch.zeros(0, 2, dtype=torch.int64)
        more = scores | {"pairs": pairs, "ref_logprob": torch.zeros(n), "beta": 1.0}
    elif op is lagrangian_policy_loss:
        more = scores | {"group": torch.arange(n)}
    with pytest.raises(ValueError, match=message):
        op(**make() | more | {name: value})


@pytest.mark.parametrize(
    "name,value,message",
    [
        bad("pairs", torch.tensor([[0, 4]]), r"pairs\[0, 1\] = 4: expected a sequence number in \[0, 4\)"),
        bad("pairs", torch.tensor([0, 1]), r"pairs has shape \[2\]"),
        bad("reward", torch.zeros(3), r"reward has shape \[3\]: expected \[4\]"),
        bad("reward", torch.full((4,), math.inf), r"reward\[0\] = inf"),
        bad("reward", None, "reward = None"),
        bad("utility", torch.zeros(4), r"utility has shape \[4\]: expected \[4, any\]"),
        bad("lam", torch.zeros(3), r"lam has shape \[3\]: expected \[2\]"),
        bad("ref_logprob", torch.full((4,), math.nan), r"ref_logprob\[0\] = nan"),
        bad("beta", 0.0, "beta = 0.0"),
        bad(
            "labels",
            "hard",
            "labels = 'hard': expected 'soft', 'sampled', 'given', 'regression', 'single' or 'listwise'",
        ),
        bad("labels", "sampled", "neither uniform nor generator"),
        bad("labels", "given", "preference = None"),
        bad("generator", 3, "generator = 3: expected a torch.Generator"),
        bad("preference", torch.zeros(4), "preference is given with labels = 'soft'"),
    ],
)
def test_bad_preference_arguments(name, value, message):
    data, labels = make_pairs()
    with pytest.raises(ValueError, match=message):
        lagrangian_preference_loss(
            **data
            | labels
            | {"beta": 1.0}
            | ({"labels": "sampled"} if name == "generator" else {})
            | {name: value}
        )


def test_preference_out_of_range():
    data, labels = make_pairs()
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"preference\[0\] = .*expected a probability"):
            lagrangian_preference_loss(
                **data, **labels, beta=1.0, labels="given", preference=torch.full((4,), value)
            )


def test_public_names_and_the_arguments_of_their_definitions():
    """`kernels.reference` defines each op by the same arguments, but for the memory budget, `debug` and what
    may be left out."""
    assert {"decode_attention", "sample", *DEFINED} == set(kernels.__all__)
    for name in DEFINED:
        op, definition = (
            inspect.signature(getattr(module, name)).parameters for module in (kernels, reference)
        )
        options = inspect.signature(reference.sequence_logprob).parameters
        theirs = {
            k: v.default
            for k, v in (options | definition).items()
            if k not in ("options", "return_token_logprob")
        }
        ours = {
            k: v.default
            for k, v in op.items()
            if k not in ("memory_budget_bytes", "gradient_tolerance", "debug", "return_token_logprob")
        }
        assert ours == (
            theirs if "options" in definition else {k: v for k, v in theirs.items() if k in definition}
        )


DEFINED = ["dual_moments", "lagrangian_policy_loss", "lagrangian_preference_loss", "sequence_logprob"]


def test_no_module_has_the_name_of_a_public_op():
    for name in kernels.__all__:
        assert callable(getattr(kernels, name))
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"kernels.{name}")
