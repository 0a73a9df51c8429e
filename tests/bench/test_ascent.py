"""Policy gradient on exact problems: its fixed points, its bias, and RePO's rectified multiplier."""

import torch

from bench.theory.exact_stages import ExactStages, standardised
from bench.theory.problem import make
from bench.theory.updates import maximiser
from engine.baselines.repo import rectified
from engine.config import MocanConfig, PrimalDualConfig, RepoConfig
from engine.records import Score, lagrangian
from tests.helpers.exact_problems import target_at


def test_policy_gradient_ends_at_the_maximiser_and_standardising_moves_it():
    problem = make(1, J=2, eps=0.4)
    lam = torch.tensor([0.8, 0.5], dtype=torch.float64)
    best = maximiser(ExactStages(problem, MocanConfig(beta=problem.beta)), target_at(problem, lam), 1)
    away = {}
    for advantage in ("rloo", "group_norm"):
        config = PrimalDualConfig(beta=problem.beta, advantage=advantage, steps=150)
        theta = ExactStages(problem, config, ascent_rate=0.5).ascend(None, lam, lagrangian(lam), 1)
        away[advantage] = (problem.policy_PY(theta) - problem.policy_PY(best)).abs().max()
    assert away["rloo"] < 1e-8 and away["group_norm"] > 1e-2


def test_fixed_point_of_group_norm_is_a_tilt_by_standardised_scores():
    problem = make(1, P=3, Y=5, beta=2.0, tabular=True)
    lam = torch.tensor([0.8], dtype=torch.float64)
    config = PrimalDualConfig(beta=problem.beta, advantage="group_norm", steps=200)
    world = ExactStages(problem, config, ascent_rate=0.5)
    pi = problem.policy_PY(world.ascend(None, lam, lagrangian(lam), 1))

    def deviation(x_PY):
        mean = (pi * x_PY).sum(1, keepdim=True)
        return ((pi * x_PY.square()).sum(1, keepdim=True) - mean.square()).sqrt()

    r, g = problem.reward_PY, problem.utility_PYJ[..., 0]
    tilt = ((r / deviation(r) + 0.8 * g / deviation(g)) / problem.beta).softmax(1)
    assert (pi - tilt).abs().max() < 1e-8


def test_standardised_scores_have_mean_0_and_population_deviation_1_on_each_prompt():
    generator = torch.Generator().manual_seed(0)
    r_PG, g_PGJ = (torch.randn(2, 3, *more, generator=generator, dtype=torch.float64) for more in ((), (2,)))
    g_PGJ[0, :, 1] = 0.3  # the second utility of the first prompt is one number
    score = Score(reward_PG=r_PG, utility_PGJ=g_PGJ, lam_J=torch.tensor([0.5, 0.25], dtype=torch.float64))
    share_PG = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]], dtype=torch.float64)
    parts = standardised(score, share_PG)
    assert torch.equal(parts.lam_J, score.lam_J) and parts.utility_PGJ[0, :, 1].tolist() == [0.0] * 3
    for z_PG in (parts.reward_PG, parts.utility_PGJ[..., 0], parts.utility_PGJ[1:, :, 1]):
        share = share_PG[-len(z_PG) :]
        assert (share * z_PG).sum(1).abs().max() < 1e-12 and (
            (share * z_PG**2).sum(1) - 1
        ).abs().max() < 1e-12
    # A share stands for as many responses.
    places = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 2]])
    each = g_PGJ[torch.arange(2)[:, None], places]
    repeated = Score(reward_PG=each[..., 0], utility_PGJ=each, lam_J=score.lam_J)
    equal = standardised(repeated, torch.full((2, 4), 0.25, dtype=torch.float64))
    expected = parts.utility_PGJ[torch.arange(2)[:, None], places]
    torch.testing.assert_close(equal.utility_PGJ, expected)


def test_standardising_can_collapse_a_policy_that_the_kl_holds():
    problem = make(1, P=3, Y=5, tabular=True)
    largest = {}
    for advantage in ("rloo", "group_norm"):
        config = PrimalDualConfig(beta=problem.beta, advantage=advantage, steps=200)
        world = ExactStages(problem, config, ascent_rate=0.5)
        lam = torch.tensor([0.8], dtype=torch.float64)
        pi = problem.policy_PY(world.ascend(None, lam, lagrangian(lam), 1))
        largest[advantage] = float(pi.max())
    # A sharper policy has smaller deviations, which magnify the scores further.
    assert largest["rloo"] < 0.9 and largest["group_norm"] > 1 - 1e-6


def test_drawn_policy_gradient_is_unbiased():
    problem = make(1, eps=0.3)
    lam, start = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
    config = PrimalDualConfig(beta=problem.beta, steps=1)
    exact = ExactStages(problem, config).ascend(start, lam, lagrangian(lam), 1)
    worlds = (ExactStages(problem, config, draws=3, seed=seed) for seed in range(400))
    drawn = torch.stack([world.ascend(start, lam, lagrangian(lam), 1) for world in worlds])
    error = drawn.std(0) / 400**0.5
    assert ((drawn.mean(0) - exact).abs() < 4 * error).all()
    assert error.max() < 0.3 * (exact - start).abs().max()


def test_repo_penalises_only_prompts_that_miss():
    problem = make(2, P=2, Y=6, tabular=True)
    # Prompt 0 misses the threshold at the reference, prompt 1 meets it: b differs by prompt only
    # through the utilities here.
    safe = torch.zeros(12, dtype=torch.float64)
    safe[6:] = 4 * problem.utility_PYJ[1, :, 0]
    world = ExactStages(problem, RepoConfig(beta=problem.beta, steps=1), ascent_rate=0.1)
    lam = torch.tensor([2.0], dtype=torch.float64)
    plain = world.ascend(safe, lam, lagrangian(lam), 1)
    only = world.ascend(safe, lam, rectified(lam), 1)
    none = world.ascend(safe, 0 * lam, lagrangian(0 * lam), 1)
    before, after = (problem.policy_PY(x) for x in (plain, only))
    assert (before[0] - after[0]).abs().max() < 1e-12
    assert (after[1] - problem.policy_PY(none)[1]).abs().max() < 1e-12
    assert (before[1] - after[1]).abs().max() > 1e-3
