"""Whether thresholds are supported: what `solve` and `largest_multiple` say against a linear program."""

import time
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, eye, hstack, kron

from engine import dual
from engine.dual import solver
from engine.dual.feasibility import EXACT, unsupported_direction
from engine.errors import UserError


def lp_multiple(g_PGJ: np.ndarray, b_J: np.ndarray) -> float:
    """Solves for the largest multiple of b that a re-weighting of the responses reaches."""
    P, G, J = g_PGJ.shape
    found = linprog(
        np.append(np.zeros(P * G), -1.0),
        A_ub=np.column_stack([-g_PGJ.reshape(P * G, J).T / P, b_J]),
        b_ub=np.zeros(J),
        A_eq=hstack([kron(eye(P), np.ones((1, G))), csr_matrix((P, 1))]).tocsr(),
        b_eq=np.ones(P),
        options=EXACT,
    )
    return np.inf if found.status == 3 else found.x[-1]


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Draws rewards, utilities, a direction of thresholds, its scale, the largest multiple, a hard beta."""
    rng = np.random.default_rng(seed)
    P, G, J = int(rng.choice([2, 8, 24])), int(rng.choice([2, 4, 8])), 1 + seed % 4
    reward, utility = rng.normal(size=(P, G)), rng.normal(size=(P, G, J))
    if J > 1 and rng.random() < 0.3:  # nearly the same or the opposite constraint
        utility[..., 1] = rng.choice([-1, 1]) * utility[..., 0] + rng.choice([0, 0.01]) * utility[..., 1]
    direction = rng.uniform(0.05, 1, size=J) * rng.choice([-1, 1], size=J, p=[0.2, 0.8])
    if direction.max() <= 0:
        direction = -direction
    centred = utility - utility.mean(1, keepdims=True)
    scale = np.sqrt(centred.var(1).mean(0))
    multiple, beta = lp_multiple(centred / scale, direction), 10 ** rng.uniform(-8, 2)
    return reward, utility, direction, scale, multiple, beta


@pytest.mark.parametrize("seed", range(40))
def test_infeasible_is_said_where_a_linear_program_says_so_up_to_the_edge(seed):
    reward, utility, direction, scale, multiple, beta = problem(seed)
    share = [1e-6, -1e-6, 1e-4, -1e-4, 0.1, -0.1][seed % 6]
    multiple = min(multiple, 1e6)
    if multiple < 1e-6:  # opposite constraints: nothing is supported, and there is no edge to stand at
        return
    b = direction * multiple * (1 + share) * scale
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if share > 0 and multiple < 1e6:
            with pytest.raises(dual.Infeasible) as refused:
                dual.solve(reward, utility, b, beta)
            v = refused.value.direction.numpy()
            reached = ((utility - utility.mean(1, keepdims=True)) @ v).max(1).mean()
            assert reached < v @ b  # the certificate
            assert refused.value.largest_multiple * (1 + share) == pytest.approx(1, rel=2e-3)
        else:
            try:
                assert dual.solve(reward, utility, b, beta).kkt <= 1e-8
            except UserError as stop:  # rewards of 1e7 in units of beta round to 1e-8
                assert beta < 1e-6 and "stopped at KKT residual" in str(stop)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("seed", range(40, 64))
def test_the_largest_multiple_is_the_linear_programs(seed):
    _, utility, direction, scale, multiple, _ = problem(seed)
    found = dual.largest_multiple(utility, direction * scale)
    assert found == pytest.approx(multiple, rel=1.1e-3, abs=1e-9) and found >= multiple * (1 - 1e-6)


@pytest.mark.parametrize("beta", [1e-8, 1e-6, 1.0])
def test_thresholds_that_were_refused_for_the_solvers_sake_are_infeasible(beta):
    """Beyond the edge by less than the Newton steps certify in their lifetime, at small betas."""
    rng = np.random.default_rng(5)
    reward, utility = rng.normal(size=(24, 4)), rng.normal(size=(24, 4, 3))
    centred = utility - utility.mean(1, keepdims=True)
    multiple = lp_multiple(centred, np.ones(3))
    with pytest.raises(dual.Infeasible, match="is beyond what the 4 samples of each prompt show"):
        dual.solve(reward, utility, multiple * (1 + 1e-7) * np.ones(3), beta)


def test_both_outcomes_of_the_decision():
    g = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64).expand(3, 2, 2)  # opposite utilities

    def decided(*b):
        return unsupported_direction(g, torch.tensor(b, dtype=torch.float64), 1e-10)

    assert decided(0.3, -0.3) is None and decided(0.3, -0.4) is None  # multipliers exist, also at equality
    v, b = decided(0.3, -0.2), torch.tensor([0.3, -0.2], dtype=torch.float64)
    assert (g @ v).amax(1).mean() < v @ b
    assert decided(1.0, -5.0) is not None  # at the limit of the first: its multiplier is beyond all numbers


def test_the_largest_multiple_of_nearly_opposite_constraints_takes_a_handful_of_rounds(monkeypatch):
    rng = np.random.default_rng(2)
    utility = rng.normal(size=(8, 2, 4))
    utility[..., 1] = -utility[..., 0] + 1e-6 * utility[..., 1]
    rounds = []
    for name in ("_descend", "unsupported_direction"):
        exact = getattr(solver, name)
        monkeypatch.setattr(
            solver, name, lambda *given, exact=exact, **more: rounds.append(0) or exact(*given, **more)
        )
    direction = np.array([0.6, 0.9, 0.3, 0.5])
    found = dual.largest_multiple(utility, direction)
    assert found == pytest.approx(
        lp_multiple(utility - utility.mean(1, keepdims=True), direction), rel=1.1e-3
    )
    assert len(rounds) <= 16, "by Newton's steps alone it takes 41"
