"""The ops on a GPU: values and gradients against float64 on the CPU, no waiting host, and a captured graph
that takes a new lambda."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench.gpu.steps import tried
from bench.run.measure import peak_bytes
from engine.config import CaidConfig, PrimalDualConfig, smoke
from engine.model import packing
from engine.model.attention import attend_packed, runs_kernel
from engine.model.folder import load
from engine.model.packing import Group, LowerStates, groups
from engine.policy import update
from engine.policy.forward import frozen_forward, logprob_gap
from engine.policy.lora import Adapter
from engine.policy.preference_loss import PreferenceLoss
from engine.policy.steps import Update
from engine.policy.weights import new_weights
from engine.records import Prompts, Score, ScoredTarget, Scores
from engine.rollout import sampler as rollout
from engine.rollout.decoding import decode
from engine.rollout.sampler import generate
from engine.rollout.states import States
from engine.run.folder import RunFolder
from kernels import decode_attention, lagrangian_preference_loss, reference, sample, sequence_logprob
from kernels.attention.decode import store
from kernels.layer import layer
from kernels.random import exponential, stream
from tests.helpers import gpu_steps
from tests.helpers.attention import HOW, LAYOUTS
from tests.helpers.decode import OPTIONS, assert_as_good_as_torch
from tests.helpers.decode import problem as decode_problem
from tests.helpers.losses import (
    FORMS,
    PAIRS,
    budget_of,
    dense_dpo,
    form_of,
    policy,
    preference_gradients,
    problem,
)
from tests.helpers.samples import samples_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(data: dict, labels: dict, lengths_too: bool = False) -> tuple[dict, dict]:
    """Puts everything on the GPU; cu_seqlens, pairs and group, from which the plan is made,
    go only with `lengths_too`."""
    stay = ("labels", *(() if lengths_too else ("cu_seqlens", "pairs", "group")))
    return tuple({k: v if k in stay else v.cuda() for k, v in values.items()} for values in (data, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary,width", [(211, 8), (32001, 64), (151936, 896)])
@pytest.mark.parametrize("chunk", [None, 12])
@pytest.mark.parametrize("lengths_too", [False, True])
def test_preference_loss_against_float64(dtype, vocabulary, width, chunk, lengths_too):
    """tests/kernels/test_hard_cases.py runs on the GPU too; here vocabularies are real,
    and lengths and pairs lie on the GPU."""
    data, labels = problem(dtype, vocabulary=vocabulary, width=width, bias=True, weighted=True)
    there, there_labels = on_gpu(data, labels, lengths_too)
    budget = None if chunk is None else budget_of(there, chunk)

    def fused(leaves):
        result = lagrangian_preference_loss(**leaves, **there_labels, beta=0.4, memory_budget_bytes=budget)
        return result.loss, result.margin, result.preference

    assert_as_good_as_dense(preference_gradients(fused, there), data, labels)


def assert_as_good_as_dense(got: dict, data: dict, labels: dict) -> None:
    """Asserts the error rule for what `preference_gradients` returned."""
    plain, exact = (
        preference_gradients(lambda leaves: dense_dpo(leaves, {}, labels, 0.4), data, cast)
        for cast in (None, torch.float64)
    )
    for name, true in exact.items():
        scale = true.abs().max().clamp_min(1e-30)
        error, bound = (((x[name].double().cpu() - true).abs().max() / scale).item() for x in (got, plain))
        assert error <= 2 * bound + 4 * torch.finfo(got[name].dtype).eps, f"{name}: {error} against {bound}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [None, 12])
@pytest.mark.parametrize("lengths_too", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labels_against_float64(form, dtype, chunk, lengths_too):
    """Scores are large, so that no residual is the small difference of larger numbers."""
    data, labels = problem(dtype, vocabulary=1000, width=64, bias=True, weighted=True)
    labels |= form_of(form) | {"reward": 10 * labels["reward"]}
    there, there_labels = on_gpu(data, labels, lengths_too)
    budget = None if chunk is None else budget_of(there, chunk)

    def fused(leaves):
        result = lagrangian_preference_loss(**leaves, **there_labels, beta=0.4, memory_budget_bytes=budget)
        return result.loss, result.margin, result.preference

    assert_as_good_as_dense(preference_gradients(fused, there), data, labels)


def test_forward_only_in_bfloat16():
    """The Triton matrix kernel that stores no logits does this, for D up to 1024."""
    data, _ = problem(torch.bfloat16, vocabulary=32001, width=576)
    there, _ = on_gpu(data, {})
    with torch.no_grad():
        got = sequence_logprob(**there).cpu()
    torch.testing.assert_close(
        got.double(),
        reference.sequence_logprob(
            **{k: v.double() if v.is_floating_point() else v for k, v in data.items()}
        ),
        rtol=1e-4,
        atol=1e-3,
    )


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
@pytest.mark.parametrize("chunk", [None, 12])
def test_the_host_never_waits(needs, chunk):
    """Nothing is copied back to the host either."""
    data, labels = on_gpu(*problem(torch.bfloat16, vocabulary=1000, width=64))
    group = torch.arange(10).cuda() % 3
    kl = {"kl": "score", "kl_coef": 0.1, "ref_logprob": labels["ref_logprob"]}
    kl["old_logprob"] = torch.full((42,), -5.0).cuda()
    forms = [on_gpu({}, form_of(form), True)[1] for form in FORMS]
    budget = None if chunk is None else budget_of(data, chunk)
    for name in needs:
        data[name].requires_grad_()

    def step() -> None:
        loss = policy(data, labels, group, memory_budget_bytes=budget).loss
        loss = loss + policy(data, labels, group, memory_budget_bytes=budget, **kl).loss
        for form in ({}, *forms):
            result = lagrangian_preference_loss(
                **data, **labels, **form, beta=0.4, memory_budget_bytes=budget
            )
            loss = loss + result.loss
        loss.backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert names and not [name for name in names if "DtoH" in name]


@pytest.mark.parametrize("chunk", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_runs_are_bitwise_equal(dtype, chunk):
    data, labels = on_gpu(*problem(dtype, vocabulary=5003, width=64, bias=True, weighted=True))
    budget = None if chunk is None else budget_of(data, chunk)
    leaves = [data[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def run() -> list[torch.Tensor]:
        result = lagrangian_preference_loss(**data, **labels, beta=0.4, memory_budget_bytes=budget)
        return [result.loss.detach(), result.margin, *torch.autograd.grad(result.loss, leaves)]

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["preference", "policy"])
def test_memory_stays_within_the_budget(op, needs, dtype):
    """It does as on the CPU. The gradient in the states counts twice, as the loss is always scaled there,
    and the allocator rounds up."""
    lengths = (400, 600, 200, 200, 800, 800)
    data, labels = on_gpu(
        *problem(dtype, lengths, torch.tensor([[0, 1], [2, 3], [4, 5]]), vocabulary=32001, width=64)
    )
    leaves, budget = [data[name].requires_grad_() for name in needs], 1 << 27

    def step() -> None:
        if op == "preference":
            loss = lagrangian_preference_loss(**data, **labels, beta=0.1, memory_budget_bytes=budget).loss
        else:
            loss = policy(data, labels, torch.arange(6).cuda() % 2, memory_budget_bytes=budget).loss
        torch.autograd.grad(loss, leaves)

    step()  # compiles, and makes the workspace of cuBLAS
    peak = peak_bytes(step, torch.device("cuda"))
    allowed = (
        sum(leaf.nbytes for leaf in leaves)
        + data["hidden"].nbytes
        + (4 * data["weight"].numel() if "weight" in needs else 0)
    )
    assert 0.1 * budget < peak <= budget + allowed + 2**20


def test_more_than_2_to_the_31_logits_at_once():
    rows, vocabulary, width = 16384, 151936, 64
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB")
    g = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(n, width, device="cuda", dtype=torch.bfloat16, generator=g) / 4
        for n in (rows, vocabulary)
    )
    target = torch.randint(vocabulary, (rows,), device="cuda", generator=g)
    hidden.requires_grad_()
    weight.requires_grad_()
    cu_seqlens = torch.tensor([0, rows])
    options = dict(return_token_logprob=True, memory_budget_bytes=2**35)
    _, token = sequence_logprob(hidden, weight, target, cu_seqlens, **options)
    (gradient,) = torch.autograd.grad(token[-3:].sum(), hidden)
    last = hidden[-3:].detach().double().requires_grad_()
    want = (last @ weight.double().T).log_softmax(1).gather(1, target[-3:, None])[:, 0]
    torch.testing.assert_close(token[-3:].double(), want, rtol=1e-5, atol=1e-4)
    (wanted,) = torch.autograd.grad(want.sum(), last)
    torch.testing.assert_close(
        gradient[-3:].double(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())
    )
    assert not gradient[:-3].any()


@pytest.mark.parametrize("form", ["soft", *FORMS])
def test_a_captured_graph_takes_a_new_lambda(form):
    data, labels = problem(vocabulary=1000, width=64)
    data, labels = on_gpu(data, labels | form_of(form), lengths_too=True)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width,heads,kv_heads", [(64, 9, 3), (80, 4, 4), (128, 16, 2), (256, 8, 1)])
@pytest.mark.parametrize("options", OPTIONS[:1] + [{"window": 300}, {"softcap": 5.0, "window": 20}], ids=str)
def test_decode_attention_against_float64(dtype, width, heads, kv_heads, options):
    """Queries come in both block sizes, from prompts with no row, one, 8 and 40."""
    for rows in ((1, 0, 1), (8, 0, 40)):
        data = decode_problem(
            rows, (700, 9, 130), heads, kv_heads, width, room=200, used=131, dtype=dtype, device="cuda"
        )
        got = decode_attention(**data, **options)
        assert_as_good_as_torch(got, data, options)
        assert torch.equal(got, decode_attention(**data, **options))


def test_a_captured_decode_step_takes_new_counts_rows_and_caches():
    data = decode_problem((2, 3, 0), (40, 7, 19), room=150, used=1, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, 5, 2, 16, device="cuda", dtype=torch.bfloat16)
    own = data["own_keys"], data["own_values"]

    def step() -> torch.Tensor:
        store(*own, key, value, data["used"])
        return decode_attention(**data, window=60)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for used, offsets in ((2, [0, 2, 5, 5]), (3, [0, 0, 1, 5]), (100, [0, 5, 5, 5])):
        data["used"].fill_(used)
        data["owner_offsets"].copy_(torch.tensor(offsets))
        for slab in own:
            slab[:, :, : used - 1] = torch.randn_like(slab[:, :, : used - 1])
            slab[:, :, used - 1 :] = torch.nan
        data["query"].normal_()
        graph.replay()
        assert_as_good_as_torch(captured, data, {"window": 60})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, width", [(1, 2), (7, 577), (300, 4096)])
def test_norm_rotation_and_gate_against_float64(rows, width, dtype):
    """They run without a gradient, by Triton, and as torch does it."""
    g = torch.Generator().manual_seed(0)
    x, delta, weight = (
        torch.randn(*shape, generator=g).to(dtype) for shape in ((rows, width), (rows, width), (width,))
    )
    qkv, angle = torch.randn(rows, 15 * 64, generator=g).to(dtype), 3 * torch.randn(rows, 64, generator=g)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def results(*inputs: torch.Tensor) -> list[torch.Tensor]:
        x, delta, weight, qkv, cos, sin = inputs
        total, normed = layer.add_rms_norm(x, delta, weight, 1e-5)
        return [
            total,
            normed,
            layer.rms_norm(x, weight, 1e-5),
            *layer.split_rotated(qkv, cos, sin, 9, 3),
            layer.gated_silu(qkv),
        ]

    inputs = x, delta, weight, qkv, cos, sin
    with torch.no_grad():
        found = [
            results(*(t.cuda() for t in inputs)),
            results(*inputs),
            results(*(t.double() for t in inputs)),
        ]
    for got, plain, exact in zip(*found, strict=True):
        largest = exact.abs().max()
        assert (got.cpu().double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + 4 * torch.finfo(
            dtype
        ).eps * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [7, 5003, 151936])
def test_sampling_is_that_of_the_cpu(dtype, columns):
    logits = (torch.randn(64, columns, generator=torch.Generator().manual_seed(columns)) * 3).to(dtype)
    key = torch.arange(64)
    for temperature in (1.0, 0.7, 0):
        got = sample(logits.cuda(), key=key.cuda(), step=torch.tensor([5]).cuda(), temperature=temperature)
        want = sample(logits, key=key, step=5, temperature=temperature)
        same = got[0].cpu() == want[0]
        if temperature:
            race = (logits.double() / temperature - exponential(stream(key, 5), columns).log()).topk(2).values
            near = race[:, 0] - race[:, 1] < 1e-5
        else:  # equal logits in 16 bits: another of the likeliest may be taken
            near = logits.gather(1, got[0].cpu()[:, None])[:, 0] == logits.amax(1)
        assert bool((same | near).all()) and (temperature == 0 or int(same.sum()) >= 62)
        for a, b in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(a.cpu()[same], b[same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [7, 5003, 151936])
@pytest.mark.parametrize("top_k,top_p", [(50, 1.0), (0, 0.9), (50, 0.9)])
def test_truncated_sampling_is_that_of_the_cpu(top_k, top_p, columns, dtype):
    logits = (torch.randn(64, columns, generator=torch.Generator().manual_seed(columns)) * 3).to(dtype)
    options = dict(temperature=0.7, top_k=top_k, top_p=top_p)
    got = sample(logits.cuda(), key=torch.arange(64).cuda(), step=torch.tensor([5]).cuda(), **options)
    want = sample(logits, key=torch.arange(64), step=5, **options)
    same = got[0].cpu() == want[0]
    assert int(same.sum()) >= 62
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a.cpu()[same], b[same], rtol=1e-5, atol=1e-5)


def test_sampling_distribution():
    logits, rows = torch.randn(1000, generator=torch.Generator().manual_seed(0)).cuda(), 200_000
    token, logprob, _ = sample(
        logits.expand(rows, -1), key=torch.arange(rows).cuda(), step=3, temperature=0.8
    )
    p = (logits.double() / 0.8).softmax(0)
    statistic = ((torch.bincount(token, minlength=1000) - rows * p) ** 2 / (rows * p)).sum().item()
    assert statistic < 999 + 5 * math.sqrt(2 * 999)
    torch.testing.assert_close(logprob.double(), p[token].log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.9}], ids=str)
def test_a_captured_sampling_step_takes_a_new_step_and_logits(options):
    logits, key, step = torch.randn(8, 5003).cuda(), torch.arange(8).cuda(), torch.tensor([0]).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample(logits, key=key, step=step, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, key=key, step=step, **options)
    step.fill_(4)
    logits.normal_()
    graph.replay()
    for a, b in zip(captured, sample(logits, key=key, step=4, **options), strict=True):
        assert torch.equal(a, b)


def test_the_host_never_waits_in_a_decode_step():
    data = decode_problem(device="cuda", used=2)
    key, value = torch.zeros(2, 5, 2, 16, device="cuda")
    logits, keys, step = torch.randn(5, 1000).cuda(), torch.arange(5).cuda(), torch.tensor([1]).cuda()

    def decode() -> None:
        store(data["own_keys"], data["own_values"], key, value, data["used"])
        decode_attention(**data)
        for temperature in (0, 0.7):
            sample(logits, key=keys, step=step, temperature=temperature)
        sample(logits, key=keys, step=step, top_k=50, top_p=0.9)

    decode()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode()
    finally:
        torch.cuda.set_sync_debug_mode("default")


PROMPTS = [[1, 70, 75, 80], [1, 90], [1, 66, 67, 68, 69, 70, 71, 99, 100]]
SAMPLING = dict(n=12, max_new_tokens=30, temperature=0.9, seed=5, stop_token_ids=(2, *range(50, 65)))


@pytest.mark.parametrize("how", [how for how in HOW if "softcap" not in how], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_attention_by_runs_against_float64(name, how, dtype):
    """There are fewer heads of keys than of queries, runs whose queries are the last of their keys,
    and runs without queries; the gradients are checked too."""
    layout = LAYOUTS[name]().windowed(how.get("window"))
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(len(layout.position), heads, 64, generator=g).to(dtype) for heads in (6, 2, 2)]
    upstream = torch.randn(inputs[0].shape, generator=g)
    found = []
    for device, kind in (("cuda", dtype), ("cpu", dtype), ("cpu", torch.float64)):
        leaves = [x.to(device, kind).requires_grad_() for x in inputs]
        assert (runs_kernel(leaves[0], None) is not None) == (device == "cuda")
        out = attend_packed(*leaves, layout.to(torch.device(device)), None, None)
        gradients = torch.autograd.grad(out, leaves, upstream.to(out))
        found.append([x.detach().cpu().double() for x in (out, *gradients)])
    for got, plain, exact in zip(*found, strict=True):
        largest = exact.abs().max()
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 4 * torch.finfo(
            dtype
        ).eps * largest


def test_rollouts_by_captured_graphs_are_those_of_the_cpu(tiny_folder):
    """Rows end at different steps, so that graphs are captured again;
    tokens may part only where rounding decides."""
    there, here = load(tiny_folder, device="cuda"), load(tiny_folder)
    adapter, other = (Adapter.on(model, rank=2, alpha=4.0, share=0.5, seed=0) for model in (there, here))
    with torch.no_grad():
        for up, twin in zip(other.up.values(), adapter.up.values(), strict=True):
            up.normal_(generator=torch.Generator().manual_seed(0))
            twin.copy_(up)
    states, expected_states = (States([0, 2], LowerStates(2)) for _ in range(2))
    got = generate(there, PROMPTS, adapter=adapter, states=states, **SAMPLING)
    expected = generate(here, PROMPTS, adapter=other, states=expected_states, **SAMPLING)
    same = (got.tokens == expected.tokens).all(1)
    assert int(same.sum()) >= 0.94 * len(same) and torch.equal(got.length[same], expected.length[same])
    torch.testing.assert_close(got.model_logprob[same], expected.model_logprob[same], rtol=0, atol=1e-3)
    for depth in (0, 2):
        torch.testing.assert_close(
            states.pooled[depth][same], expected_states.pooled[depth][same], rtol=0, atol=1e-3
        )
    for r in same.nonzero()[:, 0].tolist():
        torch.testing.assert_close(
            states.lower.response[r].cpu(), expected_states.lower.response[r], rtol=0, atol=1e-3
        )
    again = generate(there, PROMPTS, adapter=adapter, states=States([0, 2], LowerStates(2)), **SAMPLING)
    assert torch.equal(again.tokens, got.tokens)


def test_16_bit_log_probs_of_the_sampler_are_near_those_of_the_training_forward(tiny_folder):
    model = load(tiny_folder, dtype=torch.bfloat16, device="cuda")
    made = generate(model, PROMPTS, **SAMPLING)
    all_groups = [
        Group(
            prompt,
            [made.tokens[r, : made.length[r]].tolist() for r in range(12 * p, 12 * p + 12)],
            list(range(12 * p, 12 * p + 12)),
        )
        for p, prompt in enumerate(PROMPTS)
    ]
    gap = logprob_gap(model, all_groups, made, temperature=0.9, memory_budget_bytes=2**26)
    assert gap.mean < 0.02 and gap.kl < 1e-3


def test_the_host_never_waits_for_a_step_of_decoding(tiny_folder, monkeypatch):
    model = load(tiny_folder, dtype=torch.bfloat16, device="cuda")

    def watched(rows, room, on_step):
        rows.draw()
        rows.feed()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            rows.draw()
            rows.feed()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        decode(rows, room - 2, on_step)

    monkeypatch.setattr(rollout, "decode", watched)
    assert generate(model, PROMPTS, states=States([1], None), **SAMPLING).length.max() > 2


def counted(model, monkeypatch, **options) -> tuple[int, int]:
    """Returns how many kernels are launched to draw a token for all rows, and to feed it to the model."""

    class Counted(Exception):
        pass

    def count(rows, room, on_step):
        before = torch.cuda.launches()
        rows.draw()
        drawn = torch.cuda.launches()
        rows.feed()
        raise Counted(drawn - before, torch.cuda.launches() - drawn)

    monkeypatch.setattr(rollout, "decode", count)
    with pytest.raises(Counted) as counts:
        generate(model, PROMPTS, **SAMPLING, **options)
    return counts.value.args


@pytest.mark.skipif(not hasattr(torch.cuda, "launches"), reason="launches are counted on a pretended GPU")
def test_launches_of_a_decoding_step(tiny_folder, monkeypatch):
    """These numbers may only fall. The model has 4 layers, of which the adapter is on 2."""
    model = load(tiny_folder, dtype=torch.bfloat16, device="cuda")
    assert model.config.num_layers == 4
    draw, feed = counted(model, monkeypatch)
    adapter = Adapter.on(model, rank=2, alpha=4.0, share=0.5, seed=0)
    adapted = counted(model, monkeypatch, adapter=adapter)[1]
    assert draw <= 5 and feed <= 53 and adapted <= 69, (draw, feed, adapted)


STEPS = 5


class OneStage:
    """A stage without a run folder."""

    name = "iteration-1/policy"
    stopping = wants_to_stop = False

    def __init__(self, folder) -> None:
        self.paths = RunFolder(folder)

    def progress(self, *words):
        return nullcontext(SimpleNamespace(advance=lambda n: None))

    def partial(self, cls):
        return None

    def log(self, row):
        pass


@pytest.fixture
def given(tiny_folder):
    """A model in 16 bits, with samples of its own on three prompts."""
    model = load(tiny_folder, dtype=torch.bfloat16, device="cuda")
    prompts = Prompts(text=list("abc"), kind=[""] * 3, token_ids=PROMPTS, key_P=torch.tensor([11, 22, 33]))
    made = generate(load(tiny_folder), PROMPTS, **(SAMPLING | {"n": 3, "max_new_tokens": 9}))
    generator = torch.Generator().manual_seed(0)
    scores = Scores(
        reward_PG=torch.randn(3, 3, generator=generator, dtype=torch.float64),
        utility_PGJ=torch.zeros(3, 3, 1, dtype=torch.float64),
        audit_PGA=torch.zeros(3, 3, 0, dtype=torch.float64),
        ref_logprob_PG=frozen_forward(model, groups(prompts, made), [], temperature=1.0)[1].view(3, 3),
    )
    return model, samples_of(prompts, made, scores)


def some_steps(given, folder, tune: str, config_class=CaidConfig) -> dict[str, torch.Tensor]:
    model, samples = given
    sizes = {"steps": STEPS, "checkpoint_every": STEPS, "prompts_per_step": 3, "tokens_per_forward": 40}
    config = smoke(config_class(**sizes, tune=tune))
    weights = new_weights(model, config)
    one = Update(stage=OneStage(folder), config=config, model=model, weights=weights, start=None, iteration=1)
    score = Score.plain(samples.scores.reward_PG)
    if config_class is PrimalDualConfig:
        return update.ascend(one, samples, score).adapter
    return update.fit(one, samples, ScoredTarget(score=score, coefficient=0.5), train_on=[0, 1, 2]).adapter


@pytest.mark.parametrize("config_class", [CaidConfig, PrimalDualConfig])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_steps_repeat_bitwise(given, tmp_path, tune, config_class):
    first, second = (some_steps(given, tmp_path, tune, config_class) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("config_class", [CaidConfig, PrimalDualConfig])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_host_never_waits_between_the_parts_of_a_step(given, tmp_path, monkeypatch, tune, config_class):
    """Each part is packed, passed forward and backward while the one before it may still be computed."""
    some_steps(given, tmp_path, tune, config_class)  # compiles

    def watched(function):
        def watching(*given, **options):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*given, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return watching

    for name in ("policy_states", "lagrangian_policy_loss", "add_gradient"):
        monkeypatch.setattr(update, name, watched(getattr(update, name)))
    monkeypatch.setattr(update.packing, "pack", watched(update.packing.pack))
    monkeypatch.setattr(PreferenceLoss, "__call__", watched(PreferenceLoss.__call__))
    some_steps(given, tmp_path, tune, config_class)


def test_the_host_never_waits_between_the_passes_of_scoring(given, monkeypatch):
    """It waits at the end alone; a pass holds 32,768 tokens there, here 40."""
    model, samples = given
    assert runs_kernel(model.embed.new_empty(0, 1, model.config.head_dim), None) is not None
    monkeypatch.setattr(packing, "TOKENS_BY_RUNS", 40)
    all_groups, passes = groups(samples.prompts, samples.rollouts), []
    expected = frozen_forward(model, all_groups, [1], temperature=1.0, on_tokens=passes.append)
    seen = []

    def on_tokens(tokens: int) -> None:
        seen.append(tokens)
        torch.cuda.set_sync_debug_mode("error" if len(seen) < len(passes) else "default")

    try:
        got = frozen_forward(model, all_groups, [1], temperature=1.0, on_tokens=on_tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(passes) == 3 and torch.equal(got[1], expected[1]) and torch.equal(got[0][1], expected[0][1])


STEPS_OF_PART_0 = 10


@pytest.mark.parametrize("number", range(STEPS_OF_PART_0))
def test_a_step_of_part_0_of_the_bench(tiny_folder, monkeypatch, number):
    """In small sizes: the part is short, and a card is too dear for slips.

    A pretended GPU takes minutes for all: `python tests/pretended_gpu.py -k part_0_of_the_bench`.
    """
    steps = gpu_steps.small(tiny_folder, monkeypatch)
    assert len(steps) == STEPS_OF_PART_0
    outcome = tried(steps[number], torch.device("cuda"))
    assert "lines" in outcome, outcome["failed"]
    assert outcome["figures"] and all(math.isfinite(figure.measured) for figure in outcome["figures"])
