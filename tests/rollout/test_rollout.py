"""Sampling: greedy equals transformers, log-probs equal the training forward's, random numbers are keyed,
distributions are right."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import model as M
from engine.data.prompts import prompt_key
from engine.errors import UserError
from engine.model import packing
from engine.model.packing import LowerStates
from engine.policy.forward import frozen_forward
from engine.policy.lora import Adapter
from engine.records import Prompts
from engine.rollout import decoding
from engine.rollout import sampler as rollout
from engine.rollout.cache import GpuCache
from engine.rollout.sampler import generate
from engine.rollout.states import States
from kernels import compiled, sample, sequence_logprob
from kernels.random import combine, exponential, stream, uniform
from tests.helpers.architectures import VARIANTS, write_model

PROMPTS = [[1, 70, 75, 80], [1, 90], [1, 66, 67, 68, 69, 70, 71, 99, 100]]


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return M.load(tiny_folder)


def test_greedy_equals_transformers(tiny, tiny_folder):
    network = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    out = generate(tiny, PROMPTS, n=1, max_new_tokens=20, temperature=0, seed=0)
    for p, prompt in enumerate(PROMPTS):
        oracle = network.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert out.tokens[p].tolist() == oracle[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=VARIANTS)
def random_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "model"
    write_model(folder, request.param)
    return folder


@pytest.fixture(params=["compiled", "torch", "gpu"])
def every_cache(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(compiled, "serves", lambda device, dtype: False)
    if request.param == "gpu":  # with the torch twins of its kernels
        monkeypatch.setattr(rollout, "new_cache", GpuCache)


# Two are longer than every window, one token or more passes it while decoding,
# and the responses pass it by themselves.
LONG = [[1, 70, 75, 80], [90], list(range(20, 40)), [3, 9, 27, 81, 5, 15, 45]]


def test_greedy_decoding_of_every_architecture_equals_transformers(random_folder, every_cache):
    network = AutoModelForCausalLM.from_pretrained(
        random_folder, dtype=torch.float32, attn_implementation="eager"
    )
    out = generate(M.load(random_folder), LONG, n=2, max_new_tokens=24, temperature=0, seed=0)
    for p, prompt in enumerate(LONG):
        oracle = network.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for i in range(2):
            assert out.tokens[2 * p + i].tolist() == oracle[0, len(prompt) :].tolist()


def test_log_probs_of_every_architecture_are_those_of_the_packed_forward_and_of_transformers(
    random_folder, every_cache
):
    ours = M.load(random_folder)
    adapter = Adapter.on(ours, rank=2, alpha=4.0, share=0.4, seed=0)
    with torch.no_grad():
        for value in adapter.up.values():
            value.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(text=[""] * 4, kind=[""] * 4, token_ids=LONG, key_P=torch.arange(4))
    network = AutoModelForCausalLM.from_pretrained(
        random_folder, dtype=torch.float32, attn_implementation="eager"
    )
    for policy in (None, adapter):
        out = generate(
            ours,
            LONG,
            n=3,
            max_new_tokens=18,
            temperature=0.7,
            seed=1,
            stop_token_ids=(2, 40),
            adapter=policy,
        )
        sampled = out.model_logprob.double().sum(1)
        _, packed = frozen_forward(
            ours, packing.groups(prompts, out), [], temperature=0.7, memory_budget_bytes=2**20, adapter=policy
        )
        assert (sampled - packed).abs().max() < 2e-4
        for r in range(12) if policy is None else ():
            prompt, response = LONG[r // 3], out.tokens[r, : out.length[r]]
            with torch.no_grad():
                logits = network(torch.cat([torch.tensor(prompt), response])[None]).logits[
                    0, len(prompt) - 1 : -1
                ]
            assert float(
                (logits.double() / 0.7).log_softmax(1)[range(len(response)), response].sum()
            ) == pytest.approx(float(packed[r]), abs=2e-4)


def test_sampled_log_probs_equal_the_training_forward(tiny):
    adapter = Adapter.on(tiny, rank=2, alpha=4.0, share=0.5, seed=0)
    with torch.no_grad():
        for value in adapter.up.values():
            value.normal_(generator=torch.Generator().manual_seed(0))
    out = generate(
        tiny,
        PROMPTS,
        n=5,
        max_new_tokens=16,
        temperature=0.7,
        seed=1,
        stop_token_ids=(2, 40),
        adapter=adapter,
    )
    for r in range(15):
        prompt, response = PROMPTS[r // 5], out.tokens[r, : out.length[r]].tolist()
        ids = torch.tensor(prompt + response)
        hidden = tiny(ids, torch.tensor([0, len(ids)]), adapter=adapter)[len(prompt) - 1 : -1]
        total, token = sequence_logprob(
            hidden.detach(),
            tiny.head_weight,
            ids[len(prompt) :],
            torch.tensor([0, len(response)]),
            temperature=0.7,
            return_token_logprob=True,
        )
        assert (out.model_logprob[r, : len(response)] - token).abs().max() < 1e-4
        assert torch.all(out.model_logprob[r, len(response) :] == 0)
        assert out.model_logprob[r].sum() == pytest.approx(float(total), abs=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 0])
def test_model_log_probs_count_the_stop_tokens_that_min_new_tokens_forbids(tiny, temperature):
    stops = tuple(range(0, tiny.config.vocab_size, 2))
    out = generate(
        tiny,
        PROMPTS,
        n=4,
        max_new_tokens=9,
        temperature=temperature,
        top_p=0.9,
        seed=1,
        stop_token_ids=stops,
        min_new_tokens=6,
    )
    prompts = Prompts(text=[""] * 3, kind=[""] * 3, token_ids=PROMPTS, key_P=torch.arange(3))
    whole = packing.groups(prompts, out)
    _, packed = frozen_forward(tiny, whole, [], temperature=temperature or 1.0, memory_budget_bytes=2**20)
    assert (out.model_logprob.double().sum(1) - packed).abs().max() < 1e-4
    assert int(out.length.min()) > 6 and not set(out.tokens[:, :6].flatten().tolist()) & set(stops)
    for r in range(
        12
    ):  # of the processed distribution: what is left without the stop tokens, then the top 0.9 of it
        ids = torch.tensor(PROMPTS[r // 4] + out.tokens[r, : out.length[r]].tolist())
        hidden = tiny(ids, torch.tensor([0, len(ids)]))[-int(out.length[r]) - 1 : -1]
        p = (tiny.logits(hidden).detach().double() / (temperature or 1)).softmax(1)
        p[:6, list(stops)] = 0
        p /= p.sum(1, keepdim=True)
        ordered, order = p.sort(dim=1, descending=True)
        kept = torch.where(ordered.cumsum(1) - ordered < 0.9, ordered, 0).sum(1)
        expected = (
            (p.gather(1, ids[-len(p) :, None])[:, 0] / kept).log() if temperature else torch.zeros(len(p))
        )
        assert (out.logprob[r, : len(p)] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("max_rows", [64, 5, 3])
@pytest.mark.parametrize("length", [16, 1])
def test_states_taken_while_sampling_equal_those_of_the_reference_over_whole_responses(
    tiny, max_rows, length, every_cache
):
    adapter = Adapter.on(tiny, rank=2, alpha=4.0, share=0.5, seed=0)
    with torch.no_grad():
        for value in adapter.up.values():
            value.normal_(generator=torch.Generator().manual_seed(0))
    options = dict(
        n=5,
        max_new_tokens=length,
        temperature=0.9,
        seed=1,
        stop_token_ids=(2, *range(60, 90)),
        adapter=adapter,
    )
    states = States([0, 1, 2], LowerStates(2))
    out = generate(tiny, PROMPTS, states=states, max_rows=max_rows, **options)
    plain = generate(tiny, PROMPTS, max_rows=max_rows, **options)
    assert torch.equal(out.tokens, plain.tokens) and torch.equal(out.length, plain.length)
    assert length == 1 or out.length.unique().numel() > 3, "rows must end at different steps"
    prompts = Prompts(text=["", "", ""], kind=["", "", ""], token_ids=PROMPTS, key_P=torch.arange(3))
    whole = packing.groups(prompts, out)
    pooled, _ = frozen_forward(tiny, whole, [0, 1, 2], temperature=None, memory_budget_bytes=0)
    for layer in (0, 1, 2):
        assert states.pooled[layer].shape == pooled[layer].shape
        assert (states.pooled[layer] - pooled[layer]).abs().max() < 1e-5
    packed = packing.pack(whole, tiny.device)
    direct = tiny(packed.tokens, packed.layout, stop=2)
    assert (states.lower.of(whole) - direct).abs().max() < 1e-5
    _, expected = frozen_forward(tiny, whole, [], temperature=0.9, memory_budget_bytes=2**20)
    _, logprob = frozen_forward(
        tiny, whole, [], temperature=0.9, memory_budget_bytes=2**20, lower=states.lower
    )
    assert (logprob - expected).abs().max() < 1e-4


def test_samples_do_not_depend_on_batch_or_order(tiny, every_cache):
    options = dict(n=4, max_new_tokens=22, temperature=0.9, seed=5, stop_token_ids=(2, *range(50, 65)))
    whole = generate(tiny, PROMPTS, max_rows=64, **options)
    small = generate(tiny, PROMPTS, max_rows=4, **options)
    parts = generate(tiny, PROMPTS, max_rows=3, **options)  # fewer than the responses of a prompt
    turned = generate(tiny, PROMPTS[::-1], **options)
    for other in (small, parts):
        assert torch.equal(whole.tokens, other.tokens) and torch.equal(whole.length, other.length)
    assert torch.equal(whole.tokens.view(3, 4, -1), turned.tokens.view(3, 4, -1).flip(0))
    other = generate(tiny, PROMPTS, **{**options, "seed": 6})
    assert not torch.equal(whole.tokens, other.tokens)
    again = generate(tiny, PROMPTS, max_rows=64, **options)
    assert torch.equal(whole.logprob, again.logprob)


def test_shape_of_a_batch_changes_a_response_at_most_from_its_first_near_tie_on(tiny):
    g = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, 200, (int(size),), generator=g).tolist()
        for size in torch.randint(1, 30, (64,), generator=g)
    ]
    options = dict(n=1, max_new_tokens=30, temperature=0.9, seed=3, stop_token_ids=(2, 40))
    single, seven, whole = ((generate(tiny, prompts, max_rows=rows, **options)) for rows in (1, 7, 64))
    for other in (single, seven):
        same = (whole.tokens == other.tokens).cummin(1).values
        # The step of a near tie itself may differ.
        before = whole.near_tie.cumsum(1) == 0
        assert torch.all(same | ~before)
        assert int(same.all(1).sum()) >= 60
    assert int(whole.near_tie.sum()) < 10 and int(whole.length.sum()) > 1000
    again = generate(tiny, prompts, max_rows=7, **options)
    for name in ("tokens", "length", "finished", "logprob", "model_logprob", "near_tie"):
        assert torch.equal(getattr(seven, name), getattr(again, name))


@pytest.mark.parametrize("temperature", [0.9, 0])
def test_near_ties_are_those_of_the_perturbed_logits(tiny, temperature, monkeypatch, every_cache):
    monkeypatch.setattr(decoding, "NEAR_TIE", 0.2)
    out = generate(
        tiny,
        PROMPTS,
        n=4,
        max_new_tokens=20,
        temperature=temperature,
        seed=5,
        stop_token_ids=(2, *range(50, 65)),
    )
    for r in range(12):
        prompt, size = PROMPTS[r // 4], int(out.length[r])
        ids = torch.tensor(prompt + out.tokens[r, :size].tolist())
        logits = tiny.logits(tiny(ids, torch.tensor([0, len(ids)])))[len(prompt) - 1 : -1].detach().double()
        if temperature:
            key = combine(5, prompt_key(prompt), r % 4).expand(size)
            logits = (
                logits / temperature
                - exponential(torch.cat([stream(key[:1], i) for i in range(size)]), logits.shape[1]).log()
            )
        two = logits.topk(2)
        assert torch.equal(two.indices[:, 0], ids[len(prompt) :])
        gap = two.values[:, 0] - two.values[:, 1]
        clear = (gap - 0.2).abs() > 1e-3
        assert (
            torch.equal(out.near_tie[r, :size][clear], gap[clear] < 0.2) and not out.near_tie[r, size:].any()
        )
    assert 5 < int(out.near_tie.sum()) < int(out.length.sum()) - 5


def test_stop_token_ends_a_row_and_counts(tiny):
    stops = tuple(range(20, 200))
    out = generate(tiny, PROMPTS, n=3, max_new_tokens=10, seed=0, stop_token_ids=stops, min_new_tokens=3)
    for r in range(9):
        row = out.tokens[r, : out.length[r]].tolist()
        assert len(row) >= 4 or not out.finished[r]
        assert (row[-1] in stops) == bool(out.finished[r]) and not set(row[:-1]) & set(stops)
        assert torch.all(out.tokens[r, out.length[r] :] == 0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1, 10**6], "token id"), ([1] * 3000, "context")],
    ids=["empty", "unknown id", "too long"],
)
def test_prompts_that_cannot_be_used(tiny, prompt, message):
    with pytest.raises(UserError, match=message):
        generate(tiny, [prompt], n=1, max_new_tokens=4, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 0},
        {"n": 1.5},
        {"max_new_tokens": 0},
        {"max_rows": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 5},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-45},
        {"seed": 2**63},
        {"seed": 0.5},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": (10**6,)},
        {"prompt_key": torch.zeros(2, dtype=torch.int64)},
        {"prompt_key": torch.zeros(1)},
        {"prompt_key": [1]},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(tiny, change):
    with pytest.raises(UserError, match=next(iter(change)) + ".*expected"):
        generate(tiny, PROMPTS[:1], **{"n": 1, "max_new_tokens": 4, "seed": 0, **change})


def test_memory_that_runs_out_is_told_with_what_a_row_takes(tiny, monkeypatch):
    c, options = tiny.config, dict(n=2, max_new_tokens=4, seed=0)
    monkeypatch.setattr(rollout, "new_cache", lambda *_: torch.empty(2**46))
    row = (9 + 4) * 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4
    with pytest.raises(
        UserError,
        match=f"6 responses .* 13 tokens .* {row} bytes a response, {6 * row} in all.*--rollout-rows",
    ):
        generate(tiny, PROMPTS, **options)
    monkeypatch.setattr(rollout, "new_cache", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        generate(tiny, PROMPTS, **options)


def test_no_token_left_to_draw(tiny):
    everything = range(tiny.config.vocab_size)
    with pytest.raises(UserError, match="leaves no token to draw"):
        generate(tiny, PROMPTS, n=1, max_new_tokens=4, seed=0, min_new_tokens=1, stop_token_ids=everything)
    assert generate(
        tiny, PROMPTS, n=1, max_new_tokens=4, seed=0, stop_token_ids=everything
    ).length.tolist() == [1, 1, 1]


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    used = expected > 0
    assert counts[~used].sum() == 0
    return float(((counts[used] - expected[used]) ** 2 / expected[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.3, 1.0, 4), (0.8, 0.9, 7)],
)
@pytest.mark.parametrize(
    "built",
    [pytest.param(True, marks=pytest.mark.skipif(not compiled.instructions, reason="not built")), False],
)
def test_distribution_and_log_probs(temperature, top_p, top_k, built, monkeypatch):
    if not built:
        monkeypatch.setattr(compiled, "make", compiled.MAKES["none"])
    rows, vocabulary = 40_000, 200
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(2)) * 2
    key = combine(7, torch.arange(rows))
    token, logprob, model_logprob = sample(
        logits.expand(rows, -1), key=key, step=3, temperature=temperature, top_p=top_p, top_k=top_k
    )
    p = torch.softmax(logits.double() / temperature, 0)
    order = p.argsort(descending=True)
    kept = torch.zeros_like(p)
    for rank, v in enumerate(order.tolist()):
        mass = float(kept.sum()) if not top_k else float(kept.sum() / p[order[:top_k]].sum())
        if (not top_k or rank < top_k) and mass < top_p:
            kept[v] = p[v]
    q = kept / kept.sum()
    statistic, degrees = chi_square(torch.bincount(token, minlength=vocabulary).double(), q)
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)
    assert (logprob - q[token].log()).abs().max() < 1e-5
    assert (model_logprob - p[token].log()).abs().max() < 1e-5


def test_greedy_sampling_and_infinite_logits():
    logits = torch.tensor([[0.0, 3.0, 1.0], [-math.inf, -math.inf, 5.0]])
    token, logprob, model_logprob = sample(logits, key=torch.tensor([1, 2]), step=0, temperature=0)
    assert token.tolist() == [1, 2] and logprob.tolist() == [0, 0]
    assert (model_logprob - logits.log_softmax(1)[[0, 1], [1, 2]]).abs().max() < 1e-6
    token, _, _ = sample(logits[1:].expand(1000, -1), key=torch.arange(1000), step=0)
    assert torch.all(token == 2)


def test_uniform_numbers_are_uniform_and_keyed():
    u = uniform(combine(3, torch.arange(20_000)), 11)
    assert 0 < float(u.min()) and float(u.max()) < 1
    statistic, degrees = chi_square(torch.histc(u, 50, 0, 1), torch.full((50,), 0.02, dtype=torch.float64))
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)
    for step in (11, torch.tensor(11), torch.tensor([11])):
        assert torch.equal(u, uniform(combine(3, torch.arange(20_000)), step))
    assert (
        abs(float(torch.corrcoef(torch.stack([u, uniform(combine(3, torch.arange(20_000)), 12)]))[0, 1]))
        < 0.03
    )
    assert abs(float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])) < 0.03


def test_exponential_numbers_are_exponential_and_keyed():
    streams = stream(torch.arange(200), 4)
    numbers = exponential(streams, 300)
    # exp(-E) is uniform; so are the largest and the smallest of the numbers in their own scale.
    for u in (
        torch.exp(-numbers).flatten(),
        torch.exp(-numbers.amin(1) * 300),
        (1 - torch.exp(-numbers.amax(1))) ** 300,
    ):
        bins = 50 if len(u) > 1000 else 10
        statistic, degrees = chi_square(
            torch.histc(u, bins, 0, 1), torch.full((bins,), 1 / bins, dtype=torch.float64)
        )
        assert statistic < degrees + 5 * math.sqrt(2 * degrees)
    for sample_of in (numbers, numbers.T):
        correlation = torch.corrcoef(sample_of)[
            *torch.triu_indices(len(sample_of), len(sample_of), 1)
        ] * math.sqrt(sample_of.shape[1])
        assert abs(float(correlation.var()) - 1) < 0.05 and float(correlation.abs().max()) < 6
    assert torch.equal(numbers, exponential(stream(torch.arange(200), torch.tensor([4])), 300))
    assert torch.equal(numbers[7:9, :11], exponential(streams[7:9], 11))
    assert not (numbers == exponential(stream(torch.arange(200), 5), 300)).any()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-45},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 1.5},
        {"key": torch.zeros(3)},
        {"key": torch.zeros(2, dtype=torch.int64)},
        {"logits": torch.zeros(3)},
        {"logits": torch.zeros(3, 0)},
    ],
    ids=str,
)
def test_sample_refuses_bad_values(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} .*expected"):
        sample(**{"logits": torch.zeros(3, 5), "key": torch.zeros(3, dtype=torch.int64), "step": 0, **change})
