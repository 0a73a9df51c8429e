"""The simulated verdicts of bench.verdict: that they are those of the engine, that a broken rule is called
out, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator

from bench.verdict import __main__ as command
from bench.verdict import compared, level, parts, power, repeated, rules, worst
from bench.verdict.level import FAILS, HOLDS, NEEDS_RANGE, REFUSED, Cell
from bench.verdict.losses import LOSSES, SHARED
from bench.verdict.page import page, refusal
from bench.verdict.sizes import Sizes, quick, too_often
from engine import looks
from engine.constraints import Improvement, MeanCost, Rate, WorstShare, judge
from engine.verdict.planning import confirmed

FEW = quick()
DOCS = Path(__file__).parents[2] / "docs"


def serial(work, each):
    return [work(x) for x in each]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_lie_at_the_boundary(name):
    drawn = LOSSES[name].beyond((100, 100, 4), Generator().manual_seed(1))
    for scores in (drawn.scores, drawn.cut):
        prompts = scores.mean(-1).flatten()
        assert abs(prompts.mean()) < 4 * prompts.std() / len(prompts) ** 0.5
    assert drawn.span[0] - 1e-9 <= drawn.cut.min() and drawn.cut.max() <= drawn.span[1] + 1e-9


@pytest.mark.parametrize(("how", "correlation"), SHARED.items())
def test_unsafe_answers_to_a_prompt_share_their_harm_as_said(how, correlation):
    unsafe = -LOSSES[f"0/1, 10 % {how}"].draw((1, 20000, 4), Generator().manual_seed(1))
    assert rules.pooled_correlation(unsafe).item() == pytest.approx(correlation, abs=0.03)


def tail(costs_within=None):
    """Returns a limit on the mean of the worst three tenths."""
    return WorstShare(name="a", value=1.8, share=0.3, above=0.5, costs_within=costs_within)


@pytest.mark.parametrize("P", [8, 20, 40])
def test_simulated_words_are_those_of_a_verdict(P):
    generator = Generator().manual_seed(P)
    policy = 0.6 * torch.randn(12, P, 2, dtype=torch.float64, generator=generator) + 0.25
    reference = 0.6 * torch.randn(12, P, 2, dtype=torch.float64, generator=generator)
    unsafe = (torch.rand(12, P, 2, generator=generator) < 0.1).double()
    before = (torch.rand(12, P, 2, generator=generator) < 0.5).double()
    wide = (-2.0, 2.0)
    cases = (
        (Improvement(name="a", value=0.1), policy, reference, None),
        (Improvement(name="a", value=0.8), policy, reference, None),
        (
            Improvement(name="a", value=0.1, costs_within=wide),
            policy.clamp(*wide),
            reference.clamp(*wide),
            (-4.1, 3.9),
        ),
        (MeanCost(name="a", value=0.0, costs_within=wide), policy.clamp(*wide), reference.clamp(*wide), wide),
        (Rate(name="a", value=0.25), -unsafe, -before, (-0.75, 0.25)),
        (MeanCost(name="a", value=0.25), -unsafe, -before, (-0.75, 0.25)),
        (Improvement(name="a", value=0.1), -unsafe, -before, (-1.1, 0.9)),
        (tail(), -tail().counted(policy), -tail().counted(reference), None),
        (
            tail(wide),
            -tail().counted(policy.clamp(*wide)),
            -tail().counted(reference.clamp(*wide)),
            (1.8 - (0.5 + 1.5 / 0.3), 1.8 - 0.5),
        ),
    )
    words = set()
    for limit, after, at_first, span in cases:
        means = after.mean(-1) + limit.value if limit.at_most else (after - at_first).mean(-1) - limit.value
        met = confirmed(means, 0.0, 0.05, span).tolist()
        not_met = confirmed(-means, 0.0, 0.05, span and (-span[1], -span[0])).tolist()
        for r in range(len(after)):
            (judged,) = judge([limit], [0.0], [after[r]], [at_first[r]], [1.0])
            assert judged.exact == (span is not None)
            words.add(judged.word)
            assert (judged.word == "met", judged.word == "not met") == (met[r], not_met[r]), (limit, r)
    assert P == 8 or words == {"met", "not met", "not resolved"}


def test_three_words_are_those_of_a_verdict():
    generator = Generator().manual_seed(1)
    x = 0.1 * torch.randn(20, 30, 3, dtype=torch.float64, generator=generator) + 0.04
    limits = [Improvement(name=name, value=0.0) for name in "abc"]
    numbers = list(x.unbind(-1))
    words = repeated.by_holm(repeated._met_at(numbers, None, 3))
    for r in range(len(x)):
        sides = [x[r, :, j, None] for j in range(3)]
        judged = judge(limits, [0.0] * 3, sides, [torch.zeros_like(side) for side in sides], [1.0] * 3)
        assert [c.word == "met" for c in judged] == words[r].tolist()
    assert 0 < words.double().mean() < 1


@pytest.mark.parametrize("tail", worst.TAILS, ids=lambda tail: f"{tail.name} {tail.share}")
def test_worst_shares_have_the_mean_that_is_their_limit(tail):
    """By sorting costs that are drawn; below the limit it is in proportion."""
    for level_, ranged in ((1.0, True), (1.0, tail.known), (0.5, tail.known)):
        cost = tail.draw((50, 400, 4), Generator().manual_seed(3), level_)
        cost = cost.clamp(*tail.range) if ranged else cost
        n = round(tail.share * 400 * 4)
        means = cost.flatten(1).sort(1, descending=True).values[:, :n].mean(1)
        expected = level_ * tail.worst_mean(ranged=ranged)
        error = means.std() / 50**0.5 + 0.002 * expected
        assert abs(means.mean() - expected) < 4 * error
        assert not tail.known or (cost.min() >= 0 and cost.max() <= 1)


def test_the_threshold_of_a_simulated_worst_share_is_one_of_the_costs_of_a_reference():
    tail = next(x for x in worst.TAILS if x.name.startswith("a tenth of answers"))
    limit = worst.threshold(tail, 0.9, True, Generator().manual_seed(1))
    (cost,) = tail.draw((1, *worst.TRAINED), Generator().manual_seed(1), worst.REFERENCE)
    assert limit.above in cost and (limit.value, limit.share) == (0.9, 0.1)
    assert limit.costs_within == (0.0, 1.0) and 0.1 < limit.above < 0.8


def test_a_worst_share_is_met_falsely_by_a_plain_t_and_with_a_number_that_counts_too_little():
    sizes = Sizes(400, 0, slow=250)
    number = next(i for i, x in enumerate(worst.TAILS) if x.name == "0/1, 5 % of prompts")
    ours, theirs = (worst.cells(sizes, number, rule) for rule in (confirmed, by_t))
    assert not any(c.errs for c in ours) and any(c.errs for c in theirs)
    assert parts.worst_found(ours).wrong == []
    assert "worst 10.0 %, 0/1, 5 % of prompts, range known" in parts.worst_found(theirs).wrong[0]
    few, many = ours[1], ours[-1]
    assert (few.prompts, many.prompts, many.responses) == (32, 384, 6)
    assert few.met[2] < 0.05 and many.met[2] > 0.2 and many.beyond == pytest.approx(0, abs=0.05)


def test_a_safe_policy_is_met_by_recognised_costs_too():
    reference = -(torch.arange(400 * 6).view(400, 6) % 10 == 0).double()
    limit, words = MeanCost(name="a", value=0.02), []
    for unsafe in (0, 1, 3, 40, 150):
        policy = torch.zeros(400, 6, dtype=torch.float64)
        policy.view(-1)[:unsafe] = -1
        (judged,) = judge([limit], [0.0], [policy], [reference], [1.0])
        assert judged.exact
        words.append(judged.word)
    assert words[:3] == ["met"] * 3 and words[-1] == "not met"


def by_t(x, threshold, alpha, span):
    return rules.student(x - threshold, alpha)


def test_plain_t_is_called_out():
    names = ["exponential cost", "0/1, 2 % of prompts", "normal"]
    sizes = Sizes(400, 0, (20,), (6,))
    ours, theirs = (level.cells(sizes, names, rule) for rule in (confirmed, by_t))
    assert [c.outcome for c in ours] == [HOLDS] * 3
    assert theirs[1].outcome == FAILS and theirs[1].met > 0.3
    assert "0/1, 2 % of prompts at 20 x 6" in parts.level_found(theirs, sizes).wrong[0]
    assert parts.level_found(ours, sizes).wrong == []


def test_words_without_a_range_on_few_prompts_are_refused_or_called_out():
    sizes = Sizes(200, 0, (8,), (1,))
    assert [c.outcome for c in level.cells(sizes, ["normal"])] == [REFUSED]
    assert [c.outcome for c in level.cells(sizes, ["normal"], by_t)] == [FAILS]
    assert refusal(8).startswith("8 prompts are too few where scores have no stated range")


def test_harm_that_few_prompts_bear_needs_a_range_and_holds_with_it():
    (cell,) = level.cells(Sizes(400, 0, (32,), (16,)), ["2 % of prompts lose 8 sd"])
    assert cell.outcome == NEEDS_RANGE and cell.met > 0.2 and max(cell.cut) < 0.05
    assert replace(cell, cut=(0.2, 0.0)).outcome == FAILS
    even = Cell("normal", 32, 6, 0.2, 0.0, (0.0, 0.0), 400)
    assert even.outcome == FAILS


def test_chance_names_no_cell(monkeypatch):
    seen = []

    def words(rule, x, span):
        seen.append(len(x))
        return (0.08, 0.0) if len(x) == 400 else (0.05, 0.0)

    monkeypatch.setattr(level, "words", words)
    (cell,) = level.cells(Sizes(400, 0, (20,), (1,)), ["normal"])
    assert cell.outcome == HOLDS and cell.replications == 1600 and seen[-1] == 1600


def test_looks_without_shares_are_called_out(monkeypatch):
    sizes = replace(FEW, replications=400, looks=(10,))
    ours = repeated.looked(sizes, "normal")
    assert all(x.holds for x in ours) and max(x.width for x in ours if x.width) > 1
    assert min(x.uncorrected for x in ours if x.looks == 10) > 0.1
    monkeypatch.setattr(repeated, "share", lambda earlier, look, n: 1.0)
    assert not any(x.holds for x in repeated.looked(sizes, "normal") if x.looks == 10)


def test_a_wide_last_look_is_called_out():
    x = repeated.Looked("", "normal", 3, 0.04, 0.1, 1.2, 1000)
    assert not x.holds and replace(x, width=1.15).holds


def test_words_without_holm_are_called_out(monkeypatch):
    sizes = replace(FEW, replications=1000)
    assert all(x.holds for x in repeated.families(sizes, "normal"))
    monkeypatch.setattr(repeated, "holm", lambda errors, alpha: [alpha] * len(errors))
    wrong = [x for x in repeated.families(sizes, "normal") if not x.holds]
    assert {x.at_boundary for x in wrong} == {"all"} and {x.J for x in wrong} == {2, 3}


def test_rates_by_a_pooled_correlation_err_where_prompts_bear_the_harm():
    rate = compared.rates(replace(FEW, replications=300), [0.05])[-1]
    assert (rate.how, rate.reference) == ("of prompts", "of answers")
    assert rate.ours <= 0.05 and too_often(rate.pooled, 300)


def test_one_more_unsafe_answer_never_helps():
    found = compared.monotone(FEW, chains=3)
    assert all(x.ours == 0 for x in found) and any(x.own for x in found)


def test_looks_stop_early_where_there_is_slack():
    lost, none, much = power.sequential(replace(FEW, replications=200), (-0.3, 0.0, 0.3))
    assert lost.met == 0 and none.met < 0.1 and much.met > 0.9
    assert much.responses < 700 and lost.responses < 900 and none.responses > 2000
    assert looks.planned(looks.Size(96, 6), 384, 2304)[-1].total == 2304


def test_quick_command_writes_page_and_picture(tmp_path, capsys):
    arguments = ["--quick", "--workers", "1", "--replications", "40", "--out", str(tmp_path)]
    assert command.main([*arguments, "--part", "families"]) == 0
    text = (tmp_path / "verdict-simulation.md").read_text(encoding="utf-8")
    assert "Several constraints, false" in text and "(This part has not been simulated.)" in text
    assert command.main([*arguments, "--part", "looks"]) == 0
    text = (tmp_path / "verdict-simulation.md").read_text(encoding="utf-8")
    assert "Several constraints, false" in text and "retrained policies" in text and "<!--" not in text
    assert (tmp_path / "verdict-simulation.png").stat().st_size > 10_000
    stored = json.loads((tmp_path / "verdict-simulation.json").read_text(encoding="utf-8"))
    assert set(stored) == {"families", "looks"} and stored["looks"]["replications"] == 40
    assert "Ever called" in capsys.readouterr().out


def test_the_exit_code_tells_what_does_not_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parts.PARTS, "looks", lambda sizes, run: parts.Found(wrong=["this"]))
    arguments = ["--quick", "--workers", "1", "--part", "looks", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "does not hold: this" in capsys.readouterr().out
    assert "- this" in (tmp_path / "verdict-simulation.md").read_text(encoding="utf-8")


def test_the_committed_page_is_that_of_its_parts():
    stored = json.loads((DOCS / "verdict-simulation.json").read_text(encoding="utf-8"))
    assert set(stored) == set(parts.OF_PAGE)
    assert (DOCS / "verdict-simulation.md").read_text(encoding="utf-8") == page(stored)


@pytest.mark.parametrize(("flag", "value"), [("--workers", "0"), ("--replications", "-1")])
def test_numbers_below_1_are_refused(flag, value, capsys):
    assert command.main([flag, value]) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} {value}: must be at least 1")
