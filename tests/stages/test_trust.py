"""Runs that hold on any scorer: policies near the reference, aims that the samples support,
scores with a least weight."""

import math
from dataclasses import replace

import pytest
import torch

from engine import dual, train
from engine.config import MocanConfig
from engine.policy.steps import Policy
from engine.records import Score, ScoredTarget
from engine.run.committed import read_committed
from engine.run.rows import (
    DualRow,
    IterationRow,
    PolicyRow,
    ReferenceRow,
    SampledRow,
    StepRow,
    TrustRow,
    read_rows,
)
from engine.stages import trust
from engine.stages.reference import ReferenceSamples
from tests.helpers.runs import SMOKE, files

# Steps so long that the policy runs away from the reference.
LONG = [*SMOKE, "--iterations", "2", "--eval-prompts", "2", "--learning-rate", "0.3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """A run that is held to twice the tilt's KL, and one that is not."""
    folder = tmp_path_factory.mktemp("trust")
    assert train.main(["caid", *LONG, "--out", str(folder / "held")]) == 0
    assert train.main(["caid", *LONG, "--max-kl-ratio", "inf", "--out", str(folder / "0" / "free")]) == 0
    return folder / "held", folder / "0" / "free"


def by_iteration(run) -> list[list[TrustRow]]:
    rows = read_rows(run, TrustRow)
    return [[row for row in rows if row.iteration == t] for t in sorted({row.iteration for row in rows})]


def test_a_policy_that_went_too_far_is_taken_back_and_goes_on_at_less_pace(runs):
    held, free = runs
    first, second = by_iteration(held)
    assert first[0].kl > 2 * first[0].limit, "else nothing is held back here"
    for rows, policy in zip((first, second), read_rows(held, PolicyRow), strict=True):
        assert rows[-1].limit == pytest.approx(2 * policy.tilt_kl)
        assert [row.kl - row.kl_se > row.limit for row in rows] == [True] * (len(rows) - 1) + [False]
        for before, after in zip(rows, rows[1:], strict=False):
            assert after.share == pytest.approx(before.share * min(math.sqrt(before.limit / before.kl), 0.95))
    rates = [[step.learning_rate for step in read_rows(held, StepRow) if step.iteration == t] for t in (1, 2)]
    assert rates[1][-1] == pytest.approx(rates[0][-1] * first[-1].share)
    far = read_rows(free, IterationRow)
    assert [row.kl > 2 * first[0].limit for row in far] == [True, True]
    assert read_rows(free, TrustRow) == []
    assert all(row.tilt_kl > 0 for row in read_rows(free, PolicyRow))


def test_a_policy_is_judged_on_the_answers_that_measure_its_slack_and_these_are_drawn_once(
    tmp_path, cache, monkeypatch
):
    """A run that goes on between the two draws them again, and they are the same."""
    drawn, draw = [], trust.respond
    monkeypatch.setattr(trust, "respond", lambda *given, **named: drawn.append(1) or draw(*given, **named))
    flags = [*SMOKE, "--iterations", "2", "--eval-prompts", "2"]
    assert train.main(["caid", *flags, "--out", str(tmp_path / "a")]) == 0
    judged, measured = read_rows(tmp_path / "a", TrustRow), read_rows(tmp_path / "a", IterationRow)
    assert [row.share for row in judged] == [1, 1] and not drawn
    for one, other in zip(judged, measured, strict=True):
        assert (one.kl, one.kl_se) == (other.kl, other.kl_se) and one.kl != 0
    sampled = [row.stage for row in read_rows(tmp_path / "a", SampledRow)]
    assert sampled[:3] == ["reference", "iteration-1/slack", "iteration-2/slack"]
    whole = files(tmp_path / "a")
    stages = sorted((tmp_path / "a" / "stages").iterdir())
    (slack,) = (path for path in stages if "iteration-1-slack" in path.name)
    for path in stages[stages.index(slack) :]:
        path.unlink()
    (tmp_path / "a" / "evaluation.json").unlink()
    assert train.main(["--resume", str(tmp_path / "a")]) == 0
    assert files(tmp_path / "a") == whole


def test_the_way_back_is_in_the_weights(runs):
    held, free = (read_committed(run).load("iteration-1/policy", Policy) for run in runs)
    share = by_iteration(runs[0])[0][-1].share
    assert held.pace == share < 1 == free.pace
    for went_back, went_on in ((held.adapter, free.adapter), (held.last, free.last)):
        assert went_back.keys() == went_on.keys() and went_back
        for name, value in went_back.items():
            expected = went_on[name] * share if name.startswith("up") else went_on[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-8)


def test_the_tilt_is_that_of_the_lagrangian_on_the_reference_samples(runs):
    run = read_committed(runs[0])
    (row,) = run.rows(ReferenceRow)
    scores = run.load("reference", ReferenceSamples).samples.scores
    for policy in run.rows(PolicyRow):
        score_PG = scores.reward_PG / row.reward_sd
        score_PG = score_PG + policy.lam[0] * scores.utility_PGJ[..., 0] / row.utility_sd[0]
        assert policy.tilt_kl == pytest.approx(dual.tilt_kl(score_PG, run.config.beta), rel=1e-9)


def test_the_verdict_says_how_far_the_policy_went(tmp_path, capsys):
    flags = ["mocan", *SMOKE, "--eval-prompts", "2", "--learning-rate", "0.3", "--out", str(tmp_path / "a")]
    assert train.main([*flags, "--max-kl-ratio", "inf"]) == 0
    said = capsys.readouterr().out
    assert "times that of the tilt it was fitted to" in said
    assert "it went further than its reward and constraints ask for" in said


def test_a_policy_that_stays_too_far_is_said(monkeypatch):
    said, logged, asked = [], [], []
    monkeypatch.setattr(trust, "_measured_kl", lambda *given: (asked.append(given[-1]), (9.0, 0.1))[1])

    class Given:
        config = MocanConfig()
        warn, log = said.append, logged.append

        def select(self, index):
            return index

        def __len__(self):
            return 100

        def take_back(self, untrained, share):
            logged.append(share)

        def tensors(self):
            return {}

    given = Given()
    policy = Policy(adapter={}, first_moment={}, second_moment={}, steps=1, losses=[1.0], pace=0.5)
    stage = type("Stage", (), {"warn": lambda self, text: said.append(text), "log": lambda self, row: None})()
    found = trust.taken_back(given, stage, policy, given, {}, given, 1.0, iteration=3)
    assert len(said) == 1 and "KL 9.00 nats is still above the 1.00 of --max-kl-ratio 2" in said[0]
    assert logged == [pytest.approx(1 / 3)] * trust.MOST_TIMES
    assert found.pace == pytest.approx(0.5 * 3.0**-trust.MOST_TIMES)
    assert len(set(asked)) == len(asked) == trust.MOST_TIMES + 1


def test_all_weights_are_taken_back_too(tmp_path):
    """Each weight keeps the same share of its way from the reference's."""
    flags = ["mocan", *SMOKE, "--tune", "full", "--learning-rate", "0.05", "--eval-prompts", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "held")]) == 0
    assert train.main([*flags, "--max-kl-ratio", "inf", "--out", str(tmp_path / "0" / "free")]) == 0
    held, free = (
        read_committed(tmp_path / name).load("iteration-1/policy", Policy).adapter
        for name in ("held", "0/free")
    )
    share = read_rows(tmp_path / "held", TrustRow)[-1].share
    assert 0 < share < 1
    from engine import model
    from engine.policy.full import FullWeights
    from engine.stages.smoke import smoke_folder

    start = FullWeights(model.load(smoke_folder())).tensors()
    for name, value in held.items():
        moved, whole = value - start[name], free[name] - start[name]
        torch.testing.assert_close(moved, share * whole, rtol=1e-3, atol=1e-6)


def test_a_held_run_goes_on_after_a_stop_as_if_there_was_none(runs, tmp_path):
    held = runs[0]
    whole = files(held)
    stages = sorted((held / "stages").iterdir())
    (policy,) = (path for path in stages if "iteration-2-policy" in path.name)
    for path in stages[stages.index(policy) :]:
        path.unlink()
    (held / "evaluation.json").unlink()
    assert train.main(["--resume", str(held)]) == 0
    assert files(held) == whole


@pytest.mark.parametrize("flags", [["--top-p", "0.9"], ["--top-k", "5"]])
def test_without_a_kl_nothing_is_taken_back(tmp_path, flags):
    short = ["mocan", *SMOKE, "--eval-prompts", "2", "--steps", "1", *flags]
    assert train.main([*short, "--out", str(tmp_path / "a")]) == 0
    assert read_rows(tmp_path / "a", TrustRow) == []


def test_the_margin_is_lowered_to_what_the_samples_support(tmp_path, capsys):
    """The aims stay within two thirds of the most that the samples support, and never below b."""
    aims = {}
    for b in ("0.1", "0.5", "0.75"):
        flags = ["mocan", *SMOKE, "--steps", "1", "--eval-prompts", "2", "--threshold", b]
        assert train.main([*flags, "--margin", "20", "--out", str(tmp_path / b / "run")]) == 0
        said = capsys.readouterr().out
        run = read_committed(tmp_path / b / "run")
        (row,), (found,) = run.rows(ReferenceRow), run.rows(DualRow)
        scores = run.load("reference", ReferenceSamples).samples.scores
        most = float(dual.largest_threshold(scores.utility_PGJ / row.utility_sd[0]))
        aims[b] = row.aim[0], most, row.margin
        assert f"--margin 20 is lowered to {row.margin:.2g}" in said
        assert found.aim == row.aim and row.aim[0] >= float(b)
    for b in ("0.1", "0.5"):
        aim, most, margin = aims[b]
        assert aim == pytest.approx(most / 1.5, rel=5e-3) and 0 < margin < 20
    aim, most, margin = aims["0.75"]
    assert aim == 0.75 > most / 1.5 and margin == 0


def test_a_margin_that_is_supported_stays(runs):
    (row,) = read_rows(runs[0], ReferenceRow)
    assert row.margin == 0 or row.aim[0] > row.needed[0]


def test_a_low_score_counts_as_one_of_the_least_weight():
    score_PG = torch.tensor([[0.0, 1.0, -50.0, 2.0], [0.3, 0.1, 0.2, 0.0]], dtype=torch.float64)
    target = ScoredTarget(score=Score.plain(score_PG), coefficient=0.5)
    assert target.bounded(0.0) is target
    found = target.bounded(0.01).score_PG
    weights = (score_PG / 0.5).exp()
    mean = weights.mean(1, keepdim=True)
    floor = 0.5 * torch.log(0.01 * mean)
    torch.testing.assert_close(found, torch.where(weights < 0.01 * mean, floor, score_PG), rtol=1e-12, atol=0)
    assert (found != score_PG).sum() == 1
    assert float((found.amax(1) - found.amin(1)).max()) <= 0.5 * math.log(4 / 0.01)
    tilts = [(x / 0.5).softmax(1) for x in (score_PG, found)]
    assert float((tilts[0] - tilts[1]).abs().max()) < 0.01 / 4
    # In parts, what is raised is all reward, and the rest is as it was.
    one_PGJ, lam_J = score_PG.new_ones(2, 4, 1), score_PG.new_ones(1)
    parts = Score(reward_PG=score_PG - 1, utility_PGJ=one_PGJ, lam_J=lam_J)
    raised = replace(target, score=parts).bounded(0.01).score
    assert torch.equal(raised.utility_PGJ[..., 0] == 1, found == score_PG) and raised.lam_J is lam_J
    torch.testing.assert_close(raised.total_PG, found, rtol=1e-12, atol=1e-12)
