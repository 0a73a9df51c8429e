"""Floors by bytes and flops, on numbers computed by hand."""

import torch

from bench.run import floors, iteration
from engine.model.architecture import ModelConfig, Rope

# Each layer has 120 weights in its products, the head 40, all 300; a token's keys and values
# take 8 bytes in each layer.
CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    max_positions=64,
    rms_eps=1e-5,
    tied=True,
    rope=Rope(theta=1e4),
    window=3,
    window_layers=(1,),
)


def test_floor_of_sampling_by_hand():
    # Two responses to prompts of 5 and 2 tokens; 4, 3 and 1 rows draw a token, the first
    # ones from 2 rows of logits.
    parts = floors.sampling(CONFIG, 2, [5, 2], 2, [3, 1, 2, 2])
    steps = [(p.name, p.bytes, p.flops) for p in parts]
    assert steps == [
        ("prefill", 240 * 2 + 2 * 7 * 8, 2 * 240 * 7),
        ("head", 80, 2 * 40 * 2),
        ("logits", 80, 0),
        ("head", 80, 2 * 40 * 3),
        ("logits", 120, 0),
        ("layers", 480, 2 * 240 * 3),
        # All 7 tokens of the prompts and 3 of responses; in the window 2 + 2 and 3 of responses.
        ("keys and values", (10 + 7) * 8, 0),
        ("head", 80, 2 * 40),
        ("logits", 40, 0),
        ("layers", 480, 2 * 240),
        # One row is left, with 5 tokens of its prompt and 2 of its response; in the window 1 and 2.
        ("keys and values", (7 + 3) * 8, 0),
    ]
    least = floors.seconds(parts, floors.Rates(bytes_per_s=1, flops_per_s=2))
    assert least == {
        "prefill": 1680,
        "head": 80 + 120 + 80,
        "logits": 240,
        "layers": 720 + 480,
        "keys and values": 216,
    }


def test_floor_of_a_training_step_by_hand():
    rates = floors.Rates(bytes_per_s=1, flops_per_s=2)
    lora, full = (floors.training(CONFIG, 2, 7, 3, full=full) for full in (False, True))
    assert floors.seconds(lora, rates) == {"layers": 2 * 1680, "head": 2 * 120}
    assert floors.seconds(full, rates) == {"layers": 3 * 1680, "head": 3 * 120, "optimizer": 28 * 300}
    assert sum(p.flops for p in lora) == 4 * (240 * 7 + 40 * 3)
    assert sum(p.flops for p in full) == 6 * (240 * 7 + 40 * 3)


def test_rates_are_those_of_the_fastest_probe(monkeypatch):
    probes = {
        "copy": floors.Probe(print, bytes=12),
        "read": floors.Probe(print, bytes=8),
        "product": floors.Probe(print, flops=30),
    }
    times = {name: {"median": s} for name, s in {"copy": 4, "read": 2, "product": 3, "dualign": 1}.items()}
    assert floors.rates(probes, times) == floors.Rates(bytes_per_s=4, flops_per_s=10)
    monkeypatch.setitem(floors.PROBED, "cpu", (2**20, 64))
    for probe in floors.probes(torch.bfloat16, torch.device("cpu")).values():
        probe.step()


def test_floor_of_an_iteration_by_hand():
    # The adapter lies on one of the two layers, whose products have 120 weights.
    rates = floors.Rates(bytes_per_s=1e30, flops_per_s=1.0)
    size = iteration.Size(steps=3, prompts=2, new=9)
    least = iteration.least(CONFIG, 2, size, prompt=5, response=4.0, on=rates)
    head, layer, tokens = 2 * 40, 2 * 120, 2 * 4
    prompts = 6  # in an iteration; 2 more measure the slack
    scoring = prompts * (layer * (5 + tokens) + head * tokens)
    assert least["scoring"] == scoring == 3 * least["slack: scoring"]
    assert least["policy steps"] == 2 * least["scoring"]
    # The first token of both responses comes from the prompt's logits; the last one passes no layer.
    rollout = prompts * (2 * layer * (5 + 2 * 3) + head * (1 + 2 * 3))
    assert least["rollout"] == rollout == 3 * least["slack: rollout"]
