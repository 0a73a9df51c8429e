import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, minimize

from engine import caid, dual
from engine.config import CaidConfig
from engine.dual import solver
from engine.errors import UserError


def scores(seed: int, P: int = 20, G: int = 12, J: int = 2):
    """Returns random scores with unequal units and offsets per prompt;
    utilities fall where the reward rises."""
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(P, G)) + rng.normal(size=(P, 1))
    utility = rng.normal(size=(P, G, J)) - 0.5 * reward[..., None]
    return reward, utility * (1 + np.arange(J)) + rng.normal(size=(P, 1, J))


def dual_value(reward, utility, threshold, beta, lam):
    """Computes the plug-in dual of arXiv 2405.19544, appendix E, prompt by prompt,
    without the project's kernels."""
    mean = utility.mean((0, 1))
    z = (reward + (utility - mean - threshold) @ lam) / beta
    return beta * np.mean([np.logaddexp.reduce(row) - math.log(len(row)) for row in z])


def tilted_mean(reward, utility, beta, lam):
    z = (reward + utility @ lam) / beta
    w = np.exp(z - z.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    return (w[..., None] * utility).sum(1).mean(0)


@pytest.mark.parametrize("J", [1, 2, 3])
def test_value_gradient_and_hessian_match_finite_differences(J):
    reward, utility = scores(1, J=J)
    threshold = np.full(J, 0.3)
    # A finite lam_max below the optimum stops the solver where the gradient is not 0.
    result = dual.solve(reward, utility, threshold, 0.8, lam_max=0.1)
    lam = result.lam.numpy()
    assert result.value == pytest.approx(dual_value(reward, utility, threshold, 0.8, lam), abs=1e-12)
    e = 1e-4 * np.eye(J)

    def value(x):
        return dual_value(reward, utility, threshold, 0.8, x)

    gradient = [(value(lam + e[j]) - value(lam - e[j])) / 2e-4 for j in range(J)]
    assert np.abs(gradient).max() > 1e-2
    np.testing.assert_allclose(result.gradient.numpy(), gradient, atol=1e-7)
    hessian = [
        [
            (value(lam + a + b) - value(lam + a - b) - value(lam - a + b) + value(lam - a - b)) / 4e-8
            for b in e
        ]
        for a in e
    ]
    np.testing.assert_allclose(result.hessian.numpy(), hessian, atol=1e-5)


@pytest.mark.parametrize("J", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_solution_matches_scipy_and_meets_the_optimality_conditions(J, beta, seed):
    reward, utility = scores(seed, J=J)
    threshold = np.array([0.4, 0.7, -0.2])[:J]
    result = dual.solve(reward, utility, threshold, beta)
    mean = utility.mean((0, 1))
    found = minimize(
        lambda x: dual_value(reward, utility, threshold, beta, x),
        np.ones(J),
        jac=lambda x: tilted_mean(reward, utility, beta, x) - mean - threshold,
        method="L-BFGS-B",
        bounds=[(0, None)] * J,
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000},
    )
    np.testing.assert_allclose(result.lam.numpy(), found.x, rtol=1e-4, atol=1e-5)
    assert result.value <= found.fun + 1e-12

    std = np.sqrt(utility.var(1).mean(0))
    slack = tilted_mean(reward, utility, beta, result.lam.numpy()) - mean - threshold
    on = result.lam.numpy() > 0
    assert np.abs(slack[on] / std[on]).max(initial=0) < 1e-9 and (slack[~on] >= -1e-9 * std[~on]).all()
    assert result.kkt <= 1e-10
    np.testing.assert_allclose(result.predicted_improvement.numpy(), slack + threshold, atol=1e-9)
    assert result.lam.dtype == torch.float64 and result.ess.shape == (20,)
    assert (result.ess >= 1 - 1e-12).all() and (result.ess <= 12 + 1e-9).all()


def test_constraint_with_room_gets_multiplier_exactly_zero():
    reward, utility = scores(2)
    result = dual.solve(reward, utility, [0.8, -5.0], 1.0)
    assert result.lam[0] > 0 and result.lam[1].item() == 0.0 and result.gradient[1] > 0
    alone = dual.solve(reward, utility[..., :1], [0.8], 1.0)
    assert alone.lam[0].item() == pytest.approx(result.lam[0].item(), rel=1e-8)


def test_multiplier_and_value_rise_with_the_threshold():
    reward, utility = scores(3, J=1)
    top = dual.largest_threshold(utility).item()
    path = [dual.solve(reward, utility, [share * top], 0.5) for share in (-0.5, 0.1, 0.3, 0.6, 0.9, 0.99)]
    lam = [result.lam.item() for result in path]
    assert lam[0] == 0.0 and all(a < b for a, b in zip(lam[1:], lam[2:], strict=False))
    assert all(result.kkt <= 1e-10 for result in path)


def test_scaling_the_utility_scales_the_multiplier():
    reward, utility = scores(4, J=1)
    one = dual.solve(reward, utility, [0.5], 0.5)
    big = dual.solve(reward, 1e4 * utility, [0.5e4], 0.5)
    assert big.lam.item() * 1e4 == pytest.approx(one.lam.item(), rel=1e-9)


def test_per_prompt_constants_change_nothing_and_shift_the_value_by_the_mean_reward():
    reward, utility = scores(5)
    rng = np.random.default_rng(0)
    shift = 100 * rng.normal(size=(20, 1))
    one = dual.solve(reward, utility, [0.5, 0.5], 0.5)
    two = dual.solve(reward + shift, utility + 100 * rng.normal(size=(20, 1, 2)), [0.5, 0.5], 0.5)
    np.testing.assert_allclose(two.lam.numpy(), one.lam.numpy(), rtol=1e-8)
    assert two.value - one.value == pytest.approx(shift.mean(), abs=1e-9)


def test_absolute_levels_and_torch_inputs_agree_with_improvements_and_numpy():
    reward, utility = scores(6)
    b = np.array([0.4, 0.6])
    one = dual.solve(reward, utility, b, 0.5)
    level = dual.solve(reward, utility, utility.mean((0, 1)) + b, 0.5, absolute=True)
    tensors = dual.solve(torch.tensor(reward), torch.tensor(utility), torch.tensor(b), 0.5)
    np.testing.assert_allclose(level.lam.numpy(), one.lam.numpy(), rtol=1e-9)
    np.testing.assert_allclose(level.predicted_improvement.numpy(), b, atol=1e-8)
    assert torch.equal(tensors.lam, one.lam)
    assert torch.equal(dual.solve(reward.tolist(), utility.tolist(), b.tolist(), 0.5).lam, one.lam)
    single = dual.solve(torch.tensor(reward).float(), torch.tensor(utility).float(), b, 0.5)
    np.testing.assert_allclose(single.lam.numpy(), one.lam.numpy(), rtol=1e-4)


def test_infeasible_alone_names_the_largest_threshold():
    reward, utility = scores(7, J=1)
    top = (utility.max(1).mean(0) - utility.mean((0, 1)))[0]
    assert dual.largest_threshold(utility).item() == pytest.approx(top, rel=1e-12)
    dual.solve(reward, utility, [top * (1 - 1e-6)], 0.5)
    with pytest.raises(dual.Infeasible, match="best of 12.*no proof") as caught:
        dual.solve(reward, utility, [top * (1 + 1e-6)], 0.5)
    assert isinstance(caught.value, ValueError)
    assert caught.value.largest_improvement.item() == pytest.approx(
        top
    ) and caught.value.direction.tolist() == [1.0]
    assert caught.value.largest_multiple == pytest.approx(1 / (1 + 1e-6), rel=1e-9) and f"{top:.4g}" in str(
        caught.value
    )
    with pytest.raises(dual.Infeasible, match="proven") as caught:
        dual.solve(reward, utility, [2 * top], 0.5, enumerated=True)
    assert "no proof" not in str(caught.value) and "\n" not in str(caught.value)


def test_known_bounds_prove_a_threshold_infeasible():
    """A score of at most 1 cannot improve on its mean by 1 - mean, whatever is not among the samples."""
    rng = np.random.default_rng(7)
    reward, utility = rng.normal(size=(12, 6)), rng.uniform(size=(12, 6, 2)) * [1, 5]
    room = 1 - utility.mean((0, 1))[0]
    with pytest.raises(dual.Infeasible, match=r"proven.*never above \[1, inf\]") as caught:
        dual.solve(reward, utility, [room, 0.1], 0.5, bounds=[1, None])
    assert caught.value.proven and caught.value.direction.tolist() == [1.0, 0.0]
    assert caught.value.largest_improvement.tolist() == [pytest.approx(room), math.inf]
    assert caught.value.largest_multiple == pytest.approx(1) and f"{room:.4g}" in str(caught.value)
    with pytest.raises(dual.Infeasible, match="level = .*proven"):
        dual.solve(reward, utility, [1.0, 0.1], 0.5, bounds=[1, None], absolute=True)
    with pytest.raises(dual.Infeasible, match="no proof") as caught:
        dual.solve(reward, utility, [room - 1e-6, 0.1], 0.5, bounds=[1, None])
    assert not caught.value.proven
    assert torch.equal(
        dual.solve(reward, utility, [0.1, 0.1], 0.5, bounds=[1, 5]).lam,
        dual.solve(reward, utility, [0.1, 0.1], 0.5).lam,
    )
    assert dual.solve(reward, utility, [2.0, 0.1], 0.5, bounds=[1, 5], lam_max=9.0, force=True).lam[
        0
    ] == pytest.approx(9)
    for bounds, match in (
        ([1], "each of the 2"),
        ([0.5, None], "utility 0 .*above its bound 0.5"),
        ([1, "x"], "bounds is"),
    ):
        with pytest.raises(UserError, match=match):
            dual.solve(reward, utility, [0.1, 0.1], 0.5, bounds=bounds)


def test_infeasible_together_is_certified_by_its_direction():
    rng = np.random.default_rng(8)
    reward, first = rng.normal(size=(2, 15, 10))
    utility = np.stack([first, 3 * (0.3 * rng.normal(size=(15, 10)) - first)], -1)  # opposed
    top = dual.largest_threshold(utility).numpy()
    b = 0.7 * top
    for j in range(2):
        dual.solve(reward, utility[..., j : j + 1], b[j : j + 1], 0.5)
    with pytest.raises(dual.Infeasible) as caught:
        dual.solve(reward, utility, b, 0.5)
    v, t = caught.value.direction.numpy(), caught.value.largest_multiple
    centred = utility - utility.mean((0, 1))
    assert (v >= 0).all() and v.sum() == pytest.approx(1)
    assert (centred @ v).max(1).mean() < v @ b
    assert (centred @ v).max(1).mean() / (v @ b) == pytest.approx(t, rel=1e-9)
    # The limit is a minimum over directions: a fine grid of them finds the same,
    # and solving just below it works.
    grid = [np.array([1 - s, s]) for s in np.linspace(0, 1, 20001)]
    assert t == pytest.approx(min((centred @ u).max(1).mean() / (u @ b) for u in grid), rel=2e-3)
    assert dual.solve(reward, utility, 0.998 * t * b, 0.5).kkt <= 1e-10
    level = utility.mean((0, 1)) + b
    with pytest.raises(dual.Infeasible, match="level") as absolute:
        dual.solve(reward, utility, level, 0.5, absolute=True)
    np.testing.assert_allclose(absolute.value.largest_improvement.numpy(), top, rtol=1e-12)
    with pytest.raises(dual.Infeasible, match=r"alone\.$") as bare:
        dual.solve(reward, utility, b, 0.5, explain=False)
    assert math.isnan(bare.value.largest_multiple)
    assert bare.value.largest_improvement.tolist() == pytest.approx(top)
    v = bare.value.direction.numpy()
    assert (v >= 0).all() and (centred @ v).max(1).mean() < v @ b


def test_opposed_utilities_at_threshold_zero_are_feasible():
    reward, utility = scores(9, J=1)
    result = dual.solve(reward, np.concatenate([utility, -utility], -1), [0.0, 0.0], 1.0)
    np.testing.assert_allclose(result.predicted_improvement.numpy(), 0, atol=1e-9)


def test_lam_max_bounds_and_force_ends_there():
    reward, utility = scores(10)
    capped = dual.solve(reward, utility, [0.8, -5.0], 1.0, lam_max=0.05)
    assert capped.lam.tolist() == [0.05, 0.0] and capped.gradient[0] < 0 and capped.kkt == 0
    forced = dual.solve(reward, utility, [100.0, -5.0], 1.0, lam_max=7.0, force=True)
    assert forced.lam.tolist() == [7.0, 0.0]


def test_nearly_one_hot_weights_still_converge():
    reward, utility = scores(11, P=8, G=5, J=3)
    result = dual.solve(reward, utility, 0.3 * dual.largest_threshold(utility), 1e-3)
    assert result.kkt <= 1e-10 and result.ess.min() < 1.1


def test_user_mistakes_name_the_value():
    reward, utility = scores(12)
    b = [0.1, 0.1]
    bad = utility.copy()
    bad[3, 4, 1] = np.nan
    constant = utility.copy()
    constant[..., 1] = constant[:, :1, 1]
    for arguments, match in [
        ((reward, bad, b, 1.0), r"utility\[3, 4, 1\] is nan"),
        ((reward * np.inf, utility, b, 1.0), r"reward\[0, 0\]"),
        ((reward, utility, [0.1, np.inf], 1.0), r"threshold\[1\] is inf"),
        ((reward, utility, [0.1], 1.0), "1 threshold.* 2 utilities"),
        ((reward, utility[..., 0], b, 1.0), r"utility \[20, 12\]"),
        ((reward[:5], utility, b, 1.0), r"reward \[5, 12\]"),
        ((reward, constant, b, 1.0), "utility 1 .*same for all responses"),
        ((reward[:, :1], utility[:, :1], b, 1.0), "utility 0 .*sample more responses"),
        ((reward, utility, b, 0.0), "beta 0.0"),
        ((reward, utility, b, math.nan), "beta nan"),
    ]:
        with pytest.raises(UserError, match=match):
            dual.solve(*arguments)
    with pytest.raises(UserError, match="lam_max -1"):
        dual.solve(reward, utility, b, 1.0, lam_max=-1)
    with pytest.raises(UserError, match="finite lam_max"):
        dual.solve(reward, utility, b, 1.0, force=True)
    for arguments, match in [
        ((None, utility, b, 1.0), "reward is 'None': give numbers"),
        ((reward, [[1.0], [1.0, 2.0]], b, 1.0), "utility is .*equal length"),
        ((reward, utility, "x", 1.0), "threshold is 'x'"),
        ((reward, utility, b, "x"), "beta x"),
        ((reward, utility, b, None), "beta None"),
    ]:
        with pytest.raises(UserError, match=match):
            dual.solve(*arguments)
    for start in ([1.0], [1.0, np.nan], [1.0, 2.0, 3.0], "x"):
        with pytest.raises(UserError, match="start_J"):
            dual.solve(reward, utility, b, 1.0, start_J=start)
    with pytest.raises(UserError, match="lam_max x"):
        dual.solve(reward, utility, b, 1.0, lam_max="x")


def test_a_residual_above_the_wanted_one_is_warned_of(monkeypatch):
    reward, utility = scores(12, J=1)
    found = dual.solve(reward, utility, [0.5], 1.0)
    assert 0 < found.kkt
    monkeypatch.setattr(solver, "TOLERANCE", found.kkt / 2)
    monkeypatch.setitem(solver.STEPS, "newton", (solver.STEPS["newton"][0], found.iterations + 1))
    with pytest.warns(UserWarning, match="KKT residual .* fewer digits"):
        assert dual.solve(reward, utility, [0.5], 1.0).lam.item() == pytest.approx(found.lam.item())


def test_step_is_the_papers_projected_subgradient():
    moved = dual.step(torch.tensor([1.0, 0.5, 0.04]), torch.tensor([0.3, -0.2, 0.3]), 0.5)
    torch.testing.assert_close(moved, torch.tensor([0.85, 0.6, 0.0], dtype=torch.float64))


def test_step_caps_the_change_by_a_factor_and_the_floor():
    lam = torch.tensor([0.4, 0.4, 0.02, 0.0, 19.0])
    moved = dual.step(lam, torch.tensor([-100.0, 100.0, -100.0, -100.0, -100.0]), 1.0, lam_max=20.0)
    torch.testing.assert_close(moved, torch.tensor([0.8, 0.2, 0.1, 0.1, 20.0], dtype=torch.float64))
    moved = dual.step(
        lam, torch.tensor([-100.0, 100.0, -100.0, -100.0, -100.0]), 1.0, max_change=4.0, floor=0.01
    )
    torch.testing.assert_close(moved, torch.tensor([1.6, 0.1, 0.08, 0.04, 76.0], dtype=torch.float64))


def test_newton_step_leaves_out_constraints_at_zero_with_room():
    hessian = torch.tensor([[2.0, 1.5], [1.5, 3.0]])
    moved = dual.step(torch.tensor([1.0, 0.0]), torch.tensor([-0.4, 0.9]), hessian)
    torch.testing.assert_close(moved, torch.tensor([1.2, 0.0], dtype=torch.float64))
    moved = dual.step(torch.tensor([1.0, 1.0]), torch.tensor([-0.4, 0.9]), hessian, max_change=10.0)
    torch.testing.assert_close(moved, 1 - torch.linalg.solve(hessian, torch.tensor([-0.4, 0.9])).double())
    moved = dual.step(torch.tensor([1.0, 1.0]), torch.tensor([0.2, 0.2]), torch.ones(2, 2))
    torch.testing.assert_close(
        moved, torch.tensor([0.9, 0.9], dtype=torch.float64)
    )  # singular: the shortest step
    assert dual.step(torch.zeros(2), torch.ones(2), hessian).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="nan"):
        dual.step(torch.ones(1), torch.tensor([math.nan]), 1.0)


def test_newton_step_makes_up_for_no_change_that_was_cut_off():
    hessian, slack = torch.tensor([[2.0, 1.5], [1.5, 3.0]]), torch.tensor([-0.4, 0.9])
    for small in (0.0, 0.001, 0.01):  # 0.2 and what is left of the second multiplier's change to 0
        moved = dual.step(torch.tensor([1.0, small]), slack, hessian)
        torch.testing.assert_close(
            moved, torch.tensor([1.2 + 0.75 * small, 0.0], dtype=torch.float64), rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("J", [1, 2, 4])
def test_newton_and_secant_steps_minimise_the_model_within_the_bounds(J):
    """The steps agree with scipy's bounded least squares.

    The model u . d + d . L L^T d / 2 is |L^T d + L^-1 u|^2 / 2 and a constant.
    """
    rng = np.random.default_rng(J)
    cut = 0
    for _ in range(40):
        root = np.linalg.cholesky((a := rng.normal(size=(J, J))) @ a.T + 0.1 * np.eye(J))
        lam, slack = rng.uniform(0, 2, J) * (rng.uniform(size=J) > 0.3), 3 * rng.normal(size=J)
        low, high = np.where(lam > 0.05, lam / 2, 0.0), np.minimum(2 * np.maximum(lam, 0.05), 3.0)
        expected = (
            lam + lsq_linear(root.T, -np.linalg.solve(root, slack), (low - lam, high - lam), method="bvls").x
        )
        hessian, state = torch.tensor(root @ root.T), (torch.tensor(lam), torch.tensor(slack))
        for moved in (
            dual.step(*state, hessian, lam_max=3.0),
            dual.secant_step([(*state, torch.zeros(J))], hessian, lam_max=3.0),
        ):
            np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=1e-8)
        clipped = np.clip(lam - np.linalg.solve(root @ root.T, slack), low, high)
        cut += np.abs(clipped - expected).max() > 1e-3
    assert (cut > 10) == (J > 1), "clipping the free step must give another answer"


@pytest.mark.parametrize("J", [1, 2])
def test_descent_with_exact_policies_reaches_the_one_shot_multipliers(J):
    """With exact policies Algorithm 2 of arXiv 2505.19387 and the one-shot solution agree.

    The step is the Hessian at the start.
    """
    reward, utility = scores(13, J=J)
    b = np.array([0.7, 0.5])[:J]
    target = dual.solve(reward, utility, b, 1.0)
    assert (target.lam > 0).all()
    lam = torch.full((J,), 0.3, dtype=torch.float64)
    for _ in range(200):
        slack = torch.tensor(tilted_mean(reward, utility, 1.0, lam.numpy()) - utility.mean((0, 1)) - b)
        lam = dual.step(lam, slack, target.hessian)
    torch.testing.assert_close(lam, target.lam, rtol=0, atol=1e-8)


def test_paired_improvement_is_clustered_by_prompt():
    rng = np.random.default_rng(14)
    policy, reference = rng.normal(size=(30, 4)) + 10 * rng.normal(size=(30, 1)), rng.normal(size=(30, 7))
    mean, se = dual.paired_improvement(policy, reference)
    difference = policy.mean(1) - reference.mean(1)
    assert mean.item() == pytest.approx(difference.mean()) and se.item() == pytest.approx(
        difference.std(ddof=1) / 30**0.5
    )
    same = dual.paired_improvement(
        np.repeat(policy, 5, 1), reference
    )  # copies of responses are no new evidence
    assert same[1].item() == pytest.approx(se.item())
    mean, se = dual.paired_improvement(
        np.stack([policy, 2 * policy], -1), np.stack([reference, 2 * reference], -1)
    )
    assert se.shape == (2,) and se[1].item() == pytest.approx(2 * se[0].item())
    with pytest.raises(UserError, match="30 policy prompts, 29"):
        dual.paired_improvement(policy, reference[:29])
    with pytest.raises(UserError, match="at least 2"):
        dual.paired_improvement(policy[:1], reference[:1])


def test_predicted_se_matches_a_simulation():
    rng = np.random.default_rng(15)
    level = 5 * rng.normal(size=(500, 1))
    predicted = dual.predicted_se(level[:100] + 0.7 * rng.normal(size=(100, 12)), n_prompts=40, n_responses=3)
    means = []
    for _ in range(1000):
        here = rng.choice(level, 40)  # the same prompts for both policies, so their levels cancel
        policy, reference = here[None] + 0.7 * rng.normal(size=(2, 40, 3))
        means.append(dual.paired_improvement(policy, reference)[0].item())
    assert predicted == pytest.approx(np.std(means), rel=0.1)
    with pytest.raises(UserError, match="at least 2"):
        dual.predicted_se(level, 40, 3)


def test_ess_warning_below_a_quarter_of_the_responses():
    assert dual.ess_warning(torch.full((5,), 2.0), 8) is None
    warning = dual.ess_warning(torch.full((5,), 1.9), 8)
    assert "1.9 of 8" in warning and "over-estimated" in warning and "\n" not in warning


def test_projected_gradient_finds_newtons_optimum():
    for seed, J in ((0, 1), (1, 2), (2, 3)):
        reward, utility = scores(seed, J=J)
        b = np.array([0.4, 0.7, -0.2])[:J]
        newton, pgd = (dual.solve(reward, utility, b, 0.8, method=method) for method in ("newton", "pgd"))
        assert pgd.kkt <= 1e-10 and (pgd.iterations > newton.iterations or J == 1)
        torch.testing.assert_close(pgd.lam, newton.lam, rtol=1e-8, atol=1e-9)
        assert pgd.value == pytest.approx(newton.value, abs=1e-12)
    with pytest.raises(dual.Infeasible, match="best of 12"):
        dual.solve(reward, utility, 1.01 * dual.largest_threshold(utility), 0.8, method="pgd")
    with pytest.raises(UserError, match="'sgd': must be one of newton, pgd"):
        dual.solve(reward, utility, b, 0.8, method="sgd")


def test_a_start_near_the_optimum_saves_iterations_and_changes_nothing():
    reward, utility = scores(1, J=3)
    cold = dual.solve(reward, utility, [0.4, 0.7, -0.2], 0.8)
    warm = dual.solve(reward, utility, [0.4, 0.7, -0.2], 0.8, start_J=1.02 * cold.lam)
    assert warm.iterations < cold.iterations
    torch.testing.assert_close(warm.lam, cold.lam, rtol=0, atol=1e-9)
    with pytest.raises(dual.Infeasible):
        dual.solve(reward, utility, 1.01 * dual.largest_threshold(utility), 0.8, start_J=[50.0, 0.0, 3.0])


def test_largest_multiple_is_where_support_ends():
    rng = np.random.default_rng(8)
    reward, first = rng.normal(size=(2, 15, 10))
    utility = np.stack([first, 3 * (0.3 * rng.normal(size=(15, 10)) - first)], -1)  # opposed
    b = 0.05 * dual.largest_threshold(utility).numpy()
    multiple = dual.largest_multiple(utility, b)
    with pytest.raises(dual.Infeasible) as caught:
        dual.solve(reward, utility, 10 * b, 0.5)
    assert multiple == pytest.approx(10 * caught.value.largest_multiple, rel=2e-3) and 1 < multiple < 5
    assert dual.largest_multiple(utility, utility.mean((0, 1)) + b, absolute=True) == pytest.approx(
        multiple, rel=1e-9
    )
    dual.solve(reward, utility, 0.998 * multiple * b, 0.5)
    with pytest.raises(dual.Infeasible):
        dual.solve(reward, utility, 1.001 * multiple * b, 0.5)
    assert dual.largest_multiple(utility[..., :1], b[:1]) == pytest.approx(20)
    assert dual.largest_multiple(utility, [-0.1, 0.0]) == math.inf


def test_tilt_kl_is_that_of_the_tilt_and_nearly_unbiased_for_few_responses():
    """For normal scores of standard deviation s the tilt exp(score / beta) has KL (s / beta)^2 / 2."""
    generator = torch.Generator().manual_seed(0)
    score_PG = torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    many_PG = torch.randn(1000, 200, generator=generator, dtype=torch.float64)
    for beta in (1.0, 2.0):
        exact = 0.5 / beta**2
        assert dual.tilt_kl(many_PG, beta) == pytest.approx(exact, rel=0.02)
        # The plain estimate of 8 responses is 0.36 and 0.104 here.
        assert dual.tilt_kl(score_PG, beta) == pytest.approx(exact, rel=0.1)
    few = score_PG[:3, :4]

    def plain(rows: list[list[float]]) -> float:
        found = 0.0
        for row in rows:
            weights = [math.exp(x) for x in row]
            shares = [w / sum(weights) for w in weights]
            found += sum(q * math.log(q * len(row)) for q in shares) / len(rows)
        return found

    rows = few.tolist()
    without = [plain([row[:i] + row[i + 1 :] for row in rows]) for i in range(4)]
    assert dual.tilt_kl(few, 1.0) == pytest.approx(4 * plain(rows) - 3 * sum(without) / 4, rel=1e-12)
    assert dual.tilt_kl(few + 1000 * few[:, :1], 1.0) == pytest.approx(dual.tilt_kl(few, 1.0), rel=1e-9)
    assert dual.tilt_kl(torch.ones(5, 8), 1.0) == pytest.approx(0, abs=1e-14)
    assert dual.tilt_kl(score_PG[:, :1], 1.0) == 0, "one response shows nothing of a tilt"
    assert math.isfinite(dual.tilt_kl(1e6 * score_PG, 1.0))


def test_tilted_improvement_is_the_gradient_prompt_by_prompt():
    reward, utility = scores(3, J=2)
    lam = np.array([0.7, 0.2])
    gain_P, improvement_PJ = dual.tilted_improvement(reward, utility, lam, 0.8)
    assert gain_P.shape == (20,) and improvement_PJ.shape == (20, 2)
    np.testing.assert_allclose(
        improvement_PJ.mean(0), tilted_mean(reward, utility, 0.8, lam) - utility.mean((0, 1)), atol=1e-12
    )
    own = np.concatenate([utility, reward[..., None]], -1)
    tilted_reward = tilted_mean(reward, own, 0.8, np.append(lam, 0.0))[2]
    assert gain_P.mean().item() == pytest.approx(tilted_reward - reward.mean(), abs=1e-12)


def test_within_deviation_is_pooled_and_refuses_constants():
    reward, _ = scores(0)
    assert dual.within_deviation(reward, "x") == pytest.approx(np.sqrt(reward.var(1, ddof=1).mean()))
    with pytest.raises(UserError, match="scorer y gives all responses of a prompt one score"):
        dual.within_deviation(np.repeat(reward[:, :1], 5, 1), "scorer y")


# Coverage is measured on many independent data sets with prompts of unequal kinds and few responses.
# The truth is the multiplier of very many prompts with as many responses, as the bias of few responses
# is not the intervals' business. The third constraint has clear room, the second has hardly any:
# its true multiplier is 0 exactly where its threshold is the improvement that comes by itself.
WORLD = dict(G=6, beta=1.5)


def data_set(rng, P):
    level, spread = rng.normal(size=(P, 1)), 0.5 + rng.random(size=(P, 1))
    reward = level + spread * rng.normal(size=(P, WORLD["G"]))
    utility = (
        rng.normal(size=(P, WORLD["G"], 3)) * spread[..., None]
        - 0.5 * reward[..., None] * [1, 0, 0]
        + level[..., None]
    )
    return reward, utility


@pytest.fixture(scope="module")
def many_prompts():
    """Returns thresholds, levels and the true multipliers in the limit of many prompts."""
    reward, utility = data_set(np.random.default_rng(0), 100_000)
    lam = dual.solve(reward, utility, [0.2, -9.0, -9.0], WORLD["beta"]).lam
    improvement = dual.tilted_improvement(reward, utility, lam, WORLD["beta"])[1].mean(0).numpy()
    b = np.array([0.2, improvement[1], -1.0])
    return b, utility.mean((0, 1)) + b, np.array([lam[0], 0.0, 0.0])


@pytest.mark.parametrize("absolute", [False, True])
def test_delta_intervals_cover_the_truth(many_prompts, absolute):
    b, level, truth = many_prompts
    rng = np.random.default_rng(1)
    hits, errors, lam = [], [], []
    for _ in range(400):
        reward, utility = data_set(rng, 60)
        threshold = level if absolute else b
        solution = dual.solve(reward, utility, threshold, WORLD["beta"], absolute=absolute)
        interval = dual.lam_interval(reward, utility, threshold, WORLD["beta"], solution, absolute=absolute)
        hits.append(((interval.low <= solution.lam) & (solution.lam <= interval.high)).all())
        lam.append(solution.lam.numpy())
        errors.append([interval.low.numpy() <= truth, truth <= interval.high.numpy(), interval.se.numpy()])
    assert all(hits)
    low, high, se = (np.array([row[i] for row in errors]) for i in range(3))
    # An active constraint has a two-sided interval of 95 %; 400 data sets have a Monte-Carlo error of 1.1 %.
    assert 0.92 <= (low & high)[:, 0].mean() <= 0.98
    assert np.median(se[:, 0]) == pytest.approx(np.std([row[0] for row in lam]), rel=0.12)
    # A multiplier whose truth is 0 is never missed from above; with clear room the interval is the point 0.
    assert low[:, 1:].mean() >= 0.96 and high.all(0)[1:].all()
    assert not np.array(lam)[:, 2].any()


def test_an_absolute_level_is_less_certain_than_an_improvement(many_prompts):
    """Prompts differ in level, and only an improvement is measured within prompts."""
    b, level, _ = many_prompts
    reward, utility = data_set(np.random.default_rng(2), 100)
    se = []
    for absolute, threshold in ((False, b), (True, utility.mean((0, 1)) + b)):
        solution = dual.solve(reward, utility, threshold, WORLD["beta"], absolute=absolute)
        se.append(
            dual.lam_interval(reward, utility, threshold, WORLD["beta"], solution, absolute=absolute)
            .se[0]
            .item()
        )
    assert se[1] > 1.5 * se[0]


def test_interval_of_a_constraint_at_zero_is_continuous():
    reward, utility = scores(2, P=100, J=1)
    zero = dual.tilted_improvement(reward, utility, [0.0], 1.0)[1].mean().item()
    found = []
    for b in (zero - 1e-7, zero + 1e-7, zero - 5.0):
        solution = dual.solve(reward, utility, [b], 1.0)
        found.append((solution.lam.item(), dual.lam_interval(reward, utility, [b], 1.0, solution)))
    (below, inactive), (above, active), (_, far) = found
    assert below == 0.0 < above < 1e-5
    assert inactive.low.item() == active.low.item() == 0.0
    assert inactive.high.item() == pytest.approx(active.high.item(), abs=1e-5) and inactive.high.item() > 0.05
    assert (far.low.item(), far.high.item()) == (0.0, 0.0)


def test_two_equal_utilities_are_not_identified():
    reward, utility = scores(2, J=2)
    one = dual.solve(reward, utility[..., :1], [0.8], 1.0)
    twice, b = np.concatenate([utility[..., :1], 3 * utility[..., :1], utility[..., 1:]], -1), [0.8, 2.4, 0.1]
    for start in (None, [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
        solution = dual.solve(reward, twice, b, 1.0, start_J=start)
        interval = dual.lam_interval(reward, twice, b, 1.0, solution)
        assert (
            interval.se[:2].isinf().all()
            and interval.low[:2].tolist() == [0, 0]
            and interval.high[:2].isinf().all()
        )
        assert interval.high[2].isfinite() and interval.se[2] < 1
    plain = dual.lam_interval(reward, utility[..., :1], [0.8], 1.0, one)
    assert plain.se[0] < 1
    room = dual.solve(reward, twice, [-5.0, -15.0, 0.1], 1.0)
    assert dual.lam_interval(reward, twice, [-5.0, -15.0, 0.1], 1.0, room).high[:2].tolist() == [0, 0]


def test_interval_refuses_what_it_is_not_of():
    reward, utility = scores(2)
    solution = dual.solve(reward, utility, [0.5, 0.5], 1.0)
    with pytest.raises(UserError, match="other scores"):
        dual.lam_interval(reward, utility, [0.5, 0.6], 1.0, solution)
    capped = dual.solve(reward, utility, [0.8, 0.8], 1.0, lam_max=0.05)
    with pytest.raises(UserError, match="lam_max"):
        dual.lam_interval(reward, utility, [0.8, 0.8], 1.0, capped)
    one = dual.solve(reward[:1], utility[:1], [0.1, 0.1], 1.0)
    with pytest.raises(UserError, match="at least 2"):
        dual.lam_interval(reward[:1], utility[:1], [0.1, 0.1], 1.0, one)


def descend(reward, utility, b, start, propose, most=200):
    """Takes the multipliers that propose(history) names, with the slack measured exactly.

    Returns the number of steps until the open slack is below 1e-4, and the last multipliers.
    """
    lam, history, zero = start.clone(), [], torch.zeros(len(b), dtype=torch.float64)
    for t in range(most):
        slack = torch.tensor(tilted_mean(reward, utility, 1.0, lam.numpy()) - utility.mean((0, 1)) - b)
        if torch.where(lam > 0, slack, slack.clamp(max=0)).abs().max() < 1e-4:
            return t, lam
        history.append((lam, slack, zero))
        lam = propose(history)
    return most, lam


@pytest.mark.parametrize("J", [1, 2, 3])
@pytest.mark.parametrize("seed", [20, 21, 22])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_secant_reaches_the_optimum_in_few_steps_whatever_the_first_curvature(J, seed, start):
    reward, utility = scores(seed, J=J)
    b = np.array([0.7, 0.5, 0.6])[:J]
    target = dual.solve(reward, utility, b, 1.0)
    for misjudged, slower in ((1.0, 1), (3.0, 24), (1 / 3, 200)):
        hessian = misjudged * target.hessian
        steps, lam = descend(
            reward, utility, b, start * target.lam, lambda history, h=hessian: dual.secant_step(history, h)
        )
        assert steps <= 11
        torch.testing.assert_close(lam, target.lam, rtol=2e-2, atol=2e-3)
        plain, _ = descend(
            reward, utility, b, start * target.lam, lambda history, h=hessian: dual.step(*history[-1][:2], h)
        )
        assert plain >= slower


def test_secant_leaves_a_constraint_with_room_at_zero():
    reward, utility = scores(23, J=2)
    b = np.array([0.7, -5.0])
    target = dual.solve(reward, utility, b, 1.0)
    steps, lam = descend(
        reward,
        utility,
        b,
        torch.tensor([0.1, 1.0], dtype=torch.float64),
        lambda h: dual.secant_step(h, 2 * target.hessian),
    )
    assert steps <= 14 and lam[1].item() == 0.0
    assert lam[0].item() == pytest.approx(target.lam[0].item(), rel=1e-3)


def test_first_secant_step_is_the_newton_step_with_its_bounds():
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    for lam, slack in (([1.0, 0.5], [0.3, -0.2]), ([0.0, 0.4], [-9.0, 9.0]), ([0.0, 1.0], [0.4, 0.1])):
        lam, slack = torch.tensor(lam), torch.tensor(slack)
        torch.testing.assert_close(
            dual.secant_step([(lam, slack, 0 * lam)], hessian), dual.step(lam, slack, hessian)
        )
    assert (
        dual.secant_step(
            [(torch.ones(1), torch.tensor([-90.0]), torch.zeros(1))], torch.eye(1), lam_max=1.5
        ).item()
        == 1.5
    )
    with pytest.raises(UserError, match="finite"):
        dual.secant_step([(torch.ones(1), torch.tensor([math.nan]), torch.zeros(1))], torch.eye(1))
    with pytest.raises(UserError, match="not empty"):
        dual.secant_step([], torch.eye(1))


def test_secant_takes_the_measured_curvature_by_hand():
    one = torch.ones(1, dtype=torch.float64)
    history = [
        (0.5 * one, -0.6 * one, 0 * one),
        (0.8 * one, -0.15 * one, 0 * one),
    ]  # curvature 1.5, so 0.1 is missing
    assert dual.secant_step(history, one[None]).item() == pytest.approx(0.9)
    # An error of 0.3 in the first slack hides the difference of 0.45, and the first
    # model stays: 0.15 is missing.
    noisy = [(*history[0][:2], 0.3 * one), history[1]]
    assert dual.secant_step(noisy, one[None]).item() == pytest.approx(0.95)
    # Errors of 0.1 give the weight 1 - 4 (0.01 + 0.01) / 0.45^2, so the difference counts as
    # 0.3 + weight (0.45 - 0.3).
    some = [(lam, slack, 0.1 * one) for lam, slack, _ in history]
    curvature = (0.3 + (1 - 0.08 / 0.45**2) * 0.15) / 0.3
    assert dual.secant_step(some, one[None]).item() == pytest.approx(
        0.8 + 0.15 * (1 - (0.1 / 0.15) ** 2) / curvature
    )
    # Slack that falls as lambda rises is no curvature of a convex dual:
    # the model falls to a fifth and no further.
    fallen = [(one, -0.1 * one, 0 * one), (1.3 * one, -0.11 * one, 0 * one)]
    assert dual.secant_step(fallen, one[None]).item() == pytest.approx(1.3 + 0.11 / 0.2)
    # The step went too far and got worse: the next value lies within half the way from the better one.
    over = [(one, -0.1 * one, 0 * one), (1.6 * one, 0.11 * one, 0 * one)]
    assert dual.secant_step(over, 0.1 * one[None]).item() == pytest.approx(1 + 0.6 * 0.1 / 0.21)
    drifted = [(one, -0.1 * one, 0 * one), (1.6 * one, 0.6 * one, 0 * one), (1.3 * one, 0.7 * one, 0 * one)]
    assert abs(dual.secant_step(drifted, one[None]).item() - 1) <= 0.15 + 1e-12


def caid_rule(rule: str, history, hessian):
    return caid.descend(history, hessian, CaidConfig(dual_rule=rule, dual_step=1.0))


def row(lam: list[float], slack: list[float], se: float = 0.05):
    """A row of a history."""
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (lam, slack, [se] * len(lam)))


def test_guarded_goes_back_to_the_line_through_two_slacks_and_then_steps_less():
    hessian = torch.tensor([[0.45]], dtype=torch.float64)
    # A surplus of 0.42 lowered lambda by 0.36 and left a shortfall of 0.57: the policy answers by 2.75,
    # not by 0.45, and the line through both is 0 at 1.01 + 0.57 / 2.75.
    history = [row([1.37], [0.42]), row([1.01], [-0.57])]
    measured = (0.42 + 0.57) / 0.36
    back = dual.guarded_step(history, hessian, 0.5)
    assert back.item() == pytest.approx(1.01 + 0.57 / measured)
    # From then on half steps are of that curvature.
    history.append((back, *row([0.0], [0.2])[1:]))
    assert dual.guarded_step(history, hessian, 0.5).item() == pytest.approx(
        back.item() - 0.5 * 0.2 / measured
    )
    # A policy that answers less strongly than the Hessian says changes nothing but the length of this step.
    weak = [row([2.0], [0.1]), row([1.0], [-0.1])]
    assert dual.guarded_step(weak, hessian, 0.5).item() == pytest.approx(1.0 + 0.1 / 0.45)
    assert dual.guarded_step([*weak, row([1.2], [-0.1])], hessian, 0.5).item() == pytest.approx(
        1.2 + 0.5 * 0.1 / 0.45
    )


@pytest.mark.parametrize(
    "history",
    [
        [row([1.0], [-0.4]), row([1.5], [0.5])],  # raised, as a policy that lags would be
        [row([1.0], [0.4]), row([0.8], [0.2])],  # lowered, and not too far
        [row([1.0], [0.04]), row([0.8], [-0.5])],  # the surplus is within its error
        [row([1.0], [0.4]), row([0.8], [-0.04])],  # the shortfall is
        [row([1.0], [0.4]), row([1.1], [-0.5])],  # lambda was raised all the same
        [row([1.0], [-0.3])],
    ],
)
def test_guarded_is_newton_where_no_multiplier_was_lowered_too_far(history):
    hessian = torch.tensor([[0.45]], dtype=torch.float64)
    lam, slack, se = history[-1]
    expected = dual.step(lam, slack.where(slack.abs() > se, 0.0), hessian / 0.5)
    torch.testing.assert_close(dual.guarded_step(history, hessian, 0.5), expected, rtol=1e-14, atol=0)
    with pytest.raises(UserError, match="history is empty"):
        dual.guarded_step([], hessian, 0.5)


def test_guarded_raises_the_curvature_in_that_multiplier_alone():
    hessian = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    history = [row([1.0, 1.0], [0.4, 0.3]), row([0.8, 0.9], [-0.4, 0.2])]
    grown = (0.4 + 0.4) / 0.2 / 1.0
    scaled = torch.tensor([[grown, 0.6 * grown**0.5 * 2**0.5], [0.6 * grown**0.5 * 2**0.5, 2.0]])
    expected = dual.step(history[1][0], history[1][1], scaled.double())
    torch.testing.assert_close(dual.guarded_step(history, hessian, 0.5), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strength", [1.0, 2.0, 5.0, 10.0])
def test_guarded_settles_where_policies_answer_ten_times_as_strongly_as_the_hessian_says(strength):
    """Against a policy that follows lambda at once, half a Newton step swings from 4 times on."""
    hessian, ends = torch.eye(1, dtype=torch.float64), {}
    for rule in ("guarded", "newton"):
        lam, history = torch.tensor([1.5], dtype=torch.float64), []
        for _ in range(12):
            history.append((lam, strength * (lam - 1.0), torch.tensor([0.01], dtype=torch.float64)))
            lam = caid.descend(history, hessian, CaidConfig(dual_rule=rule))
        ends[rule] = abs(history[-1][1].item())
    assert ends["guarded"] <= 0.02
    assert strength <= 4 or ends["newton"] > 0.3


def test_newton_takes_a_slack_beyond_its_standard_error_as_it_is_measured():
    lam, slack = (
        torch.tensor([0.8, 0.3], dtype=torch.float64),
        torch.tensor([-0.05, 0.04], dtype=torch.float64),
    )
    hessian, se = torch.eye(2, dtype=torch.float64), torch.tensor([0.049, 0.041], dtype=torch.float64)
    torch.testing.assert_close(
        caid_rule("newton", [(lam, slack, se)], hessian), torch.tensor([0.85, 0.3], dtype=torch.float64)
    )


@pytest.mark.parametrize("rule", ["newton", "secant", "optimistic", "bisection"])
def test_a_slack_within_its_standard_error_moves_no_multiplier(rule):
    J = 1 if rule == "bisection" else 2
    hessian, lam = torch.eye(J, dtype=torch.float64), torch.tensor([0.8, 0.3], dtype=torch.float64)[:J]
    slack, se = (
        torch.tensor([-0.0999, 0.0999], dtype=torch.float64)[:J],
        torch.full((J,), 0.1, dtype=torch.float64),
    )
    first = (
        torch.tensor([0.5, 0.5], dtype=torch.float64)[:J],
        torch.tensor([-0.3, 0.3], dtype=torch.float64)[:J],
        se,
    )
    # A row before it moves the forecast, which then has an error of its own: sqrt(5) x 0.1.
    for history in ([(lam, slack, se)], [first, (lam, slack, se)])[: 1 if rule == "optimistic" else 2]:
        assert torch.equal(caid_rule(rule, history, hessian), lam)
        moved = caid_rule(rule, [*history[:-1], (lam, 1.2 * slack, se)], hessian)
        assert (moved - lam)[0] > 1e-3 and (moved - lam)[-1] * slack[-1] < 0
        exact = caid_rule(rule, [*history[:-1], (lam, slack, 0 * se)], hessian)
        # Where a slack is shrunk beyond its error, one that is known exactly moves lambda further
        # than a somewhat larger one.
        assert (exact - lam)[0] > ((moved - lam)[0] if rule in ("secant", "optimistic") else 0)
    if rule == "optimistic":
        noisy = [(lam, 0 * slack, se), (lam, slack, se)]  # 2 u - 0 = 0.1998, below 0.2236
        assert torch.equal(caid_rule(rule, noisy, hessian), lam)
        assert caid_rule(rule, [noisy[0], (lam, 1.2 * slack, se)], hessian)[0] > lam[0]


def test_resolved_slack_by_hand():
    slack, se = (
        torch.tensor([0.3, -0.3, 0.1, -0.1, 0.0, 0.05, -0.2]),
        torch.tensor([0.1, 0.1, 0.1, 0.2, 0.1, 0.0, 0.0]),
    )
    expected = torch.tensor([0.3 * 8 / 9, -0.3 * 8 / 9, 0, 0, 0, 0.05, -0.2], dtype=torch.float64)
    torch.testing.assert_close(dual.resolved(slack, se), expected, rtol=1e-6, atol=1e-9)
    exact = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(dual.resolved(exact, torch.zeros(9)), exact)
    with pytest.raises(UserError, match="nan"):
        dual.resolved(torch.tensor([math.nan]), torch.ones(1))


@pytest.mark.parametrize("rule", ["secant", "optimistic"])
def test_steps_are_hardly_moved_by_noise_alone(rule):
    """With z standard normal, E (z max(0, 1 - 1 / z^2))^2 = 0.333: the mean square step is a third of what
    the same slack without errors would give."""
    reward, utility = scores(20, J=2)
    target, se = dual.solve(reward, utility, [0.7, 0.5], 1.0), torch.full((2,), 0.02, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    square = torch.zeros(2, dtype=torch.float64)
    for _ in range(600):
        noise = se * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        for i, claimed in enumerate((se, 0 * se)):
            history = [(target.lam, slack, claimed) for slack in noise][: 2 if rule == "optimistic" else 1]
            square[i] += (caid_rule(rule, history, target.hessian) - target.lam).square().sum()
    assert float(square[0] / square[1]) == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("misjudged", [1.0, 3.0, 1 / 3])
def test_secant_stays_near_the_optimum_under_noise_whatever_the_first_curvature(misjudged):
    """From the optimum, with noise alone in the slack, the mean stays, and the spread is at
    most that of Newton's step."""
    reward, utility = scores(20, J=2)
    b, se = np.array([0.7, 0.5]), 0.1
    target = dual.solve(reward, utility, b, 1.0)
    hessian, rng, seen = misjudged * target.hessian, np.random.default_rng(5), []
    for _ in range(25):
        lam, history = target.lam, []
        for t in range(12):
            slack = (
                tilted_mean(reward, utility, 1.0, lam.numpy())
                - utility.mean((0, 1))
                - b
                + se * rng.normal(size=2)
            )
            history.append((lam, torch.tensor(slack), torch.full((2,), se)))
            lam = dual.secant_step(history, hessian)
            if t >= 4:
                seen.append(lam.numpy())
    seen = np.array(seen)
    newton = se * np.sqrt(np.diag(np.linalg.matrix_power(np.linalg.inv(target.hessian.numpy()), 2)))
    assert np.abs(seen.mean(0) - target.lam.numpy()).max() < 0.5 * newton.max()
    if misjudged < 1:  # the plain step with this curvature is thrown about
        assert (seen.std(0) < 2 * newton).all() and plain_spread(
            reward, utility, b, target, hessian, se
        ) > 2.5
    else:
        assert (seen.std(0) < 1.3 * newton).all()


def plain_spread(reward, utility, b, target, hessian, se):
    rng, lam, seen = np.random.default_rng(5), target.lam, []
    for _ in range(200):
        slack = (
            tilted_mean(reward, utility, 1.0, lam.numpy())
            - utility.mean((0, 1))
            - b
            + se * rng.normal(size=2)
        )
        lam = dual.step(lam, torch.tensor(slack), hessian)
        seen.append(lam.numpy())
    newton = se * np.sqrt(np.diag(np.linalg.matrix_power(np.linalg.inv(target.hessian.numpy()), 2)))
    return (np.std(seen, axis=0) / newton).max()


def test_optimistic_step_ends_the_circle_of_plain_descent_and_ascent():
    """In the game min_lambda max_x (lambda - 1) (x - 2) the policy x follows the gradient,
    as an undertrained policy does."""

    def distance(dual_step, eta=0.2, rounds=400):
        lam, x, history, furthest = torch.tensor([1.8]), torch.tensor([2.5]), [], []
        for _ in range(rounds):
            x = x + eta * (lam - 1)
            history.append((lam, x - 2, torch.zeros(1)))
            lam = dual_step(history, eta)
            furthest.append(math.hypot(lam.item() - 1, x.item() - 2))
        return max(furthest[-60:])

    wide = dict(max_change=math.inf)
    assert distance(lambda history, eta: dual.step(*history[-1][:2], eta, **wide)) > 0.5
    assert distance(lambda history, eta: dual.optimistic_step(history, eta, **wide)) < 1e-3


def test_optimistic_step_is_the_formula_with_the_bounds_of_step():
    lam, u, before = torch.tensor([1.0, 0.5]), torch.tensor([0.3, -0.2]), torch.tensor([0.5, 0.4])
    history = [(lam + 0.1, before, 0 * lam), (lam, u, 0 * lam)]
    moved = dual.optimistic_step(history, 0.5)
    torch.testing.assert_close(moved, torch.tensor([0.95, 0.9], dtype=torch.float64))
    assert torch.equal(dual.optimistic_step(history[1:], 0.5), dual.step(lam, u, 0.5))
    assert dual.optimistic_step(history, 50.0).tolist() == [0.5, 1.0]
    with pytest.raises(UserError, match="history is empty"):
        dual.optimistic_step([], 0.5)


@pytest.mark.parametrize("start", [0.0, 1.0, 3.0])
def test_bisection_closes_in_on_the_optimum(start):
    reward, utility = scores(24, J=1)
    target = dual.solve(reward, utility, np.array([0.7]), 1.0)
    steps, lam = descend(reward, utility, np.array([0.7]), start * target.lam, dual.bisection_step)
    assert (steps == 0) == (start == 1.0) and steps <= 20
    torch.testing.assert_close(lam, target.lam, rtol=1e-3, atol=1e-3)
    # A constraint that holds by itself goes down to exactly 0.
    _, lam = descend(
        reward, utility, np.array([-5.0]), torch.ones(1, dtype=torch.float64), dual.bisection_step
    )
    assert lam.item() == 0.0


def test_bisection_by_hand():
    def point(lam, slack, se=0.0):
        return torch.tensor([lam]), torch.tensor([slack]), torch.tensor([se])

    def after(*points, **bounds):
        return dual.bisection_step([point(*p) for p in points], **bounds).item()

    assert (
        after((1.0, -0.1)) == 2.0 and after((1.0, 0.1)) == 0.5 and after((1.0, -0.1), max_change=1.5) == 1.5
    )
    assert after((1.0, -0.1), (2.0, 0.1)) == 1.5 and after((1.0, -0.1), (2.0, 0.1), (1.5, 0.2)) == 1.25
    # The later point overrules: at 2 it was enough, at 2.5 it is not any more.
    assert after((2.0, 0.1), (2.5, -0.1)) == 5.0 and after(
        (1.0, -0.1), (2.0, 0.1), (0.9, 0.2)
    ) == pytest.approx(0.45)
    assert (
        after((0.0, 0.1)) == 0.0
        and after((0.0, -0.1)) == pytest.approx(0.1)
        and after((4.0, -0.1), lam_max=5.0) == 5.0
    )
    # Bisection goes below the floor too, where 0 is known not to be enough.
    assert (
        after((0.0, -0.1), (0.1, 0.1), (0.05, 0.1)) == pytest.approx(0.025)
        and after((0.0, -0.1), (0.025, 0.1), (0.0125, -0.1)) > 0.0125
    )
    with pytest.raises(UserError, match="one constraint"):
        dual.bisection_step([(torch.ones(2), torch.zeros(2), torch.zeros(2))])
    # Within one standard error of 0 the bracket stays, and so does lambda.
    assert after((1.0, -0.1), (2.0, 0.1), (1.5, 0.05, 0.1)) == 1.5 and after((1.0, -0.1, 0.2)) == 1.0
    assert after((1.0, -0.1), (3.0, -0.05, 0.1), (2.0, 0.1)) == 1.5
    with pytest.raises(UserError, match="finite"):
        after((1.0, math.nan))


def test_the_library_loads_without_the_report_and_the_run_folder():
    program = "import sys; from engine.dual import solve; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "engine.dual.solver" in loaded
    assert not {"matplotlib", "rich", "transformers", "engine.run", "engine.report"} & set(loaded)
