"""Policy steps on all weights, spread over ranks, against those of one process."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401, imported before the forks
import torch.distributed.fsdp  # noqa: F401
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine import model
from engine.config import CaidConfig, PrimalDualConfig, smoke
from engine.errors import NonFiniteError, UserError
from engine.model.parallel import load_spread
from engine.policy import steps as steps_of_policy
from engine.policy import update as update_of_policy
from engine.policy.full import FullWeights
from engine.policy.samples import Samples
from engine.policy.sharded import ShardedWeights
from engine.policy.steps import Update
from engine.policy.update import ascend, fit
from engine.ranks import Ranks
from engine.records import Score, ScoredTarget
from tests.helpers.architectures import write_model
from tests.helpers.ranks import on_ranks
from tests.helpers.steps import OneStage, answered

BETA_1 = 0.9  # of AdamW: the first moment after a step is a tenth of the clipped gradient
# No number of ranks divides these; on 4 ranks the last one has no row of a norm of 6.
ODD = {"hidden_size": 21, "intermediate_size": 37, "head_dim": 6, "num_attention_heads": 3}
ODD |= {"num_key_value_heads": 1}


@dataclass(frozen=True)
class World:
    """A reference, a policy that has moved from it, another one as an anchor, and samples to learn from."""

    reference: Path
    policy: Path
    anchor: Path
    samples: Samples


def world_of(home: Path, variant: str) -> World:
    write_model(home / "reference", variant, **ODD)
    network = model.load(home / "reference")
    for seed, name in enumerate(("policy", "anchor")):
        moved, generator = FullWeights(network), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in moved.parameters():
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
        model.save(moved.decoder(), home / name)
    return World(home / "reference", home / "policy", home / "anchor", answered(network))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    """Makes a world of a model with an own head and one with a tied head, whose embeddings are scaled."""
    return {
        "own": world_of(tmp_path_factory.mktemp("own"), "qwen 3, biases, windows, one key head"),
        "tied": world_of(tmp_path_factory.mktemp("tied"), "gemma 2"),
    }


def steps(
    world: World, config, ranks: Ranks, folder: Path, dtype=torch.float32, anchor_share=0.0, copies=1
) -> tuple[dict[str, dict[str, Tensor]], list[dict]]:
    """Takes the steps of a config from the moved policy; returns the first moment of one, or the
    weights after several, whole, and the rows."""
    cpu = torch.device("cpu")

    def load(path: Path):
        if ranks.size == 1:
            return model.load(path, dtype=dtype)
        return load_spread(path, dtype=dtype, device=cpu, ranks=ranks, copies=copies)

    kind = FullWeights if ranks.size == 1 else ShardedWeights
    stage = OneStage(folder)
    update = Update(
        stage=stage,
        config=config,
        model=load(world.reference),
        weights=kind(load(world.policy)),
        start=None,
        iteration=1,
        ranks=ranks,
    )
    score = Score.plain(world.samples.scores.reward_PG)
    if isinstance(config, PrimalDualConfig):
        policy = ascend(update, world.samples, score)
    else:
        anchor = kind(load(world.anchor)) if anchor_share else None
        target = ScoredTarget(score=score, coefficient=0.5, anchor="any", anchor_share=anchor_share)
        policy = fit(update, world.samples, target, train_on=list(range(5)), anchor=anchor)
    found = {}
    # The moment has the gradient of one step; after several, it is the weights that count.
    for part in ("first_moment",) if config.steps == 1 else ("adapter",):
        tensors = getattr(policy, part)
        assert all(isinstance(value, DTensor) for value in tensors.values()) == (ranks.size > 1)
        found[part] = {n: v.full_tensor() if ranks.size > 1 else v for n, v in tensors.items()}
    return found, [row.as_dict() for row in stage.rows]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten().double() for value in tensors.values()])


def one_step(config_class=CaidConfig, **settings):
    return smoke(
        config_class(
            tune="full",
            steps=1,
            warmup_steps=0,
            prompts_per_step=5,
            clip_norm=0.5,
            learning_rate=1e-3,
            **settings,
        )
    )


# What a world and a config are tried with: the labels, and what makes ranks take other numbers of passes.
CASES = [
    ("own", one_step(labels="regression"), {}),
    ("own", one_step(labels="listwise", tokens_per_forward=1, activation_checkpointing=True), {}),
    ("own", one_step(labels="soft", tokens_per_forward=1), {"anchor_share": 0.3}),
    ("own", one_step(PrimalDualConfig, tokens_per_forward=1), {}),
    ("tied", one_step(labels="soft"), {}),
    ("tied", one_step(labels="regression", activation_checkpointing=True), {}),
    # One prompt in each pass, so that passes compute the same on any number of ranks.
    ("tied", one_step(labels="soft", tokens_per_forward=1), {"dtype": torch.bfloat16}),
]
ON_FOUR = [
    CASES[4],
    ("own", replace(CASES[0][1], prompts_per_step=2), {}),
    ("own", CASES[2][1], {"anchor_share": 0.3, "copies": 2}),
]


@pytest.mark.parametrize(("size", "cases"), [(2, CASES), (4, ON_FOUR)])
def test_the_gradients_of_spread_weights_are_those_of_one_process(worlds, tmp_path, size, cases):
    """Five prompts on 2 and 4 ranks, so passes differ in number. On 4, two prompts make a step in which two
    ranks have none; two rows of two ranks are two copies of the weights."""

    def work(ranks: Ranks) -> list:
        found = [steps(worlds[name], config, ranks, tmp_path, **options) for name, config, options in cases]
        if ranks.size == 4:
            check_copies(ranks)
        return found

    def check_copies(ranks: Ranks) -> None:
        """Rank 3 comes to other weights than rank 1, which has the same rows."""
        check = steps_of_policy._check_replicas

        def moved(update: Update, taken: int) -> None:
            if ranks.rank == 3:
                with torch.no_grad():
                    next(update.weights.parameters()).to_local()[0] += 1e-3
            check(update, taken)

        steps_of_policy._check_replicas = moved  # in the rank's own process
        with pytest.raises(UserError, match="rank 3 has other weights after 1 steps than a rank that should"):
            steps(worlds["own"], CASES[0][1], ranks, tmp_path, copies=2)

    alone = work(Ranks())
    first, *others = on_ranks(size, work)
    for (name, config, options), one, many in zip(cases, alone, first, strict=True):
        expected, found = (flat(x[0]["first_moment"]) / (1 - BETA_1) for x in (one, many))
        assert expected.norm() > 0.1
        error = float((found - expected).norm() / expected.norm())
        assert error <= 3e-6, (name, config.labels, options, error)
        (row,), (own,) = one[1], many[1]
        assert row.keys() == own.keys()
        for field in row:
            same = row[field] == own[field] or math.isclose(
                row[field], own[field], rel_tol=1e-5, abs_tol=1e-7
            )
            assert same, (config.labels, field, row[field], own[field])
    for other in others:
        for (mine, rows), (theirs, their_rows) in zip(first, other, strict=True):
            assert rows == their_rows, "ranks log other figures"
            assert all(torch.equal(flat(mine[part]), flat(theirs[part])) for part in mine)


def test_clipped_steps_lead_to_the_weights_of_one_process(worlds, tmp_path):
    config = replace(CASES[0][1], steps=4, prompts_per_step=3, clip_norm=0.05, checkpoint_every=9)

    def work(ranks: Ranks):
        return steps(worlds["own"], config, ranks, tmp_path)

    (one, rows), ((many, own), _) = work(Ranks()), on_ranks(2, work)
    assert all(row["grad_norm"] > 0.05 for row in rows), "nothing was clipped"
    assert [row["grad_norm"] for row in own] == pytest.approx([row["grad_norm"] for row in rows], rel=1e-5)
    before = FullWeights(model.load(worlds["own"].policy)).tensors()
    moved, found = (flat(x["adapter"]) - flat(before) for x in (one, many))
    assert moved.norm() > 0.05 and (found - moved).norm() <= 1e-5 * moved.norm()
    assert (flat(many["adapter"]) - flat(one["adapter"])).norm() <= 1e-6 * flat(one["adapter"]).norm()


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_the_batch(worlds, tmp_path):
    add_gradient = update_of_policy.add_gradient

    def work(ranks: Ranks):
        if ranks.rank == 1:  # in the rank's own process
            update_of_policy.add_gradient = lambda loss, share: add_gradient(loss * math.nan, share)
        return steps(worlds["own"], CASES[0][1], ranks, tmp_path)

    for error in on_ranks(2, work):
        assert isinstance(error, NonFiniteError) and "the batch is in " in str(error), error
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite.safetensors"]
