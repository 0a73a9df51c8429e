"""The papers' bounds on exact problems, and deliberate mistakes that turn them red."""

import pytest

from bench.theory.bounds import all_bounds
from bench.theory.broken import BROKEN, LOOSE, flipped_sign_of_the_slack, reds
from bench.theory.measuring import measure
from bench.theory.tasks import variant


@pytest.fixture(scope="module")
def facts():
    """Measures the facts of one problem with a gap and J = 1, and of one with J = 2."""
    return measure(0, 1, 0.3), measure(3, 2, 0.1)


def test_all_bounds_hold(facts):
    for f in facts:
        assert [b for b in all_bounds(f) if not b.holds] == []
        assert f.assumptions["A1"] and f.assumptions["A2"] and f.assumptions["A5"]
    assert facts[1].tighter is not None, "Theorem 1 needs A4 in at least one of them"


def test_sharp_forms_are_near_equality(facts):
    for f in facts:
        ratio = {b.name: b.ratio for b in all_bounds(f) if b.form == "sharp"}
        assert ratio["Lemma 5 off along h alone"] > 0.98
        assert ratio["Thm 2: P* - D_p* <= gap(lambda*_p)"] > 0.9 and ratio["gap(lambda*) <= P* - D_p*"] > 0.9
    assert {b.name: b.ratio for b in all_bounds(facts[0])}["Lemma 4 with D(lambda*_p) - D*"] > 0.95


def test_every_statement_turns_red_but_those_said_to_be_loose(facts):
    red = {name for f in facts for wrong in BROKEN.values() for name in reds(f, wrong(f))}
    every = {b.name for f in facts for b in all_bounds(f)}
    assert every - red == set(LOOSE)


@pytest.mark.parametrize("name", list(BROKEN))
def test_each_wrong_sign_or_factor_turns_a_statement_red(facts, name):
    assert reds(facts[0], BROKEN[name](facts[0])) != []


def test_the_wrong_sign_of_the_slack_drives_lambda_away():
    right, wrong = flipped_sign_of_the_slack(0)
    assert right < 1e-6 and wrong > 0.1


@pytest.mark.parametrize(
    ("scale", "printed"),
    [
        (0.1, {"Thm 4, R-OPT, off along h alone"}),
        (10.0, {"CAN Thm 1: largest curvature <= G / beta", "CAN Thm 2: steps to 1e-6"}),
    ],
)
def test_printed_constants_with_wrong_units_fail_in_other_units(scale, printed):
    wrong = [b for b in all_bounds(measure(0, 1, 0.3, scale=scale)) if not b.holds]
    assert {b.name for b in wrong} == printed and {b.form for b in wrong} <= {"printed", "printed, gap for B"}


def test_a_constraint_that_holds_anyway_and_another_beta():
    for x in (variant(0, 2, 0.3, 1.0, (0.3, -1.0)), variant(1, 1, 0.3, 0.3, 0.3)):
        assert [b for b in x["bounds"] if not b["holds"] and b["form"] != "printed, gap for B"] == []
        assert x["reached"]
    assert x["beta"] == 0.3
