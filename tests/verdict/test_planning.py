"""Planned numbers of prompts against closed forms and verdicts."""

import math

import pytest
import torch
from scipy import stats
from torch import Generator

from engine.constraints import FEWEST_PROMPTS, Rate, judge
from engine.intervals import betting
from engine.verdict import planning


@pytest.mark.parametrize(("slack", "between", "G"), [(0.1, 0.0, 6), (0.2, 0.5, 6), (0.2, 0.0, 1)])
def test_normal_improvements_need_what_the_t_test_needs(slack, between, G):
    n = planning.prompts_needed(planning.normal(slack, 1.0, between, G), 0.05)
    sd = math.sqrt(2 / G + between**2)
    power = 1 - stats.nct.cdf(stats.t.ppf(0.95, n - 1), n - 1, slack / sd * math.sqrt(n))
    # 400 verdicts know the power to 0.02, and the correction for skewness takes 1 % of the bound.
    assert power == pytest.approx(planning.POWER, abs=0.06)


def test_no_unsafe_answer_needs_what_the_bound_needs():
    for limit, alpha in ((0.05, 0.05), (0.1, 0.0325)):
        n = planning.prompts_needed(planning.unsafe(limit, 0.0, 0.3, 6), alpha, (limit - 1, limit))
        assert n == pytest.approx(betting.fewest(limit, alpha), abs=max(1, n // 100))


def test_a_planned_rate_is_met_as_often_as_said():
    limit = Rate(name="harm", value=0.2)
    n = planning.prompts_needed(planning.unsafe(0.2, 0.06, 0.3, 4), 0.05, (-0.8, 0.2))
    assert 20 < n < 60
    words, generator = [], Generator().manual_seed(1)
    reference = -torch.ones(n, 4, dtype=torch.float64)
    for shares in (0.2 - planning.unsafe(0.2, 0.06, 0.3, 4)(generator, n))[:60]:
        policy = -(torch.arange(4) < (4 * shares[:, None]).round()).double()
        words.append(judge([limit], [0.0], [policy], [reference], [1.0])[0].word)
    assert words.count("met") / len(words) == pytest.approx(planning.POWER, abs=0.15)


def test_answers_that_are_all_alike_count_once():
    alike, single = (
        planning.prompts_needed(planning.unsafe(0.1, 0.03, correlation, G), 0.05, (-0.9, 0.1))
        for correlation, G in ((1.0, 8), (0.0, 1))
    )
    assert alike == pytest.approx(single, rel=0.1)


def test_rates_at_a_correlation_have_it():
    rates = planning.beta(torch.Size((200_000,)), 0.1, 0.3, Generator().manual_seed(1))
    assert rates.mean().item() == pytest.approx(0.1, abs=0.003)
    assert rates.var().item() == pytest.approx(0.3 * 0.1 * 0.9, rel=0.05)


def test_what_cannot_be_confirmed_needs_no_number():
    assert planning.prompts_needed(lambda g, n: torch.full((4, n), -1.0).double(), 0.05) is None


def test_words_need_a_spread_and_prompts_unless_a_range_is_known():
    x = torch.ones(2, FEWEST_PROMPTS, dtype=torch.float64)
    assert planning.confirmed(x, 0.0, 0.05).tolist() == [False, False]
    x[1, 0] = 2
    assert planning.confirmed(x, 0.0, 0.05).tolist() == [False, True]
    assert planning.confirmed(x[:, 1:], 0.0, 0.05).tolist() == [False, False]
    assert planning.confirmed(x, 0.0, 0.05, (-1, 3)).tolist() == [True, True]
    assert planning.confirmed(x, 3.5, 0.05, (-1, 3)).tolist() == [False, False]
    assert planning.confirmed(x, -1.0, 0.05, (-1, 3)).tolist() == [True, True]
