"""The study's arithmetic on tables made by hand, its parts and its page."""

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats

from bench import study
from bench.study import Arm, answer, arm, complete, paired, reward_at_equal_safety, summary


def made(slack, se=0.1, reward=0.0) -> Arm:
    slack = np.array(slack, dtype=float)
    return Arm(slack, np.full_like(slack, se), np.broadcast_to(np.array(reward, dtype=float), slack.shape), np.full_like(slack, se))


def row(algorithm: str, seed: int, b: float, harm: float, error: str = "") -> dict:
    return {
        "algorithm": algorithm, "seed": str(seed), "harm threshold": str(b), "harm": str(harm), "harm se": "0.05", "harm low": "0",
        "harm high": "1",
        "reward": "0.1", "reward se": "0.05", "reward low": "0", "reward high": "1", "audit other": "0.2", "audit other low": "0",
        "audit other high": "1", "harm lambda": "1", "harm verdict": "met", "kl nats": "1.5", "sampled tokens": "10", "policy steps": "5",
        "seconds": "3.5", "error": error,
    }  # fmt: skip


ROWS = [
    row(label, seed, b, b + sign * (0.1 + 0.1 * seed))
    for label, sign in (("caid", 1), ("mocan", -2))
    for seed in (0, 1, 2)
    for b in (0.2, 0.4)
]


def test_an_arm_is_improvement_minus_b():
    a = arm(ROWS, "mocan", [0, 2], [0.2, 0.4])
    assert a.slack_SB == pytest.approx(np.array([[-0.2, -0.2], [-0.6, -0.6]]))
    with pytest.raises(KeyError):
        arm(ROWS, "mocan", [5], [0.2])
    assert complete(ROWS, ("caid", "mocan")) == ([0, 1, 2], [0.2, 0.4])
    assert complete([*ROWS[1:], row("caid", 0, 0.2, 0.1, error="stopped")], ("caid", "mocan"))[0] == [1, 2]


def test_summary_removes_the_noise_of_the_test_set():
    s = summary(made([[0.3, -0.1], [0.1, -0.3]], se=0.2))
    assert (s["slack"], s["violation"], s["absolute"]) == (pytest.approx(0), pytest.approx(0.1), pytest.approx(0.2))
    assert (
        s["rmse"] == pytest.approx(math.sqrt(0.05)) and s["rmse without noise"] == pytest.approx(0.1) and s["noise"] == pytest.approx(0.2)
    )
    assert summary(made([[0.1]], se=0.2))["rmse without noise"] == 0


def test_the_seed_is_the_unit():
    """Thresholds of a seed that agree add nothing: the interval is that of the seeds' means."""
    first, second = made([[0.1, 0.1], [0.3, 0.3], [0.2, 0.2]]), made([[-0.4, -0.4], [0.5, 0.5], [0.3, 0.3]])
    result = paired(first, second)
    d = np.array([-0.3, -0.2, -0.1])
    low, high = stats.t.interval(0.95, 2, loc=d.mean(), scale=stats.sem(d))
    assert (result["mean"], result["t low"], result["t high"]) == pytest.approx((-0.2, low, high))
    assert -0.301 < result["bootstrap low"] < -0.2 < result["bootstrap high"] < -0.099
    assert result["p"] == pytest.approx(2 / 8)
    assert paired(first, made([[-0.4], [0.5], [0.3]]).__class__(*(x[:, :1].repeat(2, 1) for x in vars(second).values()))) == result
    assert "not resolved yet, 3 of 8" in answer(result) and "1 of 8" in answer(paired(made([[0.1]]), made([[0.2]])))
    # All three seeds agree: still no answer.
    assert "not resolved yet" in answer(paired(made(np.zeros((3, 2))), made(np.ones((3, 2)))))
    near, far = made(np.full((8, 2), 0.01)), made(0.5 + 0.01 * np.arange(16).reshape(8, 2))
    assert answer(paired(near, far)) == "CAID lands nearer to b" and answer(paired(far, near)) == "MoCAN lands nearer to b"


def test_false_answers_are_rare_where_there_is_no_difference():
    generator = np.random.default_rng(0)
    words = [answer(paired(*(made(0.1 * generator.normal(size=(8, 2))) for _ in range(2)), draws=400)) for _ in range(300)]
    assert sum(w != "not resolved at this number of seeds" for w in words) / 300 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 300)


def test_reward_at_equal_safety_interpolates_within_a_seed():
    first = made([[0.0, 0.0]], reward=[0.5, 0.3])  # improvements 0.2 and 0.4
    second = made([[0.1, 0.1]], reward=[0.3, 0.1])  # improvements 0.3 and 0.5
    assert reward_at_equal_safety(first, second, [0.2, 0.4]) == pytest.approx([0.35 - 0.25])
    assert reward_at_equal_safety(first, made([[1.0, 1.0]]), [0.2, 0.4]) == []


def test_parts_are_read_together_and_doubles_refused(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    for name, rows in (("a", ROWS[:6]), ("b", ROWS[6:])):
        with open(tmp_path / "study" / f"part-{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(rows)
        settings = {"seeds": [0], "algorithms": ["caid"], "thresholds": ["0.2"], "flags": ["--margin", "0"], "versions": {"commit": "abc"}}
        (tmp_path / "study" / f"part-{name}.json").write_text(json.dumps(settings))
    rows, settings = study.read_parts(tmp_path / "study")
    assert rows == ROWS and len(settings) == 2
    # A part with flags of its own is another method, one with two costs another table.
    own = {**settings[0], "flags": [*study.FLAGS, "--n-responses", "10"]}
    both = [
        {**r, "other threshold": "0.3", "other lambda": "2", "other verdict": "met", "other": "0.4", "other low": "0", "other high": "1"}
        for r in ROWS[:2]
    ]
    for name, part in (("d", ROWS[6:8]), ("e", both)):
        with open(tmp_path / "study" / f"part-{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(part[0]))
            writer.writeheader()
            writer.writerows(part)
        flags = own["flags"] if name == "d" else [*study.FLAGS, "--cost", "harm", "other"]
        (tmp_path / "study" / f"part-{name}.json").write_text(json.dumps({**own, "flags": flags}))
    more, settings = study.read_parts(tmp_path / "study")
    assert [r["algorithm"] for r in more[len(ROWS) :]] == ["mocan --n-responses 10"] * 2 + ["caid --cost harm other"] * 2
    text = study.page(more, settings)
    assert "| mocan --n-responses 10 | 2 |" in text and text.count("| harm | 0.") == 2 and text.count("| other | 0.3 | 2.00 |") == 2
    assert "-- --n-responses 10`" in text
    for name in "de":
        for suffix in ("csv", "json"):
            (tmp_path / "study" / f"part-{name}.{suffix}").unlink()
    rows, settings = study.read_parts(tmp_path / "study")
    text = study.page(rows, settings)
    assert "**Answer: " in text and text.count("| caid |") == 7 and "--margin 0" in text
    assert study.picture(rows, [0, 1, 2], [0.2, 0.4])[:4] == b"\x89PNG"
    (tmp_path / "study" / "part-c.csv").write_bytes((tmp_path / "study" / "part-b.csv").read_bytes())
    (tmp_path / "study" / "part-c.json").write_bytes((tmp_path / "study" / "part-b.json").read_bytes())
    with pytest.raises(ValueError, match="is in another part too"):
        study.read_parts(tmp_path / "study")


def test_the_test_prompts_are_new_and_enough():
    from engine.data import lookalike_prompts, shipped_prompts

    def texts(path):
        return [json.loads(line)["prompt"] for line in open(path, encoding="utf-8")]

    def normal(text):
        return "".join(text.casefold().split())

    own = [normal(x) for x in texts(study.TEST_PROMPTS)]
    assert len(own) == len(set(own)) >= 200
    known = {normal(x) for path in (*shipped_prompts("train"), *shipped_prompts("heldout"), lookalike_prompts()) for x in texts(path)}
    assert not known & set(own)
