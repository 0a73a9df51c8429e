"""`--units raw`: the same run in the scorers' own units."""

import json

import pytest
from safetensors.torch import load_file

from engine import evaluate, train
from engine.config import RunConfig
from engine.records import Scores
from engine.run.committed import read_committed
from engine.run.rows import DualRow, IterationRow, ReferenceRow, read_rows
from tests.helpers.runs import SMOKE

B, BETA, LAM_MAX = 0.2, RunConfig.beta, 20.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """A run by deviations, and the same run in raw units: b, beta and lam_max are converted by hand."""
    folder = tmp_path_factory.mktemp("units")
    asked = ["caid", *SMOKE, "--iterations", "2"]
    assert train.main([*asked, "--threshold", str(B), "--out", str(folder / "0" / "sd")]) == 0
    (row,) = read_rows(folder / "0" / "sd", ReferenceRow)
    sd_r, sd_g = row.reward_sd, row.utility_sd[0]
    values = {"threshold": B * sd_g, "beta": BETA * sd_r, "lam_max": LAM_MAX * sd_r / sd_g}
    flags = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", repr(value))]
    assert train.main([*asked, "--units", "raw", *flags, "--out", str(folder / "1" / "raw")]) == 0
    # Not beside one another: the second verdict on the same prompts would have wider bounds.
    return folder / "0" / "sd", folder / "1" / "raw", sd_r, sd_g


def test_raw_units_are_the_same_run_in_other_units(runs):
    by_sd, raw, sd_r, sd_g = runs
    (one,), (other,) = (read_rows(run, DualRow) for run in (by_sd, raw))
    assert one.lam[0] > 0.05 and other.lam[0] == pytest.approx(one.lam[0] * sd_r / sd_g, rel=1e-6)
    assert other.predicted_improvement[0] == pytest.approx(one.predicted_improvement[0] * sd_g, rel=1e-6)
    for first, second in zip(read_rows(by_sd, IterationRow), read_rows(raw, IterationRow), strict=True):
        assert second.improvement[0] == pytest.approx(first.improvement[0] * sd_g, rel=1e-4)
        assert second.reward == pytest.approx(first.reward * sd_r, rel=1e-4)
        assert second.lam[0] == pytest.approx(first.lam[0] * sd_r / sd_g, rel=1e-4)
        assert second.kl == pytest.approx(first.kl, rel=1e-3)
    adapter, twin = (load_file(sorted((run / "adapters").rglob("*.safetensors"))[-1]) for run in (by_sd, raw))
    for name, tensor in adapter.items():
        assert (twin[name] - tensor).norm() <= 1e-3 * tensor.norm()


def test_the_verdict_says_its_units(runs):
    by_sd, raw, sd_r, sd_g = runs
    one, other = (json.loads((run / "evaluation.json").read_text()) for run in (by_sd, raw))
    assert "units" not in one and other["units"] == "raw"
    for key, unit in (("reward", sd_r), ("constraints", sd_g)):
        first, second = (x[key] if key == "reward" else x[key][0]["estimate"] for x in (one, other))
        for name in ("mean", "se", "low", "high", "lower", "upper"):
            assert second[name] == pytest.approx(first[name] * unit, rel=1e-4)
    assert other["constraints"][0]["word"] == one["constraints"][0]["word"]
    page = (raw / "report.html").read_text()
    assert "in the scorers&#x27; own units" in page and "deviations of the reference" not in page
    (first,), (second,) = (read_rows(run, ReferenceRow) for run in (by_sd, raw))
    assert (second.reward_sd, second.utility_sd, second.audit_sd) == (sd_r, [sd_g], first.audit_sd)


def test_a_run_in_raw_units_is_judged_again_in_them(runs, tmp_path, capsys):
    flags = ["--n-responses", "2", "--audit", "words=judges:words", "--out", str(tmp_path / "again")]
    (tmp_path / "judges.py").write_text("def words(p, r):\n    return [1000.0 * len(x) for x in r]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert evaluate.main([str(runs[1]), *flags]) == 0
    found = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    audit = dict((name, estimate) for name, estimate in found["audits"])["words"]
    assert found["units"] == "raw" and audit["se"] > 100
    assert "in the scorers' own units" in capsys.readouterr().out


def test_log_ratios_in_raw_units_are_the_papers_scores(tmp_path):
    """The tilt at lambda is softmax(ln pi_r / pi_ref + lambda ln pi_g / pi_ref), whatever beta is; the
    constraint is about beta x log-ratio (arXiv 2405.19544, Algorithm 2)."""
    flags = ["pecan", *SMOKE, "--units", "raw", "--beta", "0.5", "--threshold", "1e-4", "--force"]
    assert train.main([*flags, "--out", str(tmp_path / "p")]) == 0
    (dual,) = read_rows(tmp_path / "p", DualRow)
    scores = read_committed(tmp_path / "p").load("preference/scores", Scores)  # nats
    g_PG, lam = scores.utility_PGJ[..., 0], dual.lam[0]
    tilt_PG = (scores.reward_PG + lam * g_PG).softmax(1)
    expected = 0.5 * ((tilt_PG * g_PG).sum(1).mean() - g_PG.mean())
    assert dual.threshold == [1e-4] and dual.predicted_improvement[0] == pytest.approx(float(expected))
