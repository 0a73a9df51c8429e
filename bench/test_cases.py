"""The cases of `python -m bench.run` under pytest-benchmark: `python -m pytest bench -n 0`. Small shapes; `bench.run` measures."""

import math

import pytest
import torch

from bench import loss_head, rollout, train_step
from engine.model import load
from engine.smoke import smoke_folder


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("name", ["dualign", "torch eager"])
def test_preference_loss(benchmark, name, rows, frozen):
    x = loss_head.make("smollm2-135m", rows, frozen, torch.float32, torch.device("cpu"))
    step = {"dualign": loss_head.ours(x, 1 << 40), "torch eager": loss_head.eager(x)}[name]
    loss_head.check(name, step, x)
    loss, _ = benchmark(step)
    assert loss.isfinite()


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("name", ["dualign", "transformers generate"])
def test_rollout(benchmark, name, rows):
    model = load(smoke_folder())
    given = rollout.prompts(model.config.vocab_size, rows // 8, 16), 8, 16
    if name == "dualign":
        assert rollout.gap(model, *given).max < 1e-4
        step = rollout.ours(model, *given)
    else:
        step = rollout.transformers_generate(rollout.stock(smoke_folder(), torch.float32, model.device), *given)
    assert benchmark(step).shape == (rows, 16)


@pytest.mark.parametrize("pairs", [2, 8])
def test_train_step(benchmark, pairs):
    model = load(smoke_folder())
    groups = train_step.batch(model.config.vocab_size, pairs, 16, 16)
    step = train_step.ours(model, groups, train_step.reference_logprob(model, groups))
    assert float(step()) == pytest.approx(math.log(2), abs=1e-4), "the policy is the reference at first"
    assert benchmark(step).isfinite()
