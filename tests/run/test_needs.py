"""What parts of a run are counted to need: against what a processor needs, and by hand for a GPU."""

from dataclasses import replace

import pytest
import torch

from bench.run.measure import peak_bytes
from engine.config import CaidConfig
from engine.model.decoder import Decoder
from engine.model.packing import Group, LowerStates
from engine.policy.forward import frozen_forward
from engine.rollout.sampler import generate
from engine.rollout.states import States
from engine.run.needs import kept_states_bytes, sampled_sets, sampling_bytes, scoring_bytes, shares_prompts
from kernels import compiled
from tests.helpers.plans import SHAPE

CPU, GPU, HALF = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
MODEL = replace(SHAPE, hidden_size=128, intermediate_size=512, num_layers=6)
needs_native = pytest.mark.skipif(not compiled.instructions, reason="kernels._native is not built")


def config(new: int) -> CaidConfig:
    return replace(CaidConfig(), max_new_tokens=new, memory_budget_mb=1)


def network(dtype: torch.dtype) -> Decoder:
    made, generator = Decoder(MODEL, {}, dtype, CPU), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return made


def peak_of_sampling(model: Decoder, lengths: list[int], n: int, new: int, rows: int, *, keeps: bool) -> int:
    prompts = [[5 + i % 50 for i in range(length)] for length in lengths]

    def run() -> None:
        states = States([], LowerStates(3)) if keeps else None
        generate(model, prompts, n=n, max_new_tokens=new, seed=1, max_rows=rows, states=states)

    return peak_bytes(run, CPU)


# Long prompts, whose pass counts; many new tokens; short responses of many rows; a part of a prompt's rows.
SIZES = [([200] * 8, 4, 8, 32), ([20] * 8, 8, 120, 64), ([3] * 4, 16, 3, 64), ([100] * 2, 16, 20, 8)]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("lengths", "n", "new", "rows"), SIZES)
@pytest.mark.parametrize("keeps", [False, True])
def test_sampling_takes_what_is_counted(lengths, n, new, rows, dtype, keeps):
    """What is not counted is within the 15 % that a plan adds; a prompt's own states are kept beside."""
    counted = sampling_bytes(config(new), MODEL, dtype, CPU, lengths, rows, [(len(lengths), n)])
    if keeps:
        counted += kept_states_bytes(lengths, n * new, MODEL.hidden_size, dtype)
    measured = peak_of_sampling(network(dtype), lengths, n, new, rows, keeps=keeps)
    assert 0.94 * measured < counted < 1.6 * measured, f"{counted} counted, {measured} measured"


def test_a_batch_holds_nothing_of_the_one_before():
    model = network(torch.float32)
    one, three = (peak_of_sampling(model, [60] * prompts, 4, 30, 16, keeps=False) for prompts in (4, 12))
    assert one <= three < 1.1 * one


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_scoring_takes_what_is_counted(dtype):
    model = network(dtype)
    responses = [[6 + i % 40 for i in range(60)] for _ in range(4)]
    groups = [Group(list(range(5, 45)), responses, list(range(4 * p, 4 * p + 4))) for p in range(20)]

    def run() -> None:
        frozen_forward(model, groups, [3], temperature=1.0, memory_budget_bytes=2**20)

    counted = scoring_bytes(config(60), MODEL, dtype, CPU, 40, [(20, 4)])
    measured = peak_bytes(run, CPU)
    assert 0.94 * measured < counted < 1.6 * measured, f"{counted} counted, {measured} measured"


def test_the_rows_of_a_prompt_share_its_keys_but_in_float64():
    def counted(dtype: torch.dtype, device: torch.device, lengths: list[int]) -> int:
        return sampling_bytes(config(1000), MODEL, dtype, device, lengths, 64, [(8, 8)])

    token = 2 * MODEL.num_kv_heads * MODEL.head_dim * MODEL.num_layers
    for device in (CPU, GPU):
        for dtype in (torch.float64, torch.float32, HALF):
            more = counted(dtype, device, [60] * 8) - counted(dtype, device, [50] * 8)
            times = 8 if shares_prompts(device, dtype) else 64
            assert more == times * 10 * token * dtype.itemsize, (device, dtype)
    assert [shares_prompts(GPU, dtype) for dtype in (torch.float64, torch.float32, HALF)] == [
        False,
        True,
        True,
    ]
    # Of prompts the longest of a batch are counted: they are laid out side by side.
    assert counted(HALF, GPU, [60] * 8 + [1] * 92) == counted(HALF, GPU, [60] * 8)


PASSED = 10 * 128 + 2 * (4 + 2) * 16 + 3 * 512  # numbers of a token


def test_the_pass_over_long_prompts_counts():
    """Half a million tokens of prompts pass together, beside their keys and values."""
    lengths, token = [4000] * 128, 2 * 2 * 16 * 6
    found = sampling_bytes(config(1), MODEL, HALF, GPU, lengths, 1024, [(128, 8)])
    assert found == 128 * 4000 * 2 * (PASSED + token)


@pytest.mark.parametrize(
    ("dtype", "device", "sets", "tokens"),
    [
        (HALF, GPU, [(1000, 8), (10, 6)], 32768),
        (HALF, GPU, [(1000, 8), (10, 600)], 100 + 600 * 60),  # no group is cut
        (HALF, GPU, [(10, 8)], 10 * (100 + 8 * 60)),  # all there are
        (torch.float32, GPU, [(1000, 8)], 2048),
        (HALF, CPU, [(1000, 8)], 2048),
        (torch.float32, CPU, [(2, 8)], 2 * (100 + 8 * 60)),
    ],
)
def test_tokens_of_a_pass_of_scoring(dtype, device, sets, tokens, monkeypatch):
    for multiplies in (False, True):
        monkeypatch.setattr(compiled, "has_16_bit_products", lambda multiplies=multiplies: multiplies)
        found = scoring_bytes(config(60), MODEL, dtype, device, 100, sets)
        # Other CPUs compute parts of it in float32.
        itemsize = 2 if dtype == HALF and (device == GPU or multiplies) else 4
        assert found == tokens * PASSED * itemsize + 2**20


def test_sets_are_those_of_the_rank_with_most_prompts():
    c = replace(CaidConfig(), n_prompts=100, n_responses=8, eval_prompts=9, eval_responses=6)
    c = replace(c, slack_prompts=5, slack_responses=3)
    assert sampled_sets(c, 1)[:3] == [(100, 8), (9, 6), (5, 3)]
    assert sampled_sets(c, 8)[:3] == [(13, 8), (2, 6), (1, 3)]
