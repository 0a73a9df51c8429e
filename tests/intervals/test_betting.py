"""Bounds by betting, against the definition in plain floats and against every outcome of small samples."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.intervals import betting, estimate, rate

SHARES = (0.4, 0.2, 0.2, 0.2)


def capital(xs: list[float], m: float, alpha: float) -> float:
    """The gambler's capital by its definition, one bet after another."""
    least = min(1.0, math.sqrt(2 * math.log(1 / alpha) * (1 - m) / (len(xs) * m)))
    total = 0.0
    for share, power in zip(SHARES, (0, 1 / 3, 2 / 3, 1), strict=True):
        for x in xs:
            share *= 1 + least**power * (m - x) / (1 - m)
        total += share
    return total


def test_the_capital_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 7, generator=generator, dtype=torch.float64)
    for m in (0.02, 0.3, 0.9):
        expected = [math.log(capital(row, m, 0.05)) for row in x.tolist()]
        assert betting.log_capital(x, m, 0.05).tolist() == pytest.approx(expected, abs=1e-12)
    assert betting.log_capital(torch.ones(1, 40, dtype=torch.float64), 0.5, 0.05).item() > -math.inf


@pytest.mark.parametrize("alpha", [0.05, 0.0325, 0.001])
def test_the_bound_is_where_the_capital_has_grown_enough(alpha):
    x = torch.tensor([[0.0] * 30, [0.1] * 29 + [1.0], [0.5] * 30], dtype=torch.float64)
    bound = betting.upper_bound(x, alpha)
    for row, m in zip(x.tolist(), bound.tolist(), strict=True):
        assert capital(row, m, alpha) == pytest.approx(1 / alpha, rel=1e-6)
    assert betting.upper_bound(torch.ones(1, 5, dtype=torch.float64), alpha).item() == 1.0


@pytest.mark.parametrize("n", [2, 9, 40])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_error_is_kept_in_every_binomial_case(n, alpha):
    counts = torch.arange(n + 1)
    x = (torch.arange(n) < counts[:, None]).double()
    bound = betting.upper_bound(x, alpha)
    for mean in (0.003, 0.02, 0.1, 0.37, 0.5, 0.9, 0.99):
        chance = [math.comb(n, k) * mean**k * (1 - mean) ** (n - k) for k in counts.tolist()]
        false = sum(p for p, b in zip(chance, bound.tolist(), strict=True) if b < mean)
        assert false <= alpha, (mean, false)


def test_the_error_is_kept_where_numbers_take_three_values():
    values, chances, n, alpha = (0.0, 0.25, 1.0), (0.9, 0.06, 0.04), 8, 0.1
    mean = sum(v * p for v, p in zip(values, chances, strict=True))
    draws = Counter(tuple(sorted(draw)) for draw in itertools.product(range(3), repeat=n))
    x = torch.tensor([[values[i] for i in draw] for draw in draws], dtype=torch.float64)
    below = betting.upper_bound(x, alpha) < mean
    lower = betting.bounds(x, 0.0, 1.0, alpha)[0] > mean
    chance = [times * math.prod(chances[i] for i in draw) for draw, times in draws.items()]
    assert sum(chance) == pytest.approx(1)
    for false in (below, lower):
        assert sum(p for p, wrong in zip(chance, false.tolist(), strict=True) if wrong) <= alpha


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=30),
    st.integers(0, 29),
    st.floats(0, 1),
    st.sampled_from([0.05, 0.003]),
)
def test_the_bound_rises_with_every_number_and_knows_no_order(xs, place, raised, alpha):
    place %= len(xs)
    higher = [*xs]
    higher[place] = max(xs[place], raised)
    x = torch.tensor([xs, higher, xs[::-1]], dtype=torch.float64)
    bound = betting.upper_bound(x, alpha).tolist()
    assert bound[1] >= bound[0] - 1e-12
    assert bound[2] == pytest.approx(bound[0], abs=1e-9)


@settings(deadline=None, max_examples=60)
# Next to 1 a factor next to 0 is rounding alone.
@given(
    st.lists(st.one_of(st.just(1.0), st.floats(0, 0.999)), min_size=2, max_size=20),
    st.floats(0.001, 0.998),
    st.floats(0, 1),
)
def test_the_capital_rises_with_the_mean_that_is_bet_against(xs, m, t):
    x = torch.tensor([xs], dtype=torch.float64)
    more = m + (0.999 - m) * t
    low, high = (betting.log_capital(x, m, 0.05).item() for m in (m, more))
    assert high >= low - 1e-9 or low == -math.inf


@pytest.mark.parametrize("n", [10, 96, 400])
def test_without_harm_the_bound_is_near_the_binomial_one(n):
    bound = betting.upper_bound(torch.zeros(1, n, dtype=torch.float64), 0.05).item()
    exact = 1 - 0.05 ** (1 / n)
    assert exact <= bound <= 1 - (0.05 * 0.4) ** (1 / n) + 1e-12


def test_fewest_is_the_first_number_whose_bound_is_low_enough():
    n = betting.fewest(0.02, 0.05)
    bounds = [betting.upper_bound(torch.zeros(1, k, dtype=torch.float64), 0.05).item() for k in (n - 1, n)]
    assert bounds[1] <= 0.02 < bounds[0]
    assert betting.fewest(0.0, 0.05) is None


def test_a_mean_between_limits_is_the_share_scaled():
    x = torch.tensor([0.0, 0.2, 1.0, 0.4], dtype=torch.float64)
    low, high = betting.bounds(-2 + 5 * x, -2.0, 3.0, 0.05)
    assert high.item() == pytest.approx(-2 + 5 * betting.upper_bound(x, 0.05).item())
    assert low.item() == pytest.approx(3 - 5 * betting.upper_bound(1 - x, 0.05).item())
    e = estimate(-2 + 5 * x, limits=(-2.0, 3.0))
    assert (e.lower, e.upper) == pytest.approx((low.item(), high.item()))
    assert e.low <= e.lower < e.mean < e.upper <= e.high


def test_a_rate_is_the_mean_of_the_prompts_shares():
    unsafe = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]])
    e = rate(unsafe, alpha=0.01)
    assert e.mean == pytest.approx(1 / 3)
    assert e.upper == betting.upper_bound(unsafe.double().mean(1), 0.01).item()
    with pytest.raises(UserError, match="needs at least 2"):
        rate(unsafe[:1])
