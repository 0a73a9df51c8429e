"""Policy steps whose prompts several ranks share out, or the slices of one model, against those of one
process."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import model
from engine.config import CaidConfig, PrimalDualConfig, smoke
from engine.errors import NonFiniteError
from engine.policy import update as update_of_policy
from engine.policy.lora import Adapter
from engine.policy.pairs import own_pairs, within_prompts
from engine.policy.steps import Policy, Update
from engine.policy.update import ascend, fit
from engine.ranks import Ranks
from engine.records import Score, ScoredTarget
from tests.helpers.ranks import on_ranks
from tests.helpers.steps import OneStage, answered

LABELS = ("soft", "sampled", "sampled-once", "regression", "listwise", "single")
BETA_1 = 0.9  # of AdamW: the first moment after a step is a tenth of the clipped gradient


@pytest.fixture(scope="module")
def world(tiny_folder):
    network = model.load(tiny_folder)
    return network, answered(network)


def step(world, config, ranks: Ranks, folder: Path) -> tuple[Policy, list]:
    """Takes one step on all five prompts, from an adapter that moves the model; returns policy and rows."""
    network, samples = world
    adapter = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter.up.values():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    stage = OneStage(folder)
    update = Update(
        stage=stage, config=config, model=network, weights=adapter, start=None, iteration=1, ranks=ranks
    )
    if isinstance(config, PrimalDualConfig):
        policy = ascend(update, samples, Score.plain(samples.scores.reward_PG))
    else:
        target = ScoredTarget(score=Score.plain(samples.scores.reward_PG), coefficient=0.5)
        policy = fit(update, samples, target, train_on=list(range(5)))
    return policy, [row.as_dict() for row in stage.rows]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten().double() for value in tensors.values()])


def one_step(config_class, **settings):
    return smoke(
        config_class(
            steps=1, warmup_steps=0, prompts_per_step=5, clip_norm=0.5, learning_rate=1e-3, **settings
        )
    )


CONFIGS = [one_step(CaidConfig, labels=labels) for labels in LABELS]
CONFIGS += [one_step(CaidConfig, tokens_per_forward=1, labels="regression"), one_step(PrimalDualConfig)]


@pytest.mark.parametrize(
    ("size", "model_ranks", "error"), [(2, 1, 5e-6), (4, 1, 5e-6), (2, 2, 3e-6), (4, 2, 3e-6)]
)
def test_the_ranks_sums_are_the_gradient_and_the_figures_of_the_whole_step(
    world, tiny_folder, tmp_path, size, model_ranks, error
):
    """Five prompts on 2 and 4 ranks, each with a model or half of one. On 4, one prompt or two make a step in
    which two ranks have none."""
    few = replace(CONFIGS[0], prompts_per_step=2 // model_ranks)
    configs = CONFIGS if size == 2 else [CONFIGS[1], CONFIGS[-1], few]
    alone = [step(world, config, Ranks(), tmp_path) for config in configs]

    def work(ranks: Ranks):
        ranks, (network, samples) = ranks.arranged(model_ranks), world
        if ranks.model is not None:
            network = model.load(tiny_folder, slices=ranks.model)
        return [step((network, samples), config, ranks, tmp_path) for config in configs]

    first, *others = on_ranks(size, work)
    for config, one, many in zip(configs, alone, first, strict=True):
        expected, found = flat(one[0].first_moment) / (1 - BETA_1), flat(many[0].first_moment) / (1 - BETA_1)
        assert expected.norm() > 0.1
        assert (found - expected).norm() <= error * expected.norm(), config.labels
        (row,), (own,) = one[1], many[1]
        assert row.keys() == own.keys()
        for name in row:
            same = row[name] == own[name] or math.isclose(row[name], own[name], rel_tol=1e-5, abs_tol=1e-7)
            assert same, (config.labels, name, row[name], own[name])
    for other in others:
        for (mine, rows), (theirs, their_rows) in zip(first, other, strict=True):
            assert rows == their_rows, "ranks log other figures"
            for kind in ("adapter", "first_moment", "second_moment"):
                assert torch.equal(flat(getattr(mine, kind)), flat(getattr(theirs, kind))), "replicas differ"


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_of_pairs_are_whole_prompts_and_all_pairs(size):
    score_PG = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dropped_PG = torch.zeros(7, 4, dtype=torch.bool)
    dropped_PG[3] = True  # a prompt without a pair
    whole = within_prompts(score_PG, [6, 2, 3, 2, 0, 5], 3, dropped_PG)
    shares = [own_pairs(whole, Ranks(rank, size)) for rank in range(size)]
    assert [p for own, _ in shares for p in own.prompt] == whole.prompt
    assert [r for own, _ in shares for r in own.row] == whole.row
    # As rows of the rollouts, which do not depend on where a share begins.
    row = torch.tensor(whole.row)
    assert [pair for own, _ in shares for pair in torch.tensor(own.row)[own.pairs].tolist()] == row[
        whole.pairs
    ].tolist()
    for own, before in shares:
        assert whole.row[before : before + len(own.row)] == own.row
    of_ranks = [set(own.prompt) for own, _ in shares]
    assert sum(map(len, of_ranks)) == len(set(whole.prompt)), "a prompt is torn apart"


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(world, tmp_path):
    add_gradient = update_of_policy.add_gradient

    def work(ranks: Ranks):
        if ranks.rank == 1:  # in the rank's own process
            update_of_policy.add_gradient = lambda loss, share: add_gradient(loss * math.nan, share)
        return step(world, CONFIGS[3], ranks, tmp_path)

    errors = on_ranks(2, work)
    assert all(isinstance(error, NonFiniteError) for error in errors), errors
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite.safetensors"]
