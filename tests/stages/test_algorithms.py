"""The baselines' real loops with one to three constraints in the exact world, against closed
forms and scipy's optimum."""

import numpy as np
import pytest
import torch

from bench.theory.exact_stages import ExactStages
from bench.theory.optima import Optima
from bench.theory.problem import make
from bench.theory.updates import maximiser, regression, soft
from engine.baselines import dpo, primal_dual, repo, sacpo, safe_dpo
from engine.config import DpoConfig, PrimalDualConfig, RepoConfig, SacpoConfig, SafeDpoConfig
from tests.helpers.samples import scored_of

# Without a gap the features are (r, g), so that theta holds the weights of reward and utilities.


@pytest.mark.parametrize("J", [1, 2, 3])
@pytest.mark.parametrize(("objective", "weights"), [("reward", (1.0, 0.0)), ("safety", (0.0, 1.0))])
def test_dpo_is_the_tilt_by_the_reward_or_by_the_sum_of_the_utilities(J, objective, weights):
    problem = make(6, J=J, beta=0.7)
    config = DpoConfig(beta=0.7, objective=objective)
    theta, lam = dpo.loop(ExactStages(problem, config, soft), config)
    expected = torch.tensor([weights[0], *[weights[1]] * J], dtype=torch.float64)
    assert (theta - expected / 0.7).abs().max() < 1e-8 and torch.equal(lam, expected[1:])


@pytest.mark.parametrize("J", [1, 2, 3])
def test_sacpo_is_the_tilt_at_its_multipliers(J):
    problem = make(6, J=J, beta=0.7)
    given = (0.4, 1.3, 0.9)[:J]
    config = SacpoConfig(beta=0.7, lam=given)
    world = ExactStages(problem, config, regression)
    theta, lam = sacpo.loop(world, config)
    assert (
        theta - torch.tensor([1.0, *given], dtype=torch.float64) / 0.7
    ).abs().max() < 1e-8 and lam.tolist() == list(given)
    (first, _), (second, _) = world.fitted
    assert (
        first.coefficient == 0.7
        and second.coefficient == pytest.approx(0.7 / sum(given))
        and second.anchor is not None
    )


@pytest.mark.parametrize("J", [1, 2, 3])
def test_primal_dual_ends_at_the_optimum_where_its_steps_are_whole(J):
    problem = make(5, J=J)
    config = PrimalDualConfig(beta=problem.beta, steps=1, iterations=400, dual_rate=0.5)
    # A natural-gradient step of length 1 is the maximiser of the Lagrangian here.
    world = ExactStages(problem, config, ascent_rate=1.0)
    theta, lam = primal_dual.loop(world, config)
    assert np.abs(lam.numpy() - Optima(problem).solve_dual()).max() < 1e-6
    assert problem.slack_J(theta).abs().max() < 1e-6
    assert world.history[0].slack_J.abs().max() > 0.05, "the start must not be the answer"


@pytest.mark.parametrize("J", [1, 2, 3])
def test_repo_raises_the_multiplier_of_each_constraint_that_a_prompt_misses(J):
    problem = make(0, J=J, eps=0.3)
    # The last constraint holds on every prompt: its multiplier must stay.
    problem.b_J[-1] = -100.0
    config = RepoConfig(beta=problem.beta, iterations=15, lam_init=0.5)
    world = ExactStages(problem, config)
    repo.loop(world, config)
    lam = torch.stack([x.lam_J for x in world.history])
    assert (lam.diff(dim=0) >= 0).all() and (lam[:, -1] == 0.5).all()
    assert (lam[-1, :-1] > 0.5).all() and (
        J == 1 or world.history[-1].slack_J[:-1].min() > world.history[0].slack_J[:-1].min()
    )


@pytest.mark.parametrize("J", [1, 2, 3])
def test_safe_dpo_counts_a_response_unsafe_that_breaks_any_limit(J):
    problem = make(3, J=J, eps=0.2)
    config = SafeDpoConfig(beta=problem.beta, cost=("a", "b", "c")[:J], unsafe_above=(0.0, 0.5, 0.2)[:J])
    world = ExactStages(problem, config, soft)
    theta, lam = safe_dpo.loop(world, config)
    unsafe = (problem.utility_PYJ < -torch.tensor(config.unsafe_above, dtype=torch.float64)).any(2)
    (target, _) = world.fitted[0]
    dropped = target.dropped(scored_of(problem.reward_PY, problem.utility_PYJ))
    assert torch.equal(dropped, unsafe) and unsafe.any() and not unsafe.all()
    before, after = (float((problem.policy_PY(x) * unsafe).sum(1).mean()) for x in (None, theta))
    assert after < before and lam.tolist() == [0.0] * J
    # Each further limit can only add unsafe responses.
    one = safe_dpo.unsafe_above(config)[:1]
    assert (unsafe | (problem.utility_PYJ[..., 0] < -one[0])).equal(unsafe)


def test_the_maximiser_moves_with_every_multiplier():
    problem = make(6, J=3)
    config = SacpoConfig(beta=problem.beta, lam=(0.2, 0.2, 0.2))
    base, _ = sacpo.loop(ExactStages(problem, config, maximiser), config)
    for j in range(3):
        lam = tuple(0.2 + 0.5 * (i == j) for i in range(3))
        more = SacpoConfig(beta=problem.beta, lam=lam)
        theta, _ = sacpo.loop(ExactStages(problem, more, maximiser), more)
        assert float(problem.slack_J(theta)[j] - problem.slack_J(base)[j]) > 0.01
