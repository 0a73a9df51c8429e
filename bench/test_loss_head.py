"""The cases of bench/loss_head.py under pytest-benchmark: `python -m pytest bench`. Small shapes; `python -m bench.run` measures."""

import pytest
import torch

from bench import loss_head


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("name", ["dualign", "torch eager"])
def test_preference_loss(benchmark, name, rows, frozen):
    x = loss_head.make("smollm2-135m", rows, frozen, torch.float32, torch.device("cpu"))
    step = {"dualign": loss_head.ours(x, 1 << 40), "torch eager": loss_head.eager(x)}[name]
    loss_head.check(name, step, x)
    loss, _ = benchmark(step)
    assert loss.isfinite()
