"""The cases of `python -m bench.run` under pytest-benchmark, in small shapes: `python -m pytest bench`."""

import math

import pytest
import torch

from bench.run import engines, growth, loss_head, rollout, train_step
from bench.run.work import random_work
from engine.model.folder import load
from engine.stages.smoke import smoke_folder


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("name", ["dualign", "torch eager"])
def test_preference_loss(benchmark, name, rows, frozen):
    asked = loss_head.LossHead(rows=rows, frozen=frozen)
    x = loss_head.make(asked, torch.float32, torch.device("cpu"))
    step = {"dualign": loss_head.ours(x, 1 << 40), "torch eager": loss_head.eager(x)}[name]
    loss_head.check({name: step}, x)
    loss, _ = benchmark(step)
    assert loss.isfinite()


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("name", ["dualign", "transformers generate"])
def test_rollout(benchmark, name, rows):
    model = load(smoke_folder())
    work = random_work(model.config.vocab_size, rows, n=8, prompt=16, new=16)
    if name == "dualign":
        assert rollout.gap(model, work).max < 1e-4
        step = rollout.ours(model, work)
    else:
        stock = engines.stock(smoke_folder(), torch.float32, model.device)
        step = engines.transformers_generate(stock, work)
    work.check(name, benchmark(step))


def test_responses_that_part(monkeypatch):
    model = load(smoke_folder())
    work = random_work(model.config.vocab_size, 16, n=4, prompt=8, new=10)
    assert rollout.parting(model, work) == (0, None)
    sampled, calls = rollout._sampled, []

    def turned(*arguments):
        calls.append(arguments)
        rollouts = sampled(*arguments)
        if len(calls) == 2:
            rollouts.tokens[3, 4:] += 1
            rollouts.tokens[7, 8] += 1
        return rollouts

    monkeypatch.setattr(rollout, "_sampled", turned)
    assert rollout.parting(model, work) == (2 / 16, 6)


@pytest.mark.parametrize("pairs", [2, 8])
def test_train_step(benchmark, pairs):
    model = load(smoke_folder())
    groups = train_step.batch(model.config.vocab_size, pairs, 16, 16)
    step = train_step.ours(model, groups, train_step.reference_logprob(model, groups))
    assert float(step()) == pytest.approx(math.log(2), abs=1e-4), "the policy is the reference at first"
    assert math.isfinite(benchmark(step))


def test_growth_steps_are_of_their_sizes():
    model = load(smoke_folder())
    by_size = growth.steps(model)
    assert {size.what for size in by_size} == {"sampling", "training step"}
    for size, step in by_size.items():
        if size.axis == "layers" and size.what == "sampling":
            assert {len(response) for response in step()} == {32}
    assert len(growth.shallow(model, 1).layers) == 1
    assert len(model.layers) == model.config.num_layers
    assert growth.slope([(1, 1.0), (2, 2.0), (4, 8.0)]) == pytest.approx(2)
