"""Models of random weights in the sizes of published ones."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.run import floors, shapes
from engine.model.architecture import ModelConfig
from tests.helpers.tiny_shape import TINY

# The published models' numbers of parameters, and the floor of a decode step in ms by weights, keys and
# values alone: 32 prompts of 256 tokens x 8 responses of 512, bfloat16, 3.0 TB/s.
PUBLISHED = {
    "smollm2-135m": (134_515_008, 0.66),
    "qwen2.5-0.5b": (494_032_768, 0.63),
    "qwen3-0.6b": (596_049_920, 3.22),
    "llama-3.2-1b": (1_235_814_400, 1.63),
    "qwen2.5-1.5b": (1_543_714_304, 1.73),
    "llama-3.1-8b": (8_030_261_248, 8.22),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name, tmp_path):
    config = ModelConfig.from_json(shapes.SHAPES[name], tmp_path)
    parameters, floor_ms = PUBLISHED[name]
    assert config.parameter_count() == parameters
    parts = floors.sampling(config, 2, [256] * 32, 8, [512] * 256)
    least = floors.seconds(parts, floors.Rates(bytes_per_s=3.0e12, flops_per_s=790e12))
    step_ms = 1000 / 512 * (least["layers"] + least["head"] + least["keys and values"])
    assert step_ms == pytest.approx(floor_ms, rel=0.012)


def test_a_shape_is_a_model_that_transformers_loads(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    with shapes.opened("", "tiny", torch.float32, torch.device("cpu")) as (name, folder, model):
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert name == "tiny, random weights" and not folder.exists()
    assert model.layers[1].down.std() == pytest.approx(0.02, rel=0.1)
    assert not model.layers[1].qkv_bias.any()
    tokens = torch.arange(20) * 7
    with torch.no_grad():
        expected = stock(tokens[None]).logits[0]
        assert torch.allclose(model.logits(model(tokens, torch.tensor([0, 20]))), expected, atol=1e-5)
    for model, shape, message in (("", "qwen", "qwen2.5-0.5b"), ("smoke", "tiny", "--model left out")):
        opened = shapes.opened(model, shape, torch.float32, torch.device("cpu"))
        with pytest.raises(SystemExit, match=message), opened:
            pass
