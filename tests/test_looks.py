"""The shares of looks and attempts, and several constraints."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.intervals import betting, holm
from engine.looks import Size, attempt_share, look_share, planned, share


def test_all_looks_that_will_ever_be_share_one_error():
    attempts = [attempt_share(m) for m in range(10_000)]
    assert sum(attempts) == pytest.approx(1 - 0.25 / 10_000)
    for looks in (1, 2, 3, 10):
        shares = [look_share(k, looks) for k in range(looks)]
        assert math.fsum(shares) == pytest.approx(1) and min(shares) > 0
        assert [share(2, k, looks) for k in range(looks)] == [attempt_share(2) * s for s in shares]


@pytest.mark.parametrize("looks", [1, 2, 3, 10])
@pytest.mark.parametrize("prompts", [20, 96, 400])
def test_the_last_planned_look_is_hardly_wider_than_a_single_one(looks, prompts):
    last = 0.05 * share(0, looks - 1, looks)
    ratio = stats.t.ppf(1 - last, prompts - 1) / stats.t.ppf(0.95, prompts - 1)
    assert 1 < ratio <= 1.15
    x = torch.tensor([0.0] * (prompts - 2) + [0.5, 1.0], dtype=torch.float64)
    wide, single = ((betting.upper_bound(x, a) - x.mean()).item() for a in (last, 0.05))
    assert 1 < wide / single <= 1.15


def test_looks_double_on_new_prompts_and_then_on_new_responses():
    sizes = [(s.prompts, s.responses) for s in planned(Size(96, 6), 416, 4 * 576)]
    assert sizes == [(96, 6), (192, 6), (384, 6)]
    sizes = [(s.prompts, s.responses) for s in planned(Size(96, 6), 120, 4 * 576)]
    assert sizes == [(96, 6), (96, 12), (96, 24)]
    sizes = [(s.prompts, s.responses) for s in planned(Size(96, 6), 150, 5 * 576)]
    assert sizes == [(96, 6), (150, 6), (150, 12)]
    assert planned(Size(96, 6), 416, 576) == [Size(96, 6)]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 500), st.integers(1, 20), st.integers(0, 5000), st.integers(0, 40_000))
def test_no_look_passes_the_budget_or_the_prompts(prompts, responses, more, budget):
    first = Size(prompts, responses)
    looks = planned(first, prompts + more, max(budget, first.total))
    assert looks[0] == first and len(looks) <= 20
    for before, after in zip(looks, looks[1:], strict=False):
        assert after.total >= 1.5 * before.total and after.total <= max(budget, first.total)
        assert before.prompts <= after.prompts <= prompts + more and before.responses <= after.responses


def naive_holm(errors: list[float], alpha: float) -> set[int]:
    """Which claims Holm's procedure makes, by rounds of Bonferroni."""
    made: set[int] = set()
    while left := [j for j in range(len(errors)) if j not in made]:
        passed = {j for j in left if errors[j] <= alpha / len(left)}
        if not passed:
            break
        made.add(min(passed, key=lambda j: errors[j]))
    return made


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=5))
def test_holm_makes_the_claims_of_its_rounds(errors):
    tested = holm(errors, 0.05)
    assert {j for j, (e, a) in enumerate(zip(errors, tested, strict=True)) if e <= a} == naive_holm(
        errors, 0.05
    )
    assert all(0.05 / len(errors) <= a <= 0.05 for a in tested)
