"""The study's arithmetic on tables made by hand, its parts and its page."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bench.study import __main__ as study
from bench.study.__main__ import (
    Arm,
    answer,
    arm,
    complete,
    matched,
    paired,
    remaining,
    reward_at_equal_safety,
    summary,
)
from engine.config import Algorithm
from engine.constraints import Improvement, Judged
from engine.errors import NonFiniteError, UserError
from engine.intervals import Estimate
from engine.run.rows import StageTimeRow
from engine.sweep import runs as sweep_runs
from engine.verdict.evaluation import Evaluation
from tests.helpers.rows import POLICY, REFERENCE, SPEED, STEP, write_metrics, write_timing


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
        "seconds": "3.5", "prompts": "208", "responses": "8", "error": error,
    }  # fmt: skip


ROWS = [
    row(label, seed, b, b + sign * (0.1 + 0.1 * seed))
    for label, sign in (("caid", 1), ("mocan", -2))
    for seed in (0, 1, 2)
    for b in (0.2, 0.4)
]


def test_an_arm_is_improvement_minus_b():
    a = arm(ROWS, "mocan", [0, 2])
    assert a.slack_SB == pytest.approx(np.array([[-0.2, -0.2], [-0.6, -0.6]]))
    with pytest.raises(KeyError):
        arm(ROWS, "mocan", [5])


def test_the_question_is_fixed_whatever_else_was_run():
    assert complete(ROWS) == [0, 1, 2]
    assert complete([*ROWS[1:], row("caid", 0, 0.2, 0.1, error="stopped")]) == [1, 2]
    # Another threshold, a seed beyond the plan, another cost: none of them empties the answer or gets into it.
    other = {k.replace("harm", "noise"): v for k, v in row("caid", 3, 0.2, 0.1).items()}
    more = [
        *ROWS,
        row("caid", 0, 0.3, 9.0),
        *(row(x, 8, b, 9.0) for x in ("caid", "mocan") for b in (0.2, 0.4)),
        other,
    ]
    assert complete(more) == [0, 1, 2]
    assert arm(more, "caid", [0, 1, 2]).slack_SB == pytest.approx(arm(ROWS, "caid", [0, 1, 2]).slack_SB)
    settings = [
        {
            "seeds": [0],
            "algorithms": ["caid"],
            "thresholds": ["0.2"],
            "flags": [],
            "versions": {},
            "hours": 1.0,
        }
    ]
    text, before = (study.page(rows, settings, {}) for rows in (more, ROWS))
    answers = [
        [line for line in t.splitlines() if line.startswith(("**Answer", "| caid | 0.2, 0.4 |"))]
        for t in (text, before)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 2
    assert "| caid | 3 | +0.10 [0.00, 1.00] | noise | 0.2 |" in text and "| caid | 0 | 0.3 |" in text


def test_a_run_without_audit_or_verdict_shifts_no_cell():
    columns = ["algorithm", "seed", "harm threshold", "error", *ROWS[0]]
    failed = {
        **dict.fromkeys(columns, ""),
        **{k: row("caid", 5, 0.2, 0.1)[k] for k in ("algorithm", "seed", "harm threshold")},
    }
    no_audit = row("caid", 4, 0.2, 0.1) | {k: "" for k in ROWS[0] if k.startswith("audit")}
    settings = [
        {
            "seeds": [0],
            "algorithms": ["caid"],
            "thresholds": ["0.2"],
            "flags": [],
            "versions": {},
            "hours": 1.0,
        }
    ]
    text = study.page([*ROWS, no_audit, {**failed, "error": "loss nan"}], settings, {})
    table = [
        line
        for line in text.splitlines()
        if re.match(r"\| (caid|mocan) \| \d \|", line) or "| lambda |" in line
    ]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 1 + len(ROWS) + 1
    assert "| caid | 4 | 0.2 | 1.00 | +0.10 [0.00, 1.00] | +0.10 [0.00, 1.00] | - | 1.50 | met |" in text
    assert "caid at seed 5 failed: loss nan" in text


def test_summary_removes_the_noise_of_the_test_set():
    s = summary(made([[0.3, -0.1], [0.1, -0.3]], se=0.2))
    assert (s["slack"], s["violation"], s["absolute"]) == (
        pytest.approx(0),
        pytest.approx(0.1),
        pytest.approx(0.2),
    )
    assert (
        s["rmse"] == pytest.approx(math.sqrt(0.05))
        and s["rmse without noise"] == pytest.approx(0.1)
        and s["noise"] == pytest.approx(0.2)
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
        paired(
            first,
            made([[-0.4], [0.5], [0.3]]).__class__(
                *(x[:, :1].repeat(2, 1) for x in list(vars(second).values())[:3])
            ),
        )
        == result
    )
    assert "not resolved yet, 3 of 8" in answer(result) and "1 of 8" in answer(
        paired(made([[0.1]]), made([[0.2]]))
    )
    # All three seeds agree: still no answer.
    assert "not resolved yet" in answer(paired(made(np.zeros((3, 2))), made(np.ones((3, 2)))))
    near, far = made(np.full((8, 2), 0.01)), made(0.5 + 0.01 * np.arange(16).reshape(8, 2))
    assert (
        answer(paired(near, far)) == "CAID lands nearer to b"
        and answer(paired(far, near)) == "MoCAN lands nearer to b"
    )


def test_false_answers_are_rare_where_there_is_no_difference():
    generator = np.random.default_rng(0)
    words = [
        answer(paired(*(made(0.1 * generator.normal(size=(8, 2))) for _ in range(2)), draws=400))
        for _ in range(300)
    ]
    assert sum(w != "not resolved at this number of seeds" for w in words) / 300 < 0.05 + 4 * math.sqrt(
        0.05 * 0.95 / 300
    )


def test_a_control_is_compared_with_runs_of_its_own_seed_and_threshold():
    # |slack| of caid at seeds 0, 1, 2 is 0.1, 0.2, 0.3, of mocan twice that; seed 5 and b = 0.3 have no partner.
    control = [
        row("control", seed, b, b - x)
        for seed, b, x in ((0, 0.4, 0.2), (1, 0.4, 0.6), (5, 0.4, 9.0), (2, 0.3, 9.0))
    ]
    m = matched([*ROWS, *control], "control", "caid")
    low, high = stats.t.interval(0.95, 1, loc=0.25, scale=stats.sem([0.1, 0.4]))
    assert (m["pairs"], m["seeds"]) == (2, 2) and [m[k] for k in ("mean", "low", "high")] == pytest.approx(
        [0.25, low, high]
    )
    assert matched([*ROWS, *control], "control", "mocan")["mean"] == pytest.approx(0.1)
    # Two thresholds of one seed are one seed: no interval.
    one = matched([*ROWS, row("control", 0, 0.2, 0.2), row("control", 0, 0.4, 0.4)], "control", "caid")
    assert one == {"pairs": 2, "seeds": 1, "mean": pytest.approx(-0.1)}
    assert matched(ROWS, "control", "caid") == {"pairs": 0, "seeds": 0}


def test_reward_at_equal_safety_interpolates_within_a_seed():
    first = made([[0.0, 0.0]], reward=[0.5, 0.3])  # improvements 0.2 and 0.4
    second = made([[0.1, 0.1]], reward=[0.3, 0.1])  # improvements 0.3 and 0.5
    ((difference, width),) = reward_at_equal_safety(first, second)
    assert (difference, width) == pytest.approx((0.35 - 0.25, 0.1))
    assert reward_at_equal_safety(first, made([[1.0, 1.0]])) == []


def test_what_remains_are_commands_that_can_be_run(tmp_path):
    commands = remaining(ROWS, study.options(study._shown(study.FLAGS)), study.DOCS)
    assert (
        commands[0] == "python -m bench.study --seeds 3 4 5 6 7 --algorithms caid mocan --thresholds 0.2 0.4"
    )
    assert commands[1].startswith(
        "python -m bench.study --seeds 3 4 5 --algorithms primal_dual dpo:objective=reward"
    )
    assert (
        commands[3].endswith("--algorithms mocan --thresholds 0.4 -- --n-responses 10") and len(commands) == 5
    )
    # A seed that has one threshold is not run at it again, which would be refused.
    more = remaining([*ROWS, row("caid", 7, 0.4, 0.4), row("mocan", 7, 0.4, 0.4)], {}, study.DOCS)
    assert [c.partition("--seeds ")[2] for c in more[:2]] == [
        "3 4 5 6 --algorithms caid mocan --thresholds 0.2 0.4", "7 --algorithms caid mocan --thresholds 0.2"
    ]  # fmt: skip
    two = [
        row("caid --cost harm harm-audit --audit", 0, b, b) | {"harm-audit threshold": x}
        for b in (0.2, 0.4)
        for x in ("0.2", "0.4")
    ]
    # Algorithms that know no threshold have run wherever they have, and a failed run is none.
    others = [
        row(label, seed, 0.2, 1.0, "" if seed > 3 else "stopped")
        for label in study.OTHERS[1:]
        for seed in range(3, 6)
    ]
    commands = remaining([*ROWS, *two, *others], {"--model": ("big",)}, tmp_path / "gpu")
    assert len(commands) == 5 and commands[0].endswith("--docs gpu -- --model big")
    assert f"--seeds 3 --algorithms {' '.join(study.OTHERS)} --thresholds 0.4" in commands[1]
    assert "--seeds 4 5 --algorithms primal_dual --thresholds 0.4" in commands[2]


def keep(folder: Path, name: str, rows: list[dict], flags: tuple[str, ...] = ()) -> None:
    """A part as `run_part` keeps it."""
    (folder / "study").mkdir(exist_ok=True)
    with open(folder / "study" / f"part-{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    settings = {
        "seeds": [0],
        "algorithms": ["caid"],
        "thresholds": ["0.2"],
        "flags": study._shown((*study.FLAGS, *flags)),
    }
    (folder / "study" / f"part-{name}.json").write_text(
        json.dumps({**settings, "versions": {"commit": "abc", "threads": "2"}, "hours": 1.5})
    )


def test_parts_are_read_together_and_doubles_refused(tmp_path):
    keep(tmp_path, "a", ROWS[:6])
    keep(tmp_path, "b", ROWS[6:])
    rows, settings, shared = study.read_parts(tmp_path / "study")
    assert rows == ROWS and len(settings) == 2 and study.words(shared) == study._shown(study.FLAGS)
    text = study.page(rows, settings, shared)
    # Own tokens, the reference's, their sum; in the summary their means.
    assert (
        text.count("| met | 10 | 100 | 110 | 5 | 4 |") == 12
        and text.count("+0.100 | 10 | 100 | 110 | 5 | 4 |") == 2
    )
    # Both methods' ranges of improvement at a seed never meet here.
    assert (
        "**Answer: " in text
        and text.count("| caid |") == 7
        and "overlap at 0 of 3 seed(s)." in text
        and "--margin 0" in text
    )
    assert study.picture(rows, [0, 1, 2])[:4] == study.picture(ROWS[:1], [])[:4] == b"\x89PNG"
    assert "took 3.0 hours" in text and "commit(s) abc and ran on 2 thread(s)" in text
    (tmp_path / "study" / "notes.md").write_text("A run was done twice.\n")
    assert "\nA run was done twice.\n" in study.page(rows, settings, shared, tmp_path)
    keep(tmp_path, "c", ROWS[6:])
    with pytest.raises(
        UserError, match="part-c.csv: the run of mocan at seed 0 and b 0.2 is in .*part-b.csv too"
    ):
        study.read_parts(tmp_path / "study")


def test_only_flags_that_differ_between_parts_enter_the_names(tmp_path):
    big = (
        "--model",
        "org/model",
        "--device",
        "cuda",
        "--prompts",
        "data/own.jsonl",
        "--cost",
        "harm=/secret/heads/harm",
    )
    keep(tmp_path, "a", ROWS, (*big, "--threads", "1"))
    # A control is another method, two costs are another table; threads are a machine's matter.
    keep(tmp_path, "b", ROWS[6:8], (*big, "--threads=2", "--n-responses", "10"))
    both = [
        {
            **r,
            "other threshold": "0.3",
            "other lambda": "2",
            "other verdict": "met",
            "other": "0.4",
            "other low": "0",
            "other high": "1",
        }
        for r in ROWS[:2]
    ]
    keep(tmp_path, "c", both, (*big[:-2], "--cost", "harm", "other", "--threads", "2"))
    rows, settings, shared = study.read_parts(tmp_path / "study")
    names = list(dict.fromkeys(r["algorithm"] for r in rows))
    assert names == [
        "caid --cost harm=harm",
        "mocan --cost harm=harm",
        "mocan --cost harm=harm --n-responses 10",
        "caid --cost harm other",
    ]
    (tmp_path / "study" / "part-c.csv").unlink()
    rows, settings, shared = study.read_parts(tmp_path / "study")
    assert list(dict.fromkeys(r["algorithm"] for r in rows)) == ["caid", "mocan", "mocan --n-responses 10"]
    text = study.page(rows, settings, shared, tmp_path / "gpu")
    assert (
        "flags `--margin 0 --heldout test.jsonl --eval-prompts 208 --eval-responses 8 --model org/model --device cuda "
        in text
    )
    assert (
        "| mocan --n-responses 10 | 0.2, 0.4 | 2 |" in text
        and "| mocan --n-responses 10 | caid | 2 | 1 | +0.100 | - |" in text
    )
    assert "secret" not in text and "--prompts data/own.jsonl" in text
    assert (
        "--docs gpu -- --model org/model" in text
        and "--n-responses 10`: commit abc, threads 2" in text
        and "--threads" not in text
    )


def test_two_costs_have_a_table_of_their_own(tmp_path):
    both = [
        {
            **r,
            "other threshold": "0.3",
            "other lambda": "2",
            "other verdict": "met",
            "other": "0.4",
            "other low": "0",
            "other high": "1",
        }
        for r in ROWS[:2]
    ]
    keep(tmp_path, "a", ROWS)
    keep(tmp_path, "b", both, ("--cost", "harm", "other"))
    text = study.page(*study.read_parts(tmp_path / "study"))
    assert (
        text.count("| harm | 0.") == 2
        and text.count("| other | 0.3 | 2.00 |") == 2
        and "| caid --cost harm other | 0 |" in text
    )


def test_parts_have_folders_of_their_own():
    name = study.part_name(["caid", "mocan"], ["0.2", "0.4"], [1, 2], [])
    assert name == "caid-mocan-b-0.2-0.4-seeds-1-2"
    others = [
        study.part_name(["caid"], b, [0], [])
        for b in (["0.2"], ["-0.2"], ["0.2", "0.4"], ["0.2,0.4"], ["0.2,-0.4"])
    ]
    assert len(set(others)) == 5
    bisection = study.part_name(["caid:dual_rule=bisection"], ["0.4"], [0], ["--device", "cuda"])
    assert bisection == "caid-dual_rule-bisection-b-0.4-seeds-0-device-cuda"


class Trained(list):
    """Names of runs in order, and which one is to be stopped or to diverge."""

    def __init__(self) -> None:
        self.fail: dict[str, str] = {}


@pytest.fixture
def trained(monkeypatch) -> Trained:
    """Runs whose files are written at once: their names, as they are trained. CAID ends 0.1 above b, all others 0.3 below."""
    names = Trained()
    fail = names.fail

    def train(config, *, resume=None):
        folder, (b,) = Path(config.out), config.threshold
        if folder.name == fail.get("stop"):
            raise KeyboardInterrupt
        names.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"versions": {"commit": "abc", "threads": "4"}}))
        write_timing(
            folder,
            [
                StageTimeRow(stage="reference", seconds=5.0),
                replace(SPEED, tokens=70),
                StageTimeRow(stage=SPEED.stage, seconds=3.0),
                replace(SPEED, stage="heldout/policy", tokens=9000),
                StageTimeRow(stage="heldout/policy", seconds=900.0),
            ],
        )
        write_metrics(folder, [REFERENCE, STEP, STEP, replace(POLICY, lam=[0.7])])
        if folder.name == fail.get("diverge"):
            raise NonFiniteError("loss nan")

        def estimate(mean: float) -> Estimate:
            return Estimate(mean, 0.05, mean - 0.1, mean + 0.1, mean - 0.1, mean + 0.1, 208)

        harm = Judged(Improvement(name="harm", value=b), b, estimate(b + (0.1 if "caid" in folder.name else -0.3)), "met")
        evaluation = Evaluation(
            reward=estimate(0.2), constraints=(harm,), audits=(), kl=estimate(1.0), finished=(1, 1), mean_length=(9, 9),
            refusal_harmless=None,
            n_prompts=208, n_responses=8,
        )  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(evaluation.as_dict()))
        (folder / "report.html").write_text("")

    def draw_samples(plans):
        folder = Path(plans[0].config.samples_of)
        folder.mkdir(exist_ok=True)
        write_timing(folder, [replace(SPEED, stage="reference", tokens=1000)])
        return []

    monkeypatch.setattr(Algorithm, "train", lambda row, config, *, resume=None: train(config, resume=resume))
    monkeypatch.setattr(sweep_runs, "draw_samples", draw_samples)
    monkeypatch.setattr(sweep_runs, "write", lambda *a: None)
    return names


def test_parts_are_run_gone_on_with_and_collected(tmp_path, trained, monkeypatch, capsys):
    def run(
        *argv: str, flags: tuple[str, ...] = ("--model", "org/model", "--device", "cpu", "--threads", "1")
    ) -> int:
        where = ("--out", str(tmp_path / "runs"), "--docs", str(tmp_path / "gpu"))
        monkeypatch.setattr("sys.argv", ["study", *argv, *where, "--", *flags])
        trained.clear()
        return study.main()

    question = ("--seeds", "0", "1")
    # Stopped in the third run, then gone on with by the same command, then only read.
    trained.fail["stop"] = "caid-b0.4-seed0"
    assert run(*question) == 130 and trained == ["caid-b0.2-seed0", "mocan-b0.2-seed0"]
    assert not (tmp_path / "gpu").exists() and "the same command goes on in" in capsys.readouterr().err
    del trained.fail["stop"]
    assert run(*question) == 0 and len(trained) == 6 and trained[0] == "caid-b0.4-seed0"
    whole = {path.name: path.read_bytes() for path in (tmp_path / "gpu").rglob("*.*")}
    assert run(*question) == 0 and trained == []
    assert (
        whole == {path.name: path.read_bytes() for path in (tmp_path / "gpu").rglob("*.*")}
        and len(whole) == 4
    )
    text = (tmp_path / "gpu" / "study.md").read_text()
    assert (
        "not resolved yet, 2 of 8 planned seeds" in text
        and "4 | +0.100 | 0.000 | 0.100 |" in text
        and "both on org/model" in text
    )
    assert (
        "| caid | 0 | 0.2 | 0.70 | +0.30 [0.20, 0.40] | +0.20 [0.10, 0.30] | - | 1.00 | met | 70 | 1000 | 1070 | 2 | 3 |"
        in text
    )
    assert "took 2.0 hours" in text and "--eval-responses 8 --model org/model --device cpu`" in text
    # A second part, a control, one of whose runs fails.
    trained.fail["diverge"] = "mocan-b0.4-seed1"
    control = ("--seeds", "0", "1", "--algorithms", "mocan", "--thresholds", "0.4")
    assert run(*control, flags=("--model", "org/model", "--device", "cpu", "--n-responses", "10")) == 0
    text = (tmp_path / "gpu" / "study.md").read_text()
    assert (
        "| mocan --n-responses 10 | caid | 1 | 1 | +0.200 | - |" in text
        and "| mocan --n-responses 10 | mocan | 1 | 1 | +0.000 |" in text
    )
    assert "mocan --n-responses 10 at seed 1 failed: loss nan" in text and text.count("| caid |") == 6
    # Runs that another part has are refused before anything is run; one that failed there is not.
    assert run("--seeds", "1", "--algorithms", "caid", "--thresholds", "0.4", "0.6") == 2 and trained == []
    assert "the run of caid at seed 1 and b 0.4 is in" in capsys.readouterr().err
    assert (
        run(
            "--seeds",
            "1",
            *control[3:],
            flags=("--model", "org/model", "--device", "cpu", "--n-responses", "10"),
        )
        == 0
    )
    assert trained == ["mocan-b0.4-seed1"]


def test_the_test_prompts_are_new_and_enough():
    from engine.data.prompts import lookalike_prompts, shipped_prompts

    def texts(path):
        return [json.loads(line)["prompt"] for line in open(path, encoding="utf-8")]

    def normal(text):
        return "".join(text.casefold().split())

    own = [normal(x) for x in texts(study.TEST_PROMPTS)]
    assert len(own) == len(set(own)) >= 200
    known = {
        normal(x)
        for path in (*shipped_prompts("train"), *shipped_prompts("heldout"), lookalike_prompts())
        for x in texts(path)
    }
    assert not known & set(own)
