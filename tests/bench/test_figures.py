"""bench.figures on synthetic scores, and on the files of a smoke run."""

import json
from dataclasses import replace

import pytest
import torch

from bench.figures import __main__ as command
from bench.figures import calibration, stored
from bench.figures.calibration import BINS, draw_calibration, judge_preferences, pair_differences, reliability
from bench.figures.page import page_text
from bench.figures.predictions import realised
from bench.figures.stored import Stored, read_stored
from bench.figures.subsets import draw_subsets, lam_of_subsets
from engine import caid, dual, pecan
from engine.config import CaidConfig, PecanConfig, RunConfig, smoke
from engine.errors import UserError
from engine.run import committed
from engine.run.contents import read_contents
from engine.run.rows import DualRow, IterationRow, ReferenceRow, read_rows


def test_subsets_show_the_spread_of_prompts_and_the_bias_of_few_responses():
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(120, 8, generator=generator, dtype=torch.float64)
    g = torch.randn(120, 8, 1, generator=generator, dtype=torch.float64) - 0.3 * r[..., None]
    aim = torch.tensor([0.4], dtype=torch.float64)
    found = lam_of_subsets(r, g, aim, 1.0, draws=30)
    assert found["full"] == dual.solve(r, g, aim, 1.0).lam.tolist()
    few, *_, many = found["prompts"]
    narrow, wide = (row["high"][0] - row["low"][0] for row in (many, few))
    assert (few["n"], many["n"]) == (25, 100) and wide > narrow
    # The interval also has in it what is not known of the bias of 8 responses.
    assert narrow / 2 < many["half"][0] < 1.5 * narrow
    means = [row["mean"][0] for row in found["responses"] if row["mean"]]
    assert means[0] > means[-1] and means[-1] == pytest.approx(found["full"][0])
    assert found["responses"][-1]["n"] == 8
    assert draw_subsets(found).axes[0].get_xlabel() == "number of prompts"


def test_predictions_are_set_beside_what_a_run_measured(tmp_path, cache, monkeypatch, capsys):
    run = tmp_path / "run"
    caid.train(smoke(CaidConfig(out=str(run), threads=1, iterations=2, threshold=(0.05,))))
    samples = read_stored(run)
    reward, utility, beta = samples.reward_PG, samples.utility_PGJ, samples.beta
    assert utility.var(1).mean() == pytest.approx(1.0)
    assert samples.aim_J.tolist() == read_rows(run, ReferenceRow)[0].aim
    rows = realised(run, samples)
    assert [row["what"] for row in rows] == ["iteration 1", "iteration 2", "held out"]
    iterations, verdict = read_rows(run, IterationRow), json.loads((run / "evaluation.json").read_text())
    for row, measured in zip(rows, iterations, strict=False):
        tilt = ((reward + utility[..., 0] * measured.lam[0]) / beta).softmax(1)
        predicted = float(((tilt - 1 / reward.shape[1]) * utility[..., 0]).sum(1).mean())
        assert row["predicted"] == pytest.approx([predicted]) and row["measured"] == measured.improvement
    assert rows[-1]["measured"] == [verdict["constraints"][0]["estimate"]["mean"]]
    assert rows[-1]["lam"] == iterations[-1].lam
    assert beta == RunConfig.beta and "`run`: caid, seed 0, smoke; commit " in samples.says
    # A run of another beta is predicted with that beta.
    tilt = ((reward + utility[..., 0] * iterations[0].lam[0]) / 2).softmax(1)
    predicted = float(((tilt - 1 / reward.shape[1]) * utility[..., 0]).sum(1).mean())
    assert realised(run, replace(samples, beta=2.0))[0]["predicted"] == pytest.approx([predicted])
    monkeypatch.setattr(command, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["figures", str(run), str(run)])
    assert command.main() == 0
    text = (tmp_path / "figures.md").read_text()
    assert text.count("| run | iteration") == 2 and "| responses | 4 |" in text
    assert "    python -m bench.figures run run\n" in text and "torch " in text and "quickstart" not in text
    # A verdict on the reference has no multipliers: iterates past --max-kl are none.
    contents, kl = read_contents(run), [row.kl for row in iterations]
    nearest = iterations[kl.index(min(kl))].lam
    for limit, lam in ((min(kl), nearest), (-1.0, None)):
        limited = replace(contents, config={**contents.config, "max_kl": limit})
        with monkeypatch.context() as patch:
            patch.setattr(committed, "read_contents", lambda folder, limited=limited: limited)
            rows = realised(run, samples)
        assert rows[-1]["lam"] == lam if lam else len(rows) == len(iterations)
    # An older run lacks settings; one without samples is named.
    monkeypatch.setattr(stored, "read_contents", lambda folder: replace(contents, config={"beta": 1.0}))
    assert read_stored(run).aim_J.tolist() == samples.aim_J.tolist()
    (run / "stages" / "01-reference.safetensors").unlink()
    assert command.main() == 2 and f"error: {run}: it has no samples" in capsys.readouterr().err


def test_unsupported_draws_are_no_numbers(tmp_path):
    # Hardly any subset of the responses reaches the aim: infinite ends are null in JSON, words in the page.
    generator = torch.Generator().manual_seed(0)
    r, g = (torch.randn(30, 4, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    aim = torch.tensor([0.8], dtype=torch.float64)
    found = lam_of_subsets(r[..., 0], g, aim, 1.0, draws=10)
    few = found["responses"][0]
    assert few["low"] == few["high"] == [None] and few["unsupported"] == 10
    json.dumps(found, allow_nan=False)
    text = page_text("command", Stored(r[..., 0], g, aim, 1.0, "x"), found, [], [], [])
    assert (
        "| responses | 2 | unsupported | [unsupported, unsupported] | unsupported | unsupported | 10 of 60 |"
        in text
    )
    assert len(draw_subsets(found).axes) == 2


def test_reliability_of_known_predictions():
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    difference = pair_differences(score)
    assert len(difference) == 400 * 30 and difference.sum().item() == pytest.approx(0, abs=1e-9)
    assert difference[:5].tolist() == (score[0, 0] - score[0, 1:]).tolist()
    truth = torch.sigmoid(difference)
    exact = reliability(truth, truth)
    assert exact["error"] == pytest.approx(0) and exact["agreement"] == 1
    assert exact["predicted"] == exact["true"]
    # Predictions that are twice too sure: every bin's truth lies nearer to a half than its prediction.
    sure = reliability(torch.sigmoid(2 * difference), truth)
    assert sure["agreement"] == 1 and 0.05 < sure["error"] < 0.2
    assert all(abs(t - 0.5) < abs(p - 0.5) for p, t in zip(sure["predicted"], sure["true"], strict=True))
    # A truth that is the same for all pairs: predictions are calibrated in the mean only.
    away = (truth.view(-1) - 0.3).abs().mean().item()
    assert reliability(truth, 0.3 + 0 * truth)["error"] == pytest.approx(away, abs=0.02)


def test_calibration_reads_a_run_on_preferences(tmp_path, cache, monkeypatch):
    run = tmp_path / "run"
    pecan.train(smoke(PecanConfig(out=str(run), threads=1, force=True)))
    rows = judge_preferences(run)
    assert {row["truth"] for row in rows} == {"reward: the labels", "harm: the labels", "harm: harm-audit"}
    assert [row["what"] for row in rows if row["truth"] == "harm: harm-audit"][-1] == "model score"
    assert all(len(row["true"]) == BINS and 0 <= row["error"] <= 1 for row in rows)
    assert len(draw_calibration(rows).axes) == 3
    x, row = read_stored(run), read_rows(run, DualRow)[0]
    assert x.utility_PGJ.var(1).mean() == pytest.approx(1.0) and x.aim_J.tolist() == row.aim
    _, gain_PJ = dual.tilted_improvement(x.reward_PG, x.utility_PGJ, row.lam, x.beta)
    assert gain_PJ.mean(0).tolist() == pytest.approx(row.predicted_improvement)
    # The labels of a file are not what the scorers say.
    contents = replace(read_contents(run), config={"beta": 1.0, "preferences": "own.jsonl"})
    for module in (calibration, stored):
        monkeypatch.setattr(module, "read_contents", lambda folder: contents)
    truths = {row["truth"] for row in judge_preferences(run)}
    assert truths == {"reward: the run's scorer", "harm: the run's scorer", "harm: harm-audit"}
    contents = replace(contents, algorithm="caid")
    with pytest.raises(UserError, match="no log-ratio scores"):
        judge_preferences(run)
