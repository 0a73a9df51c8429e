"""A NaN that the model computes is called the model's, with the layer where it begins."""

import math
from types import SimpleNamespace

import pytest
import torch

from engine import model as M
from engine.errors import NonFiniteError
from engine.model.packing import Group
from engine.policy.forward import frozen_forward
from engine.policy.lora import Adapter
from engine.rollout import generate
from engine.stages.sampling import naming

PROMPTS = [[5, 9, 33], [7, 8]]
GROUPS = [Group([5, 9, 33], [[6, 7], [8]], [0, 1])]


@pytest.fixture
def network(tiny_folder):
    return M.load(tiny_folder)


@pytest.fixture
def adapter(network):
    return Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=0)


def sampled(network, adapter=None, **options):
    return generate(network, PROMPTS, n=2, max_new_tokens=4, seed=0, adapter=adapter, **options)


def forward(network, adapter=None):
    return frozen_forward(network, GROUPS, [], temperature=1.0, adapter=adapter)


def head_states(network, adapter=None):
    return frozen_forward(network, GROUPS, [2], temperature=None, adapter=adapter)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("compute", [sampled, forward])
def test_the_reference_and_its_layer_are_named(network, compute, value):
    network.layers[2].down[3, 0] = value
    with pytest.raises(NonFiniteError, match=r"^the reference computes .* first in layer 3 of 4 \(float32\)"):
        compute(network)


@pytest.mark.parametrize("compute", [sampled, forward])
def test_the_policy_and_its_layer_are_named(network, adapter, compute):
    with torch.no_grad():
        adapter.up["3|mlp|down_proj"].fill_(1.0)
        adapter.down["3|mlp|down_proj"][0, 0] = math.nan
    compute(network)
    with pytest.raises(NonFiniteError, match=r"^the policy computes .* first in layer 4 of 4.*learning-rate"):
        compute(network, adapter)


def test_states_for_heads_are_looked_at_too(network):
    network.layers[0].qkv[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the reference computes .* in layer 1 of 4"):
        head_states(network)


def test_the_embedding_of_a_token(network):
    network.embed[33, 0] = math.nan
    with pytest.raises(NonFiniteError, match="first in the embedding"):
        sampled(network)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_logit_that_is_no_number(network, processor, temperature):
    """No prompt holds the token; each draw sees its logit all the same."""
    network.embed[300, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the reference computes .* first in (its logits|the embedding)"):
        sampled(network, temperature=temperature)


def test_float16_overflow_names_its_cure(tiny_folder):
    network = M.load(tiny_folder, dtype="float16")
    network.layers[1].down.fill_(60_000.0)
    network.layers[1].gate_up.fill_(60_000.0)
    with pytest.raises(NonFiniteError, match=r"in layer 2 of 4 \(float16\).*--dtype bfloat16"):
        sampled(network)


def test_the_stage_stands_in_front():
    with (
        pytest.raises(NonFiniteError, match="^iteration-2/slack: the policy"),
        naming(SimpleNamespace(name="iteration-2/slack")),
    ):
        raise NonFiniteError("the policy computes numbers that are not finite")
