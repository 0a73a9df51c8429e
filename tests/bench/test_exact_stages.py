"""The algorithms' real loops in the exact world of bench/, where optima are known from scipy and closed forms; and the papers' bounds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.special import log_softmax

from bench.theory import __main__ as command
from bench.theory.bounds import bounds
from bench.theory.broken import BROKEN, LOOSE, flipped_sign_of_the_slack
from bench.theory.exact_stages import ExactWorld, preferred, standardised
from bench.theory.measuring import measure
from bench.theory.optima import Optima
from bench.theory.page import failures, required_rule
from bench.theory.problem import make
from bench.theory.runs import no_gap, oscillation
from bench.theory.tasks import reds, variant
from bench.theory.updates import listwise, maximiser, regression, sampled, single, soft
from engine import caid, cdpo, dual, mocan, opd, pd_dpo, primal_dual, repo, sacpo, safe_dpo
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
)  # fmt: skip
from engine.errors import UserError
from engine.records import Target
from kernels import lagrangian_preference_loss

FORMS = [maximiser, soft, regression, listwise, single]


def target_at(problem, lam, **changes):
    score = problem.reward_PY + problem.utility_PYJ @ lam
    return Target(lam_J=lam, score_PG=score, coefficient=problem.beta, **changes)


def table_by_the_real_loss(world, target, number):
    """An update: the real op on a table of logits, L-BFGS in float64. A response is one token, a prompt's state a unit vector."""
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
            hidden, table, torch.arange(Y).repeat(P), torch.arange(P * Y + 1), pairs, score, score.new_zeros(P * Y, 0), score.new_zeros(0),
            reference, beta=target.coefficient,
        )  # fmt: skip
        loss = result.loss * P  # keeps the gradient's size away from the tolerance
        loss.backward()
        return loss

    optimizer.step(closure)
    return table.detach().t().reshape(-1)


@pytest.mark.parametrize(("J", "start"), [(1, None), (1, 3.0), (2, 0.1)])
def test_the_real_loss_reaches_the_closed_form_optimum_in_both_loops(J, start):
    problem = make(1, J=J, P=4, Y=5, beta=0.7, tabular=True)
    lam_star = Optima(problem).solve_dual()
    config = CaidConfig(beta=0.7, iterations=16, dual_step=1.0)
    world = ExactWorld(problem, config, table_by_the_real_loss)
    world.lam_init = None if start is None else start * world.solve_dual().lam
    theta, lam = caid.loop(world, config)
    closed = ((problem.reward_PY + problem.utility_PYJ @ torch.tensor(lam_star)) / 0.7).softmax(1)
    assert np.abs(lam.numpy() - lam_star).max() < 1e-6
    assert (problem.policy_PY(theta) - closed).abs().max() < 1e-6
    assert start is None or world.history[0].slack_J.abs().max() > 0.05, "the start must not be the answer"
    one = mocan.loop(
        ExactWorld(problem, MocanConfig(beta=0.7), table_by_the_real_loss), MocanConfig(beta=0.7)
    )
    assert np.abs(one[1].numpy() - lam_star).max() < 1e-6
    assert (problem.policy_PY(one[0]) - closed).abs().max() < 1e-6


@pytest.mark.parametrize("update", FORMS)
def test_each_form_finds_the_tilt_that_is_in_the_class(update):
    problem = make(2, J=2)
    lam = torch.tensor([0.7, 0.4], dtype=torch.float64)
    anchor = torch.tensor([0.5, -0.2, 0.3], dtype=torch.float64)
    target = target_at(
        problem, lam, anchor=anchor, anchor_share=0.4, shift_PG=0.3 * problem.utility_PYJ[..., 0]
    )
    target = replace(target, coefficient=1.7)
    theta = update(ExactWorld(problem, MocanConfig(beta=problem.beta), update), target, 1)
    # coefficient x ln(pi / anchor mixture) = score + shift; the features are (r, g).
    expected = torch.tensor([1.0, 0.7 + 0.3, 0.4], dtype=torch.float64) / 1.7 + 0.4 * anchor
    assert (theta - expected).abs().max() < 1e-8


def test_dropped_pairs_carry_nothing():
    problem = make(2)
    dropped = problem.utility_PYJ[..., 0] < 0
    target = target_at(problem, torch.tensor([0.7], dtype=torch.float64), dropped_PG=dropped)
    world = ExactWorld(problem, MocanConfig(beta=problem.beta))
    noise = torch.randn(
        problem.reward_PY.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for update in (soft, regression):
        plain = update(world, target, 1)
        # The same on all dropped responses of a prompt: only their pairs among themselves do not see it.
        pushed = update(world, replace(target, score_PG=target.score_PG + noise[:, :1] * dropped), 1)
        moved = update(world, replace(target, score_PG=target.score_PG + noise * dropped, dropped_PG=None), 1)
        assert (plain - torch.tensor([1.0, 0.7], dtype=torch.float64)).abs().max() < 1e-8
        assert (pushed - plain).abs().max() > 1e-3 and (moved - pushed).abs().max() > 1e-3


def test_fitting_v_turns_single_responses_into_pairs():
    problem = make(3, eps=0.5)
    world = ExactWorld(problem, MocanConfig(beta=problem.beta), draws=6, seed=1)
    phi, scores = world.gather(problem.features_PYF), world.scores.reward_PG
    prompt = torch.eye(len(phi), dtype=torch.float64)[:, None].expand(-1, 6, -1)
    together = torch.linalg.lstsq(
        torch.cat((phi, prompt), dim=2).flatten(0, 1), scores.reshape(-1, 1)
    ).solution[:2, 0]
    target = Target(lam_J=torch.zeros(1, dtype=torch.float64), score_PG=scores, coefficient=1.0)
    assert (regression(world, target, 1) - together).abs().max() < 1e-10


def test_sampled_labels_are_the_soft_ones_in_the_mean():
    problem = make(4, P=64, Y=12)
    target = target_at(problem, torch.tensor([0.5], dtype=torch.float64))
    world = ExactWorld(problem, MocanConfig(beta=problem.beta))
    several = torch.stack([sampled(world, target, t) for t in range(1, 9)])
    standard = several.std(0) / 8**0.5
    assert standard.max() < 0.1 and ((several.mean(0) - soft(world, target, 1)).abs() < 4 * standard).all()
    assert (sampled(world, target, 1) == several[0]).all(), "seeded"


@pytest.mark.parametrize(("J", "eps"), [(1, 0.3), (2, 1.0), (1, 3.0)])
def test_maximiser_is_the_best_of_scipys(J, eps):
    problem = make(2, J=J, eps=eps)
    lam = np.full(J, 0.9)
    theta = maximiser(
        ExactWorld(problem, MocanConfig(beta=problem.beta)), target_at(problem, torch.tensor(lam)), 1
    )
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
        theta = maximiser(ExactWorld(problem, MocanConfig(beta=problem.beta)), target_at(problem, lam), 1)
        assert problem.lagrangian(theta, lam) == pytest.approx(best, abs=1e-9)


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
        world = ExactWorld(problem, config, regression, lam_init=torch.tensor(start * lam_star))
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
        theta, _ = sacpo.loop(ExactWorld(problem, config, maximiser), config)
        direct, _ = mocan.loop(
            ExactWorld(problem, MocanConfig(beta=problem.beta), maximiser), MocanConfig(beta=problem.beta)
        )
        away = (problem.policy_PY(theta) - problem.policy_PY(direct)).abs().max()
        assert away < 1e-7 if eps == 0 else away > 1e-3


@pytest.mark.parametrize("J", [1, 2, 3])
def test_multi_shot_within_six_newton_steps(J):
    for seed in range(8):
        for eps in (0.1, 0.3):
            problem = make(seed, J=J, eps=eps)
            world = ExactWorld(problem, CaidConfig(beta=problem.beta, iterations=7, dual_step=1.0), maximiser)
            caid.loop(world, world.config)
            assert world.history[0].slack_J.abs().max() > 1e-4, "one-shot must not be the answer"
            assert world.history[-1].slack_J.abs().max() < 1e-4, (seed, eps)


def test_six_secant_steps_from_the_engines_default_reach_it_at_eps_1():
    for seed in range(8):
        rule = required_rule(1, 1.0)
        assert rule == "secant 0.5, lambda*" and CaidConfig().dual_step == 0.5
        problem = make(seed, eps=1.0)
        world = ExactWorld(
            problem, CaidConfig(beta=problem.beta, iterations=7, dual_rule="secant"), maximiser
        )
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
        from_scores = loop(ExactWorld(problem, config, maximiser), config)
        seen = preferred(ExactWorld(problem, config))
        assert (seen.reward_PY - problem.reward_PY).abs().max() > 0.1, (
            "log-ratios differ from the scores by a constant per prompt"
        )
        from_ratios = loop(ExactWorld(seen, config, maximiser), config)
        assert (from_ratios[1] - from_scores[1]).abs().max() < 1e-8
        assert (problem.policy_PY(from_ratios[0]) - problem.policy_PY(from_scores[0])).abs().max() < 1e-7


def test_log_ratios_of_fitted_policies_are_other_scores_only_with_a_gap():
    for eps in (0.0, 0.5):
        problem, config = make(3, J=2, eps=eps), MocanConfig()
        direct = mocan.loop(ExactWorld(problem, config, soft), config)[1]
        fitted = mocan.loop(
            ExactWorld(preferred(ExactWorld(problem, config, soft)), replace(config, force=True), soft),
            config,
        )[1]
        away = (fitted - direct).abs().max()
        assert away < 1e-6 if eps == 0 else away > 1e-2


def test_with_a_gap_label_forms_meet_the_constraint_elsewhere_and_at_a_loss():
    problem = make(0, eps=0.3)
    optima = Optima(problem)
    lam_p, _, _ = optima.solve_dual_in_class(optima.solve_dual())
    best = optima.solve_primal_in_class(optima.best_in_class(lam_p).theta).value
    for update in FORMS:
        config = CaidConfig(beta=problem.beta, iterations=20, dual_step=1.0)
        theta, lam = caid.loop(ExactWorld(problem, config, update), config)
        assert problem.slack_J(theta).abs().max() < 1e-6
        away, loss = abs(float(lam[0] - lam_p[0])), best - problem.value(theta)
        assert (
            (away < 1e-6 and abs(loss) < 1e-8) if update is maximiser else (away > 0.005 and loss > 1e-6)
        ), update


def test_policy_gradient_ends_at_the_maximiser_and_standardising_moves_it():
    problem = make(1, J=2, eps=0.4)
    lam = torch.tensor([0.8, 0.5], dtype=torch.float64)
    best = maximiser(ExactWorld(problem, MocanConfig(beta=problem.beta)), target_at(problem, lam), 1)
    found = {}
    for advantage in ("rloo", "group_norm"):
        world = ExactWorld(
            problem, PrimalDualConfig(beta=problem.beta, advantage=advantage, steps=150), ascent_rate=0.5
        )
        found[advantage] = world.ascend(None, lam, 1)
    assert (problem.policy_PY(found["rloo"]) - problem.policy_PY(best)).abs().max() < 1e-8
    assert (problem.policy_PY(found["group_norm"]) - problem.policy_PY(best)).abs().max() > 1e-2


def test_fixed_point_of_group_norm_is_a_tilt_by_standardised_scores():
    problem = make(1, P=3, Y=5, beta=2.0, tabular=True)
    lam = torch.tensor([0.8], dtype=torch.float64)
    world = ExactWorld(
        problem, PrimalDualConfig(beta=problem.beta, advantage="group_norm", steps=200), ascent_rate=0.5
    )
    pi = problem.policy_PY(world.ascend(None, lam, 1))

    def deviation(x_PY):
        mean = (pi * x_PY).sum(1, keepdim=True)
        return ((pi * x_PY.square()).sum(1, keepdim=True) - mean.square()).sqrt()

    r, g = problem.reward_PY, problem.utility_PYJ[..., 0]
    tilt = ((r / deviation(r) + 0.8 * g / deviation(g)) / problem.beta).softmax(1)
    assert (pi - tilt).abs().max() < 1e-8
    z = standardised(problem.utility_PYJ, pi)[..., 0]
    assert (pi * z).sum(1).abs().max() < 1e-12 and ((pi * z * z).sum(1) - 1).abs().max() < 1e-12


def test_standardising_can_collapse_a_policy_that_the_kl_holds():
    problem = make(1, P=3, Y=5, tabular=True)
    largest = {}
    for advantage in ("rloo", "group_norm"):
        world = ExactWorld(
            problem, PrimalDualConfig(beta=problem.beta, advantage=advantage, steps=200), ascent_rate=0.5
        )
        pi = problem.policy_PY(world.ascend(None, torch.tensor([0.8], dtype=torch.float64), 1))
        largest[advantage] = float(pi.max())
    # A sharper policy has smaller deviations, which magnify the scores further.
    assert largest["rloo"] < 0.9 and largest["group_norm"] > 1 - 1e-6


def test_drawn_policy_gradient_is_unbiased():
    problem = make(1, eps=0.3)
    lam, start = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
    config = PrimalDualConfig(beta=problem.beta, steps=1)
    exact = ExactWorld(problem, config).ascend(start, lam, 1)
    drawn = torch.stack(
        [ExactWorld(problem, config, draws=3, seed=s).ascend(start, lam, 1) for s in range(400)]
    )
    error = drawn.std(0) / 400**0.5
    assert ((drawn.mean(0) - exact).abs() < 4 * error).all() and error.max() < 0.3 * (
        exact - start
    ).abs().max()


def test_repo_penalises_only_prompts_that_miss():
    problem = make(2, P=2, Y=6, tabular=True)
    # Prompt 0 misses the threshold at the reference, prompt 1 meets it: b differs by prompt only through the utilities here.
    safe = torch.zeros(12, dtype=torch.float64)
    safe[6:] = 4 * problem.utility_PYJ[1, :, 0]
    world = ExactWorld(problem, RepoConfig(beta=problem.beta, steps=1), ascent_rate=0.1)
    lam = torch.tensor([2.0], dtype=torch.float64)
    plain, only = world.ascend(safe, lam, 1), world.ascend(safe, lam, 1, rectified=True)
    none = world.ascend(safe, 0 * lam, 1)
    before, after = (problem.policy_PY(x) for x in (plain, only))
    assert (before[0] - after[0]).abs().max() < 1e-12 and (
        after[1] - problem.policy_PY(none)[1]
    ).abs().max() < 1e-12
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_repo_overshoots_and_its_multiplier_only_rises():
    problem = make(0, eps=0.3)
    config = RepoConfig(beta=problem.beta, iterations=40, lam_init=1.0)
    world = ExactWorld(problem, config)
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
    theta, lam = safe_dpo.loop(ExactWorld(problem, config, soft), config)
    unsafe = problem.utility_PYJ[..., 0] < 0
    before, after = (float((problem.policy_PY(x) * unsafe).sum(1).mean()) for x in (None, theta))
    assert after < 0.5 * before and lam.tolist() == [0.0]


def test_a_constraint_that_holds_anyway_gets_no_weight():
    problem = make(3, b=-5.0)
    assert caid.loop(ExactWorld(problem, CaidConfig(iterations=3), maximiser), CaidConfig(iterations=3))[
        1
    ].tolist() == [0.0]


def test_infeasible_thresholds_are_reported_before_training():
    problem = make(4, b=50.0)
    world = ExactWorld(problem, CaidConfig(), maximiser)
    with pytest.raises(dual.Infeasible, match="proven"):
        caid.loop(world, CaidConfig())
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
    free = kinds[algorithm](
        beta=problem.beta, iterations=12, **({} if algorithm is caid else {"lam_init": 1.0})
    )
    start = torch.ones(1, dtype=torch.float64)
    world = ExactWorld(problem, free, maximiser, lam_init=start)
    algorithm.loop(world, free)
    kl = [problem.kl(x.theta) for x in world.history]
    # A limit that is first passed after the first iterate.
    rising = next(i for i in range(1, len(kl)) if kl[i] > max(kl[:i]) + 1e-9)
    limited = ExactWorld(
        problem, replace(free, max_kl=(max(kl[:rising]) + kl[rising]) / 2), maximiser, lam_init=start
    )
    theta, lam = algorithm.loop(limited, limited.config)
    # OPD then measures the step that it returns.
    assert (
        len(limited.history) == rising + 1 + (algorithm is opd) and theta is not limited.history[rising].theta
    )
    own = [x.lam_J for x in limited.history if x.theta is theta] + [
        target.lam_J for target, x in limited.fitted if x is theta
    ]
    assert own and all((x == lam).all() for x in own)
    assert all(
        (x.lam_J == target.lam_J).all()
        for x in limited.history
        for target, theta in limited.fitted
        if theta is x.theta
    )


def test_steps_on_ln_lambda_refuse_to_start_at_0():
    for config in (CaidConfig(), MocanConfig(), PrimalDualConfig(), RepoConfig(), CdpoConfig(lam_init=0.0)):
        check(config)
    for config in (PrimalDualConfig(lam_init=0.0), RepoConfig(lam_init=0.0)):
        with pytest.raises(UserError, match="--lam-init 0.0: must be above 0"):
            check(config)


@pytest.fixture(scope="module")
def facts():
    """One problem with a gap, J = 1, and one of J = 2."""
    return measure(0, 1, 0.3), measure(3, 2, 0.1)


def test_all_bounds_hold(facts):
    for f in facts:
        assert [b for b in bounds(f) if not b.holds] == []
        assert f.assumptions["A1"] and f.assumptions["A2"] and f.assumptions["A5"]
    assert facts[1].tighter is not None, "Theorem 1 needs A4 in at least one of them"


def test_sharp_forms_are_near_equality(facts):
    for f in facts:
        ratio = {b.name: b.ratio for b in bounds(f) if b.form == "sharp"}
        assert ratio["Lemma 5 off along h alone"] > 0.98
        assert ratio["Thm 2: P* - D_p* <= gap(lambda*_p)"] > 0.9 and ratio["gap(lambda*) <= P* - D_p*"] > 0.9
    assert {b.name: b.ratio for b in bounds(facts[0])}["Lemma 4 with D(lambda*_p) - D*"] > 0.95


@pytest.mark.parametrize("name", list(BROKEN))
def test_each_wrong_sign_or_factor_turns_a_statement_red(facts, name):
    assert reds(facts[0], BROKEN[name](facts[0])) != []


def test_every_statement_turns_red_but_those_said_to_be_loose(facts):
    red = {name for f in facts for wrong in BROKEN.values() for name in reds(f, wrong(f))}
    every = {b.name for f in facts for b in bounds(f)}
    assert every - red == set(LOOSE)


def test_the_wrong_sign_of_the_slack_drives_lambda_away():
    right, wrong = flipped_sign_of_the_slack(0)
    assert right < 1e-6 and wrong > 0.1


@pytest.mark.parametrize(
    ("scale", "printed"),
    [
        (0.1, {"Thm 4, R-OPT, off along h alone"}),
        (10.0, {"CAN Thm 1: largest curvature <= G / beta", "CAN Thm 2: steps to 1e-6"}),
    ],
)
def test_printed_constants_with_wrong_units_fail_in_other_units(scale, printed):
    wrong = [b for b in bounds(measure(0, 1, 0.3, scale=scale)) if not b.holds]
    assert {b.name for b in wrong} == printed and {b.form for b in wrong} <= {"printed", "printed, gap for B"}


def test_a_constraint_that_holds_anyway_and_another_beta():
    for x in (variant(0, 2, 0.3, 1.0, (0.3, -1.0)), variant(1, 1, 0.3, 0.3, 0.3)):
        assert [b for b in x["bounds"] if not b["holds"] and b["form"] != "printed, gap for B"] == []
        assert x["reached"]
    assert x["beta"] == 0.3


def test_lambda_in_the_class_is_found_from_elsewhere():
    optima = Optima(make(5, J=2))
    lam_star = optima.solve_dual()
    for start in (0 * lam_star, 3 * lam_star):
        lam, _, kink = Optima(make(5, J=2)).solve_dual_in_class(start)
        assert np.abs(lam - lam_star).max() < 1e-6 and not kink


def test_ends_of_caid_at_nu_0_are_required():
    found = no_gap(1, 1)
    assert {key.split("|")[0] for key, (needed, _) in found.items() if needed is None} <= {
        "primal-dual, RLOO",
        "RePO",
    }
    results = {"problems": [], "variants": [], "six": [], "ends": [], "no_gap": [[(1, 1), found]]}
    assert failures(results) == []
    results["no_gap"] = [[(1, 1), {"CAID, secant 0.5|0|60": (None, 1e-5)}]]
    assert len(failures(results)) == 1


@pytest.mark.parametrize("J", [1, 2])
def test_gaps_close_quadratically_with_nu(J):
    gaps, nus = [], []
    for eps in (0.3, 0.1, 0.03):
        optima = Optima(make(0, J=J, eps=eps))
        lam_star = optima.solve_dual()
        _, dual_in_class, kink = optima.solve_dual_in_class(lam_star)
        gaps.append(optima.solve_primal().value - dual_in_class)
        nus.append(optima.gap_of_class(optima.tilted(lam_star)))
        assert not kink
    power = np.diff(np.log(gaps)) / np.diff(np.log(nus))
    assert (power > 1.7).all() and (power < 2.3).all()


def test_a_kink_has_a_duality_gap_and_is_found():
    optima = Optima(make(2, eps=3.0))
    lam, value, kink = optima.solve_dual_in_class(optima.solve_dual())
    primal = optima.solve_primal_in_class(optima.best_in_class(lam).theta)
    assert kink and primal.value < value - 0.01


def test_workers_below_1_are_refused(capsys):
    assert command.main(["--workers", "0"]) == 2
    assert capsys.readouterr().err.strip() == "error: --workers 0: must be at least 1."


def test_quick_without_a_folder_leaves_the_committed_page_alone(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(command, "compute", lambda sizes, workers: {})
    monkeypatch.setattr(command, "write", lambda results, out, console: written.append(out) or [])
    assert command.main(["--quick"]) == 0 and command.main([]) == 0
    assert written[0].parent == tmp_path and str(written[1]) == "docs"


def test_quick_command_writes_page_pictures_and_ratios(tmp_path, capsys):
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "theory.md").read_text(encoding="utf-8")
    assert "<!--" not in page and "pairwise regression" in page
    for name in ("convergence", "bounds", "oscillation", "labels"):
        assert f"theory-{name}.png" in page and (tmp_path / f"theory-{name}.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "theory.json").read_text())
    assert {(x["J"], x["eps"]) for x in written["problems"] if "b" not in x} == {
        (1, 0.0),
        (1, 0.3),
        (2, 0.0),
        (2, 0.3),
    }
    assert {x["beta"] for x in written["problems"]} == {1.0, 0.3}
    sharp = [i for i, (_, form) in enumerate(written["statements"]) if form == "sharp"]
    assert len(sharp) > 10
    for x in written["problems"]:
        assert all(left <= right + 1e-5 for left, right in (x["sides"][i] for i in sharp if x["sides"][i]))
