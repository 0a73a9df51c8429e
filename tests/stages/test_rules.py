"""The rules of the algorithms, from scores of responses to a number for each, on scores written by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.baselines import repo, safe_dpo
from engine.baselines.primal_dual import penalised, standardised
from engine.config import SafeDpoConfig
from engine.records import Target, lagrangian
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
    assert lagrangian(LAM)(SCORED).tolist() == [[1.5, 3.5, 7.0], [1.0, -0.5, 5.5]]
    assert torch.equal(lagrangian(0 * LAM)(SCORED), REWARD)
    assert SCORED.counted_PGJ[..., 1].tolist() == [[0.0, 0.0, 0.0], [4.0, 2.0, 0.0]]


def test_the_penalised_score_without_standardising_is_the_lagrangian():
    assert torch.equal(penalised(LAM, "rloo")(SCORED), lagrangian(LAM)(SCORED))
    # A multiplier for each prompt, [P, 1, J].
    lam_P1J = torch.stack([LAM, 0 * LAM])[:, None]
    expected = torch.stack([lagrangian(LAM)(SCORED)[0], REWARD[1]])
    assert torch.equal(penalised(lam_P1J, "rloo")(SCORED), expected)


@pytest.mark.parametrize("share", [None, [[0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]]])
def test_group_norm_standardises_reward_and_utilities_before_they_are_joined(share):
    share_PG = None if share is None else tensor(share)
    scored = scored_of(REWARD, UTILITY, weight_PJ=WEIGHT, share_PG=share_PG)
    score_PG = penalised(LAM, "group_norm")(scored)
    r_PG = standardised(REWARD[..., None], share_PG)[..., 0]
    g_PGJ = standardised(UTILITY, share_PG)
    for p in range(2):
        for i in range(3):
            expected = r_PG[p, i] + sum(LAM[j] * WEIGHT[p, j] * g_PGJ[p, i, j] for j in range(2))
            assert float(score_PG[p, i]) == pytest.approx(float(expected), abs=1e-12)
    # Another unit of a score changes nothing.
    other = scored_of(3 * REWARD + 1, 7 * UTILITY - 2, weight_PJ=WEIGHT, share_PG=share_PG)
    torch.testing.assert_close(penalised(LAM, "group_norm")(other), score_PG)


def test_standardised_scores_have_mean_0_and_population_deviation_1_on_each_prompt():
    x_PGJ = standardised(UTILITY, None)
    # The second utility of the first prompt is one number.
    assert x_PGJ[0, :, 1].tolist() == [0.0] * 3
    varied = torch.stack([x_PGJ[0, :, 0], x_PGJ[1, :, 0], x_PGJ[1, :, 1]])
    torch.testing.assert_close(varied.mean(1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(varied.std(1, correction=0), torch.ones(3, dtype=torch.float64))
    assert x_PGJ[1, :, 0].tolist() == pytest.approx([-(0.5**0.5), -(0.5**0.5), 2**0.5])


def test_a_share_stands_for_as_many_responses():
    share_PG = tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]])
    repeated = torch.stack([UTILITY[0, [0, 1, 2, 2]], UTILITY[1, [0, 0, 1, 2]]])
    x_PGJ, expected = standardised(UTILITY, share_PG), standardised(repeated, None)
    torch.testing.assert_close(x_PGJ[0], expected[0, [0, 1, 2]])
    torch.testing.assert_close(x_PGJ[1], expected[1, [0, 2, 3]])


@pytest.mark.parametrize("advantage", ["rloo", "group_norm"])
def test_a_rectified_multiplier_counts_only_where_a_prompt_misses_that_aim(advantage):
    # The first prompt misses the first aim; the second one meets the first exactly and misses the second.
    scored = scored_of(REWARD, UTILITY, weight_PJ=WEIGHT, missing_PJ=tensor([[0.1, -3.0], [0.0, 2.0]]))
    score_PG = repo.rectified(LAM, advantage)(scored)
    alone = [penalised(LAM * tensor(on), advantage)(scored) for on in ([1.0, 0.0], [0.0, 1.0])]
    assert torch.equal(score_PG[0], alone[0][0]) and torch.equal(score_PG[1], alone[1][1])
    if advantage == "rloo":
        assert score_PG.tolist() == [[1.5, 3.5, 7.0], [1.0, -0.5, 4.0]]
    met = scored_of(REWARD, UTILITY, weight_PJ=WEIGHT, missing_PJ=torch.zeros_like(WEIGHT))
    assert torch.equal(repo.rectified(LAM, advantage)(met), penalised(0 * LAM, advantage)(met))


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
    assert torch.equal(target.score(scored), REWARD - safe_dpo.SURE * unsafe)
    assert torch.equal(target.shift(scored), -3.0 * unsafe.double())
    # A safe response wins for sure, whatever the rewards.
    labels = torch.sigmoid(target.score(scored)[~unsafe][:, None] - target.score(scored)[unsafe][None])
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
    assert torch.equal(on.score_PG, lagrangian(LAM)(SCORED)) and torch.equal(on.shift_PG, 2 * REWARD)
    assert torch.equal(on.dropped_PG, REWARD > 1)
    assert (on.coefficient, on.start, on.anchor, on.anchor_share) == (0.7, "start", "anchor", 0.3)
    plain = Target(lam_J=LAM, score=lagrangian(LAM), coefficient=0.7).on(SCORED)
    assert plain.shift_PG is None and plain.dropped_PG is None and plain.start is None
