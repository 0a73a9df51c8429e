"""The algorithms' real loops in an enumerated world, where the constrained optimum is known in closed form and from scipy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from toy import EnumeratedWorld

from engine import caid, dual, mocan
from engine.config import CaidConfig, MocanConfig, check


def optimum(world):
    """(lambda*, pi* [P, Y]) by scipy on the dual written out here, then the closed form pi* ~ exp((r + lambda . g) / beta)."""
    r, g, beta = world.reward_PY.numpy(), world.utility_PYJ.numpy(), world.beta
    h = g - g.mean((0, 1)) - world.b_J.numpy()

    def value(lam):
        z = (r + h @ lam) / beta
        top = z.max(1, keepdims=True)
        weight = np.exp(z - top)
        log_mean = top[:, 0] + np.log(weight.mean(1))
        tilted = weight / weight.sum(1, keepdims=True)
        return beta * log_mean.mean(), (tilted[..., None] * h).sum(1).mean(0)

    found = minimize(
        value,
        np.full(g.shape[2], 0.3),
        jac=True,
        bounds=[(0, None)] * g.shape[2],
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-12},
    )
    lam = torch.tensor(found.x)
    return lam, torch.softmax((world.reward_PY + world.utility_PYJ @ lam) / beta, dim=1)


@pytest.mark.parametrize(("J", "b", "start"), [(1, [0.4], None), (1, [0.4], [0.05]), (1, [0.4], [3.0]), (2, [0.3, 0.2], [0.1, 2.0])])
def test_caid_reaches_the_constrained_optimum(J, b, start):
    world = EnumeratedWorld(P=4, Y=5, J=J, b=b, beta=0.7, seed=1, lam_init=start)
    table, lam = caid.loop(world, CaidConfig(iterations=16, dual_step=1.0, beta=0.7))
    expected_lam, expected_policy = optimum(world)
    assert (lam - expected_lam).abs().max() < 1e-6
    assert (world.policy_PY(table) - expected_policy).abs().max() < 1e-6
    assert world.history[-1][1].abs().max() < 1e-6
    if start is not None:
        assert world.history[0][1].abs().max() > 0.05, "the start must not be the answer"


def test_mocan_reaches_the_same_optimum_in_one_shot():
    world = EnumeratedWorld(P=4, Y=5, J=2, b=[0.3, 0.2], beta=0.7, seed=2)
    table, lam = mocan.loop(world, MocanConfig(beta=0.7))
    expected_lam, expected_policy = optimum(world)
    assert (lam - expected_lam).abs().max() < 1e-6
    assert (world.policy_PY(table) - expected_policy).abs().max() < 1e-6


def test_a_constraint_that_holds_anyway_gets_no_weight():
    world = EnumeratedWorld(P=4, Y=5, J=1, b=[-5.0], beta=0.7, seed=3)
    assert caid.loop(world, CaidConfig(iterations=3, beta=0.7))[1].tolist() == [0.0]


def test_infeasible_thresholds_are_reported_before_training():
    world = EnumeratedWorld(P=4, Y=5, J=1, b=[50.0], beta=0.7, seed=4)
    with pytest.raises(dual.Infeasible) as caught:
        caid.loop(world, CaidConfig())
    assert not world.history
    largest = world.utility_PYJ.amax(1).mean(0) - world.utility_PYJ.mean((0, 1))
    assert (caught.value.largest_improvement - largest).abs().max() < 1e-9


def test_default_configs_pass_their_own_check():
    check(CaidConfig())
    check(MocanConfig())
