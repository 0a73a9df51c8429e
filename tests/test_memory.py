"""The predicted time and memory of a run."""

from dataclasses import replace

import pytest
import torch

from engine import memory
from engine.architecture import ModelConfig, Rope
from engine.config import CaidConfig, PrimalDualConfig
from engine.errors import UserError
from engine.memory import KEPT_STATES_BYTES, Plan, kept_states_bytes

SHAPE = ModelConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=256,
    rms_eps=1e-6, tied=True, rope=Rope(theta=1e4),
)  # fmt: skip


@pytest.fixture(autouse=True)
def fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_matmul_rate", lambda dtype, device: 1e11)


def plan(prompts: int = 100, length: int = 20, dtype: torch.dtype = torch.float32, **changes) -> Plan:
    return Plan.of(replace(CaidConfig(), **changes), SHAPE, dtype, torch.device("cpu"), [length] * prompts, [length] * 10)


def test_kept_states_are_counted_up_to_their_limit():
    assert kept_states_bytes([10, 20], 30, 8, torch.bfloat16) == (10 + 20 + 2 * 30) * 8 * 2
    tokens = KEPT_STATES_BYTES // (4 * 8)
    assert kept_states_bytes([tokens], 0, 8, torch.float32) == KEPT_STATES_BYTES
    assert kept_states_bytes([tokens], 1, 8, torch.float32) == 0


def test_more_work_takes_longer_and_more_rows_more_memory():
    base = plan()
    for more in ({"steps": 50}, {"iterations": 9}, {"eval_responses": 60}, {"max_new_tokens": 200}):
        assert plan(**more).seconds > 1.05 * base.seconds
    assert plan(rollout_rows=2000, n_responses=40).needed_bytes > base.needed_bytes
    # In 16 bits the reference's own log-probs take a pass of their own.
    assert plan(dtype=torch.bfloat16).seconds > base.seconds


def test_a_policy_step_is_counted_with_the_responses_that_it_trains_on():
    two = plan().seconds
    assert plan(responses_per_prompt=0).seconds == plan(responses_per_prompt=8).seconds > 1.05 * two
    assert plan(pairs="mine.jsonl", responses_per_prompt=0).seconds == two  # a file has two
    gradient = [Plan.of(c, SHAPE, torch.float32, torch.device("cpu"), [20] * 100, [20] * 10).seconds
                for c in (PrimalDualConfig(), PrimalDualConfig(responses_per_prompt=0))]  # fmt: skip
    assert gradient[0] == gradient[1]


def test_too_little_memory_names_both_sizes_and_the_cure():
    with pytest.raises(UserError, match=r"needs about \d+\.\d GB of memory and 0\.1 GB are free; lower --rollout-rows"):
        replace(plan(), available_bytes=10**8).check()


def test_sentence():
    assert Plan(2 * 10**9, 10**10, 150.0).sentence() == "predicted: about 2 min, 2.0 GB of memory (10.0 GB free)"
