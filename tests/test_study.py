"""The study's arithmetic on tables made by hand, its parts and its page."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bench import study
from bench.study import Arm, answer, arm, complete, paired, reward_at_equal_safety, summary
from engine.errors import UserError


def made(slack, se=0.1, reward=0.0) -> Arm:
    slack = np.array(slack, dtype=float)
    return Arm(slack, np.full_like(slack, se), np.broadcast_to(np.array(reward, dtype=float), slack.shape))


def row(algorithm: str, seed: int, b: float, harm: float, error: str = "") -> dict:
    return {
        "algorithm": algorithm, "seed": str(seed), "harm threshold": str(b), "harm": str(harm), "harm se": "0.05", "harm low": "0",
        "harm high": "1",
        "reward": "0.1", "reward se": "0.05", "reward low": "0", "reward high": "1", "audit other": "0.2", "audit other low": "0",
        "audit other high": "1", "harm lambda": "1", "harm verdict": "met", "kl nats": "1.5", "sampled tokens": "10",
        "reference tokens": "100", "policy steps": "5",
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
    assert (
        paired(first, made([[-0.4], [0.5], [0.3]]).__class__(*(x[:, :1].repeat(2, 1) for x in list(vars(second).values())[:3]))) == result
    )
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


def keep(folder: Path, name: str, rows: list[dict], flags: tuple[str, ...] = ()) -> None:
    """A part as `run_part` keeps it."""
    (folder / "study").mkdir(exist_ok=True)
    with open(folder / "study" / f"part-{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    settings = {"seeds": [0], "algorithms": ["caid"], "thresholds": ["0.2"], "flags": study._shown((*study.FLAGS, *flags))}
    (folder / "study" / f"part-{name}.json").write_text(json.dumps({**settings, "versions": {"commit": "abc", "threads": "2"}}))


def test_parts_are_read_together_and_doubles_refused(tmp_path):
    keep(tmp_path, "a", ROWS[:6])
    keep(tmp_path, "b", ROWS[6:])
    rows, settings, shared = study.read_parts(tmp_path / "study")
    assert rows == ROWS and len(settings) == 2 and study.words(shared) == study._shown(study.FLAGS)
    text = study.page(rows, settings, shared)
    # Own tokens, the reference's, their sum; in the summary their means.
    assert text.count("| 10 | 100 | 110 | 5 | 4 |") == 12 and text.count("| 10 | 110 | 5 | 4 |") == 2
    assert "**Answer: " in text and text.count("| caid |") == 7 and "--margin 0" in text
    assert study.picture(rows, [0, 1, 2], [0.2, 0.4])[:4] == b"\x89PNG"
    keep(tmp_path, "c", ROWS[6:])
    with pytest.raises(UserError, match="the run mocan 0 0.2 is in .*part-b.csv too"):
        study.read_parts(tmp_path / "study")


def test_only_flags_that_differ_between_parts_enter_the_names(tmp_path):
    big = ("--model", "org/model", "--device", "cuda", "--prompts", "data/own.jsonl", "--cost", "harm=/secret/heads/harm")
    keep(tmp_path, "a", ROWS, (*big, "--threads", "1"))
    # A control is another method, two costs are another table; threads are a machine's matter.
    keep(tmp_path, "b", ROWS[6:8], (*big, "--threads=2", "--n-responses", "10"))
    both = [
        {**r, "other threshold": "0.3", "other lambda": "2", "other verdict": "met", "other": "0.4", "other low": "0", "other high": "1"}
        for r in ROWS[:2]
    ]
    keep(tmp_path, "c", both, (*big[:-2], "--cost", "harm", "other", "--threads", "2"))
    rows, settings, shared = study.read_parts(tmp_path / "study")
    names = list(dict.fromkeys(r["algorithm"] for r in rows))
    assert names == ["caid --cost harm=harm", "mocan --cost harm=harm", "mocan --cost harm=harm --n-responses 10", "caid --cost harm other"]
    (tmp_path / "study" / "part-c.csv").unlink()
    rows, settings, shared = study.read_parts(tmp_path / "study")
    assert list(dict.fromkeys(r["algorithm"] for r in rows)) == ["caid", "mocan", "mocan --n-responses 10"]
    text = study.page(rows, settings, shared, tmp_path / "gpu")
    assert "flags `--margin 0 --heldout test.jsonl --eval-prompts 208 --eval-responses 8 --model org/model --device cuda " in text
    assert "| mocan --n-responses 10 | 2 |" in text and "secret" not in text and "--prompts data/own.jsonl" in text
    assert "--docs gpu -- --model org/model" in text and "--n-responses 10`: commit abc, threads 2" in text and "--threads" not in text


def test_two_costs_have_a_table_of_their_own(tmp_path):
    both = [
        {**r, "other threshold": "0.3", "other lambda": "2", "other verdict": "met", "other": "0.4", "other low": "0", "other high": "1"}
        for r in ROWS[:2]
    ]
    keep(tmp_path, "a", ROWS)
    keep(tmp_path, "b", both, ("--cost", "harm", "other"))
    text = study.page(*study.read_parts(tmp_path / "study"))
    assert text.count("| harm | 0.") == 2 and text.count("| other | 0.3 | 2.00 |") == 2 and "| caid --cost harm other | 0 |" in text


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
