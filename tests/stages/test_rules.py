"""The rules of the algorithms, from scores of responses to a number for each, on scores written by hand."""

from types import SimpleNamespace

import torch
from torch import Tensor

from engine.baselines import repo, safe_dpo
from engine.config import SafeDpoConfig
from engine.records import Score, Target, lagrangian, utilities_alone
from tests.helpers.samples import scored_of


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two prompts with three responses, two constraints; the second constraint is about the second prompt alone.
REWARD = tensor([[1.0, 2.0, 6.0], [0.0, -1.0, 4.0]])
UTILITY = tensor([[[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]], [[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]]])
WEIGHT = tensor([[1.0, 0.0], [1.0, 2.0]])
LAM = tensor([0.5, 0.25])
SCORED = scored_of(REWARD, UTILITY, weight_PJ=WEIGHT)


def test_the_lagrangian_counts_each_utility_with_its_weight():
    # r + 0.5 g_1, and on the second prompt + 0.25 * 2 g_2 too.
    assert lagrangian(LAM)(SCORED).total_PG.tolist() == [[1.5, 3.5, 7.0], [1.0, -0.5, 5.5]]
    assert torch.equal(lagrangian(0 * LAM)(SCORED).total_PG, REWARD)
    assert SCORED.counted_PGJ[..., 1].tolist() == [[0.0, 0.0, 0.0], [4.0, 2.0, 0.0]]


def test_a_score_keeps_its_parts_for_the_losses():
    score = lagrangian(LAM)(SCORED)
    reward, utility, lam = score.at(torch.tensor([4, 0]))
    assert reward.tolist() == [-1.0, 1.0] and utility.tolist() == [[0.0, 2.0], [1.0, 0.0]]
    assert torch.equal(lam, LAM) and torch.equal(reward + utility @ lam, score.total_PG.flatten()[[4, 0]])
    alone = utilities_alone(LAM)(SCORED)
    assert torch.equal(alone.total_PG, score.total_PG - REWARD) and not alone.reward_PG.any()
    reward, utility, lam = Score.plain(REWARD).at(torch.tensor([2]))
    assert reward.tolist() == [6.0] and utility.shape == (1, 0) and lam.shape == (0,)
    assert torch.equal(Score.plain(REWARD).total_PG, REWARD)


def test_a_rectified_multiplier_counts_only_where_a_prompt_misses_that_aim():
    # The first prompt misses the first aim; the second one meets the first exactly and misses the second.
    scored = scored_of(REWARD, UTILITY, weight_PJ=WEIGHT, missing_PJ=tensor([[0.1, -3.0], [0.0, 2.0]]))
    score = repo.rectified(LAM)(scored)
    assert score.total_PG.tolist() == [[1.5, 3.5, 7.0], [1.0, -0.5, 4.0]] and torch.equal(score.lam_J, LAM)
    met = scored_of(REWARD, UTILITY, weight_PJ=WEIGHT, missing_PJ=torch.zeros_like(WEIGHT))
    assert torch.equal(repo.rectified(LAM)(met).total_PG, REWARD)


def safe_dpo_target(unsafe_above: tuple[float, ...], offset: float) -> Target:
    """Returns the target that SafeDPO hands to its update."""
    config = SafeDpoConfig(cost=("a", "b"), unsafe_above=unsafe_above, offset=offset)
    stages = SimpleNamespace(sample_reference=lambda: None, n_constraints=2, fit=lambda target, t: target)
    target, lam_J = safe_dpo.loop(stages, config)
    assert lam_J.tolist() == [0.0, 0.0]
    return target


def test_safe_dpo_drops_lowers_and_shifts_the_unsafe_responses():
    # A cost at its number is safe. The second constraint is about the second prompt alone.
    cost = tensor([[[0.0, 9.0], [0.1, 9.0], [-1.0, 9.0]], [[0.0, 0.5], [0.0, 0.6], [2.0, 2.0]]])
    scored = scored_of(REWARD, UTILITY, weight_PJ=WEIGHT, cost_PGJ=cost)
    target = safe_dpo_target((0.0, 0.5), offset=3.0)
    unsafe = torch.tensor([[False, True, False], [False, True, True]])
    assert torch.equal(target.dropped(scored), unsafe)
    score_PG = target.score(scored).total_PG
    assert torch.equal(score_PG, REWARD - safe_dpo.SURE * unsafe)
    assert torch.equal(target.shift(scored), -3.0 * unsafe.double())
    # A safe response wins for sure, whatever the rewards.
    labels = torch.sigmoid(score_PG[~unsafe][:, None] - score_PG[unsafe][None])
    assert (labels == 1).all()
    # One number of --unsafe-above serves all costs.
    assert torch.equal(safe_dpo_target((0.5,), offset=3.0).dropped(scored)[0], torch.tensor([False] * 3))


def test_a_target_applies_its_rules_to_the_responses_that_it_is_given():
    target = Target(
        lam_J=LAM,
        score=lagrangian(LAM),
        coefficient=0.7,
        start="start",
        anchor="anchor",
        anchor_share=0.3,
        shift=lambda scored: 2 * scored.reward_PG,
        dropped=lambda scored: scored.reward_PG > 1,
    )
    on = target.on(SCORED)
    assert torch.equal(on.score_PG, lagrangian(LAM)(SCORED).total_PG) and torch.equal(on.shift_PG, 2 * REWARD)
    assert torch.equal(on.dropped_PG, REWARD > 1)
    assert (on.coefficient, on.start, on.anchor, on.anchor_share) == (0.7, "start", "anchor", 0.3)
    plain = Target(lam_J=LAM, score=lagrangian(LAM), coefficient=0.7).on(SCORED)
    assert plain.shift_PG is None and plain.dropped_PG is None and plain.start is None
