"""Runs in bfloat16 on a CPU: what they sample, score and train in, and what they say of it."""

import pytest
import torch
from safetensors.torch import load_file

from engine import model, train
from engine.model import packing
from engine.policy.forward import frozen_forward, states_and_head
from engine.policy.lora import Adapter
from engine.records import Prompts
from engine.rollout.sampler import generate
from engine.run.rows import SampledRow, read_rows
from engine.stages import inputs
from kernels import compiled, sequence_logprob
from tests.helpers.runs import SMOKE, files

TOKENS = [[1, 70, 75, 80], [1, 90], [1, 66, 67, 68, 69]]


def run(folder, *flags: str) -> int:
    return train.main(["caid", *SMOKE, "--dtype", "bfloat16", "--out", str(folder), *flags])


def test_a_run_ends_and_an_equal_one_writes_equal_files(tmp_path, capsys):
    assert run(tmp_path / "a") == 0
    printed = capsys.readouterr()
    assert "torch.bfloat16, cpu" in printed.out + printed.err
    assert "sampled and recomputed log-probs differ by" in printed.out + printed.err
    gaps = [row.logprob_gap["mean"] for row in read_rows(tmp_path / "a", SampledRow)]
    assert gaps and all(gap < 0.05 for gap in gaps)
    trained = load_file(max((tmp_path / "a" / "adapters").rglob("*.safetensors")))
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert run(tmp_path / "b") == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_processor_without_16_bit_products_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inputs, "has_16_bit_products", lambda: False)
    assert run(tmp_path / "c") == 0
    printed = capsys.readouterr()
    assert "this processor has neither AVX512-BF16 nor AMX" in printed.out + printed.err


@pytest.mark.skipif(not compiled.instructions, reason="no compiled kernels")
def test_a_policy_starts_with_the_log_probs_that_the_reference_was_scored_with(tiny_folder):
    """They are equal bit for bit, though one pass asks for a gradient and the other does not."""
    network = model.load(tiny_folder, dtype=torch.bfloat16)
    prompts = Prompts(text=["a", "b", "c"], kind=[""] * 3, token_ids=TOKENS, key_P=torch.tensor([1, 2, 3]))
    rollouts = generate(network, TOKENS, n=8, max_new_tokens=40, seed=0, stop_token_ids=(2, 60))
    groups = packing.groups(prompts, rollouts)
    _, reference = frozen_forward(network, groups, [], temperature=0.7)
    policy = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=0)
    packed = packing.pack(groups, network.device)
    states, head = states_and_head(network, policy, packed)
    assert states.requires_grad and states.dtype == torch.bfloat16
    logprob = sequence_logprob(states, head, packed.target_T, packed.cu_seqlens, temperature=0.7)
    assert torch.equal(logprob.detach().double(), reference)
