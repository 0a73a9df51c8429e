"""Steps of bench.gpu that take no time: some that go wrong, and those of part 0 in small sizes."""

import os
import time
from pathlib import Path

import pytest
import torch

from bench.gpu.steps import Figure, Step, table


def line(device: torch.device) -> list[dict]:
    return [table("Name", ["x", "y"], [["one", 2.5]], device=device)]


def hangs(device: torch.device) -> list[dict]:
    time.sleep(3600)
    raise AssertionError("this process had to be ended")


def dies(device: torch.device) -> list[dict]:
    os._exit(3)


def wrong() -> list[Step]:
    """Lists a step that goes well, and two that do not."""
    good = Step("good", 1, line, lambda lines: [Figure("y", "s", lines[0]["table"][0][1], 2.0)])
    return [good, Step("hangs", 1, hangs), Step("dies", 1, dies)]


def small(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Lists the steps of part 0 but the first, which runs tests, in small sizes."""
    from bench.gpu import first, parts
    from bench.run import floors, loss_head, shapes
    from tests.helpers.tiny_shape import TINY

    monkeypatch.setattr(floors, "PROBED", dict.fromkeys(("cpu", "cuda"), (2**16, 16)))
    monkeypatch.setitem(loss_head.SHAPES, "qwen3-8b", (16, 50))
    for shape in ("qwen2.5-0.5b", "qwen2.5-1.5b"):
        monkeypatch.setitem(shapes.SHAPES, shape, TINY)
    for sizes, values in (
        (parts.HEAD, {"rows": 128, "repeats": 1}),
        (parts.ROLLOUT, {"rows": 16, "prompt": 5, "new": 3}),
        (parts.TRAIN_STEP, {"pairs": 2, "prompt": 5, "response": 4, "repeats": 1}),
        (parts.ITERATION, {"steps": 1, "prompts": 2, "new": 3}),
        (first.CEILINGS, {"rows": 16, "width": 8, "vocabulary": 40, "side": 8}),
        (first.ROWS, {"rows": 2, "vocabulary": 300, "tiles": ((4096, 8), (1024, 4))}),
        (first.FORWARD, {"rows": 3, "heads": ((16, 300),)}),
    ):
        for name, value in values.items():
            monkeypatch.setitem(sizes, name, value)
    monkeypatch.setattr(first, "ENTRIES_ROWS", 20)
    return first.steps(str(model))[1:]
