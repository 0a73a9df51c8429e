"""Policy updates on exact problems, against closed forms and scipy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.special import log_softmax

from bench.theory.exact_stages import ExactStages
from bench.theory.optima import Optima
from bench.theory.problem import make
from bench.theory.updates import maximiser, regression, sampled, soft
from engine.config import MocanConfig
from engine.records import Score, ScoredTarget
from tests.helpers.exact_problems import FORMS, target_at


@pytest.mark.parametrize("update", FORMS)
def test_each_form_finds_the_tilt_that_is_in_the_class(update):
    problem = make(2, J=2)
    lam = torch.tensor([0.7, 0.4], dtype=torch.float64)
    anchor = torch.tensor([0.5, -0.2, 0.3], dtype=torch.float64)
    target = target_at(
        problem, lam, anchor=anchor, anchor_share=0.4, shift_PG=0.3 * problem.utility_PYJ[..., 0]
    )
    target = replace(target, coefficient=1.7)
    theta = update(ExactStages(problem, MocanConfig(beta=problem.beta), update), target, 1)
    # coefficient x ln(pi / anchor mixture) = score + shift; the features are (r, g).
    expected = torch.tensor([1.0, 0.7 + 0.3, 0.4], dtype=torch.float64) / 1.7 + 0.4 * anchor
    assert (theta - expected).abs().max() < 1e-8


def test_dropped_pairs_carry_nothing():
    problem = make(2)
    dropped = problem.utility_PYJ[..., 0] < 0
    target = target_at(problem, torch.tensor([0.7], dtype=torch.float64), dropped_PG=dropped)
    world = ExactStages(problem, MocanConfig(beta=problem.beta))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(problem.reward_PY.shape, generator=generator, dtype=torch.float64)
    for update in (soft, regression):
        plain = update(world, target, 1)
        # Only pairs of two dropped responses do not see a number added to all dropped ones of a prompt.
        pushed = update(
            world, replace(target, score=Score.plain(target.score_PG + noise[:, :1] * dropped)), 1
        )
        moved = update(
            world, replace(target, score=Score.plain(target.score_PG + noise * dropped), dropped_PG=None), 1
        )
        assert (plain - torch.tensor([1.0, 0.7], dtype=torch.float64)).abs().max() < 1e-8
        assert (pushed - plain).abs().max() > 1e-3 and (moved - pushed).abs().max() > 1e-3


def test_fitting_v_turns_single_responses_into_pairs():
    problem = make(3, eps=0.5)
    world = ExactStages(problem, MocanConfig(beta=problem.beta), draws=6, seed=1)
    phi, scores = world.gather(problem.features_PYF), world.scores.reward_PG
    prompt = torch.eye(len(phi), dtype=torch.float64)[:, None].expand(-1, 6, -1)
    both = torch.cat((phi, prompt), dim=2).flatten(0, 1)
    together = torch.linalg.lstsq(both, scores.reshape(-1, 1)).solution[:2, 0]
    target = ScoredTarget(score=Score.plain(scores), coefficient=1.0)
    assert (regression(world, target, 1) - together).abs().max() < 1e-10


def test_sampled_labels_are_the_soft_ones_in_the_mean():
    problem = make(4, P=64, Y=12)
    target = target_at(problem, torch.tensor([0.5], dtype=torch.float64))
    world = ExactStages(problem, MocanConfig(beta=problem.beta))
    several = torch.stack([sampled(world, target, t) for t in range(1, 9)])
    standard = several.std(0) / 8**0.5
    assert standard.max() < 0.1 and ((several.mean(0) - soft(world, target, 1)).abs() < 4 * standard).all()
    assert (sampled(world, target, 1) == several[0]).all(), "seeded"


@pytest.mark.parametrize(("J", "eps"), [(1, 0.3), (2, 1.0), (1, 3.0)])
def test_maximiser_is_the_best_of_scipys(J, eps):
    problem = make(2, J=J, eps=eps)
    lam = np.full(J, 0.9)
    world = ExactStages(problem, MocanConfig(beta=problem.beta))
    theta = maximiser(world, target_at(problem, torch.tensor(lam)), 1)
    best = Optima(problem).best_in_class(lam)
    assert problem.lagrangian(theta, torch.tensor(lam)) == pytest.approx(best.lagrangian(lam), abs=1e-9)
    assert problem.slack_J(theta).tolist() == pytest.approx(best.slack, abs=1e-5)


@pytest.mark.parametrize("seed", [2, 8, 16])
def test_maxima_far_out_are_found(seed):
    problem = make(seed, eps=3.0)
    optima = Optima(problem)
    radius, angle = np.meshgrid(np.geomspace(0.05, 300, 60), np.linspace(0, 2 * np.pi, 181))
    theta = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1, 2)
    log_ratio = log_softmax(np.einsum("pyf,sf->spy", optima.phi, theta), axis=2) + np.log(optima.Y)
    pi = np.exp(log_ratio) / optima.Y
    value, slack = (pi * (optima.r - log_ratio)).sum(2).mean(1), (pi * optima.h[..., 0]).sum(2).mean(1)
    _, dual_in_class, _ = optima.solve_dual_in_class(np.zeros(1))
    # D_p lies above the lines value + lambda slack of the grid's policies, at every lambda.
    lower = linprog(
        [0.0, 1.0],
        A_ub=np.stack([slack, -np.ones_like(slack)], 1),
        b_ub=-value,
        bounds=[(0, 100), (None, None)],
    ).fun
    assert lower - 1e-6 < dual_in_class < lower + 0.05
    for lam in (0.0, 1.0, 3.0):
        best = optima.best_in_class(np.array([lam])).lagrangian(np.array([lam]))
        assert best > float((value + lam * slack).max()) - 1e-9
        lam = torch.tensor([lam], dtype=torch.float64)
        theta = maximiser(ExactStages(problem, MocanConfig(beta=problem.beta)), target_at(problem, lam), 1)
        assert problem.lagrangian(theta, lam) == pytest.approx(best, abs=1e-9)
