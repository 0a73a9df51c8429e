"""bench.figures on synthetic scores, and on the files of a smoke run."""

import json

import pytest
import torch

from bench import figures
from engine import caid, dual
from engine.config import CaidConfig, smoke
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
    text = figures.page(run, tuple(reward.shape), found, rows)
    assert text.count("| run | iteration") == 2 and "| responses | 4 |" in text
    assert len(figures.draw_realised(rows).axes) == 2
