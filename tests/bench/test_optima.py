"""The optima of exact problems: how the class's gaps close, and a kink."""

import numpy as np
import pytest

from bench.theory.optima import Optima
from bench.theory.problem import make


def test_lambda_in_the_class_is_found_from_elsewhere():
    optima = Optima(make(5, J=2))
    lam_star = optima.solve_dual()
    for start in (0 * lam_star, 3 * lam_star):
        lam, _, kink = Optima(make(5, J=2)).solve_dual_in_class(start)
        assert np.abs(lam - lam_star).max() < 1e-6 and not kink


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
