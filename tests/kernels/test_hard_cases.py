"""Hard cases of the loss head through every scheme of `kernels.loss_head.schemes`,
against dense float64 autograd, by the error rule of tests/helpers/losses.py.
Cases that test_losses and test_schemes hold already are not repeated.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import kernels
from bench.run.measure import peak_bytes
from kernels import dual_moments, reference
from kernels.loss_head.rows import TorchRows
from kernels.loss_head.schemes import row_workspace
from tests.helpers.losses import assert_close
from tests.helpers.schemes import (
    ALL_OPTIONS,
    FROZEN,
    FULL,
    SCHEMES,
    Scheme,
    budget_for,
    check,
    fused,
    inputs,
    keywords_of,
    run,
    with_gradients,
)

EACH_SCHEME = pytest.mark.parametrize("scheme", list(SCHEMES)[:7])
EACH_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


@pytest.mark.parametrize(
    "scheme,dtype",
    [(name, torch.float16) for name in SCHEMES if name not in ("B", "C")]
    + [
        (name, dtype)
        for name in ("F", "F, frozen head")
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ],
)
def test_all_options_at_once(scheme, dtype, taken):
    """Batches are ragged, pairs have one or two empty members and share sequences; there are a bias,
    token weights, temperature and softcap, and the upstream scalar is 3."""
    check(scheme, inputs(dtype, weighted=True), taken, options=ALL_OPTIONS)


@EACH_SCHEME
@EACH_DTYPE
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_rows_of_extreme_values(scheme, dtype, softcap, taken):
    """Rows are uniform, have all logits near 300 or -300, p near 1 or near 0, or one logit of 3 past the last
    whole block where the rest are -15."""
    data = inputs(dtype)
    hidden, weight, last = data["hidden"], data["weight"], 140
    weight[:, 0], weight[:, 1], data["bias"][:] = 1, 0, 0
    weight[last, 1] = 1
    hidden[:, :2] = 0
    hidden[[0, 6]] = 0
    hidden[[1, 7], 0] = 300
    hidden[[2, 8], 0] = -300
    for rows, offset, peak, target in (([3, 9], 0, 40, last), ([4, 10], 0, 40, 5), ([5, 11], -15, 18, last)):
        hidden[rows] = 0
        hidden[rows, 0], hidden[rows, 1] = offset, peak
        data["target"][rows] = target
    got = check(scheme, data, taken, options={"softcap": softcap})
    assert all(x.isfinite().all() for x in got.values())
    if SCHEMES[scheme].op == "logprob" and row_workspace(data["hidden"].to(taken.device)) is not TorchRows:
        assert got["token"][0].item() == pytest.approx(-math.log(141), rel=1e-6)
        difference = 18 if softcap is None else 30 * (math.tanh(3 / 30) + math.tanh(15 / 30))
        assert got["token"][5].item() == pytest.approx(-math.log1p(140 * math.exp(-difference)), rel=1e-4)


@EACH_SCHEME
@EACH_DTYPE
def test_common_offset_of_2_to_the_24(scheme, dtype, taken):
    """Logits are even numbers, which this offset keeps.

    Values and gradients are those without it, bit for bit.
    """
    data = inputs(dtype)
    for name in ("hidden", "weight"):
        data[name] = data[name].round().clamp(-2, 2)
    data["hidden"] *= 2
    data["bias"] = torch.zeros(141)
    keywords = keywords_of(SCHEMES[scheme].op, data)
    near = check(scheme, data, taken, keywords)
    far = run(scheme, data | {"bias": torch.full((141,), 2.0**24)}, keywords, device=taken.device)
    for name, x in near.items():
        assert torch.equal(far[name], x), name


@EACH_SCHEME
@EACH_DTYPE
def test_minus_infinity(scheme, dtype, taken):
    """Single tokens and whole ends of the vocabulary without mass have no gradient and spoil nothing."""
    data = inputs(dtype)
    gone = torch.tensor([*range(40), 77, *range(120, 141)])
    data["bias"][gone] = -math.inf
    data["target"] = 41 + data["target"] % 30
    got = check(scheme, data, taken)
    assert all(x.isfinite().all() for x in got.values())
    if "d_weight" in got:
        assert not got["d_weight"][gone].any() and not got["d_bias"][gone].any()


@pytest.mark.parametrize("scheme", ["D", "E", "B, preference", "C, preference"])
@pytest.mark.parametrize(
    "dtype,size", [(torch.float32, 1e3), (torch.float32, 1e6), (torch.bfloat16, 1e3), (torch.float16, 1e6)]
)
@pytest.mark.parametrize("kind", ["given", "huge lambda", "lambda 0"])
def test_saturated_margins(scheme, dtype, size, kind, taken):
    """|margin| lies far beyond what a sigmoid resolves, both ways, for labels 0, 1/2 and 1, for ties,
    and for labels that are saturated themselves."""
    data = inputs(dtype)
    keywords = keywords_of("preference", data)
    keywords["ref_logprob"] += size * torch.tensor([-1.0, 0, 1, 0, -1, 1])
    if kind == "given":
        keywords |= {"labels": "given", "preference": torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0])}
    elif kind == "huge lambda":
        keywords["lam"] = torch.tensor([-1e6, -2e6])
    else:
        keywords["lam"], keywords["reward"] = torch.zeros(2), torch.ones(6)
    got = check(scheme, data, taken, keywords)
    assert got["loss"] > 0.01 * size and got["margin"].abs().max() > 0.1 * size
    assert all(x.isfinite().all() for x in got.values()) and got["d_hidden"].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hard_cases_on_each_make_of_processor(scheme, processor, taken):
    """The cases above hold in float32 on each make, and all of them at once."""
    check(scheme, inputs(weighted=True), taken, options=ALL_OPTIONS)
    for softcap in (None, 30.0):
        test_rows_of_extreme_values(scheme, torch.float32, softcap, taken)
    test_common_offset_of_2_to_the_24(scheme, torch.float32, taken)
    test_minus_infinity(scheme, torch.float32, taken)
    if SCHEMES[scheme].op == "preference":
        test_saturated_margins(scheme, torch.float32, 1e3, "given", taken)


@pytest.mark.parametrize(
    "scheme,vocabulary,width,dtype",
    [
        ("A", 131, 2048, torch.float32),
        ("A", 49152, 64, torch.bfloat16),
        ("B", 50264, 100, torch.float16),
        ("C", 152064, 64, torch.bfloat16),
        ("D", 7, 5120, torch.float32),
        ("D", 600, 4096, torch.float16),
        ("D", 32001, 128, torch.bfloat16),
        ("D", 128256, 64, torch.float16),
        ("E", 257, 3584, torch.float32),
        ("E", 151936, 64, torch.float32),
        ("F", 7, 8192, torch.bfloat16),
        ("F", 32000, 256, torch.float32),
        ("F, frozen head", 1000, 1024, torch.float32),
        ("F, frozen head", 262144, 64, torch.bfloat16),
    ],
)
def test_real_vocabulary_and_width(scheme, vocabulary, width, dtype, taken):
    data = inputs(dtype, vocabulary, width, lengths=(2, 0, 3, 2, 0, 5), bias=False)
    # Logits have size 1, as after training.
    data["weight"] /= width**0.5
    check(scheme, data, taken)


@pytest.mark.parametrize(
    "scheme,rows",
    [
        ("B", 1),
        ("C", 1),
        ("A", 127),
        ("A", 128),
        ("A", 129),
        ("B", 129),
        ("A", 2049),
        ("B", 2049),
        ("C", 2049),
        ("F", 2049),
    ],
)
def test_numbers_of_rows(scheme, rows, taken):
    """The batch has one row, as many as fill a block or one more, or more than a tile holds."""
    check(scheme, inputs(lengths=(rows - 1, 0, 1), vocabulary=33, width=5), taken)


@pytest.mark.parametrize("needs", [("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("scheme", ["A", "F", "B, preference"])
def test_subsets_of_gradients(scheme, needs, taken):
    check(scheme, inputs(weighted=True), taken, needs=needs)


@pytest.mark.parametrize(
    "scheme,dtype",
    [(name, torch.float32) for name in ("A", "B", "C", "F", "F, frozen head")]
    + [(name, dtype) for name in list(SCHEMES)[:7] for dtype in (torch.bfloat16, torch.float16)],
)
def test_two_runs_are_bitwise_equal(scheme, dtype, device):
    data = inputs(dtype, vocabulary=1003, weighted=True)
    keywords = keywords_of(SCHEMES[scheme].op, data)
    one, two = (run(scheme, data, keywords, device=device) for _ in range(2))
    for name, x in one.items():
        assert torch.equal(two[name], x), name


@pytest.mark.parametrize("scheme", ["A", "D", "E", "F", "F, frozen head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_changes_no_bit(scheme, dtype, device):
    data = inputs(dtype)
    keywords = keywords_of(SCHEMES[scheme].op, data)
    want = run(scheme, data, keywords, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(scheme, data, keywords, device=device)
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@EACH_SCHEME
def test_backward_passes_add_up(scheme):
    """Each pass has a graph of its own, and all add to one .grad.

    Upstream scalars are powers of two, so that sums are exact.
    """
    data = inputs(weighted=True)
    op, needs, _ = SCHEMES[scheme]
    keywords, budget = keywords_of(op, data), budget_for(SCHEMES[scheme], data)
    leaves = {k: v.requires_grad_(k in needs) for k, v in data.items()}
    fused(kernels, op, leaves, keywords, budget)[0].backward()
    once = {name: leaves[name].grad.clone() for name in needs}
    for upstream, total in ((0.0, 1.0), (-2.0, -1.0), (4.0, 3.0)):
        (upstream * fused(kernels, op, leaves, keywords, budget)[0]).backward()
        for name in needs:
            assert torch.equal(leaves[name].grad, total * once[name])


@pytest.mark.parametrize("scheme", ["A", "E", "F, frozen head"])
def test_double_backward_is_a_clear_error(scheme):
    """The error comes for every gradient."""
    data = inputs()
    op, needs, _ = SCHEMES[scheme]
    keywords, budget = keywords_of(op, data), budget_for(SCHEMES[scheme], data)
    leaves = {k: v.requires_grad_(k in needs) for k, v in data.items()}
    loss = fused(kernels, op, leaves, keywords, budget)[0]
    for gradient in torch.autograd.grad(loss, [leaves[name] for name in needs], create_graph=True):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("op", ["logprob", "preference", "policy"])
def test_vmap_is_a_clear_error(op):
    data = inputs()
    keywords, states = keywords_of(op, data), data.pop("hidden").expand(2, -1, -1).clone().requires_grad_()
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.func.vmap(lambda hidden: fused(kernels, op, data | {"hidden": hidden}, keywords)[0])(states)


@pytest.mark.parametrize("scheme", ["A", "B", "F"])
def test_tied_embeddings(scheme, taken):
    """The head made the states too, so that its gradient is the sum of both uses."""
    data = inputs(torch.float64)
    op, keywords, budget = (
        SCHEMES[scheme].op,
        keywords_of(SCHEMES[scheme].op, data),
        budget_for(SCHEMES[scheme], data),
    )
    embedding, tokens, gradients = data.pop("weight"), torch.arange(37) * 5 % 141, []
    for is_fused in (True, False):
        weight = embedding.clone().requires_grad_()
        leaves = data | {"weight": weight, "hidden": torch.tanh(weight[tokens])}
        (
            fused(kernels, op, leaves, keywords, budget)
            if is_fused
            else fused(reference, op, leaves, keywords)
        )[0].backward()
        gradients.append(weight.grad)
    assert taken == {scheme}
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@EACH_SCHEME
def test_strided_inputs(scheme):
    """Transposed matrices and every second element of vectors give equal results but for
    the order inside products."""
    data = inputs(weighted=True)
    keywords = keywords_of(SCHEMES[scheme].op, data)
    strided = {
        k: v.t().contiguous().t() if v.dim() == 2 else torch.stack([v, v], 1)[:, 1] for k, v in data.items()
    }
    assert not any(v.is_contiguous() for v in strided.values())
    got, want = run(scheme, strided, keywords), run(scheme, data, keywords)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)


@EACH_SCHEME
def test_inference_mode_and_checkpointing(scheme):
    data = inputs()
    op, needs, _ = SCHEMES[scheme]
    keywords, budget = keywords_of(op, data), budget_for(SCHEMES[scheme], data)
    want = run(scheme, data, keywords)
    with torch.inference_mode():
        loss, values = fused(kernels, op, data, keywords, budget)
    assert not loss.requires_grad
    for name, x in values.items():
        torch.testing.assert_close(x.clone(), want[name], rtol=1e-5, atol=1e-5)
    leaves = {k: v.requires_grad_(k in needs) for k, v in data.items()}
    (3 * checkpoint(lambda: fused(kernels, op, leaves, keywords, budget)[0], use_reentrant=False)).backward()
    for name in needs:
        assert torch.equal(leaves[name].grad, want[f"d_{name}"])


def test_two_losses_on_the_same_states():
    """A log-prob, a preference and a policy loss share states and head; their gradients add up."""
    data, results = inputs(torch.float64), []
    for is_fused in (True, False):
        leaves = {k: v.clone().requires_grad_(k in FULL) for k, v in data.items()}
        total = 0
        for name, factor in (("A", 1), ("E", -2), ("F", 1)):
            op, keywords, budget = (
                SCHEMES[name].op,
                keywords_of(SCHEMES[name].op, data),
                budget_for(SCHEMES[name], data),
            )
            total += (
                factor
                * (
                    fused(kernels, op, leaves, keywords, budget)
                    if is_fused
                    else fused(reference, op, leaves, keywords)
                )[0]
            )
        total.backward()
        results.append([leaves[name].grad for name in FULL])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scheme", ["B", "D", "E", "F"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), vocabulary=st.integers(2, 60), width=st.integers(1, 9))
def test_gradients_sum_to_zero_over_the_vocabulary(scheme, seed, vocabulary, width):
    """A constant on all logits changes no loss."""
    data = inputs(torch.float64, vocabulary, width, seed=seed)
    got = run(scheme, data, keywords_of(SCHEMES[scheme].op, data))
    for name in ("d_bias", "d_weight"):
        assert got[name].abs().max() > 0
        assert got[name].sum(0).abs().max() <= 1e-12 * max(1, got[name].abs().sum())


@pytest.mark.parametrize("scheme", ["C, preference", "D", "E"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), labels=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_gradients_scale_with_sigmoid_of_the_margin_less_the_label(scheme, seed, labels):
    data = inputs(torch.float64, seed=seed)
    keywords = keywords_of("preference", data) | {"pairs": torch.tensor([[2, 3]]), "labels": "given"}
    given_label = [{"preference": torch.tensor([q], dtype=torch.float64)} for q in labels]
    one, two = (run(scheme, data, keywords | label) for label in given_label)
    factor_one, factor_two = (torch.sigmoid(one["margin"][0]) - q for q in labels)
    for name in SCHEMES[scheme].needs:
        torch.testing.assert_close(
            one[f"d_{name}"] * factor_two, two[f"d_{name}"] * factor_one, rtol=1e-9, atol=1e-12
        )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(any),
    vocabulary=st.integers(1, 40),
    width=st.integers(1, 9),
    share=st.floats(0.1, 1),
    seed=st.integers(0, 999),
    options=st.sampled_from(
        [{}, {"temperature": 1.4}, {"softcap": 2.0}, {"softcap": 5.0, "temperature": 0.6}]
    ),
)
def test_any_policy_loss_agrees_with_dense(lengths, vocabulary, width, share, seed, options):
    data = inputs(torch.float64, vocabulary, width, tuple(lengths), seed)
    keywords, rows = keywords_of("policy", data, options, seed), sum(lengths)
    for needs in (FULL, FROZEN):
        budget = budget_for(Scheme("policy", needs, max(share, 1 / rows)), data, options)
        got = with_gradients(
            lambda leaves, b=budget: fused(kernels, "policy", leaves, keywords, b, options), data, needs
        )
        # Float64 has its own bound in the rule.
        assert_close(
            got,
            [got],
            with_gradients(
                lambda leaves: fused(reference, "policy", leaves, keywords, options=options), data, needs
            ),
        )


@pytest.mark.parametrize("scheme", ["B, preference", "D", "E"])
@EACH_DTYPE
def test_identical_responses_cancel(scheme, dtype, taken):
    """The margin is exactly 0, the loss is log 2, and the head has no gradient beyond rounding."""
    data = inputs(dtype, lengths=(9, 9, 40))
    for name in ("hidden", "target"):
        data[name][9:18] = data[name][:9]
    keywords = keywords_of("preference", data)
    keywords |= {"pairs": torch.tensor([[0, 1]]), "labels": "given", "preference": torch.ones(1)}
    keywords["ref_logprob"][:2] = -50
    got = run(scheme, data, keywords, device=taken.device)
    assert taken == {scheme[0]} and got["margin"].item() == 0
    assert got["loss"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.equal(got["d_hidden"][:9], -got["d_hidden"][9:18]) and got["d_hidden"].abs().max() > 0.1
    assert got["d_weight"].abs().max() <= 1e-5 and got["d_bias"].abs().max() <= 1e-5


@pytest.mark.parametrize("scheme", ["C", "C, preference", "F, frozen head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_frozen_head_needs_no_memory_of_its_size(scheme, dtype):
    """Not even a converted copy is made where the head is 16-bit."""
    op, data = SCHEMES[scheme].op, inputs(dtype, vocabulary=4099, width=256)
    keywords = keywords_of(op, data)
    data["hidden"].requires_grad_()

    def step():
        fused(kernels, op, data, keywords, 1_000_000)[0].backward()

    assert peak_bytes(step, torch.device("cpu")) < data["weight"].nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dual_moments_in_every_dtype(dtype):
    """Moments are float64 from the rounded scores on, also under autocast, and have no graph."""
    g = torch.Generator().manual_seed(2)
    reward, utility = torch.randn(4, 6, generator=g).to(dtype), torch.randn(4, 6, 3, generator=g).to(dtype)
    lam = torch.tensor([0.5, 0.0, 2.0]).to(dtype)
    want = dual_moments(reward.double(), utility.double(), lam.double(), 0.3, threshold=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = dual_moments(
            reward.requires_grad_(), utility.requires_grad_(), lam.requires_grad_(), 0.3, threshold=0.1
        )
    for x, wide in zip(got, want, strict=True):
        assert x.dtype == torch.float64 and not x.requires_grad and torch.equal(x, wide)
