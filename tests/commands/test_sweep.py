"""engine.sweep: shared samples, the path of the dual, the table and its pictures, resuming, bad input."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import caid, dual
from engine.config import CaidConfig, RunConfig, smoke
from engine.errors import UserError
from engine.run.rows import (
    IterationRow,
    PolicyRow,
    ReferenceRow,
    SpeedRow,
    StageTimeRow,
    StepRow,
    read_rows,
    read_timing,
)
from engine.run.store import load
from engine.stages.reference import ReferenceSamples
from engine.sweep import __main__ as sweep_main
from engine.sweep.outcomes import effort, kept_lam
from engine.sweep.pages import write_table
from engine.sweep.plans import Plan, SweepConfig, configs_of
from engine.sweep.runs import begun, draw_samples
from tests.helpers.pictures import sweeps_in_pixels
from tests.helpers.rows import SPEED, write_timing

COMMON = ["--", "--threads", "1", "--force"]
ARGUMENTS = [
    "--preset",
    "smoke",
    "--algorithms",
    "caid:iterations=2",
    "mocan",
    "dpo",
    "--thresholds",
    "0.1",
    "-0.2",
    "--seeds",
    "3",
]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "s"
    with sweeps_in_pixels():
        assert sweep_main.main([*ARGUMENTS, "--out", str(out), *COMMON]) == 0
    return out


def rows_of(out: Path) -> list[dict]:
    with open(out / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_the_verdict_of_every_run(swept):
    rows = rows_of(swept)
    runs = [
        "caid-iterations=2-b0.1-seed3",
        "mocan-b0.1-seed3",
        "dpo-seed3",
        "caid-iterations=2-b-0.2-seed3",
        "mocan-b-0.2-seed3",
    ]
    assert [row["algorithm"] for row in rows] == [
        "caid:iterations=2",
        "mocan",
        "dpo",
        "caid:iterations=2",
        "mocan",
    ]
    for row, name in zip(rows, runs, strict=True):
        found = json.loads((swept / name / "evaluation.json").read_text())
        assert float(row["reward"]) == found["reward"]["mean"]
        constraint = found["constraints"][0]
        assert (
            float(row["harm"]) == constraint["estimate"]["mean"] and row["harm verdict"] == constraint["word"]
        )
        assert float(row["harm threshold"]) == constraint["threshold"]
        assert float(row["harm lambda"]) == read_rows(swept / name, PolicyRow)[-1].lam[0]
        assert int(row["policy steps"]) == len(read_rows(swept / name, StepRow))
    caid_tokens, mocan_tokens = (int(rows[i]["sampled tokens"]) for i in (0, 1))
    # MoCAN samples nothing in training, and neither verdict is counted.
    slack = [row.tokens for row in read_timing(swept / runs[0], SpeedRow) if row.stage.endswith("slack")]
    assert caid_tokens == sum(slack) > 0 and mocan_tokens == 0
    speeds = read_timing(swept / "samples-seed3", SpeedRow)
    (reference,) = [row.tokens for row in speeds if row.stage == "reference"]
    assert {int(row["reference tokens"]) for row in rows} == {reference}
    assert len(read_rows(swept / runs[0], IterationRow)) == 2


def test_runs_of_a_seed_share_the_reference_and_end_like_runs_alone(swept, tmp_path):
    """A run with --samples-of gives the policy and the verdict of one that samples by itself."""
    alone = smoke(
        CaidConfig(iterations=2, seed=3, threshold=(0.1,), threads=1, force=True, out=str(tmp_path / "alone"))
    )
    caid.train(alone)
    shared = swept / "caid-iterations=2-b0.1-seed3"
    for name in ("evaluation.json", "heldout.jsonl", "adapters/iteration-2/adapter_model.safetensors"):
        assert (shared / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    samples = read_rows(swept / "samples-seed3", ReferenceRow)[0]
    for name in ("mocan-b0.1-seed3", "mocan-b-0.2-seed3"):
        assert read_rows(swept / name, ReferenceRow)[0].reward_sd == samples.reward_sd


def test_an_interrupted_attempt_is_not_counted_twice(tmp_path):
    """Ctrl-C leaves a stage row before that of the whole attempt, and a kill leaves none."""
    slack = "iteration-1/slack"
    write_timing(
        tmp_path,
        [
            replace(SPEED, stage=slack, tokens=70),
            StageTimeRow(stage=slack, seconds=3.0),
            replace(SPEED, stage=slack, tokens=70),
            replace(SPEED, stage=slack, tokens=70),
            StageTimeRow(stage=slack, seconds=5.0),
            StageTimeRow(stage="heldout/policy", seconds=9.0),
        ],
    )
    assert effort(tmp_path) == ({"iteration-1/slack": 70}, {"iteration-1/slack": 5.0, "heldout/policy": 9.0})


def test_pictures_and_page_show_every_run(swept):
    page = (swept / "index.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and page.count("data:image/png;base64,") == 2
    for name in (
        "CAID:iterations=2",
        "MoCAN",
        "DPO",
        "one-shot lambda",
        "caid-iterations=2-b0.1-seed3",
        "dpo-seed3",
    ):
        assert name in page
    for name in ("pareto.png", "multipliers.png"):
        assert (swept / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (
            swept / name
        ).stat().st_size > 20_000


def test_a_stopped_sweep_goes_on_and_ends_equal(swept, tmp_path):
    """A kill leaves some runs whole, one in its middle and the others not begun:
    the sweep still ends equal."""
    out = tmp_path / "s"
    shutil.copytree(swept, out)
    for name in ("table.csv", "index.html", "mocan-b0.1-seed3/evaluation.json"):
        (out / name).unlink()
    shutil.rmtree(out / "mocan-b-0.2-seed3")
    for last in (out / "mocan-b0.1-seed3" / "stages").glob("0[45]-*"):
        last.unlink()
    # The copy's runs name the first folder as where their samples are, so the sweep
    # has to run where it began.
    shutil.rmtree(swept.with_name("old"), ignore_errors=True)
    swept.rename(swept.with_name("old"))
    out.rename(swept)
    with sweeps_in_pixels():
        assert sweep_main.main(["--resume", str(swept)]) == 0
    drop = {"seconds"}
    before, after = (
        [{k: v for k, v in row.items() if k not in drop} for row in rows_of(o)]
        for o in (swept.with_name("old"), swept)
    )
    assert before == after
    assert (swept / "pareto.png").read_bytes() == (swept.with_name("old") / "pareto.png").read_bytes()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--algorithms", "cad"], "--algorithms cad: not one of .*; choose one of them. Did you mean caid"),
        (["--thresholds", "x"], "--thresholds x: must be a number"),
        *[
            ([flag], f"{flag}: no value; give at least one")
            for flag in ("--algorithms", "--thresholds", "--seeds")
        ],
        (["--thresholds", "0.1,0.2"], "2 value\\(s\\) for 1 cost"),
        (["--algorithms", "caid:stps=3"], "unknown flag --stps"),
        (
            ["--algorithms", "caid", "mocan:tune=full,learning_rate=1e-5"],
            "--tune full, lora: the runs of a sweep share",
        ),
        (
            ["--algorithms", "mocan:threshold=0.9"],
            "mocan:threshold=0.9: the sweep sets --threshold; .*--thresholds",
        ),
        (["--algorithms", "caid:seed=4"], "caid:seed=4: the sweep sets --seed; .*--seeds"),
        (["--algorithms", "caid:out=there"], "caid:out=there: the sweep sets --out"),
        (["--algorithms", "caid:steps=4,steps=5"], "caid:steps=4,steps=5: --steps is given twice"),
        (
            ["--algorithms", "caid:pairs=a/b", "caid:pairs=a-b"],
            "both would have the folder caid-pairs=a-b-b0.2",
        ),
        (["--", "--nonsense", "3"], "flag --nonsense behind --: .*; correct it or leave it out"),
        (["--", "--seed", "3"], "--seed behind --: the sweep sets it"),
        (
            ["--", "--require-met"],
            "--require-met behind --: a sweep compares verdicts and needs none; leave it out",
        ),
        (["--", "--beta", "0"], "--beta 0"),
        (["--preset", "large"], "--preset large"),
        (["--resume", "nowhere"], "no sweep is there"),
        (["--resume", "nowhere", "--seeds", "1"], "takes no other flags"),
    ],
)
def test_bad_input_ends_before_any_compute(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    assert sweep_main.main(argv) == 2
    assert re.search(said, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_what_is_solved_before_training_is_each_algorithms_own_problem(tmp_path):
    """The dual is solved for every beta and margin, but neither for DPO, which has no threshold,
    nor for scores that are not there yet. A sweep of these alone is not refused."""

    def plans(labels: tuple[str, ...], threshold: str) -> list[Plan]:
        own = SweepConfig(
            out=str(tmp_path), algorithms=labels, thresholds=(threshold,), flags=("--threads", "1")
        )
        return configs_of(own, "smoke")

    labels = ("dpo", "pecan", "caid:scores=preference")
    assert draw_samples(plans(labels, "99")) == []
    rows = draw_samples(plans((*labels, "mocan", "mocan:beta=2", "mocan:margin=0.01", "caid"), "0.05"))
    beta = RunConfig.beta
    assert [(row.beta, row.margin) for row in rows] == [(beta, 0), (beta, 0.01), (2, 0)]
    assert rows[0].aim == rows[2].aim == [0.05] and rows[1].aim[0] > 0.05
    (units,) = read_rows(tmp_path / "samples-seed0", ReferenceRow)
    scores = load(
        tmp_path / "samples-seed0" / "stages" / "01-reference.safetensors", ReferenceSamples
    ).samples.scores
    r = scores.reward_PG / units.reward_sd
    g = scores.utility_PGJ / torch.tensor(units.utility_sd, dtype=torch.float64)
    for row in rows:
        assert row.lam == pytest.approx(dual.solve(r, g, row.aim, row.beta).lam.tolist(), rel=1e-8)


def test_a_first_iterate_past_max_kl_has_the_multipliers_of_its_iteration(tmp_path):
    out = tmp_path / "s"
    argv = [
        "--preset",
        "smoke",
        "--algorithms",
        "caid:iterations=2",
        "--thresholds",
        "0.1",
        "--out",
        str(out),
    ]
    # A kill between the folder and its settings.
    out.mkdir()
    (out / "sweep.json.tmp").write_text("{")
    assert sweep_main.main([*argv, *COMMON, "--max-kl", "1e-9"]) == 0
    (row,) = rows_of(out)
    folder = out / "caid-iterations=2-b0.1-seed0"
    assert float(row["harm lambda"]) == read_rows(folder, IterationRow)[0].lam[0]
    # The reference against itself, up to float32.
    assert kept_lam(folder) is None and float(row["kl nats"]) == pytest.approx(0, abs=1e-3)
    # A kill after the verdict, before the report.
    whole = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert sweep_main.main(["--resume", str(out)]) == 0 and (folder / "report.html").read_bytes() == whole
    assert sweep_main.main([*argv, *COMMON]) == 2


def test_thresholds_that_the_samples_do_not_support_end_it_before_training(tmp_path, capsys):
    argv = [
        "--preset",
        "smoke",
        "--algorithms",
        "mocan",
        "--thresholds",
        "0.1",
        "99",
        "--out",
        str(tmp_path / "s"),
        "--",
        "--threads",
        "1",
    ]
    assert sweep_main.main(argv) == 2
    error = capsys.readouterr().err
    assert (
        "error: --thresholds 99: --threshold 99 (with" in error
        and "is beyond what the 4 samples" in error
        and "behind --." in error
    )
    assert not list((tmp_path / "s").glob("mocan*"))


def test_near_thresholds_have_folders_of_their_own(tmp_path):
    values = ("0.1", "0.10000001", "0.1000000001", "0.25", "1e-7", "0.10")
    plans = configs_of(SweepConfig(out=str(tmp_path), algorithms=("mocan",), thresholds=values), "smoke")
    assert [(plan.folder.name, *plan.threshold) for plan in plans] == [
        ("mocan-b0.1-seed0", 0.1),
        ("mocan-b0.10000001-seed0", 0.10000001),
        ("mocan-b0.1000000001-seed0", 0.1000000001),
        ("mocan-b0.25-seed0", 0.25),
        ("mocan-b1e-07-seed0", 1e-7),
    ]


def test_a_sweep_deletes_nothing_in_the_place_of_a_run(tmp_path):
    notes, stage, file = (tmp_path / name for name in ("notes", "stage", "file"))
    for folder in (notes, stage):
        (folder / "stages").mkdir(parents=True)
    (notes / "my notes.txt").write_text("dear diary")
    (stage / "stages" / "01-reference.safetensors").write_bytes(b"x")
    file.write_text("mine")
    assert begun(tmp_path / "none") is None
    for path in (notes, stage, file):
        with pytest.raises(UserError, match=f"{path}: no run, and in its way; move it away"):
            begun(path)
    assert (notes / "my notes.txt").read_text() == "dear diary" and file.exists()
    assert any((stage / "stages").iterdir())


def test_cells_that_start_a_formula_are_quoted(tmp_path):
    head = '=HYPERLINK("http://x")'
    rows = [
        {"algorithm": "caid", head: -0.5, "-b": "not met", "error": "@x"},
        {"a": "+1", "b": 3, "c": "\t", "d": ""},
    ]
    write_table(tmp_path / "table.csv", rows)
    with open(tmp_path / "table.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["algorithm", f"'{head}", "'-b", "error"],
            ["caid", "-0.5", "not met", "'@x"],
            ["'+1", "3", "'\t", ""],
        ]


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": ["0"]},
        {"seeds": 3},
        {"thresholds": "0.1"},
        {"preset": "large"},
        {"other": []},
        {"flags": [1]},
    ],
)
def test_damaged_settings_of_a_sweep_are_refused(tmp_path, capsys, change):
    settings = {"preset": "smoke", "algorithms": ["caid"], "thresholds": ["0.1"], "seeds": [0], "flags": []}
    (tmp_path / "sweep.json").write_text(json.dumps(settings | change))
    assert sweep_main.main(["--resume", str(tmp_path)]) == 2
    assert "no sweep is there" in capsys.readouterr().err


def test_samples_of_another_setting_are_refused(swept, tmp_path):
    samples = str(swept / "samples-seed3")
    with pytest.raises(UserError, match="--samples-of .*: it has --seed 3, this run has 4"):
        caid.train(smoke(CaidConfig(seed=4, threads=1, samples_of=samples, out=str(tmp_path / "run"))))
    assert not (tmp_path / "run").exists()


def test_a_sweep_reads_one_state_of_its_files_and_counts_no_damaged_run(tmp_path, capsys):
    rows = [{"prompt": f"Say it {i}", "chosen": "yes" * (i % 3 + 1), "rejected": "no"} for i in range(12)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "s"
    labels = [f"mocan:pairs={pairs}", "mocan:steps=2", f"mocan:steps=1,pairs={pairs}"]
    algorithms = ["--algorithms", *labels, "--thresholds", "0.1"]
    assert sweep_main.main(["--preset", "smoke", *algorithms, "--out", str(out), *COMMON]) == 0
    table, page = ((out / name).read_bytes() for name in ("table.csv", "index.html"))
    by_pairs, by_steps, by_three = (
        next(out.glob(f"mocan-{name}*")) for name in ("pairs", "steps=2", "steps=1")
    )
    # What is damaged in a finished run is restored before the run is counted.
    lines = (by_steps / "metrics.jsonl").read_text().splitlines(keepends=True)
    (by_steps / "metrics.jsonl").write_text("".join(lines[:-2]))
    verdict = (by_pairs / "evaluation.json").read_bytes()
    (by_pairs / "evaluation.json").write_bytes(verdict.replace(b"0.", b"1."))
    files = by_pairs / "inputs.safetensors", by_steps / "model/config.json"
    owned = {file: file.read_bytes() for file in files}
    for file in owned:
        file.write_bytes(b"")
    assert sweep_main.main(["--resume", str(out)]) == 0
    assert (by_pairs / "evaluation.json").read_bytes() == verdict
    assert owned == {file: file.read_bytes() for file in owned}
    assert (by_steps / "metrics.jsonl").read_text() == "".join(lines)
    assert (table, page) == tuple((out / name).read_bytes() for name in ("table.csv", "index.html"))
    # A run that begins later reads the files that the runs before it have read, or none.
    pairs.write_text(pairs.read_text().replace("no", "never"))
    assert sweep_main.main(["--resume", str(out)]) == 0, "a run that has begun owns its pairs"
    capsys.readouterr()
    shutil.rmtree(by_three)
    assert sweep_main.main(["--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"--pairs {pairs} has changed since" in said and said.count("\n") == 1
