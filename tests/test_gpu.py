"""The ops on a GPU: values and gradients against float64 on the CPU, no waiting host, and a captured graph that takes a new lambda."""

import pytest
import torch
from test_kernels_loss_head import PAIRS, policy, problem
from test_kernels_reference import dense_dpo, preference_gradients

from kernels import lagrangian_preference_loss, reference, sequence_logprob

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(data: dict, labels: dict, lengths_too: bool = False) -> tuple[dict, dict]:
    """Everything on the GPU, but cu_seqlens and pairs, from which the plan is made, only with `lengths_too`."""
    stay = () if lengths_too else ("cu_seqlens", "pairs")
    return tuple({k: v if k in stay else v.cuda() for k, v in values.items()} for values in (data, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary,width", [(211, 8), (32001, 64), (151936, 896)])
@pytest.mark.parametrize("budget", [None, 1 << 22])
@pytest.mark.parametrize("lengths_too", [False, True])
def test_preference_loss_against_float64(dtype, vocabulary, width, budget, lengths_too):
    data, labels = problem(dtype, vocabulary=vocabulary, width=width, bias=True, weighted=True)
    there, there_labels = on_gpu(data, labels, lengths_too)
    if budget is not None and budget < 8 * vocabulary * 12:
        budget = 32 * vocabulary * 12

    def fused(leaves):
        result = lagrangian_preference_loss(**leaves, **there_labels, beta=0.4, memory_budget_bytes=budget)
        return result.loss, result.margin, result.preference

    got = preference_gradients(fused, there)
    plain = preference_gradients(lambda leaves: dense_dpo(leaves, {}, labels, 0.4), data)
    exact = preference_gradients(lambda leaves: dense_dpo(leaves, {}, labels, 0.4), data, torch.float64)
    for name, true in exact.items():
        scale = true.abs().max().clamp_min(1e-30)
        error, bound = (((x[name].double().cpu() - true).abs().max() / scale).item() for x in (got, plain))
        assert error <= 2 * bound + 4 * torch.finfo(got[name].dtype).eps, f"{name}: {error} against {bound}"


def test_forward_only_in_bfloat16():
    """The Triton matrix kernel that stores no logits (D up to 1024)."""
    data, _ = problem(torch.bfloat16, vocabulary=32001, width=576)
    there, _ = on_gpu(data, {})
    with torch.no_grad():
        got = sequence_logprob(**there).cpu()
    torch.testing.assert_close(
        got.double(),
        reference.sequence_logprob(**{k: v.double() if v.is_floating_point() else v for k, v in data.items()}),
        rtol=1e-4,
        atol=1e-3,
    )


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_the_host_never_waits(needs, budget):
    data, labels = on_gpu(*problem(torch.bfloat16, vocabulary=1000, width=64))
    for name in needs:
        data[name].requires_grad_()

    def step() -> None:
        loss = lagrangian_preference_loss(**data, **labels, beta=0.4, memory_budget_bytes=budget).loss
        (loss + policy(data, labels, torch.arange(10).cuda() % 3, memory_budget_bytes=budget).loss).backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_takes_a_new_lambda():
    data, labels = on_gpu(*problem(vocabulary=1000, width=64), lengths_too=True)
    assert torch.equal(labels["pairs"].cpu(), PAIRS)
    data["hidden"].requires_grad_()

    def step() -> torch.Tensor:
        loss = lagrangian_preference_loss(**data, **labels, beta=0.4).loss
        return torch.autograd.grad(loss, data["hidden"])[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    labels["lam"].copy_(torch.tensor([3.0, 0.1]))
    graph.replay()
    torch.testing.assert_close(captured, step())
