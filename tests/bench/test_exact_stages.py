"""The algorithms' real loops in the exact world, where optima are known from scipy and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.theory.exact_stages import ExactStages, preferred
from bench.theory.failures import required_rule
from bench.theory.optima import Optima
from bench.theory.problem import make
from bench.theory.runs import oscillation
from bench.theory.updates import maximiser, regression, soft
from engine import caid, dual, mocan
from engine.baselines import cdpo, opd, pd_dpo, primal_dual, repo, sacpo, safe_dpo
from engine.config import (
    CaidConfig,
    CdpoConfig,
    MocanConfig,
    OpdConfig,
    PdDpoConfig,
    PrimalDualConfig,
    RepoConfig,
    SacpoConfig,
    SafeDpoConfig,
    check,
)
from engine.errors import UserError
from kernels import lagrangian_preference_loss
from tests.helpers.exact_problems import FORMS


def table_by_the_real_loss(world, target, number):
    """Updates a table of logits by the real op and L-BFGS in float64;
    responses are one token, states unit vectors."""
    problem = world.problem
    P, Y = problem.reward_PY.shape
    upper = torch.triu_indices(Y, Y, 1).t()
    pairs = torch.cat([upper + p * Y for p in range(P)])
    hidden = torch.eye(P, dtype=torch.float64).repeat_interleave(Y, dim=0)
    start = torch.zeros(P * Y, dtype=torch.float64) if target.start is None else target.start
    table = start.view(P, Y).t().contiguous().requires_grad_()
    score, reference = target.score_PG.reshape(-1), world.scores.ref_logprob_PG.reshape(-1)
    optimizer = torch.optim.LBFGS(
        [table], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        result = lagrangian_preference_loss(
            hidden,
            table,
            torch.arange(Y).repeat(P),
            torch.arange(P * Y + 1),
            pairs,
            score,
            score.new_zeros(P * Y, 0),
            score.new_zeros(0),
            reference,
            beta=target.coefficient,
        )
        # The factor keeps the gradient's size away from the tolerance.
        loss = result.loss * P
        loss.backward()
        return loss

    optimizer.step(closure)
    return table.detach().t().reshape(-1)


@pytest.mark.parametrize(("J", "start", "iterations"), [(1, None, 2), (1, 3.0, 8), (2, 0.1, 10)])
def test_the_real_loss_reaches_the_closed_form_optimum_in_both_loops(J, start, iterations):
    problem = make(1, J=J, P=4, Y=5, beta=0.7, tabular=True)
    lam_star = Optima(problem).solve_dual()
    config = CaidConfig(beta=0.7, iterations=iterations, dual_step=1.0)
    world = ExactStages(problem, config, table_by_the_real_loss)
    world.lam_init = None if start is None else start * world.solve_dual().lam
    theta, lam = caid.loop(world, config)
    closed = ((problem.reward_PY + problem.utility_PYJ @ torch.tensor(lam_star)) / 0.7).softmax(1)
    assert np.abs(lam.numpy() - lam_star).max() < 1e-6
    assert (problem.policy_PY(theta) - closed).abs().max() < 1e-6
    assert start is None or world.history[0].slack_J.abs().max() > 0.05, "the start must not be the answer"
    config = MocanConfig(beta=0.7)
    theta, lam = mocan.loop(ExactStages(problem, config, table_by_the_real_loss), config)
    assert np.abs(lam.numpy() - lam_star).max() < 1e-6
    assert (problem.policy_PY(theta) - closed).abs().max() < 1e-6


@pytest.mark.parametrize("J", [1, 2, 3])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_without_a_gap_every_dual_method_ends_at_the_optimum(J, start):
    problem = make(5, J=J)
    lam_star = Optima(problem).solve_dual()
    primal = Optima(problem).solve_primal()
    high = start * float(lam_star.max())
    many = {"beta": problem.beta, "lam_init": high, "iterations": 60}
    for loop, config in (
        (caid.loop, CaidConfig(beta=problem.beta, iterations=16, dual_step=1.0)),
        (cdpo.loop, CdpoConfig(**many)),
        (pd_dpo.loop, PdDpoConfig(**many)),
        (opd.loop, OpdConfig(**many | {"iterations": 300})),
    ):
        world = ExactStages(problem, config, regression, lam_init=torch.tensor(start * lam_star))
        theta, lam = loop(world, config)
        assert np.abs(lam.numpy() - lam_star).max() < 1e-6, loop
        assert problem.slack_J(theta).abs().max() < 1e-6, loop
        assert problem.value(theta) == pytest.approx(primal.value, abs=1e-6)
        assert world.history[0].slack_J.abs().max() > 0.05, "the start must not be the answer"


def test_sacpo_at_lambda_star_is_the_optimum_only_without_a_gap():
    for eps in (0.0, 0.5):
        problem = make(5, eps=eps)
        lam = float(Optima(problem).solve_dual()[0])
        config = SacpoConfig(beta=problem.beta, lam=(lam,))
        theta, _ = sacpo.loop(ExactStages(problem, config, maximiser), config)
        config = MocanConfig(beta=problem.beta)
        direct, _ = mocan.loop(ExactStages(problem, config, maximiser), config)
        away = (problem.policy_PY(theta) - problem.policy_PY(direct)).abs().max()
        assert away < 1e-7 if eps == 0 else away > 1e-3


@pytest.mark.parametrize("J", [1, 2, 3])
def test_multi_shot_within_six_newton_steps(J):
    for seed in range(8):
        for eps in (0.1, 0.3):
            problem = make(seed, J=J, eps=eps)
            world = ExactStages(
                problem, CaidConfig(beta=problem.beta, iterations=7, dual_step=1.0), maximiser
            )
            caid.loop(world, world.config)
            assert world.history[0].slack_J.abs().max() > 1e-4, "one-shot must not be the answer"
            assert world.history[-1].slack_J.abs().max() < 1e-4, (seed, eps)


def test_six_secant_steps_from_the_engines_default_reach_it_at_eps_1():
    for seed in range(8):
        rule = required_rule(1, 1.0)
        assert rule == "secant 0.5, lambda*" and CaidConfig().dual_step == 0.5
        problem = make(seed, eps=1.0)
        config = CaidConfig(beta=problem.beta, iterations=7, dual_rule="secant")
        world = ExactStages(problem, config, maximiser)
        caid.loop(world, world.config)
        assert world.history[0].slack_J.abs() > 1e-2, "one-shot must not be the answer"
        assert world.history[-1].slack_J.abs() < 1e-4, seed


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_exact_tilts_as_scores_give_the_multipliers_and_policies_of_the_scores(eps):
    problem = make(3, J=2, eps=eps, beta=0.7)
    for loop, config in (
        (caid.loop, CaidConfig(beta=0.7, iterations=6, dual_step=1.0)),
        (mocan.loop, MocanConfig(beta=0.7)),
    ):
        from_scores = loop(ExactStages(problem, config, maximiser), config)
        seen = preferred(ExactStages(problem, config))
        # Log-ratios differ from the scores by a constant per prompt.
        assert (seen.reward_PY - problem.reward_PY).abs().max() > 0.1
        from_ratios = loop(ExactStages(seen, config, maximiser), config)
        assert (from_ratios[1] - from_scores[1]).abs().max() < 1e-8
        assert (problem.policy_PY(from_ratios[0]) - problem.policy_PY(from_scores[0])).abs().max() < 1e-7


def test_log_ratios_of_fitted_policies_are_other_scores_only_with_a_gap():
    for eps in (0.0, 0.5):
        problem = make(3, J=2, eps=eps)
        config = MocanConfig(beta=problem.beta)
        direct = mocan.loop(ExactStages(problem, config, soft), config)[1]
        seen = preferred(ExactStages(problem, config, soft))
        fitted = mocan.loop(ExactStages(seen, replace(config, force=True), soft), config)[1]
        away = (fitted - direct).abs().max()
        assert away < 1e-6 if eps == 0 else away > 1e-2


def test_with_a_gap_label_forms_meet_the_constraint_elsewhere_and_at_a_loss():
    problem = make(0, eps=0.3)
    optima = Optima(problem)
    lam_p, _, _ = optima.solve_dual_in_class(optima.solve_dual())
    best = optima.solve_primal_in_class(optima.best_in_class(lam_p).theta).value
    for update in FORMS:
        config = CaidConfig(beta=problem.beta, iterations=20, dual_step=1.0)
        theta, lam = caid.loop(ExactStages(problem, config, update), config)
        assert problem.slack_J(theta).abs().max() < 1e-6
        away, loss = abs(float(lam[0] - lam_p[0])), best - problem.value(theta)
        if update is maximiser:
            assert away < 1e-6 and abs(loss) < 1e-8
        else:
            assert away > 0.005 and loss > 1e-6, update


def test_repo_overshoots_and_its_multiplier_only_rises():
    problem = make(0, eps=0.3)
    config = RepoConfig(beta=problem.beta, iterations=40, lam_init=1.0)
    world = ExactStages(problem, config)
    repo.loop(world, config)
    lam = [float(x.lam_J) for x in world.history]
    assert lam == sorted(lam) and world.history[-1].slack_J[0] > 0.01


def test_plain_primal_dual_circles_where_the_dual_method_converges():
    circling, _, dual_method = oscillation(iterations=80).values()
    turns = int((np.diff(np.sign(circling)) != 0).sum())
    assert turns >= 4 and max(map(abs, circling[20:])) > 0.1
    assert int((np.diff(np.sign(dual_method[:6])) != 0).sum()) <= 1 and max(map(abs, dual_method[30:])) < 1e-6


def test_safe_dpo_moves_mass_to_safe_responses():
    problem = make(3, eps=0.2)
    config = SafeDpoConfig(beta=problem.beta)
    theta, lam = safe_dpo.loop(ExactStages(problem, config, soft), config)
    unsafe = problem.utility_PYJ[..., 0] < 0
    before, after = (float((problem.policy_PY(x) * unsafe).sum(1).mean()) for x in (None, theta))
    assert after < 0.5 * before and lam.tolist() == [0.0]


def test_a_constraint_that_holds_anyway_gets_no_weight():
    problem = make(3, b=-5.0)
    config = CaidConfig(beta=problem.beta, iterations=3)
    _, lam = caid.loop(ExactStages(problem, config, maximiser), config)
    assert lam.tolist() == [0.0]


def test_infeasible_thresholds_are_reported_before_training():
    problem = make(4, b=50.0)
    config = CaidConfig(beta=problem.beta)
    world = ExactStages(problem, config, maximiser)
    with pytest.raises(dual.Infeasible, match="proven"):
        caid.loop(world, config)
    assert not world.history and not world.fitted


@pytest.mark.parametrize("algorithm", [caid, cdpo, pd_dpo, primal_dual, repo, opd])
def test_max_kl_returns_the_iterate_before_with_its_own_multipliers(algorithm):
    problem = make(0, eps=0.1, b=0.8)  # lambda* is 1.6, so lambda and KL rise from 1
    kinds = {
        caid: CaidConfig,
        cdpo: CdpoConfig,
        pd_dpo: PdDpoConfig,
        primal_dual: PrimalDualConfig,
        repo: RepoConfig,
        opd: OpdConfig,
    }
    lam_init = {} if algorithm is caid else {"lam_init": 1.0}
    free = kinds[algorithm](beta=problem.beta, iterations=12, **lam_init)
    start = torch.ones(1, dtype=torch.float64)
    world = ExactStages(problem, free, maximiser, lam_init=start)
    algorithm.loop(world, free)
    kl = [problem.kl(x.theta) for x in world.history]
    # The limit is first passed after the first iterate.
    rising = next(i for i in range(1, len(kl)) if kl[i] > max(kl[:i]) + 1e-9)
    max_kl = (max(kl[:rising]) + kl[rising]) / 2
    limited = ExactStages(problem, replace(free, max_kl=max_kl), maximiser, lam_init=start)
    theta, lam = algorithm.loop(limited, limited.config)
    # OPD then measures the step that it returns.
    assert len(limited.history) == rising + 1 + (algorithm is opd)
    assert theta is not limited.history[rising].theta
    lams = [x.lam_J for x in limited.history if x.theta is theta]
    lams += [target.lam_J for target, x in limited.fitted if x is theta]
    assert lams and all((x == lam).all() for x in lams)
    for x in limited.history:
        for target, theta in limited.fitted:
            assert theta is not x.theta or (x.lam_J == target.lam_J).all()


def test_steps_on_ln_lambda_refuse_to_start_at_0():
    for config in (CaidConfig(), MocanConfig(), PrimalDualConfig(), RepoConfig(), CdpoConfig(lam_init=0.0)):
        check(config)
    for config in (PrimalDualConfig(lam_init=0.0), RepoConfig(lam_init=0.0)):
        with pytest.raises(UserError, match="--lam-init 0.0: must be above 0"):
            check(config)
