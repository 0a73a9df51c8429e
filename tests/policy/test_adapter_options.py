"""Dropout and targets of adapters against peft with the same masks, and labels that are drawn once."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from engine import model
from engine.config import CaidConfig, smoke
from engine.model import packing
from engine.model.names import FUSED, linears_of
from engine.model.packing import Group
from engine.policy.forward import frozen_forward, states_and_head
from engine.policy.lora import Adapter
from engine.policy.pairs import within_prompts
from engine.policy.peft import save_peft
from engine.policy.preference_loss import PreferenceLoss
from engine.policy.weights import new_adapter
from engine.records import Pairs, Prompts, Score, ScoredTarget, Scores
from engine.rollout.sampler import generate
from tests.helpers.samples import samples_of

PROMPT, RESPONSES = [1, 70, 75, 80], [[90, 66, 67], [71, 72, 73, 74, 2]]
TARGETS = ("q", "v", "gate", "up", "down")


@pytest.fixture(scope="module")
def network(tiny_folder):
    return model.load(tiny_folder, dtype="float64")


@pytest.fixture(scope="module")
def adapter(network):
    made = Adapter.on(network, rank=3, alpha=6.0, share=0.0, seed=0, linears=linears_of(TARGETS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in made.up.values():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return made


class Masked(nn.Module):
    """Stands in for a dropout of peft: multiplies by the mask of the sequence at hand."""

    def __init__(self, mask_TD, rows):
        super().__init__()
        self.mask_TD, self.rows = mask_TD, rows

    def forward(self, x):
        return x * self.mask_TD[self.rows[0]]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_has_the_values_and_gradients_of_peft_with_the_same_masks(
    network, adapter, tiny_folder, tmp_path, checkpointed
):
    packed = packing.pack([Group(PROMPT, RESPONSES, [0, 1])], network.device)
    dropped = adapter.with_dropout(0.4, key=5)
    adapter.zero_grad()
    states, head = states_and_head(network, dropped, packed, checkpointed=checkpointed)
    logprob = torch.log_softmax(states @ head.t(), -1)[range(len(packed.target_T)), packed.target_T]
    logprob.square().sum().backward()

    save_peft(adapter, tmp_path, str(tiny_folder), dropout=0.4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.4
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).double()
    rows, found = [None], 0
    for layer, matrices in dropped.fused(0, network.config.num_layers).items():
        for matrix, factors in matrices.items():
            inside = factors.down.shape[1]
            seen = factors.seen(torch.ones(len(packed.tokens), inside, dtype=torch.float64))
            names = [name for name in FUSED[matrix] if name in adapter.placement.linears]
            for name, mask in zip(names, seen, strict=True):
                lora = tuned.get_submodule(f"base_model.model.model.layers.{layer}.{name}")
                lora.lora_dropout["default"] = Masked(mask / 0.6, rows)
                found += 1
    assert found == 5 * network.config.num_layers
    total, expected, start = 0.0, [], len(PROMPT)
    for response in RESPONSES:
        rows[0] = [*range(len(PROMPT)), *range(start, start + len(response))]
        start += len(response)
        logits = tuned(torch.tensor([PROMPT + response])).logits[0, len(PROMPT) - 1 : -1]
        expected.append(torch.log_softmax(logits, -1)[range(len(response)), response])
        total = total + expected[-1].square().sum()
    total.backward()
    # transformers computes norms and positions in float32.
    assert torch.allclose(logprob, torch.cat(expected), rtol=0, atol=1e-5)
    gradients = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    for kind, group in (("lora_A", adapter.down), ("lora_B", adapter.up)):
        for key, value in group.items():
            layer, *name = key.split("|")
            place = f"base_model.model.model.layers.{layer}.{'.'.join(name)}.{kind}.default.weight"
            assert (value.grad - gradients[place]).abs().max() <= 1e-5 * gradients[place].abs().max()


def test_each_linear_has_masks_of_its_own_and_a_key_draws_them_again(network, adapter):
    x = torch.ones(200, network.config.hidden_size, dtype=torch.float64)

    def seen(key, layer=0):
        return adapter.with_dropout(0.25, key=key).fused(0, 2)[layer]["qkv"].seen(x)

    q, v = seen(3)
    assert abs(float((q == 0).double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / q.numel())
    again = seen(3)
    assert (q == again[0]).all() and (v == again[1]).all()
    for other in (v, seen(4)[0], seen(3, layer=1)[0]):
        assert 0.3 < float((q != other).double().mean()) < 0.45  # 2 x 0.25 x 0.75


def test_an_adapter_on_some_linears_says_so_and_is_read_by_peft(network, adapter, tiny_folder, tmp_path):
    config = replace(smoke(CaidConfig()), lora_targets=("v", "q"), lora_from=0.0)
    assert new_adapter(network, config).placement.linears == ("self_attn.q_proj", "self_attn.v_proj")
    assert new_adapter(network, CaidConfig()).placement.linears == linears_of(CaidConfig().lora_targets)
    save_peft(adapter, tmp_path, str(tiny_folder))
    asked = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert asked == ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(base, tmp_path).double()
    ids = torch.tensor(PROMPT + RESPONSES[1])
    with torch.no_grad():
        there = tuned(ids[None]).logits[0]
        here = network.logits(network(ids, torch.tensor([0, len(ids)]), adapter=adapter))
    assert torch.allclose(here, there, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def world(network):
    """Two prompts with four responses each, and the scores of these."""
    prompts = Prompts(
        text=["a", "b"], kind=["", ""], token_ids=[PROMPT, [1, 90]], key_P=torch.tensor([11, 22])
    )
    rollouts = generate(
        network, prompts.token_ids, n=4, max_new_tokens=6, seed=0, stop_token_ids=(2,), temperature=1.0
    )
    logprob = frozen_forward(network, packing.groups(prompts, rollouts), [], temperature=1.0)[1]
    score_PG = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = Scores(
        reward_PG=score_PG,
        utility_PGJ=score_PG[..., None],
        audit_PGA=torch.zeros(2, 4, 0, dtype=torch.float64),
        ref_logprob_PG=logprob.view(2, 4),
    )
    return samples_of(prompts, rollouts, scores)


def loss_of(network, adapter, samples, iteration=1, **settings):
    config = replace(smoke(CaidConfig(temperature=1.0)), **settings)
    return PreferenceLoss(
        config=config,
        model=network,
        weights=adapter,
        samples=samples,
        target=ScoredTarget(score=Score.plain(samples.scores.reward_PG), coefficient=0.5),
        iteration=iteration,
    )


def test_a_step_draws_its_dropout_by_its_number_and_the_anchor_has_none(network, adapter, world):
    pairs = within_prompts(world.scores.reward_PG, [0, 1], 4)
    dropping = loss_of(network, adapter, world, labels="soft", lora_dropout=0.3)
    losses = [float(dropping(pairs, step=i).loss.detach()) for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    without = loss_of(network, adapter, world, labels="soft")(pairs, step=0).loss
    assert losses[0] != float(without.detach())
    # Without a trained adapter nothing is left of the dropout: B is 0.
    fresh = Adapter.on(network, rank=3, alpha=6.0, share=0.0, seed=0)
    plain, again = (
        replace(loss_of(network, fresh, world, labels="soft", lora_dropout=p), anchor=adapter)
        for p in (0.0, 0.3)
    )
    plain, again = (
        replace(loss, target=replace(loss.target, anchor="any"))(pairs, step=0).loss
        for loss in (plain, again)
    )
    assert float(plain.detach()) == float(again.detach())


def test_labels_drawn_once_belong_to_the_pair_and_the_update(network, adapter, world):
    """The label of a pair is read from its loss: -ln sigmoid(margin) or -ln sigmoid(-margin)."""

    def label(pairs, k, step, iteration=1, labels="sampled-once"):
        alone = Pairs(prompt=pairs.prompt, row=pairs.row, pairs=pairs.pairs[k : k + 1])
        found = loss_of(network, adapter, world, iteration=iteration, labels=labels)(alone, step=step)
        margin = found.margin.double()
        first = -nn.functional.logsigmoid(margin).item()
        other = -nn.functional.logsigmoid(-margin).item()
        assert (
            abs(first - other) > 1e-6
            and min(abs(float(found.loss.detach()) - x) for x in (first, other)) < 1e-9
        )
        return abs(float(found.loss.detach()) - first) < abs(float(found.loss.detach()) - other)

    zero = replace(world, scores=replace(world.scores, reward_PG=torch.zeros(2, 4, dtype=torch.float64)))
    world = zero  # every label is a coin
    one, both = (within_prompts(zero.scores.reward_PG, chosen, 4) for chosen in ([1], [0, 1]))
    once = [label(one, k, step=0) for k in range(6)]
    assert once == [label(one, k, step=7) for k in range(6)]
    # The same pairs stand elsewhere in another step.
    assert once == [label(both, 6 + k, step=3) for k in range(6)]
    assert once != [label(one, k, step=0, iteration=2) for k in range(6)]
    drawn = [[label(one, k, step, labels="sampled") for k in range(6)] for step in range(3)]
    assert len({tuple(row) for row in drawn}) > 1
