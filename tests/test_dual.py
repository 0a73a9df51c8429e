import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from engine import dual
from engine.errors import UserError


def scores(seed: int, P: int = 20, G: int = 12, J: int = 2):
    """Random scores with unequal units and offsets per prompt; utilities fall where the reward rises."""
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(P, G)) + rng.normal(size=(P, 1))
    utility = rng.normal(size=(P, G, J)) - 0.5 * reward[..., None]
    return reward, utility * (1 + np.arange(J)) + rng.normal(size=(P, 1, J))


def dual_value(reward, utility, threshold, beta, lam):
    """The plug-in dual of arXiv 2405.19544 app. E, prompt by prompt; independent of the project's kernels."""
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
    hessian = [[(value(lam + a + b) - value(lam + a - b) - value(lam - a + b) + value(lam - a - b)) / 4e-8 for b in e] for a in e]
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
    assert caught.value.largest_improvement.item() == pytest.approx(top) and caught.value.direction.tolist() == [1.0]
    assert caught.value.largest_multiple == pytest.approx(1 / (1 + 1e-6), rel=1e-9) and f"{top:.4g}" in str(caught.value)
    with pytest.raises(dual.Infeasible, match="proven") as caught:
        dual.solve(reward, utility, [2 * top], 0.5, enumerated=True)
    assert "no proof" not in str(caught.value) and "\n" not in str(caught.value)


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
    # The limit is a minimum over directions: a fine grid of them finds the same, and solving just below it works.
    grid = [np.array([1 - s, s]) for s in np.linspace(0, 1, 20001)]
    assert t == pytest.approx(min((centred @ u).max(1).mean() / (u @ b) for u in grid), rel=2e-3)
    assert dual.solve(reward, utility, 0.998 * t * b, 0.5).kkt <= 1e-10
    level = utility.mean((0, 1)) + b
    with pytest.raises(dual.Infeasible, match="level") as absolute:
        dual.solve(reward, utility, level, 0.5, absolute=True)
    np.testing.assert_allclose(absolute.value.largest_improvement.numpy(), top, rtol=1e-12)


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


def test_step_is_the_papers_projected_subgradient():
    moved = dual.step(torch.tensor([1.0, 0.5, 0.04]), torch.tensor([0.3, -0.2, 0.3]), 0.5)
    torch.testing.assert_close(moved, torch.tensor([0.85, 0.6, 0.0], dtype=torch.float64))


def test_step_caps_the_change_by_a_factor_and_the_floor():
    lam = torch.tensor([0.4, 0.4, 0.02, 0.0, 19.0])
    moved = dual.step(lam, torch.tensor([-100.0, 100.0, -100.0, -100.0, -100.0]), 1.0, lam_max=20.0)
    torch.testing.assert_close(moved, torch.tensor([0.8, 0.2, 0.1, 0.1, 20.0], dtype=torch.float64))
    moved = dual.step(lam, torch.tensor([-100.0, 100.0, -100.0, -100.0, -100.0]), 1.0, max_change=4.0, floor=0.01)
    torch.testing.assert_close(moved, torch.tensor([1.6, 0.1, 0.08, 0.04, 76.0], dtype=torch.float64))


def test_newton_step_leaves_out_constraints_at_zero_with_room():
    hessian = torch.tensor([[2.0, 1.5], [1.5, 3.0]])
    moved = dual.step(torch.tensor([1.0, 0.0]), torch.tensor([-0.4, 0.9]), hessian)
    torch.testing.assert_close(moved, torch.tensor([1.2, 0.0], dtype=torch.float64))
    moved = dual.step(torch.tensor([1.0, 1.0]), torch.tensor([-0.4, 0.9]), hessian, max_change=10.0)
    torch.testing.assert_close(moved, 1 - torch.linalg.solve(hessian, torch.tensor([-0.4, 0.9])).double())
    moved = dual.step(torch.tensor([1.0, 1.0]), torch.tensor([0.2, 0.2]), torch.ones(2, 2))
    torch.testing.assert_close(moved, torch.tensor([0.9, 0.9], dtype=torch.float64))  # singular: the shortest step
    assert dual.step(torch.zeros(2), torch.ones(2), hessian).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="nan"):
        dual.step(torch.ones(1), torch.tensor([math.nan]), 1.0)


@pytest.mark.parametrize("J", [1, 2])
def test_descent_with_exact_policies_reaches_the_one_shot_multipliers(J):
    """arXiv 2505.19387: with exact policies Algorithm 2 and the one-shot solution agree. The step is the Hessian at the start."""
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
    assert mean.item() == pytest.approx(difference.mean()) and se.item() == pytest.approx(difference.std(ddof=1) / 30**0.5)
    same = dual.paired_improvement(np.repeat(policy, 5, 1), reference)  # copies of responses are no new evidence
    assert same[1].item() == pytest.approx(se.item())
    mean, se = dual.paired_improvement(np.stack([policy, 2 * policy], -1), np.stack([reference, 2 * reference], -1))
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
    assert "1.9 of 8" in warning and "\n" not in warning
