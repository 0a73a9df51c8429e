"""The Triton row kernel: values and gradients in Triton's interpreter, and a compile for sm_90."""

import math
from functools import partial

import pytest
import torch

from kernels import reference, sequence_logprob
from kernels.loss_head import losses as losses_module
from kernels.loss_head import ops, passes
from kernels.loss_head.records import Head
from tests.helpers import losses, schemes
from tests.helpers.interpreter import compiled, interpreted

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def triton_rows(monkeypatch):
    """Makes the ops do their rows with Triton, on the CPU."""
    from kernels.loss_head.rows_triton import TritonRows

    for module in (ops, passes, losses_module, losses):
        monkeypatch.setattr(module, "row_workspace", lambda hidden, tolerance=0.0: TritonRows)


def token_logprob(hidden, weight, target, bias=None, temperature=1.0, softcap=None, budget=None):
    """Returns log p of every row by the op."""
    cu_seqlens = torch.tensor([0, len(target)])
    options = {"temperature": temperature, "softcap": softcap, "memory_budget_bytes": budget}
    return sequence_logprob(
        hidden, weight, target, cu_seqlens, bias=bias, return_token_logprob=True, **options
    )[1]


@compiled
def test_every_configuration_compiles_for_sm_90():
    """Registers, shared memory and wgmma are checked with whatever triton is installed.

    bench/sm90.py gates spills on the one version that they depend on, and takes fp16 and single switches too.
    """
    from bench import sm90

    wrong = {}
    for kernel in sm90.loss_kernels():
        flags = kernel.constants
        if kernel.dtype != "fp16" and flags.get("HAS_BIAS") == flags.get("HAS_SOFTCAP"):
            figures = sm90.compiled(kernel)
            if found := sm90.failures(kernel, figures):
                wrong[kernel.name, kernel.dtype] = found, figures
    assert not wrong


def dense(hidden, weight, target, bias=None, **options):
    """Returns log p of every row from whole logits."""
    rows = hidden, weight, target, torch.tensor([0, len(target)])
    return reference.sequence_logprob(*rows, bias=bias, return_token_logprob=True, **options)[1]


def check(data, needs, budget=None, **options):
    """Asserts the error rule of tests/helpers/losses.py for Triton's rows
    in the interpreter, against dense float64."""
    needs = [name for name in needs if name in data]

    def run(function, data, cast=None):
        leaves = {k: v.detach().clone() for k, v in data.items()}
        leaves |= {k: v.to(cast) for k, v in leaves.items() if cast and v.is_floating_point()}
        for name in needs:
            leaves[name].requires_grad_()
        token = function(**leaves, **options)
        (token * torch.linspace(-1, 1.5, len(token), dtype=token.dtype)).sum().backward()
        return {"token": token.detach()} | {f"d_{name}": leaves[name].grad for name in needs}

    got = run(partial(token_logprob, budget=budget), data)
    losses.assert_close(got, losses.reordered(partial(run, dense), data), run(dense, data, torch.float64))
    return got


def make(rows=9, width=8, vocabulary=33, dtype=torch.float32, bias=False):
    g = torch.Generator().manual_seed(3)
    data = {
        "hidden": torch.randn(rows, width, generator=g).to(dtype),
        "weight": torch.randn(vocabulary, width, generator=g).to(dtype),
        "target": torch.randint(vocabulary, (rows,), generator=g),
    }
    data["target"][0] = vocabulary - 1
    return data | ({"bias": torch.randn(vocabulary, generator=g).to(dtype)} if bias else {})


NEEDS = pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "full"])


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 2.0},
    {"softcap": 30.0, "temperature": 1.7},
    {"softcap": 1e4},
]


@interpreted
@NEEDS
@pytest.mark.parametrize(
    "vocabulary,dtype,options",
    [(1000, torch.float32, x) for x in OPTIONS]
    # Neither the temperature nor the cap looks at the dtype.
    + [(1000, dtype, OPTIONS[i]) for dtype in (torch.bfloat16, torch.float16) for i in (0, 2, 3)]
    + [(7, torch.float32, OPTIONS[3]), (64, torch.float32, OPTIONS[0])],
    ids=str,
)
def test_values_and_gradients(needs, vocabulary, dtype, options):
    data = make(5, vocabulary=vocabulary, dtype=dtype, bias=options.get("softcap") == 2.0)
    check(data, needs, **options)


@interpreted
@pytest.mark.parametrize(
    "scheme,dtype",
    [(name, torch.float32) for name in schemes.SCHEMES]
    + [("C", torch.float16), ("D", torch.float16), ("E", torch.bfloat16), ("F", torch.bfloat16)],
)
def test_every_scheme(scheme, dtype, taken):
    """The schemes of preference and policy losses run too."""
    data = schemes.inputs(dtype, vocabulary=61, lengths=(3, 0, 5, 2, 0, 9), weighted=True)
    schemes.check(scheme, data, taken, options=schemes.ALL_OPTIONS)


@interpreted
@NEEDS
def test_several_blocks_and_chunks(needs, monkeypatch):
    from kernels.loss_head.rows_triton import TritonRows

    monkeypatch.setattr(TritonRows, "MAX_BLOCK", 128)
    check(make(rows=11, vocabulary=300, bias=True), needs, budget=12000, softcap=4.0)
    check(make(rows=11, vocabulary=257), needs, budget=12000)


@interpreted
def test_all_negative_logits_and_a_ragged_last_block():
    """A tail read as 0 would add exp(0) to a row whose logits are all far below it.

    A maximum that starts at 0 would lose such a row.
    """
    data = {
        "hidden": -torch.ones(2, 1),
        "weight": torch.linspace(200, 300, 33)[:, None],
        "target": torch.tensor([0, 32]),
    }
    check(data, ("hidden", "weight"))


@interpreted
def test_large_common_offset():
    data = {"hidden": torch.tensor([[2.0**24]]), "weight": torch.ones(2, 1), "target": torch.tensor([1])}
    assert check(data, ("hidden",))["token"].item() == pytest.approx(-math.log(2), rel=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "first, last, options",
    [(*ends, {}) for ends in ((0, 400), (400, 0), (0, 100), (-400, -300), (30, 0))]
    + [(0, 400, {"temperature": 0.6}), (-400, -300, {"temperature": 0.6}), (0, 400, {"softcap": 500.0})],
    ids=str,
)
def test_a_row_whose_blocks_are_far_apart(first, last, options, dtype, monkeypatch):
    """Exponentials are formed relative to the first block, and again where the row goes far beyond it."""
    from kernels.loss_head.rows_triton import TritonRows

    monkeypatch.setattr(TritonRows, "MAX_BLOCK", 16)
    data = make(5, dtype=dtype, bias=True)
    data["bias"][:16], data["bias"][16:] = first, last
    data["target"] = torch.arange(5) * 8
    got = check(data, ("hidden", "weight"), **options)
    assert all(x.isfinite().all() for x in got.values())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_equal_logits(dtype):
    data = make(dtype=dtype)
    data["weight"][:] = data["weight"][0]
    torch.testing.assert_close(token_logprob(**data), torch.full((9,), -math.log(33)), rtol=1e-6, atol=0)
    check(data, ("hidden", "weight"))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_lost_row_spoils_no_other_one(dtype):
    """A row of NaN or of -inf alone has no log-prob; with weight 0 it adds nothing to the head's gradient."""
    gradients = []
    for bad in (0.3, math.nan, -math.inf):
        data = make(dtype=dtype)
        data["weight"] = data["weight"].abs()
        data["hidden"][4] = bad
        weight = data["weight"].requires_grad_()
        token = torch.ones(9).index_fill(0, torch.tensor([4]), 0)
        total = sequence_logprob(**data, cu_seqlens=torch.tensor([0, 9]), token_weight=token)
        gradients.append(torch.autograd.grad(total.sum(), weight)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@interpreted
def test_minus_infinity(monkeypatch):
    """A whole first block is -inf, then a finite one follows; a target of -inf has log-prob -inf."""
    from kernels.loss_head.rows_triton import TritonRows

    monkeypatch.setattr(TritonRows, "MAX_BLOCK", 16)
    data = make(bias=True)
    data["bias"][:16] = -math.inf
    data["target"] = data["target"].clamp(min=16)
    got = check(data, ("hidden", "weight", "bias"))
    assert all(x.isfinite().all() for x in got.values())
    token = token_logprob(data["hidden"], data["weight"], torch.zeros(9, dtype=torch.int64), data["bias"])
    assert (token == -math.inf).all()


@interpreted
def test_nan_spreads_and_int32_targets():
    data = make()
    data["hidden"][4, 0] = math.nan
    token = token_logprob(data["hidden"], data["weight"], data["target"].int(), None)
    assert token.isnan().tolist() == [i == 4 for i in range(9)]


@interpreted
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_row_of_weight_zero_adds_nothing_even_nan(softcap):
    gradients = []
    for value in (0.3, math.nan):
        data = make()
        data["hidden"][4] = value
        leaves = [data[name].requires_grad_() for name in ("hidden", "weight")]
        token_weight = torch.ones(9).index_fill(0, torch.tensor([4]), 0)
        total = sequence_logprob(
            **data, cu_seqlens=torch.tensor([0, 9]), token_weight=token_weight, softcap=softcap
        )
        gradients.append(torch.autograd.grad(total.sum(), leaves))
    for clean, spoiled in zip(*gradients, strict=True):
        torch.testing.assert_close(clean, spoiled, rtol=1e-6, atol=1e-6)


@interpreted
@NEEDS
def test_sequences_and_token_weights(needs):
    data = make(bias=True)
    cu_seqlens = torch.tensor([0, 3, 3, 9])
    token_weight = torch.tensor([1, 0, 2, 0.5, 1, 0, 1, 1, 3.0])
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = {k: v.clone().to(dtype) if v.is_floating_point() else v for k, v in data.items()}
        for name in needs:
            leaves[name].requires_grad_()
        if dtype == torch.float32:
            total = sequence_logprob(**leaves, cu_seqlens=cu_seqlens, token_weight=token_weight)
        else:
            token = dense(**leaves) * token_weight
            total = torch.stack([token[:3].sum(), token[:0].sum(), token[3:].sum()])
        (total * torch.tensor([1.0, 5.0, -2.0], dtype=dtype)).sum().backward()
        results.append([total.detach().double(), *(leaves[name].grad.double() for name in needs)])
    assert results[0][0][1] == 0
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@interpreted
def test_float16_keeps_small_coefficients():
    """1e-9 rounds to 0 in float16, but not relative to the largest coefficient.
    The bias is float32 to show it."""
    data = make(dtype=torch.float16)
    grads = []
    for scale in (1.0, 1e-9):
        bias = torch.zeros(33, requires_grad=True)
        token = token_logprob(data["hidden"], data["weight"], data["target"], bias)
        grads.append(torch.autograd.grad(token.sum() * scale, bias)[0])
    torch.testing.assert_close(grads[1] * 1e9, grads[0], rtol=1e-5, atol=1e-6)


@interpreted
def test_empty_batch():
    data = make(rows=1)
    hidden = data["hidden"][:0].requires_grad_()
    token = token_logprob(hidden, data["weight"], data["target"][:0], None)
    token.sum().backward()
    assert token.shape == (0,) and hidden.grad.shape == (0, 8)


@interpreted
@pytest.mark.parametrize(
    "rows,width,vocabulary,parts",
    # The last shape has two parts of two tiles of 32 tokens, and the last tile is ragged, as that of rows is.
    [(9, 8, 33, 2), (16, 16, 32, 1), (1, 16, 7, 1), (0, 8, 9, 1), (17, 40, 100, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "softcap": 3.0}], ids=["plain", "softcap"])
def test_log_probs_without_stored_logits(dtype, rows, width, vocabulary, parts, options):
    from kernels.loss_head import forward_triton

    data = make(max(1, rows), width, vocabulary, dtype, bias=bool(options))
    data = {k: v[:rows] if k in ("hidden", "target") else v for k, v in data.items()}
    out = torch.full((rows,), math.nan)
    head = Head(data["weight"], data.get("bias"), options.get("temperature", 1.0), options.get("softcap"))
    blocks = forward_triton.INTERPRETED
    forward_triton.token_logprob(data["hidden"], head, data["target"], blocks, parts, out)
    want = dense(**{k: v.double() if v.is_floating_point() else v for k, v in data.items()}, **options)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=2e-6)


@interpreted
def test_vocabulary_parts_join_past_minus_infinity_and_offsets():
    """Whole tiles are -inf before and after the finite ones, and logits lie near 2^24."""
    from kernels.loss_head import forward_triton

    bias = torch.full((300,), -math.inf)
    bias[[140, 141]] = 2.0**24
    out = torch.empty(2)
    head = Head(torch.zeros(300, 16), bias, 1.0, None)
    target = torch.tensor([140, 5])
    blocks = forward_triton.INTERPRETED
    forward_triton.token_logprob(torch.zeros(2, 16), head, target, blocks, 8, out)
    assert out[0].item() == pytest.approx(-math.log(2), rel=1e-6) and out[1] == -math.inf


@interpreted
def test_forward_passes_of_small_heads_store_no_logits(monkeypatch):
    from kernels.loss_head import forward_triton
    from kernels.loss_head.rows_triton import TritonRows

    data = make(dtype=torch.bfloat16)
    stored = token_logprob(**data | {"hidden": data["hidden"].requires_grad_()}).detach()
    data["hidden"] = data["hidden"].detach()
    monkeypatch.setattr(forward_triton, "TABLE", ((640, forward_triton.INTERPRETED),))
    monkeypatch.setattr(TritonRows, "_logprob", None)
    torch.testing.assert_close(token_logprob(**data), stored, rtol=1e-6, atol=1e-6)
    assert (
        forward_triton.blocks_for(4096, torch.bfloat16) is None
        and forward_triton.blocks_for(576, torch.float32) is None
    )
