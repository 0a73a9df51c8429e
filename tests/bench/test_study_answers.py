"""The study's statistics, on rows and arms with known answers."""

import math

import numpy as np
import pytest
from scipy import stats

from bench.study.answers import answer, matched, paired, reward_at_equal_safety, summary
from bench.study.arms import Arm, arm
from tests.helpers.study_rows import ROWS, row


def arm_of(slack, se=0.1, reward=0.0) -> Arm:
    """Returns an arm with this slack [seeds, thresholds]."""
    slack = np.array(slack, dtype=float)
    return Arm(slack, np.full_like(slack, se), np.broadcast_to(np.array(reward, dtype=float), slack.shape))


def test_an_arm_is_improvement_minus_b():
    a = arm(ROWS, "mocan", [0, 2])
    assert a.slack_SB == pytest.approx(np.array([[-0.2, -0.2], [-0.6, -0.6]]))
    with pytest.raises(KeyError):
        arm(ROWS, "mocan", [5])


def test_summary_removes_the_noise_of_the_test_set():
    s = summary(arm_of([[0.3, -0.1], [0.1, -0.3]], se=0.2))
    assert (s["slack"], s["violation"], s["absolute"]) == pytest.approx((0, 0.1, 0.2))
    expected = (math.sqrt(0.05), 0.1, 0.2)
    assert (s["rmse"], s["rmse without noise"], s["noise"]) == pytest.approx(expected)
    assert summary(arm_of([[0.1]], se=0.2))["rmse without noise"] == 0


def test_the_seed_is_the_unit():
    # Thresholds of a seed that agree add nothing: the interval is that of the seeds' means.
    first = arm_of([[0.1, 0.1], [0.3, 0.3], [0.2, 0.2]])
    second = arm_of([[-0.4, -0.4], [0.5, 0.5], [0.3, 0.3]])
    result = paired(first, second)
    d = np.array([-0.3, -0.2, -0.1])
    low, high = stats.t.interval(0.95, 2, loc=d.mean(), scale=stats.sem(d))
    assert (result["mean"], result["t low"], result["t high"]) == pytest.approx((-0.2, low, high))
    assert -0.301 < result["bootstrap low"] < -0.2 < result["bootstrap high"] < -0.099
    assert result["p"] == pytest.approx(2 / 8)
    assert paired(*(arm_of(arm.slack_SB[:, :1]) for arm in (first, second))) == result
    assert "not resolved yet, 3 of 8" in answer(result)
    assert "1 of 8" in answer(paired(arm_of([[0.1]]), arm_of([[0.2]])))
    # All three seeds agree, and still there is no answer.
    assert "not resolved yet" in answer(paired(arm_of(np.zeros((3, 2))), arm_of(np.ones((3, 2)))))
    near, far = arm_of(np.full((8, 2), 0.01)), arm_of(0.5 + 0.01 * np.arange(16).reshape(8, 2))
    assert answer(paired(near, far)) == "CAID lands nearer to b"
    assert answer(paired(far, near)) == "MoCAN lands nearer to b"


def test_false_answers_are_rare_where_there_is_no_difference():
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        first, second = (arm_of(0.1 * generator.normal(size=(8, 2))) for _ in range(2))
        wrong += answer(paired(first, second, draws=400)) != "not resolved at this number of seeds"
    assert wrong / 300 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 300)


def test_a_control_is_compared_with_runs_of_its_own_seed_and_threshold():
    # |slack| of caid at seeds 0, 1, 2 is 0.1, 0.2, 0.3, of mocan twice that;
    # seed 5 and b = 0.3 have no partner.
    control = [
        row("control", seed, b, b - x)
        for seed, b, x in ((0, 0.4, 0.2), (1, 0.4, 0.6), (5, 0.4, 9.0), (2, 0.3, 9.0))
    ]
    m = matched([*ROWS, *control], "control", "caid")
    low, high = stats.t.interval(0.95, 1, loc=0.25, scale=stats.sem([0.1, 0.4]))
    assert (m["pairs"], m["seeds"]) == (2, 2)
    assert [m[k] for k in ("mean", "low", "high")] == pytest.approx([0.25, low, high])
    assert matched([*ROWS, *control], "control", "mocan")["mean"] == pytest.approx(0.1)
    # Two thresholds of one seed are one seed, which has no interval.
    one = matched([*ROWS, row("control", 0, 0.2, 0.2), row("control", 0, 0.4, 0.4)], "control", "caid")
    assert one == {"pairs": 2, "seeds": 1, "mean": pytest.approx(-0.1)}
    assert matched(ROWS, "control", "caid") == {"pairs": 0, "seeds": 0}


def test_reward_at_equal_safety_interpolates_within_a_seed():
    first = arm_of([[0.0, 0.0]], reward=[0.5, 0.3])  # improvements 0.2 and 0.4
    second = arm_of([[0.1, 0.1]], reward=[0.3, 0.1])  # improvements 0.3 and 0.5
    ((difference, width),) = reward_at_equal_safety(first, second)
    assert (difference, width) == pytest.approx((0.35 - 0.25, 0.1))
    assert reward_at_equal_safety(first, arm_of([[1.0, 1.0]])) == []
