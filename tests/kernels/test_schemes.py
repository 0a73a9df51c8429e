"""The schemes of the loss head against dense float64 autograd, by the error rule,
and its torch.library ops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.run.measure import peak_bytes
from kernels import lagrangian_policy_loss, lagrangian_preference_loss, reference, sequence_logprob
from kernels.loss_head import ops
from kernels.loss_head.records import Head
from kernels.loss_head.rows import TorchRows
from kernels.loss_head.rows_native import NativeRows
from kernels.loss_head.schemes import plan, row_workspace
from tests.helpers.losses import (
    LENGTHS,
    PAIRS,
    assert_close,
    budget_of,
    dense_dpo,
    dense_logprob,
    make,
    policy,
    preference_gradients,
    problem,
    reordered,
)


def check(data, labels, needs=("hidden", "weight", "bias"), budget=None, options=None, beta=0.4):
    options = options or {}

    def fused(leaves):
        result = lagrangian_preference_loss(
            **leaves, **labels, beta=beta, memory_budget_bytes=budget, **options
        )
        return result.loss, result.margin, result.preference

    got = preference_gradients(fused, data, needs=needs)
    plain = reordered(
        lambda moved: preference_gradients(lambda d: dense_dpo(d, options, labels, beta), moved, needs=needs),
        data,
    )
    exact = preference_gradients(lambda d: dense_dpo(d, options, labels, beta), data, torch.float64, needs)
    assert_close(got, plain, exact)
    return got


class Spy:
    """Counts the rows of matrix products with the head, by kind."""

    def __init__(self, monkeypatch):
        self.forward = self.hidden = self.weight = 0
        for cls in (TorchRows, NativeRows):
            for name in ("values", "product", "keep", "add_gradients"):
                monkeypatch.setattr(cls, name, self.counted(vars(cls)[name], name))

    def counted(self, original, name):
        def call(work, *arguments):
            if name != "add_gradients":
                rows = len(arguments[0])
                self.forward += rows
                self.hidden += rows * (name == "product")
            else:
                kept, *_, sums = arguments
                self.hidden += len(kept.z) * (sums.d_hidden is not None)
                self.weight += len(kept.z) * (sums.d_weight is not None)
            return original(work, *arguments)

        return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "rows,options",
    [(12, {}), (26, {}), (40, {}), (12, {"softcap": 3.0, "temperature": 0.7}), (16, {"softcap": 3.0})],
    ids=str,
)
def test_whole_pairs_in_a_chunk(dtype, rows, options, monkeypatch):
    """This is scheme D, and E for the two sequences of 14 rows where a chunk holds 12.

    Every row that stands in a pair takes three products.
    """
    data, labels = problem(dtype, bias=True, weighted=True)
    spy, softcap = Spy(monkeypatch), options.get("softcap")
    budget = budget_of(data, rows, softcap)
    head = Head(data["weight"], data["bias"], 1.0, softcap)
    assert plan(row_workspace(data["hidden"]), data["hidden"], head, budget, True, True).kept < 42
    check(data, labels, budget=budget, options=options)
    unpaired = LENGTHS[5] + LENGTHS[7]
    assert (spy.forward, spy.hidden, spy.weight) == (42, 42 - unpaired, 42 - unpaired)


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("weight",), ("bias",), ("hidden", "bias")])
def test_subsets_of_gradients_in_chunks(needs):
    data, labels = problem(bias=True)
    check(data, labels, needs, budget_of(data, 12))


def test_two_sequences_longer_than_a_chunk(monkeypatch):
    """In scheme E one unknown scale stands for the difference of two sums,
    over many chunks: three products."""
    data, labels = problem(
        lengths=(50, 3, 41), pairs=torch.tensor([[2, 0], [0, 2]]), bias=True, weighted=True
    )
    # A negative weight must not be taken for the second sequence's sign.
    data["token_weight"][[1, 60]] = -0.5
    spy = Spy(monkeypatch)
    check(data, labels, budget=budget_of(data, 16))
    assert (spy.forward, spy.weight) == (94, 91)


def test_more_than_one_long_pair(monkeypatch):
    """The second pair needs an accumulator of its own within the budget, and is computed twice without it."""
    lengths, pairs = (30, 31, 29, 33), torch.tensor([[0, 1], [2, 3]])
    data, labels = problem(lengths=lengths, pairs=pairs)
    for rows, forward in ((24, 123), (10, 123 + 62)):
        with monkeypatch.context() as patch:
            spy = Spy(patch)
            check(data, labels, budget=budget_of(data, rows))
            assert spy.forward == forward


def test_a_component_longer_than_a_chunk_is_computed_twice(monkeypatch):
    pairs = torch.tensor([[0, 1], [1, 2]])
    data, labels = problem(lengths=(10, 11, 12, 5), pairs=pairs)
    spy = Spy(monkeypatch)
    check(data, labels, budget=budget_of(data, 16))
    assert (spy.forward, spy.weight) == (33 * 2 + 5, 33)


def test_a_pair_of_empty_sequences_beside_one_that_fills_chunks():
    data, labels = problem(lengths=(30, 0, 0, 31), pairs=torch.tensor([[0, 3], [1, 2]]))
    for rows in (10, 61):
        check(data, labels, budget=budget_of(data, rows))


def test_pairs_far_apart_share_a_chunk():
    """Rows that do not follow each other are gathered."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    data, labels = problem(lengths=tuple(range(1, 25)), pairs=order.view(12, 2))
    check(data, labels, budget=budget_of(data, 60))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype,rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_row_of_weight_zero_adds_nothing_even_nan_in_every_scheme(dtype, rtol, softcap):
    for budget_rows in (12, 30, None):
        results = []
        for value in (0.3, math.nan):
            data, labels = problem(dtype)
            data["token_weight"] = torch.ones(42)
            data["token_weight"][[2, 14, 30]] = 0
            budget = None if budget_rows is None else budget_of(data, budget_rows, softcap)
            data["hidden"][[2, 14, 30]] = value
            leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
            loss = lagrangian_preference_loss(
                **data, **labels, beta=0.5, memory_budget_bytes=budget, softcap=softcap
            ).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for clean, spoiled in zip(*results, strict=True):
            torch.testing.assert_close(clean, spoiled, rtol=rtol, atol=rtol)


def test_nan_in_a_row_with_weight_reaches_the_gradients():
    data, labels = problem()
    data["hidden"][30, 0] = math.nan
    for budget in (None, budget_of(data, 12)):
        leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
        loss = lagrangian_preference_loss(**data, **labels, beta=0.5, memory_budget_bytes=budget).loss
        d_hidden, d_weight = torch.autograd.grad(loss, leaves)
        assert loss.isnan() and d_hidden[30].isnan().all() and d_weight.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_part_of_the_rows_kept(dtype, monkeypatch):
    """In scheme B with fewer rows than there are, the kept ones are not computed again."""
    data = make(rows=100, vocabulary=509, lengths=(60, 40), bias=True, weighted=True, dtype=dtype)
    whole = budget_of(data, 100)
    counts = []
    for share in (1.5, 0.8, 0.3):
        with monkeypatch.context() as patch:
            spy = Spy(patch)
            leaves = [data[name].detach().requires_grad_() for name in ("hidden", "weight", "bias")]
            keywords = data | dict(zip(("hidden", "weight", "bias"), leaves, strict=True))
            torch.autograd.grad(
                sequence_logprob(**keywords, memory_budget_bytes=int(whole * share)).sum(), leaves
            )
            counts.append(spy.forward)
    assert counts[0] == 100 < counts[1] < 150 and counts[2] == 200


@pytest.mark.parametrize("budget", [None, 60_000])
def test_two_runs_are_bitwise_equal(budget):
    results = []
    for _ in range(2):
        data, labels = problem(bias=True)
        leaves = [data[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        loss = lagrangian_preference_loss(**data, **labels, beta=0.3, memory_budget_bytes=budget).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


LARGE_HEAD = 4099, 16, (40, 60, 20, 20, 80, 80), 900_000
MANY_STATES = 300, 256, (600, 500, 700, 400, 300, 500), 2_400_000  # more of them than the budget holds


# Each two values of two parameters stand together once at least.
@pytest.mark.parametrize(
    "op,needs,shape,dtype,upstream",
    [
        ("preference", ("hidden",), LARGE_HEAD, torch.float32, 1),
        ("preference", ("hidden",), MANY_STATES, torch.float32, 3),
        ("preference", ("hidden", "weight"), LARGE_HEAD, torch.bfloat16, 1),
        ("preference", ("hidden", "weight"), MANY_STATES, torch.bfloat16, 3),
        ("policy", ("hidden",), LARGE_HEAD, torch.bfloat16, 3),
        ("policy", ("hidden",), MANY_STATES, torch.bfloat16, 1),
        ("policy", ("hidden", "weight"), LARGE_HEAD, torch.float32, 3),
        ("policy", ("hidden", "weight"), MANY_STATES, torch.float32, 1),
    ],
)
def test_memory_stays_within_the_budget(op, needs, shape, dtype, upstream):
    """The peak counts all allocations beyond inputs, less the returned gradients and one float32 accumulator,
    and less the gradient in the states where it is formed before a loss is scaled."""
    vocabulary, width, lengths, budget = shape
    data, labels = problem(
        dtype,
        lengths=lengths,
        pairs=torch.tensor([[0, 1], [2, 3], [4, 5]]),
        vocabulary=vocabulary,
        width=width,
    )
    leaves = [data[name].requires_grad_() for name in needs]

    def step():
        if op == "preference":
            loss = lagrangian_preference_loss(**data, **labels, beta=0.1, memory_budget_bytes=budget).loss
        else:
            loss = policy(data, labels, memory_budget_bytes=budget).loss
        torch.autograd.grad(loss if upstream == 1 else upstream * loss, leaves)

    peak = peak_bytes(step, torch.device("cpu"))
    allowed = sum(leaf.nbytes for leaf in leaves) + (4 * data["weight"].numel() if "weight" in needs else 0)
    allowed += data["hidden"].nbytes if upstream != 1 else 0
    assert 0.1 * budget < peak <= budget + allowed
    assert budget < sum(lengths) * (vocabulary + width) * 4


def test_a_frozen_head_needs_no_third_product_in_a_small_budget(monkeypatch):
    """J W of all rows does not fit beside the gradient, so that it is formed in the gradient's place."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        data, labels = problem(
            dtype, tuple(60 * n for n in LENGTHS), vocabulary=50, width=512, bias=True, weighted=True
        )
        data["weight"] /= 512**0.5
        data["token_weight"][3] = 0
        budget = int(1.8 * data["hidden"].nbytes)
        head = Head(data["weight"], data["bias"], 1.0, None)
        planned = plan(row_workspace(data["hidden"]), data["hidden"], head, budget, True, False)
        assert planned.kind == "values"
        with monkeypatch.context() as patch:
            spy = Spy(patch)
            got = check(data, labels, ("hidden",), budget)
            assert (spy.forward, spy.hidden, spy.weight) == (2520, 2520, 0) and not got["d_hidden"][3].any()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8),
    st.integers(1, 40),
    st.integers(3, 30),
    st.integers(0, 999),
)
def test_any_pairs_agree_with_dense(lengths, pairs, vocabulary, rows, seed):
    pairs = torch.tensor([(a % len(lengths), b % len(lengths)) for a, b in pairs], dtype=torch.int64).view(
        -1, 2
    )
    data, labels = problem(torch.float64, tuple(lengths), pairs, vocabulary, seed=seed, weighted=True)
    if not len(pairs):
        data["hidden"].requires_grad_()
        loss = lagrangian_preference_loss(
            **data, **labels, beta=0.4, memory_budget_bytes=budget_of(data, rows)
        ).loss
        assert loss == 0 and not torch.autograd.grad(loss, data["hidden"])[0].any()
        return
    check(data, labels, ("hidden", "weight"), budget_of(data, rows))


def test_gradients_that_were_formed_in_the_forward_pass_survive_a_second_backward_pass():
    data, labels = problem(torch.float64)
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
    loss = lagrangian_preference_loss(
        **data, **labels, beta=0.5, memory_budget_bytes=budget_of(data, 16)
    ).loss
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    loss.backward(retain_graph=True)
    for leaf in leaves:
        leaf.grad.mul_(3)
    (2 * loss).backward(retain_graph=True)
    for leaf, gradient in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 5 * gradient, rtol=1e-12, atol=0)
    spoiled = torch.autograd.grad(loss, leaves, retain_graph=True)[1]
    spoiled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("budget", [None, 60_000])
def test_tied_embeddings_accumulation_and_repeated_sequences(budget):
    """The head is also the embedding that made the states, two losses add up in .grad,
    and the same sequence stands in many pairs."""
    data, labels = problem(torch.float64, pairs=torch.tensor([[0, 1], [0, 1], [1, 0], [0, 3], [6, 6]]))
    tokens = torch.arange(42) % 211
    grads = []
    for fused in (True, False):
        weight = data["weight"].clone().requires_grad_()
        for beta in (0.3, 0.7):
            leaves = data | {"hidden": torch.tanh(weight[tokens]) * 3, "weight": weight}
            if fused:
                loss = lagrangian_preference_loss(
                    **leaves, **labels, beta=beta, memory_budget_bytes=budget
                ).loss
            else:
                loss = dense_dpo(leaves, {}, labels, beta)[0]
            (loss * 2.5).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


def test_loss_falls_along_the_gradient_and_scales_with_kappa():
    data, labels = problem(torch.float64)
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
    loss = lagrangian_preference_loss(**data, **labels, beta=0.5).loss
    gradients = torch.autograd.grad(loss, leaves)
    moved = {
        name: (x - 1e-3 * g).detach()
        for name, x, g in zip(("hidden", "weight"), leaves, gradients, strict=True)
    }
    assert lagrangian_preference_loss(**data | moved, **labels, beta=0.5).loss < loss


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
def test_rows_in_any_order_of_sequences(needs):
    """A permutation of the sequences permutes results and gradients."""
    data, labels = problem(torch.float64, weighted=True)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    bounds = data["cu_seqlens"]
    rows = torch.cat([torch.arange(bounds[n], bounds[n + 1]) for n in order])
    moved = {k: data[k][rows] for k in ("hidden", "target", "token_weight")} | {"weight": data["weight"]}
    moved["cu_seqlens"] = torch.tensor([0, *(LENGTHS[n] for n in order)]).cumsum(0)
    back = order.argsort()
    moved_labels = {k: v[order] if len(v) == 10 else v for k, v in labels.items()} | {"pairs": back[PAIRS]}
    results = []
    for d, chosen in ((data, labels), (moved, moved_labels)):
        leaves = [d[name].detach().requires_grad_() for name in needs]
        loss = lagrangian_preference_loss(
            **d | dict(zip(needs, leaves, strict=True)),
            **chosen,
            beta=0.5,
            memory_budget_bytes=budget_of(data, 12),
        ).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    results[0][1] = results[0][1][rows]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_plan_prefers_three_products_then_memory():
    data = make(rows=64, vocabulary=4096, lengths=(64,))
    hidden, weight = data["hidden"], data["weight"]

    def made(budget, *needs):
        return plan(TorchRows, hidden, Head(weight, None, 1.0, None), budget, *needs)

    whole = made(1 << 30, True, True)
    assert (whole.kind, whole.rows, whole.kept) == ("kept", 64, 64)
    assert made(1 << 30, True, False).kind == "product" and made(1 << 30, False, False).kind == "values"
    assert 0 < made(900_000, True, True).kept < 64
    assert made(200_000, True, True).kept == 0
    with pytest.raises(ValueError, match="memory_budget_bytes = 1000: expected at least"):
        made(1000, True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])
@pytest.mark.parametrize("advantage,normalize", [("rloo", "token"), ("group_norm", "sequence")])
@pytest.mark.parametrize(
    "clip,kl_coef,kl",
    [(None, 0.0, "k2"), ((0.2, 0.3), 0.1, "k2"), ((0.1, 0.1), 0.5, "k3"), ((0.2, 0.3), 0.1, "score")],
)
def test_policy_loss_against_autograd(either_rows, dtype, needs, advantage, normalize, clip, kl_coef, kl):
    data, labels = problem(dtype, bias=True, weighted=clip is not None)
    group = torch.tensor([7, -1, 7, 7, -1, -1, 2**40, 3, 3, 7])
    g = torch.Generator().manual_seed(8)
    token = dense_logprob(**{k: v for k, v in data.items() if k != "token_weight"})[1].double()
    old = (token + 0.3 * torch.randn(42, generator=g)).float() if clip else None
    ref = (token + torch.randn(42, generator=g)).float() if kl_coef else None
    penalty = None
    if kl == "score":
        weighted = old.double() * data["token_weight"].double()
        old_N = torch.stack([x.sum() for x in weighted.split(list(LENGTHS))])
        ref = (old_N + torch.randn(10, generator=g)).float()
        penalty = kl_coef * (old_N - ref.double())
    options = {
        "old_logprob": old,
        "ref_logprob": ref,
        "clip": clip,
        "kl_coef": kl_coef,
        "kl": kl,
        "normalize": normalize,
    }
    options |= {"group": group, "advantage": advantage} | {k: labels[k] for k in ("reward", "utility", "lam")}
    exact_advantage = reference.group_advantage(
        *(options[k] for k in ("group", "reward", "utility", "lam")), advantage, penalty
    )
    budget = None if dtype.itemsize == 2 else 40_000

    def fused(leaves):
        result = lagrangian_policy_loss(**leaves, **options, memory_budget_bytes=budget)
        torch.testing.assert_close(result.advantage, exact_advantage, rtol=1e-12, atol=1e-12)
        assert not any(x.requires_grad for x in result[1:])
        if penalty is not None:
            assert float(result.kl) == pytest.approx(float(penalty.mean()) / kl_coef, rel=1e-6)
        return result.loss, result.logprob, result.token_logprob

    def dense(leaves):
        result = reference.lagrangian_policy_loss(**leaves, **options)
        return result.loss, result.logprob, result.token_logprob

    got = preference_gradients(fused, data, needs=needs)
    plain = reordered(lambda moved: preference_gradients(dense, moved, needs=needs), data)
    assert_close(got, plain, preference_gradients(dense, data, torch.float64, needs))


def test_policy_statistics():
    data, labels = problem(torch.float64)
    token = sequence_logprob(**data, return_token_logprob=True)[1]
    shift = torch.zeros(42, dtype=torch.float64)
    shift[:5] = -1.0  # the ratio is e in the first sequence, whose advantage is positive
    labels["reward"], labels["utility"] = torch.tensor([1.0, 0] * 5), torch.zeros(10, 2)
    group = torch.arange(10) // 2
    result = policy(data, labels, group, old_logprob=token + shift, ref_logprob=token - 0.5, clip=(0.2, 0.2))
    assert result.clip_fraction.item() == pytest.approx(5 / 42)
    assert result.kl.item() == pytest.approx(0.125)
    assert result.advantage.tolist() == [1, -1] * 5
    assert policy(data, labels, group).kl.isnan()


def test_the_kl_in_the_score_has_the_gradient_of_the_kl_of_sequences():
    """All sequences of two tokens of two are listed, the second state depends on the first token, and the
    mean over pairs of draws, with the other draw as the baseline, is -E[s] + beta KL over two. The KL term of
    each token alone has another gradient."""
    g = torch.Generator().manual_seed(5)
    states, weight = (torch.randn(n, 2, generator=g, dtype=torch.float64) for n in (3, 2))
    reference_N, s_N = torch.randn(2, 4, generator=g, dtype=torch.float64).unbind()
    reference_N, beta = reference_N.log_softmax(0), 0.7
    states.requires_grad_()

    def token_logprobs():
        table = (states @ weight.T).log_softmax(1)
        return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a in (0, 1) for b in (0, 1)])

    logprob_N = token_logprobs().sum(1)
    p_N = logprob_N.exp()
    exact = (p_N * (beta * (logprob_N - reference_N) - s_N)).sum() / 2
    (want,) = torch.autograd.grad(exact, states)
    old, p_N = token_logprobs().detach(), p_N.detach()

    def mean_gradient(kl, ref_of):
        total = torch.zeros_like(states)
        for i in range(4):
            for j in range(4):
                rows = torch.tensor([0, 1 + i // 2, 0, 1 + j // 2])
                loss = lagrangian_policy_loss(
                    states[rows],
                    weight,
                    torch.tensor([i // 2, i % 2, j // 2, j % 2]),
                    torch.tensor([0, 2, 4]),
                    torch.zeros(2, dtype=torch.int64),
                    s_N[[i, j]],
                    torch.zeros(2, 0),
                    torch.zeros(0),
                    old_logprob=old[[i, j]].flatten(),
                    ref_logprob=ref_of([i, j]),
                    kl_coef=beta,
                    kl=kl,
                ).loss
                total += p_N[i] * p_N[j] * torch.autograd.grad(loss, states)[0]
        return total

    torch.testing.assert_close(mean_gradient("score", lambda n: reference_N[n]), want, rtol=1e-12, atol=1e-13)
    first = reference_N.view(2, 2).logsumexp(1).repeat_interleave(2)
    by_token = torch.stack([first, reference_N - first], 1)
    assert (mean_gradient("k2", lambda n: by_token[n].flatten()) - want).abs().max() > 1e-3


def test_equal_scores_have_advantage_exactly_zero():
    data, labels = problem()
    labels["reward"], labels["utility"] = torch.full((10,), 0.1), torch.full((10, 2), 0.7)
    for kind in ("rloo", "group_norm"):
        assert policy(data, labels, torch.zeros(10, dtype=torch.int32), advantage=kind).advantage.eq(0).all()


def test_policy_of_nothing():
    data, labels = problem(lengths=(0,) * 10)
    data["hidden"].requires_grad_()
    result = policy(data, labels)
    result.loss.backward()
    assert result.loss == 0 and data["hidden"].grad.shape == (0, 8)


def test_policy_gradcheck():
    data, labels = problem(torch.float64, vocabulary=5, width=3)
    old = sequence_logprob(**data, return_token_logprob=True)[1] + 0.05
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]

    def call(hidden, weight):
        return policy(
            data | {"hidden": hidden, "weight": weight},
            labels,
            old_logprob=old,
            ref_logprob=old - 0.3,
            kl_coef=0.2,
        ).loss

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("op", ["preference", "policy"])
def test_double_backward_is_a_clear_error(op):
    data, labels = problem()
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
    budget = budget_of(data, 12)
    if op == "preference":
        loss = lagrangian_preference_loss(**data, **labels, beta=1.0, memory_budget_bytes=budget).loss
    else:
        loss = policy(data, labels, memory_budget_bytes=budget).loss
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)[1]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kl_coef": 0.1}, "kl_coef = 0.1 with ref_logprob = None"),
        ({"kl_coef": -1.0}, "kl_coef = -1.0: expected a finite number"),
        ({"clip": 0.2}, "clip = 0.2: expected"),
        ({"clip": (1.5, 0.2)}, r"clip = \(1.5, 0.2\)"),
        ({"kl": "k1"}, "kl = 'k1': expected 'k2' or 'k3' or 'score'"),
        ({"kl": "score", "kl_coef": 0.1}, r"ref_logprob = None: pass the reference's log-probs \[N\]"),
        ({"kl": "score", "ref_logprob": torch.zeros(42)}, r"ref_logprob has shape \[42\]: expected \[10\]"),
        ({"kl": "score", "ref_logprob": torch.zeros(10)}, "kl = 'score' with old_logprob = None: pass"),
        ({"advantage": "gae"}, "advantage = 'gae'"),
        ({"normalize": "batch"}, "normalize = 'batch'"),
        ({"old_logprob": torch.zeros(3)}, r"old_logprob has shape \[3\]: expected \[42\]"),
        ({"ref_logprob": torch.full((42,), math.nan)}, r"ref_logprob\[0\] = nan"),
        ({"group": torch.zeros(9, dtype=torch.int64)}, r"group has shape \[9\]"),
        ({"group": torch.zeros(10)}, "group has dtype float32"),
    ],
)
def test_bad_policy_arguments(options, message):
    data, labels = problem()
    scores = {
        "group": torch.zeros(10, dtype=torch.int64),
        **{k: labels[k] for k in ("reward", "utility", "lam")},
    }
    with pytest.raises(ValueError, match=message):
        lagrangian_policy_loss(**data, **scores | options)


# These tests are about torch.library.


def op_calls():
    """Returns (op, arguments) of a small call of each op."""
    data, labels = problem(bias=True, weighted=True)
    rows = [data[k] for k in ("hidden", "weight", "bias", "target", "token_weight", "cu_seqlens")]
    leaves = [x.requires_grad_() for x in rows[:3]] + rows[3:]
    frozen = [rows[0].detach().requires_grad_(), *(x.detach() for x in rows[1:3]), *rows[3:]]
    q, no_goal = torch.full((6,), 0.7), torch.zeros(0, dtype=torch.float64)
    aims = "soft", PAIRS, q, no_goal, None, labels["ref_logprob"], 0.3
    budget = budget_of(data, 12)
    advantage = torch.linspace(-1, 1, 10, dtype=torch.float64)
    scores = [labels[k] for k in ("reward", "utility", "lam")]
    detached = rows[0].detach()
    return {
        "full": (ops.sequence_logprob_op, (*leaves, 0.8, 3.0, 1 << 28, True, True, False)),
        "frozen": (ops.sequence_logprob_op, (*frozen, 0.8, 3.0, 1 << 28, True, False, False)),
        "recomputed": (ops.sequence_logprob_op, (*leaves, 0.8, None, budget, True, True, False)),
        "labels": (
            ops.preference_labels_op,
            (detached, PAIRS, *scores, labels["ref_logprob"], "soft", *(None,) * 4, 0.3, False),
        ),
        "terms": (
            ops.preference_terms_op,
            (torch.randn(10).requires_grad_(), *aims),
        ),
        "pass": (
            ops.preference_pass_op,
            (
                *leaves,
                *aims,
                0.8,
                3.0,
                budget_of(data, 12, 3.0),
                0.0,
                True,
                True,
                True,
                False,
            ),
        ),
        "advantage": (
            ops.group_advantage_op,
            (
                detached,
                *rows[4:],
                torch.arange(10) % 3,
                *scores,
                torch.full((42,), -5.0),
                torch.full((10,), -20.0),
                0.1,
                "score",
                "rloo",
                False,
            ),
        ),
        "policy": (
            ops.policy_pass_op,
            # Without a reference the KL is NaN, which is not equal to itself.
            (
                *leaves,
                advantage,
                None,
                torch.full((42,), -5.0),
                0.2,
                0.3,
                0.1,
                "k2",
                "token",
                0.8,
                3.0,
                budget_of(data, 12, 3.0),
                0.0,
                True,
                True,
                True,
                False,
            ),
        ),
    }


@pytest.mark.parametrize(
    "name", ["full", "frozen", "recomputed", "labels", "terms", "pass", "advantage", "policy"]
)
def test_opcheck(name):
    torch._dynamo.reset()
    op, arguments = op_calls()[name]
    checked = torch.library.opcheck(op, arguments)
    assert len(checked) == 4 and set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
def test_fullgraph_compile_of_a_caller(small, needs):
    """There is no graph break: nothing in the public ops asks the host for a value."""
    torch._dynamo.reset()
    data, labels = problem()
    budget = budget_of(data, 12) if small else None

    def caller(hidden, weight, lam):
        rest = {k: data[k] for k in ("target", "cu_seqlens")}
        loss = lagrangian_preference_loss(
            hidden * 2, weight, **rest, **labels | {"lam": lam}, beta=0.3, memory_budget_bytes=budget
        ).loss
        group = torch.arange(10) % 3
        scores = {"reward": labels["reward"], "utility": labels["utility"], "lam": lam}
        return (
            loss
            + lagrangian_policy_loss(
                hidden, weight, **rest, group=group, **scores, memory_budget_bytes=budget
            ).loss
        )

    def gradients(function):
        leaves = {k: data[k].detach().requires_grad_(k in needs) for k in ("hidden", "weight")}
        loss = function(leaves["hidden"], leaves["weight"], labels["lam"])
        return [loss.detach(), *torch.autograd.grad(loss, [leaves[k] for k in needs])]

    for got, want in zip(
        gradients(torch.compile(caller, fullgraph=True, backend="aot_eager")), gradients(caller), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", ["logprob", "preference", "policy"])
def test_a_compiled_caller_takes_batches_of_other_sizes_and_other_options(op):
    """Ragged batches and annealed options come as symbols from the second call on."""
    torch._dynamo.reset()

    def caller(data, labels, beta, temperature):
        leaves = data | {"hidden": data["hidden"] * 2}
        if op == "logprob":
            return sequence_logprob(**leaves, temperature=temperature).square().sum()
        if op == "preference":
            return lagrangian_preference_loss(**leaves, **labels, beta=beta, temperature=temperature).loss
        references = {"ref_logprob": torch.full((len(data["target"]),), -5.0), "kl_coef": beta}
        return policy(
            leaves, labels, torch.arange(len(labels["reward"])) % 2, **references, temperature=temperature
        ).loss

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    for lengths, beta, temperature in (
        ((5, 3, 4), 0.3, 1.0),
        ((7, 2, 0, 6), 0.4, 0.8),
        ((3, 9), 0.25, 1.3),
        ((8, 8, 1, 2, 2), 0.7, 0.9),
    ):
        data, labels = problem(
            lengths=lengths, pairs=torch.tensor([[0, 1], [1, 0], [0, 1]])[: len(lengths) - 1]
        )
        found = []
        for function in (compiled, caller):
            leaves = data | {k: data[k].detach().requires_grad_() for k in ("hidden", "weight")}
            loss = function(leaves, labels, beta, temperature)
            found.append([loss.detach(), *torch.autograd.grad(loss, [leaves["hidden"], leaves["weight"]])])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_fake_tensors_need_no_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = problem()
    with FakeTensorMode() as mode:
        data, labels = ({k: mode.from_tensor(v) for k, v in values.items()} for values in real)
        data["hidden"].requires_grad_()
        result = lagrangian_preference_loss(**data, **labels, beta=0.2)
        assert result.loss.shape == () and result.margin.shape == (6,)
        (gradient,) = torch.autograd.grad(result.loss, data["hidden"])
        assert gradient.shape == (42, 8)
