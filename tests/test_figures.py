"""bench.figures on synthetic scores, and on the files of a smoke run."""

import json

import pytest
import torch

from bench import figures
from engine import caid, dual, pecan
from engine.config import CaidConfig, PecanConfig, smoke
from engine.errors import UserError
from engine.metrics import read_rows


def test_subsets_show_the_spread_of_prompts_and_the_bias_of_few_responses():
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(120, 8, generator=generator, dtype=torch.float64)
    g = torch.randn(120, 8, 1, generator=generator, dtype=torch.float64) - 0.3 * r[..., None]
    aim = torch.tensor([0.4], dtype=torch.float64)
    found = figures.subsets(r, g, aim, 1.0, draws=30)
    assert found["full"] == dual.solve(r, g, aim, 1.0).lam.tolist()
    few, *_, many = found["prompts"]
    assert (few["n"], many["n"]) == (25, 100) and few["high"][0] - few["low"][0] > many["high"][0] - many["low"][0]
    # The delta method's interval is about as wide as the spread that it predicts.
    assert many["half"][0] == pytest.approx((many["high"][0] - many["low"][0]) / 2, rel=0.5)
    means = [row["mean"][0] for row in found["responses"] if row["mean"]]
    assert means[0] > means[-1] and means[-1] == pytest.approx(found["full"][0]) and found["responses"][-1]["n"] == 8
    assert figures.draw_subsets(found).axes[0].get_xlabel() == "number of prompts"


def test_predictions_are_set_beside_what_a_run_measured(tmp_path, cache):
    run = tmp_path / "run"
    caid.train(smoke(CaidConfig(out=str(run), threads=1, force=True, iterations=2)))
    reward, utility, aim, beta = figures.scores_of(run)
    assert utility.var(1).mean() == pytest.approx(1.0) and aim.tolist() == read_rows(run, "reference")[0]["aim"]
    rows = figures.realised(run, reward, utility, beta)
    assert [row["what"] for row in rows] == ["iteration 1", "iteration 2", "held out"]
    iterations, verdict = read_rows(run, "iteration"), json.loads((run / "evaluation.json").read_text())
    for row, measured in zip(rows, iterations, strict=False):
        tilt = ((reward + utility[..., 0] * measured["lam"][0]) / beta).softmax(1)
        predicted = float(((tilt - 1 / reward.shape[1]) * utility[..., 0]).sum(1).mean())
        assert row["predicted"] == pytest.approx([predicted]) and row["measured"] == measured["improvement"]
    assert rows[-1]["measured"] == [verdict["constraints"][0]["estimate"]["mean"]] and rows[-1]["lam"] == iterations[-1]["lam"]
    found = figures.subsets(reward, utility, torch.tensor([0.05]), beta, draws=4)
    text = figures.page(run, tuple(reward.shape), found, rows, [])
    assert text.count("| run | iteration") == 2 and "| responses | 4 |" in text
    assert len(figures.draw_realised(rows).axes) == 2


def test_reliability_of_known_predictions():
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    difference = figures.pair_differences(score)
    assert len(difference) == 400 * 30 and difference.sum().item() == pytest.approx(0, abs=1e-9)
    assert difference[:5].tolist() == (score[0, 0] - score[0, 1:]).tolist()
    truth = torch.sigmoid(difference)
    exact = figures.reliability(truth, truth)
    assert exact["error"] == pytest.approx(0) and exact["agreement"] == 1 and exact["predicted"] == exact["true"]
    # Twice too sure: every bin's truth lies nearer to a half than its prediction.
    sure = figures.reliability(torch.sigmoid(2 * difference), truth)
    assert sure["agreement"] == 1 and 0.05 < sure["error"] < 0.2
    assert all(abs(t - 0.5) < abs(p - 0.5) for p, t in zip(sure["predicted"], sure["true"], strict=True))
    # No news: calibrated in the mean only.
    assert figures.reliability(truth, 0.3 + 0 * truth)["error"] == pytest.approx((truth.view(-1) - 0.3).abs().mean().item(), abs=0.02)


def test_calibration_reads_a_run_on_preferences(tmp_path, cache):
    run = tmp_path / "run"
    pecan.train(smoke(PecanConfig(out=str(run), threads=1, force=True)))
    rows = figures.calibration(run)
    assert {row["truth"] for row in rows} == {"reward: the labels", "harm: the labels", "harm: harm-audit"}
    assert [row["what"] for row in rows if row["truth"] == "harm: harm-audit"][-1] == "model score"
    assert all(len(row["true"]) == figures.BINS and 0 <= row["error"] <= 1 for row in rows)
    assert len(figures.draw_calibration(rows).axes) == 3
    with pytest.raises(UserError, match="no log-ratio scores"):
        figures.calibration(tmp_path)
