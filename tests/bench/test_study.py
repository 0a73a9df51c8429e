"""The study's parts, its page and its command."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench.study import __main__ as command
from bench.study.arms import arm, complete
from bench.study.commands import remaining
from bench.study.flags import options, shown, words
from bench.study.page import page_text
from bench.study.parts import part_name, read_parts
from bench.study.picture import picture
from bench.study.plan import DOCS, FLAGS, OTHERS, TEST_PROMPTS
from engine.config import Algorithm
from engine.constraints import Improvement, Judged
from engine.data.prompts import lookalike_prompts, shipped_prompts
from engine.errors import NonFiniteError, UserError
from engine.intervals import Estimate
from engine.run import outputs
from engine.run.folder import RunFolder
from engine.run.rows import StageTimeRow
from engine.sweep import runs as sweep_runs
from engine.verdict.evaluation import Evaluation
from tests.helpers.rows import POLICY, REFERENCE, SPEED, STEP, write_timing
from tests.helpers.runs import write_run
from tests.helpers.study_rows import ROWS, row, with_another_cost

SETTINGS = [
    {"seeds": [0], "algorithms": ["caid"], "thresholds": ["0.2"], "flags": [], "versions": {}, "hours": 1.0}
]


def test_the_question_is_fixed_whatever_else_was_run():
    assert complete(ROWS) == [0, 1, 2]
    assert complete([*ROWS[1:], row("caid", 0, 0.2, 0.1, error="stopped")]) == [1, 2]
    # Neither another threshold, nor a seed beyond the plan, nor another cost empties
    # the answer or gets into it.
    other = {k.replace("harm", "noise"): v for k, v in row("caid", 3, 0.2, 0.1).items()}
    more = [
        *ROWS,
        row("caid", 0, 0.3, 9.0),
        *(row(x, 8, b, 9.0) for x in ("caid", "mocan") for b in (0.2, 0.4)),
        other,
    ]
    assert complete(more) == [0, 1, 2]
    assert arm(more, "caid", [0, 1, 2]).slack_SB == pytest.approx(arm(ROWS, "caid", [0, 1, 2]).slack_SB)

    def answers(text: str) -> list[str]:
        shown = ("**Answer", "| caid | 0.2, 0.4 |")
        return [line for line in text.splitlines() if line.startswith(shown)]

    text, before = (page_text(rows, SETTINGS, {}) for rows in (more, ROWS))
    assert answers(text) == answers(before) and len(answers(text)) == 2
    assert "| caid | 3 | +0.10 [0.00, 1.00] | noise | 0.2 |" in text and "| caid | 0 | 0.3 |" in text


def test_a_run_without_audit_or_verdict_shifts_no_cell():
    columns = ["algorithm", "seed", "harm threshold", "error", *ROWS[0]]
    failed = dict.fromkeys(columns, "")
    failed |= {k: row("caid", 5, 0.2, 0.1)[k] for k in ("algorithm", "seed", "harm threshold")}
    no_audit = row("caid", 4, 0.2, 0.1) | {k: "" for k in ROWS[0] if k.startswith("audit")}
    text = page_text([*ROWS, no_audit, {**failed, "error": "loss nan"}], SETTINGS, {})
    shown = r"\| (caid|mocan) \| \d \||.*\| lambda \|"
    table = [line for line in text.splitlines() if re.match(shown, line)]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 1 + len(ROWS) + 1
    assert "| caid | 4 | 0.2 | 1.00 | +0.10 [0.00, 1.00] | +0.10 [0.00, 1.00] | - | 1.50 | met |" in text
    assert "caid at seed 5 failed: loss nan" in text


def test_what_remains_are_commands_that_can_be_run(tmp_path):
    start = "python -m bench.study --seeds 3 4 5"
    commands = remaining(ROWS, options(shown(FLAGS)), DOCS)
    assert commands[0] == f"{start} 6 7 --algorithms caid mocan --thresholds 0.2 0.4"
    assert commands[1].startswith(f"{start} --algorithms primal_dual dpo:objective=reward")
    assert commands[3].endswith("--algorithms mocan --thresholds 0.4 -- --n-responses 10")
    assert len(commands) == 5
    # A seed that has one threshold is not run at it again, which would be refused.
    more = remaining([*ROWS, row("caid", 7, 0.4, 0.4), row("mocan", 7, 0.4, 0.4)], {}, DOCS)
    assert more[0] == f"{start} 6 --algorithms caid mocan --thresholds 0.2 0.4"
    assert more[1].endswith("--seeds 7 --algorithms caid mocan --thresholds 0.2")
    two = [
        row("caid --cost harm harm-audit --audit", 0, b, b) | {"harm-audit threshold": x}
        for b in (0.2, 0.4)
        for x in ("0.2", "0.4")
    ]
    # Algorithms that know no threshold have run wherever they have, and a failed run is none.
    others = [
        row(label, seed, 0.2, 1.0, "" if seed > 3 else "stopped")
        for label in OTHERS[1:]
        for seed in range(3, 6)
    ]
    commands = remaining([*ROWS, *two, *others], {"--model": ("big",)}, tmp_path / "gpu")
    assert len(commands) == 5 and commands[0].endswith("--docs gpu -- --model big")
    assert f"--seeds 3 --algorithms {' '.join(OTHERS)} --thresholds 0.4" in commands[1]
    assert "--seeds 4 5 --algorithms primal_dual --thresholds 0.4" in commands[2]


def keep(folder: Path, name: str, rows: list[dict], flags: tuple[str, ...] = ()) -> None:
    """Writes a part as `run_part` keeps it."""
    (folder / "study").mkdir(exist_ok=True)
    path = folder / "study" / f"part-{name}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    settings = SETTINGS[0] | {
        "flags": shown((*FLAGS, *flags)),
        "versions": {"commit": "abc", "threads": "2"},
        "hours": 1.5,
    }
    path.with_suffix(".json").write_text(json.dumps(settings))


def test_parts_are_read_together_and_doubles_refused(tmp_path):
    keep(tmp_path, "a", ROWS[:6])
    keep(tmp_path, "b", ROWS[6:])
    rows, settings, shared = read_parts(tmp_path / "study")
    assert rows == ROWS and len(settings) == 2 and words(shared) == shown(FLAGS)
    text = page_text(rows, settings, shared)
    # The tokens of training, the reference's and their sum; in the summary their means.
    assert text.count("| met | 10 | 100 | 110 | 5 | 4 |") == 12
    assert text.count("+0.100 | 10 | 100 | 110 | 5 | 4 |") == 2
    # Both methods' ranges of improvement at a seed never meet here.
    assert "**Answer: " in text and "overlap at 0 of 3 seed(s)." in text
    assert text.count("| caid |") == 7 and "--margin 0" in text
    assert picture(rows, [0, 1, 2])[:4] == picture(ROWS[:1], [])[:4] == b"\x89PNG"
    assert "took 3.0 hours" in text and "commit(s) abc and ran on 2 thread(s)" in text
    (tmp_path / "study" / "notes.md").write_text("A run was done twice.\n")
    assert "\nA run was done twice.\n" in page_text(rows, settings, shared, tmp_path)
    keep(tmp_path, "c", ROWS[6:])
    message = "part-c.csv: the run of mocan at seed 0 and b 0.2 is in .*part-b.csv too"
    with pytest.raises(UserError, match=message):
        read_parts(tmp_path / "study")


def test_only_flags_that_differ_between_parts_enter_the_names(tmp_path):
    shared_flags = "--model org/model --device cuda --prompts data/own.jsonl".split()
    big = (*shared_flags, "--cost", "harm=/secret/heads/harm")
    keep(tmp_path, "a", ROWS, (*big, "--threads", "1"))
    # A control is another method, and two costs are another table; threads belong to the machine.
    keep(tmp_path, "b", ROWS[6:8], (*big, "--threads=2", "--n-responses", "10"))
    both = [with_another_cost(r) for r in ROWS[:2]]
    keep(tmp_path, "c", both, (*big[:-2], "--cost", "harm", "other", "--threads", "2"))
    rows, settings, shared = read_parts(tmp_path / "study")
    names = list(dict.fromkeys(r["algorithm"] for r in rows))
    assert names == [
        "caid --cost harm=harm",
        "mocan --cost harm=harm",
        "mocan --cost harm=harm --n-responses 10",
        "caid --cost harm other",
    ]
    (tmp_path / "study" / "part-c.csv").unlink()
    rows, settings, shared = read_parts(tmp_path / "study")
    assert list(dict.fromkeys(r["algorithm"] for r in rows)) == ["caid", "mocan", "mocan --n-responses 10"]
    text = page_text(rows, settings, shared, tmp_path / "gpu")
    assert "flags `--margin 0 --heldout test.jsonl --eval-prompts 208 --eval-responses 8 --model " in text
    assert "--eval-responses 8 --model org/model --device cuda " in text
    assert "| mocan --n-responses 10 | 0.2, 0.4 | 2 |" in text
    assert "| mocan --n-responses 10 | caid | 2 | 1 | +0.100 | - |" in text
    assert "secret" not in text and "--prompts data/own.jsonl" in text
    assert "--docs gpu -- --model org/model" in text and "--threads" not in text
    assert "--n-responses 10`: commit abc, threads 2" in text


def test_two_costs_have_a_table_of_their_own(tmp_path):
    both = [with_another_cost(r) for r in ROWS[:2]]
    keep(tmp_path, "a", ROWS)
    keep(tmp_path, "b", both, ("--cost", "harm", "other"))
    text = page_text(*read_parts(tmp_path / "study"))
    assert text.count("| harm | 0.") == 2 and text.count("| other | 0.3 | 2.00 |") == 2
    assert "| caid --cost harm other | 0 |" in text


def test_parts_have_folders_of_their_own():
    name = part_name(["caid", "mocan"], ["0.2", "0.4"], [1, 2], [])
    assert name == "caid-mocan-b-0.2-0.4-seeds-1-2"
    others = [
        part_name(["caid"], b, [0], [])
        for b in (["0.2"], ["-0.2"], ["0.2", "0.4"], ["0.2,0.4"], ["0.2,-0.4"])
    ]
    assert len(set(others)) == 5
    bisection = part_name(["caid:dual_rule=bisection"], ["0.4"], [0], ["--device", "cuda"])
    assert bisection == "caid-dual_rule-bisection-b-0.4-seeds-0-device-cuda"


class Trained(list):
    """Names of runs in order, and which one is to be stopped or to diverge."""

    def __init__(self) -> None:
        self.fail: dict[str, str] = {}


@pytest.fixture
def trained(monkeypatch) -> Trained:
    """Stands in for training: each run's files are written at once, and its name is noted in a list.

    CAID ends 0.1 above b, all others 0.3 below.
    """
    names = Trained()
    fail = names.fail

    def train(config, *, resume=None):
        folder, (b,) = Path(config.out), config.threshold
        if folder.name == fail.get("stop"):
            raise KeyboardInterrupt
        names.append(folder.name)
        if not folder.exists():
            stages = {
                "reference": [REFERENCE],
                "iteration-1/policy": [STEP, STEP, replace(POLICY, lam=[0.7])],
            }
            write_run(folder, "caid", {}, stages, {"commit": "abc", "threads": "4"})
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
        if folder.name == fail.get("diverge"):
            raise NonFiniteError("loss nan")

        def estimate(mean: float) -> Estimate:
            return Estimate(mean, 0.05, mean - 0.1, mean + 0.1, mean - 0.1, mean + 0.1, 208)

        harm = Judged(
            Improvement(name="harm", value=b),
            b,
            estimate(b + (0.1 if "caid" in folder.name else -0.3)),
            "met",
        )
        evaluation = Evaluation(
            reward=estimate(0.2),
            constraints=(harm,),
            audits=(),
            kl=estimate(1.0),
            finished=(1, 1),
            mean_length=(9, 9),
            refusal_harmless=None,
            n_prompts=208,
            n_responses=8,
        )
        (folder / "evaluation.json").write_text(json.dumps(evaluation.as_dict()))
        outputs.note(RunFolder(folder), [folder / "evaluation.json"])

    def draw_samples(plans, ranks):
        folder = Path(plans[0].config.samples_of)
        folder.mkdir(exist_ok=True)
        write_timing(folder, [replace(SPEED, stage="reference", tokens=1000)])
        return []

    monkeypatch.setattr(Algorithm, "train", lambda row, config, *, resume=None: train(config, resume=resume))
    monkeypatch.setattr(sweep_runs, "draw_samples", draw_samples)
    monkeypatch.setattr(sweep_runs, "write", lambda *a: None)
    return names


def test_parts_are_run_gone_on_with_and_collected(tmp_path, trained, monkeypatch, capsys):
    base = ("--model", "org/model", "--device", "cpu")

    def run(*argv: str, flags: tuple[str, ...] = (*base, "--threads", "1")) -> int:
        where = ("--out", str(tmp_path / "runs"), "--docs", str(tmp_path / "gpu"))
        monkeypatch.setattr("sys.argv", ["study", *argv, *where, "--", *flags])
        trained.clear()
        return command.main()

    question = ("--seeds", "0", "1")
    # Stopped in the third run, then gone on with by the same command, then only read.
    trained.fail["stop"] = "caid-b0.4-seed0"
    assert run(*question) == 130 and trained == ["caid-b0.2-seed0", "mocan-b0.2-seed0"]
    assert (
        not (tmp_path / "gpu").exists()
        and "start the same command again, which goes on in" in capsys.readouterr().err
    )
    del trained.fail["stop"]
    assert run(*question) == 0 and len(trained) == 6 and trained[0] == "caid-b0.4-seed0"

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "gpu").rglob("*.*")}

    whole = files()
    assert run(*question) == 0 and trained == []
    assert whole == files() and len(whole) == 4
    text = (tmp_path / "gpu" / "study.md").read_text()
    assert "not resolved yet, 2 of 8 planned seeds" in text and "both on org/model" in text
    assert "4 | +0.100 | 0.000 | 0.100 |" in text
    measured = "0.70 | +0.30 [0.20, 0.40] | +0.20 [0.10, 0.30] | - | 1.00 | met"
    assert f"| caid | 0 | 0.2 | {measured} | 70 | 1000 | 1070 | 2 | 3 |" in text
    assert "took 2.0 hours" in text and "--eval-responses 8 --model org/model --device cpu`" in text
    # The second part is a control, one of whose runs fails.
    trained.fail["diverge"] = "mocan-b0.4-seed1"
    control = ("--seeds", "0", "1", "--algorithms", "mocan", "--thresholds", "0.4")
    assert run(*control, flags=(*base, "--n-responses", "10")) == 0
    text = (tmp_path / "gpu" / "study.md").read_text()
    assert "| mocan --n-responses 10 | caid | 1 | 1 | +0.200 | - |" in text
    assert "| mocan --n-responses 10 | mocan | 1 | 1 | +0.000 |" in text
    assert "mocan --n-responses 10 at seed 1 failed: loss nan" in text and text.count("| caid |") == 6
    # Runs that another part has are refused before anything is run; one that failed there is not.
    assert run("--seeds", "1", "--algorithms", "caid", "--thresholds", "0.4", "0.6") == 2 and trained == []
    assert "the run of caid at seed 1 and b 0.4 is in" in capsys.readouterr().err
    assert run("--seeds", "1", *control[3:], flags=(*base, "--n-responses", "10")) == 0
    assert trained == ["mocan-b0.4-seed1"]


def test_the_test_prompts_are_new_and_enough():
    def texts(path) -> list[str]:
        """Reads the prompts of a file without case and spaces."""
        with open(path, encoding="utf-8") as file:
            return ["".join(json.loads(line)["prompt"].casefold().split()) for line in file]

    new = texts(TEST_PROMPTS)
    assert len(new) == len(set(new)) >= 200
    paths = (*shipped_prompts("train"), *shipped_prompts("heldout"), lookalike_prompts())
    assert not set(new) & {text for path in paths for text in texts(path)}
