"""The forms of labels that set log-ratios against the score itself, least squares on pairs or on single
sequences and listwise: against dense float64 autograd in every scheme, by the error rule of
tests/helpers/losses.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.run.measure import peak_bytes
from kernels import lagrangian_preference_loss, sequence_logprob
from kernels.loss_head import ops
from kernels.loss_head.rows import TorchRows
from kernels.loss_head.rows_native import NativeRows
from tests.helpers.losses import (
    FEATURES,
    FORMS,
    LENGTHS,
    PAIRS,
    assert_close,
    budget_of,
    dense_dpo,
    form_of,
    preference_gradients,
    reordered,
)
from tests.helpers.losses import problem as small_problem
from tests.helpers.schemes import ALL_OPTIONS, FROZEN, FULL, Scheme, budget_for, inputs, keywords_of

EACH_FORM = pytest.mark.parametrize("labels", FORMS)
NO_PAIRS = torch.zeros(0, 2, dtype=torch.int64)


def problem(*shape, **more):
    """Returns inputs whose log-ratios are far from their goals: residuals are then no small differences of
    larger numbers, whose relative error would be a matter of luck."""
    data, scores = small_problem(*shape, **more)
    return data, scores | {"reward": 10 * scores["reward"]}


def check_form(data, labels, needs=("hidden", "weight", "bias"), budget=None, options=None, beta=0.4):
    """Asserts the error rule for loss, margins, labels and gradients; returns them."""
    options = options or {}

    def fused(leaves):
        result = lagrangian_preference_loss(
            **leaves, **labels, beta=beta, memory_budget_bytes=budget, **options
        )
        assert not any(x.requires_grad for x in result[1:])
        return result.loss, result.margin, result.preference

    def dense(moved, cast=None):
        return preference_gradients(lambda d: dense_dpo(d, options, labels, beta), moved, cast, needs)

    got = preference_gradients(fused, data, needs=needs)
    assert_close(got, reordered(dense, data), dense(data, torch.float64))
    return got


class Spy:
    """Counts the rows whose logits are computed."""

    def __init__(self, monkeypatch):
        self.rows = 0
        for cls in (TorchRows, NativeRows):
            for name in ("values", "product", "keep"):
                monkeypatch.setattr(cls, name, self.counted(vars(cls)[name]))

    def counted(self, original):
        def call(work, hidden, *arguments):
            self.rows += len(hidden)
            return original(work, hidden, *arguments)

        return call


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])
@pytest.mark.parametrize("feature", FEATURES)
def test_values_and_gradients_against_autograd(either_rows, labels, dtype, needs, feature):
    shape, options = FEATURES[feature]
    data, scores = problem(dtype, **shape)
    check_form(data, scores | form_of(labels), needs, options=options)


# By the share of all rows that a chunk holds (None: all at once): the letter of `kernels.loss_head.schemes`.
SCHEMES = [("full", None, "B"), ("full", 0.7, "D"), ("full", 0.2, "E"), ("frozen", None, "C")]


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs,share,letter", SCHEMES)
def test_every_scheme(labels, dtype, needs, share, letter, taken):
    """A chunk of D holds each pair and each group, one of E holds neither the longest pair nor sequence."""
    data = inputs(dtype, lengths=(4, 0, 9, 4, 0, 5 if letter == "D" else 18), weighted=True)
    keywords = keywords_of("preference", data, ALL_OPTIONS)
    beta, own = keywords.pop("beta"), form_of(labels, 6)
    if labels == "listwise":
        own["group"] = torch.tensor([4, -3, 0, 4, -3, 0])
    wanted = FULL if needs == "full" else FROZEN
    budget = budget_for(Scheme("preference", wanted, share), data, ALL_OPTIONS)
    check_form(data, keywords | own, wanted, budget, ALL_OPTIONS, beta)
    if dtype == torch.float16 and labels != "listwise" and letter in ("D", "E"):
        # Coefficients have any size, which is known only once all of them are.
        assert taken == {"part of B" if letter == "D" else "A"}
    else:
        assert taken == {letter}


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_head_in_a_small_budget(labels, dtype, taken, monkeypatch):
    """J W of all rows does not fit beside the gradient, so that it is formed in the gradient's place."""
    lengths = tuple(60 * n for n in LENGTHS)
    data, scores = problem(dtype, lengths, vocabulary=50, width=512, bias=True, weighted=True)
    data["weight"] /= 512**0.5
    spy = Spy(monkeypatch)
    check_form(data, scores | form_of(labels), FROZEN, int(1.8 * data["hidden"].nbytes))
    assert spy.rows == 2520 and not taken


@pytest.mark.parametrize(
    "labels,chunk,again",
    [
        ("regression", 12, 0),
        ("single", 8, 0),
        ("single", 6, 9),
        ("listwise", 20, 0),
        ("listwise", 12, 16),
    ],
)
def test_logits_are_computed_once_where_a_chunk_holds_what_belongs_together(
    labels, chunk, again, monkeypatch
):
    """A longer sequence or pair is too, as long as its sums have memory; a longer group is not."""
    data, scores = problem(bias=True, weighted=True)
    own = form_of(labels)
    if labels == "listwise":
        # The largest group has three sequences of 16 rows, more than the second chunk.
        own["group"] = torch.tensor([1, 1, 0, 1, 2, 3, 4, 5, 6, 6])
    spy = Spy(monkeypatch)
    check_form(data, scores | own, budget=budget_of(data, chunk))
    assert spy.rows == 42 + again


@EACH_FORM
@pytest.mark.parametrize("needs", [("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight")])
def test_subsets_of_gradients(labels, needs):
    data, scores = problem(bias=True)
    for budget in (None, budget_of(data, 12)):
        check_form(data, scores | form_of(labels), needs, budget)


@EACH_FORM
@pytest.mark.parametrize(
    "dtype,size",
    [(torch.float32, 1e3), (torch.float32, 1e6), (torch.bfloat16, 1e6), (torch.float16, 1e4)],
    ids=str,
)
@pytest.mark.parametrize("chunk", [None, 12, 30])
def test_log_ratios_and_scores_of_any_size(labels, dtype, size, chunk):
    """Residuals of least squares become as large, and softmaxes saturate."""
    data, scores = problem(dtype, bias=True)
    scores["ref_logprob"] += size * torch.linspace(-1, 1, 10)
    scores["lam"] = size * torch.tensor([1.0, -2.0])
    budget = None if chunk is None else budget_of(data, chunk)
    got = check_form(data, scores | form_of(labels), budget=budget, beta=0.01)
    assert all(x.isfinite().all() for x in got.values()) and got["d_hidden"].any() and got["loss"] > 1


@pytest.mark.parametrize(
    "vocabulary,width,lengths,dtype,labels",
    [
        *((7, 5120, (1, 0, 2, 1), torch.float32, labels) for labels in FORMS),
        *((33, 5, (2000, 48, 1, 0), torch.float32, labels) for labels in FORMS),
        *((257, 3584, (3, 2, 4, 1), torch.float32, labels) for labels in FORMS),
        # The forms part at sequences, after the vocabulary.
        (50257, 100, (2, 0, 3, 2), torch.float16, "single"),
        (151936, 64, (2, 3, 0, 4), torch.bfloat16, "listwise"),
    ],
)
def test_real_vocabularies_widths_and_lengths(vocabulary, width, lengths, dtype, labels):
    data, scores = problem(dtype, lengths, torch.tensor([[0, 1], [2, 3], [3, 0]]), vocabulary, width)
    data["weight"] /= width**0.5
    for needs, budget in ((FULL, None), (FULL, budget_of(data, max(lengths) // 2 + 1)), (FROZEN, None)):
        check_form(data, scores | form_of(labels, 4), needs, budget)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8),
    st.lists(st.integers(-2, 2), min_size=7, max_size=7),
    st.integers(1, 40),
    st.integers(2, 30),
    st.integers(0, 999),
    st.sampled_from(FORMS),
)
def test_any_pairs_and_groups_agree_with_dense(lengths, pairs, group, vocabulary, rows, seed, labels):
    pairs = [(a % len(lengths), b % len(lengths)) for a, b in pairs]
    pairs = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    data, scores = problem(torch.float64, tuple(lengths), pairs, vocabulary, seed=seed, weighted=True)
    own = form_of(labels, len(lengths), seed)
    if labels == "listwise":
        own["group"] = torch.tensor(group[: len(lengths)], dtype=torch.int32)
    for needs in (("hidden", "weight"), ("hidden",)):
        check_form(data, scores | own, needs, budget_of(data, rows))


@EACH_FORM
def test_gradcheck(labels):
    data, scores = problem(torch.float64, (2, 3, 0, 1, 2, 1, 3, 1, 2, 1), vocabulary=4, width=2)
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
    keywords = scores | form_of(labels)
    for budget in (None, budget_of(data, 5)):

        def loss(hidden, weight, budget=budget):
            moved = data | {"hidden": hidden, "weight": weight}
            return lagrangian_preference_loss(**moved, **keywords, beta=0.7, memory_budget_bytes=budget).loss

        assert torch.autograd.gradcheck(loss, leaves)


def test_without_pairs_sequences_rows_or_tokens():
    data, scores = problem()
    regression = lagrangian_preference_loss(
        **data, **scores | {"pairs": NO_PAIRS}, beta=1.0, labels="regression"
    )
    assert regression.loss == 0 and regression.accuracy.isnan()
    for labels in ("single", "listwise"):
        whole = check_form(data, scores | form_of(labels))
        alone = check_form(data, scores | form_of(labels) | {"pairs": NO_PAIRS})
        assert alone["margin"].shape == alone["q"].shape == (0,)
        for name in ("loss", "d_hidden", "d_weight"):
            assert torch.equal(alone[name], whole[name])
    for labels in FORMS:
        for lengths in ((0,), (0, 0, 0)):
            data, scores = problem(lengths=lengths, pairs=torch.zeros(1, 2, dtype=torch.int64))
            for needs in (("hidden",), ("hidden", "weight")):
                got = check_form(data, scores | form_of(labels, len(lengths)), needs)
                assert got["d_hidden"].shape == (0, 8) and not got.get("d_weight", torch.zeros(1)).any()
        data, scores = problem(lengths=(), pairs=NO_PAIRS)
        leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
        for budget in (None, 20_000):
            loss = lagrangian_preference_loss(
                **data, **scores, **form_of(labels, 0), beta=1.0, memory_budget_bytes=budget
            ).loss
            assert loss == 0 and not any(x.any() for x in torch.autograd.grad(loss, leaves))


def test_groups_of_one_and_sequences_in_no_pair_have_no_gradient():
    for budget_rows in (None, 5):
        data, scores = problem(torch.float64)
        budget = None if budget_rows is None else budget_of(data, budget_rows)
        alone = check_form(data, scores | {"labels": "listwise", "group": torch.arange(10)}, budget=budget)
        assert alone["loss"] == 0 and not alone["d_hidden"].any() and not alone["d_weight"].any()
        paired = check_form(data, scores | {"labels": "regression"}, budget=budget)
        unpaired = [n for n in range(10) if n not in PAIRS]
        starts = data["cu_seqlens"].tolist()
        assert unpaired == [5, 7]
        for n in range(10):
            own = paired["d_hidden"][starts[n] : starts[n + 1]]
            assert bool(own.any()) == (n not in (2, 5, 7, 9))  # 2 is empty, 9 is in a pair with itself


@EACH_FORM
def test_labels_margins_and_accuracy_of_pairs(labels):
    """They are those of soft labels, for the forms in which they do not enter the loss too."""
    data, scores = problem(torch.float64)
    got = lagrangian_preference_loss(**data, **scores, **form_of(labels), beta=0.4)
    soft = lagrangian_preference_loss(**data, **scores, beta=0.4)
    score = scores["reward"].double() + scores["utility"].double() @ scores["lam"].double()
    q = torch.sigmoid(score[PAIRS[:, 0]] - score[PAIRS[:, 1]])
    torch.testing.assert_close(got.preference, q, rtol=1e-12, atol=1e-12)
    for name in ("logprob", "margin", "preference", "accuracy"):
        assert torch.equal(getattr(got, name), getattr(soft, name)), name


@EACH_FORM
def test_the_least_loss_is_at_the_tilt(labels):
    """There log-ratios are (s - ln of the normaliser) / beta, and no sequence has a coefficient."""
    data, scores = problem(torch.float64)
    own, beta = form_of(labels), 0.4
    score = scores["reward"].double() + scores["utility"].double() @ scores["lam"].double()
    value = own.get("value", torch.zeros(10)).double()
    scores["ref_logprob"] = sequence_logprob(**data) - (score - value) / beta
    for budget in (None, budget_of(data, 12)):
        leaves = [data[name].detach().requires_grad_() for name in ("hidden", "weight")]
        moved = data | dict(zip(("hidden", "weight"), leaves, strict=True))
        loss = lagrangian_preference_loss(
            **moved, **scores, **own, beta=beta, memory_budget_bytes=budget
        ).loss
        assert all(x.abs().max() < 1e-12 for x in torch.autograd.grad(loss, leaves))
        if labels != "listwise":  # whose least cross-entropy is the entropy of the scores' softmax
            assert loss < 1e-24


@EACH_FORM
@pytest.mark.parametrize("chunk", [None, 12])
def test_order_of_sequences_and_names_of_groups_change_nothing(labels, chunk):
    data, scores = problem(torch.float64, weighted=True)
    own = form_of(labels)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    bounds, back = data["cu_seqlens"], order.argsort()
    rows = torch.cat([torch.arange(bounds[n], bounds[n + 1]) for n in order])
    moved = {k: data[k][rows] for k in ("hidden", "target", "token_weight")} | {"weight": data["weight"]}
    moved["cu_seqlens"] = torch.tensor([0, *(LENGTHS[n] for n in order)]).cumsum(0)
    keywords = scores | own
    other = {k: v[order] if isinstance(v, torch.Tensor) and len(v) == 10 else v for k, v in keywords.items()}
    other["pairs"] = back[PAIRS]
    if labels == "listwise":
        other["group"] = -other["group"]
    budget = None if chunk is None else budget_of(data, chunk)
    one, two = (check_form(d, k, ("hidden", "weight"), budget) for d, k in ((data, keywords), (moved, other)))
    one["d_hidden"] = one["d_hidden"][rows]
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=1e-11, atol=1e-12)


@EACH_FORM
@pytest.mark.parametrize("chunk", [None, 12])
def test_two_runs_are_bitwise_equal(labels, chunk):
    results = []
    for _ in range(2):
        data, scores = problem(bias=True)
        leaves = [data[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        budget = None if chunk is None else budget_of(data, chunk)
        loss = lagrangian_preference_loss(
            **data, **scores, **form_of(labels), beta=0.3, memory_budget_bytes=budget
        ).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EACH_FORM
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [None, 12, 30])
def test_a_row_of_weight_zero_adds_nothing_even_nan(labels, softcap, chunk):
    results = []
    for spoilt in (0.3, math.nan):
        data, scores = problem()
        data["token_weight"] = torch.ones(42)
        data["token_weight"][[2, 14, 30]] = 0
        data["hidden"][[2, 14, 30]] = spoilt
        budget = None if chunk is None else budget_of(data, chunk, softcap)
        leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
        loss = lagrangian_preference_loss(
            **data, **scores, **form_of(labels), beta=0.5, memory_budget_bytes=budget, softcap=softcap
        ).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for clean, spoiled in zip(*results, strict=True):
        torch.testing.assert_close(clean, spoiled, rtol=1e-5, atol=1e-5)


@EACH_FORM
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
def test_memory_stays_within_the_budget(labels, needs):
    lengths = (40, 60, 20, 20, 80, 80)
    data, scores = problem(
        lengths=lengths, pairs=torch.tensor([[0, 1], [2, 3], [4, 5]]), vocabulary=4099, width=16
    )
    leaves, budget = [data[name].requires_grad_() for name in needs], 900_000
    own = form_of(labels, 6)

    def step():
        loss = lagrangian_preference_loss(**data, **scores, **own, beta=0.1, memory_budget_bytes=budget).loss
        torch.autograd.grad(loss, leaves)

    peak = peak_bytes(step, torch.device("cpu"))
    allowed = sum(leaf.nbytes for leaf in leaves) + (4 * data["weight"].numel() if "weight" in needs else 0)
    assert 0.1 * budget < peak <= budget + allowed


@EACH_FORM
def test_opcheck(labels):
    """Of the ops that know the form: labels and goals, terms, and the pass in chunks."""
    torch._dynamo.reset()
    data, scores = problem(bias=True, weighted=True)
    own = {"value": None, "group": None} | form_of(labels)
    rows = [data[k] for k in ("hidden", "weight", "bias", "target", "token_weight", "cu_seqlens")]
    arguments = [scores[k] for k in ("reward", "utility", "lam", "ref_logprob")]
    of_labels = (
        rows[0].detach(),
        PAIRS,
        *arguments,
        labels,
        None,
        None,
        own["value"],
        own["group"],
        0.3,
        False,
    )
    q, goal = ops.preference_labels_op(*of_labels)
    aims = labels, PAIRS, q, goal, own["group"], scores["ref_logprob"], 0.3
    leaves = [x.requires_grad_() for x in rows[:3]] + rows[3:]
    for op, given_to in (
        (ops.preference_labels_op, of_labels),
        (ops.preference_terms_op, (torch.randn(10).requires_grad_(), *aims)),
        (
            ops.preference_pass_op,
            (*leaves, *aims, 0.8, 3.0, budget_of(data, 12, 3.0), 0.0, True, True, True, False),
        ),
    ):
        assert set(torch.library.opcheck(op, given_to).values()) == {"SUCCESS"}


# One op makes the terms of a loss in one piece, another one those in chunks.
@pytest.mark.parametrize("labels,small", [("regression", True), ("single", False), ("listwise", True)])
def test_fullgraph_compile_of_a_caller_for_batches_of_other_sizes(labels, small):
    torch._dynamo.reset()

    def caller(data, keywords, beta, budget):
        leaves = data | {"hidden": data["hidden"] * 2}
        return lagrangian_preference_loss(**leaves, **keywords, beta=beta, memory_budget_bytes=budget).loss

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    for lengths, beta in (((5, 3, 4), 0.3), ((7, 2, 0, 6), 0.4), ((8, 8, 1, 2, 2), 0.7)):
        pairs = torch.tensor([[0, 1], [1, 0], [0, 1]])[: len(lengths) - 1]
        data, scores = problem(lengths=lengths, pairs=pairs)
        keywords, found = scores | form_of(labels, len(lengths)), []
        for function in (compiled, caller):
            leaves = data | {k: data[k].detach().requires_grad_() for k in ("hidden", "weight")}
            loss = function(leaves, keywords, beta, budget_of(data, 6) if small else None)
            found.append([loss.detach(), *torch.autograd.grad(loss, [leaves["hidden"], leaves["weight"]])])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_double_backward_is_a_clear_error():
    for labels in FORMS:
        data, scores = problem()
        leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
        for budget in (None, budget_of(data, 12)):
            loss = lagrangian_preference_loss(
                **data, **scores, **form_of(labels), beta=1.0, memory_budget_bytes=budget
            ).loss
            gradient = torch.autograd.grad(loss, leaves, create_graph=True)[1]
            with pytest.raises(RuntimeError, match="double backward is not supported"):
                gradient.square().sum().backward()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"labels": "single"}, "value = None: expected a tensor"),
        ({"labels": "single", "value": torch.zeros(9)}, r"value has shape \[9\]: expected \[10\]"),
        ({"labels": "single", "value": torch.full((10,), math.inf)}, r"value\[0\] = inf: expected a finite"),
        ({"labels": "listwise"}, "group = None: expected a tensor"),
        (
            {"labels": "listwise", "group": torch.zeros(10)},
            "group has dtype float32: expected int64 or int32",
        ),
        (
            {"labels": "listwise", "value": torch.zeros(10)},
            "value is given with labels = 'listwise': pass lab",
        ),
        (
            {"group": torch.zeros(10, dtype=torch.int64)},
            "group is given with labels = 'soft': pass labels='list",
        ),
        (
            {"labels": "regression", "preference": torch.zeros(6)},
            "preference is given with labels = 'regression'",
        ),
        ({"labels": "regression", "reward": None}, "reward = None: expected a tensor"),
    ],
)
def test_bad_arguments(changes, message):
    data, scores = problem()
    with pytest.raises(ValueError, match=message):
        lagrangian_preference_loss(**data, **scores | changes, beta=1.0)
