"""Gradients of the loss head from the entries that matter, on a GPU."""

import pytest
import torch

from kernels import lagrangian_preference_loss
from tests.helpers import sparse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {"lengths": (13, 11, 0, 9, 12, 8, 6), "width": 17, "vocabulary": 311}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Makes calls of few rows leave entries out of their gradients."""
    from kernels.loss_head.rows_sparse_triton import SparseTritonRows

    for name, value in {"LEAST_ROWS": 32, "PILOTS": 8, "DENSE_SHARE": {2: 0.25, 4: 0.25}, "ROOM": 2}.items():
        monkeypatch.setattr(SparseTritonRows, name, value)


def on_gpu(lengths_too=False, **keywords):
    data = sparse.inputs(**SMALL | keywords)
    return {k: v if k == "cu_seqlens" and not lengths_too else v.cuda() for k, v in data.items()}


def waits(function):
    before = torch.cuda.waits()
    function()
    return torch.cuda.waits() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["preference", "policy"])
def test_entries_against_float64(op, dtype):
    for needs in (sparse.FULL, sparse.FROZEN):
        got, (bound, mass) = sparse.run(on_gpu(dtype=dtype, bias=True), op, needs, tolerance=1e-2)
        assert mass > 0 and 0 < bound <= 1e-2 * (1 + 1e-5)
        data = sparse.inputs(**SMALL, dtype=dtype, bias=True)
        true = sparse.run(data, op, needs, ops=sparse.reference, wide=True)[0]
        for name, exact in true.items():
            error = (got[name].double().cpu() - exact).abs().max() / exact.abs().max()
            assert error <= bound + 16 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("budget", [1 << 30, 200_000])
def test_entries_repeat_bitwise(budget):
    data = on_gpu(dtype=torch.bfloat16, bias=True)
    first, left = sparse.run(data, tolerance=1e-2, budget=budget)
    assert left[0] > 0
    for _ in range(3):
        again, told = sparse.run(data, tolerance=1e-2, budget=budget)
        assert told == left and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.skipif(not hasattr(torch.cuda, "waits"), reason="waits are counted on a pretended GPU")
@pytest.mark.parametrize("op", ["preference", "policy"])
def test_how_often_the_host_waits_for_entries(op):
    """It reads what the pilots say, and counts and bounds of a chunk; with a frozen head the factors come
    later. A call without a tolerance never waits, and one of flat rows once."""

    def losses(needs, tolerance=1e-2, **keywords):
        leaves = on_gpu(dtype=torch.bfloat16, **keywords)
        for name in needs:
            leaves[name].requires_grad_()
        return waits(lambda: sparse.loss_of(sparse.kernels, op, leaves, tolerance, 1 << 30, {}))

    assert losses(("hidden", "weight")) == 2 and losses(("hidden",)) == 3
    assert losses(("hidden", "weight"), 0) == losses(("hidden",), 0) == 0
    assert losses(("hidden", "weight"), kind="flat") == 1


def test_entries_are_not_chosen_in_a_captured_graph():
    """The host must not look, so that all of J is taken."""
    data = on_gpu(lengths_too=True, dtype=torch.bfloat16)
    data["hidden"].requires_grad_()
    n = len(SMALL["lengths"])
    labels = {"pairs": sparse.PAIRS, "reward": torch.arange(n) / n, "utility": torch.ones(n, 1)}
    labels |= {"lam": torch.tensor([0.5]), "ref_logprob": torch.linspace(-60, -40, n)}
    labels = {name: x.cuda() for name, x in labels.items()}

    def step(tolerance):
        loss = lagrangian_preference_loss(**data, **labels, beta=0.05, gradient_tolerance=tolerance).loss
        return torch.autograd.grad(loss, data["hidden"])[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chosen = step(1e-2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(1e-2)
    graph.replay()
    assert torch.equal(captured, step(0)) and not torch.equal(captured, chosen)
