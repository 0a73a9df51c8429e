"""Bounds that allow for skewness, against their definition and by simulation."""

import math

import pytest
import torch
from scipy import stats

from engine.intervals import estimate, skewed

ALPHAS = (0.05, 0.0325, 0.002)


def lower_by_definition(xs: list[float], alpha: float) -> float:
    """The lower bound by its definition: bisection for the t whose transform is Student's quantile."""
    n, mean = len(xs), math.fsum(xs) / len(xs)
    variance = math.fsum((x - mean) ** 2 for x in xs) / n
    third = math.fsum((x - mean) ** 3 for x in xs) / n
    a = min(0.0, 1.5 * math.sqrt(n * (n - 1)) / (n - 2) * third / variance**1.5) / math.sqrt(n)
    q = stats.t.ppf(1 - alpha, n - 1)
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6 < q else (low, t)
    return mean - max(low, q) * math.sqrt(variance / (n - 1))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [3, 8, 96])
def test_bounds_are_those_of_their_definition(n, alpha):
    generator = torch.Generator().manual_seed(n)
    x = -torch.rand(5, n, generator=generator, dtype=torch.float64).pow(6)
    lower, upper = skewed.bounds(x, alpha)
    assert lower.tolist() == pytest.approx([lower_by_definition(row, alpha) for row in x.tolist()])
    mirrored = [-lower_by_definition([-v for v in row], alpha) for row in x.tolist()]
    assert upper.tolist() == pytest.approx(mirrored)


def test_symmetric_numbers_have_students_bounds():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    expected = stats.t.interval(0.9, 4, loc=0, scale=x.std().item() / math.sqrt(5))
    assert [b.item() for b in skewed.bounds(x, 0.05)] == pytest.approx(expected)


def test_no_bound_is_closer_than_students():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64).exp()
    lower, upper = skewed.bounds(x, 0.05)
    reach = stats.t.ppf(0.95, 11) * x.std(-1) / math.sqrt(12)
    assert (lower <= x.mean(-1) - reach + 1e-12).all() and (upper >= x.mean(-1) + reach - 1e-12).all()


@pytest.mark.parametrize("value", [0.0, 0.3, -1e12])
def test_equal_numbers_have_bounds_without_a_width(value):
    x = torch.full((7,), value, dtype=torch.float64)
    assert [b.item() for b in skewed.bounds(x, 0.05)] == [value, value]


def test_rare_harm_is_missed_less_often_than_by_student():
    generator = torch.Generator().manual_seed(3)
    draw = torch.rand(4000, 96, generator=generator, dtype=torch.float64)
    noise = torch.randn(4000, 96, generator=generator, dtype=torch.float64) / math.sqrt(6)
    x, mean = noise - 3.0 * (draw < 0.05), -0.15
    ours = (skewed.bounds(x, 0.05)[0] >= mean).double().mean().item()
    student = x.mean(-1) - stats.t.ppf(0.95, 95) * x.std(-1) / math.sqrt(96)
    # One standard error of the shares is 0.0034.
    assert ours < 0.06 and (student >= mean).double().mean().item() > 0.062


def test_an_estimate_has_them():
    x = torch.tensor([0.1, 0.2, 0.2, -4.0], dtype=torch.float64)
    e = estimate(x, 0.9, alpha=0.01)
    assert (e.low, e.high) == tuple(b.item() for b in skewed.bounds(x, (1 - 0.9) / 2))
    assert (e.lower, e.upper) == tuple(b.item() for b in skewed.bounds(x, 0.01))
