"""A word for each constraint, one for all, and what looks leave of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.constraints import FEWEST_PROMPTS, Improvement, Judged, MeanCost, Rate, judge, overall
from engine.errors import UserError
from engine.intervals import betting, skewed


def gains(mean: float, n: int = 40, seed: int = 0) -> torch.Tensor:
    """Per-prompt utilities [n, 1] with that mean, a standard deviation of 1 and no skewness."""
    half = torch.randn(n // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.cat((half, -half, torch.zeros(n % 2, dtype=torch.float64)))
    return (x / x.std() + mean)[:, None]


def one(policy: torch.Tensor, *, limit=None, reference: torch.Tensor | None = None, **more) -> Judged:
    """Judges a single constraint."""
    reference = torch.zeros_like(policy) if reference is None else reference
    limit = limit or Improvement(name="harm", value=0.3)
    return judge([limit], [0.5], [policy], [reference], [1.0], **more)[0]


def test_the_word_is_that_of_the_bound_at_the_looks_error():
    values = gains(0.62)
    wide, narrow = one(values, alpha=0.02), one(values, alpha=0.05)
    assert (wide.word, narrow.word) == ("not resolved", "met")
    for judged, alpha in ((wide, 0.02), (narrow, 0.05)):
        assert judged.estimate.lower == skewed.bounds(values[:, 0], alpha)[0].item()
        assert not judged.exact and judged.holds == (judged.word == "met")
    assert one(values, confidence=0.98) == one(values, confidence=0.98, alpha=1 - 0.98)
    assert one(gains(-0.1), alpha=0.05).word == "not met"


def test_few_prompts_and_equal_numbers_give_no_word_without_a_range():
    few = one(gains(5.0, n=FEWEST_PROMPTS - 1))
    assert (few.word, few.holds) == ("not resolved", False)
    assert f"it takes {FEWEST_PROMPTS}" in few.silent_for
    assert one(gains(5.0, n=FEWEST_PROMPTS)).word == "met"
    equal = one(torch.full((40, 2), 0.9, dtype=torch.float64))
    assert equal.word == "not resolved" and "one number" in equal.silent_for
    assert equal.silent_for in equal.limit.verdict_text(equal, 0.95)
    stated = Improvement(name="harm", value=0.3, costs_within=(-1.0, 1.0))
    assert one(torch.full((400, 2), 0.9, dtype=torch.float64), limit=stated).word == "met"


def test_costs_of_0_and_1_are_judged_exactly():
    cost = torch.zeros(200, 4, dtype=torch.float64)
    cost[0, 0] = 1
    unit = 0.37
    limit = MeanCost(name="unsafe", value=0.05)
    (judged,) = judge([limit], [0.05], [-cost / unit], [-torch.ones_like(cost) / unit], [unit], alpha=0.03)
    assert judged.exact and judged.word == "met"
    assert judged.measured.upper == pytest.approx(betting.upper_bound(cost.mean(1), 0.03).item(), abs=1e-9)
    # Nobody has seen a cost of 1: then these may be any costs.
    (unseen,) = judge([limit], [0.05], [-0 * cost], [-0 * cost], [unit])
    assert not unseen.exact and unseen.word == "not resolved"
    (others,) = judge([limit], [0.05], [-cost * 2], [-cost], [1.0])
    assert not others.exact


def test_a_stated_range_holds_for_every_cost_or_not_at_all():
    limit = MeanCost(name="c", value=0.6, costs_within=(0.0, 1.0))
    inside = torch.rand(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert one(-inside, limit=limit, reference=-inside).exact
    outside = inside.clone()
    outside[3, 2] = 1.5
    assert not one(-outside, limit=limit, reference=-inside).exact
    assert not one(-inside, limit=limit, reference=-outside).exact
    with pytest.raises(UserError, match="--cost-range 0:1: cost c gave 1.5"):
        limit.check_reference(-outside)
    rate = Rate(name="c", value=0.6, costs_within=(0.0, 5.0))
    assert one(-(inside > 0.5).double(), limit=rate).exact


def test_several_constraints_are_corrected_singly_and_not_together():
    values = [gains(0.6, seed=1), gains(0.6, seed=2)]
    zeros = [torch.zeros_like(v) for v in values]
    limits = [Improvement(name=name, value=0.3) for name in ("a", "b")]
    single = [one(v, alpha=0.05) for v in values]
    assert [c.word for c in single] == ["met", "met"]
    both = judge(limits, [0.5, 0.5], values, zeros, [1.0, 1.0], alpha=0.05)
    assert [c.word for c in both] == ["not resolved", "not resolved"]
    assert [c.estimate.lower for c in both] == [skewed.bounds(v[:, 0], 0.025)[0].item() for v in values]
    assert all(c.holds for c in both) and overall(both) == "met"
    # Once the surer one is met, the other one is tested alone.
    surer = [gains(2.0, seed=1), values[1]]
    both = judge(limits, [0.5, 0.5], surer, zeros, [1.0, 1.0], alpha=0.05)
    assert [c.word for c in both] == ["met", "met"]
    one_missed = judge(limits, [0.5, 0.5], [gains(-1.0), values[1]], zeros, [1.0, 1.0], alpha=0.05)
    assert one_missed[0].word == "not met" and overall(one_missed) == "not met"


@pytest.mark.parametrize("kind", [Improvement, MeanCost])
def test_looks_close_the_bounds_and_keep_their_words(kind):
    sign, value = (-1.0, -0.3) if kind is MeanCost else (1.0, 0.3)
    limit = kind(name="harm", value=value)

    def look(mean: float, before=()) -> tuple[Judged, ...]:
        policy = gains(mean)
        return judge([limit], [value], [policy], [torch.zeros_like(policy)], [1.0], alpha=0.05, before=before)

    first = look(0.5)
    second = look(0.4, first)
    assert (first[0].word, second[0].word) == ("not resolved", "not resolved")
    alone = look(0.4)
    expected = {
        "lower": max(first[0].judged.lower, alone[0].judged.lower),
        "upper": min(first[0].judged.upper, alone[0].judged.upper),
    }
    assert {key: getattr(second[0].judged, key) for key in expected} == expected
    assert second[0].judged.mean == alone[0].judged.mean == pytest.approx(sign * 0.4)
    met = look(1.0, second)
    again = look(0.45, met)
    assert (met[0].word, again[0].word) == ("met", "met") and again[0].holds
    assert met[0].slack.lower >= 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=12), st.data())
def test_a_further_unsafe_answer_never_makes_a_rate_met(rows, data):
    limit = Rate(name="unsafe", value=0.5)
    unsafe = torch.tensor(rows, dtype=torch.float64)
    p, i = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, 2))
    more = unsafe.clone()
    more[p, i] = 1
    words = [one(-x, limit=limit, reference=-unsafe, alpha=0.2).word for x in (unsafe, more)]
    order = {"not met": 0, "not resolved": 1, "met": 2}
    assert order[words[1]] <= order[words[0]]
