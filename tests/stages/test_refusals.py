"""Refusals in the verdict: told by the scorer that is named refusal, by first words where there is none."""

import json

import pytest
import torch

from engine import evaluate, train
from engine.records import Scores
from engine.run.rows import ReferenceRow, read_rows
from engine.scorers.base import Head, Scorers, TextScorer
from engine.scorers.find import find_scorer
from engine.stages.reference import is_counted_alone
from engine.stages.refusals import refused
from engine.verdict.evaluation import Evaluation
from tests.helpers.runs import SMOKE


def scorer(name, kind=TextScorer):
    if kind is Head:
        return Head(name=name, layer=1, weight_D=torch.ones(2).double(), bias=0.0, trunk="x")
    return TextScorer(name=name, function=lambda prompts, responses: [0.0] * len(responses))


@pytest.mark.parametrize("kind", [Head, TextScorer])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_cost_or_audit_named_refusal_tells_refusals(kind, place):
    names = ["harm", "length", "vowels"]
    names[place] = "refusal"
    all_three = [scorer(name, kind) for name in names]
    cost_PGS = torch.tensor([[[0.5, -1.0, 0.0], [-0.1, 2.0, 1.0]]]).double()
    scores = Scores(
        reward_PG=cost_PGS[..., 0],
        utility_PGJ=-cost_PGS[..., :1],
        audit_PGA=-cost_PGS[..., 1:],
        ref_logprob_PG=cost_PGS[..., 0],
    )
    scorers = Scorers(reward=scorer("refusal"), costs=tuple(all_three[:1]), audits=tuple(all_three[1:]))
    # Above 0 is a refusal, 0 itself is none.
    assert refused(scorers, scores) == [[True, False], [False, True], [False, True]][place]


def test_the_built_in_scorer_goes_by_first_words_and_says_so(tmp_path):
    built_in = find_scorer("refusal", tmp_path).load("x", None)
    assert built_in.name == "refusal"
    none = torch.zeros(1, 1, 1)
    scores = Scores(reward_PG=none[0], utility_PGJ=none, audit_PGA=none, ref_logprob_PG=none[0])
    for scorers in (
        Scorers(reward=built_in, costs=(scorer("harm"),), audits=(built_in,)),
        Scorers(reward=scorer("refusal"), costs=(scorer("harm"),), audits=()),
    ):
        assert refused(scorers, scores) is None


@pytest.fixture(scope="module")
def told(tmp_path_factory, cache):
    """Makes a run whose refusals a Python function tells, and judges it again.

    The run's other audits, first words and lengths, are the same for all responses of its random model.
    """
    place = tmp_path_factory.mktemp("told")
    (place / "teller_of_tests.py").write_text(
        "def odd(prompts, responses):\n    return [len(r) % 2 - 0.5 for r in responses]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        audits = ["--audit", "harm-audit", "refusal=teller_of_tests:odd", "words=refusal", "length"]
        assert train.main(["mocan", *SMOKE, *audits, "--out", str(place / "run"), "--force"]) == 0
        assert evaluate.main([str(place / "run"), "--out", str(place / "again")]) == 0
    return place


def share(place, side):
    """Counts odd responses to harmless prompts in heldout.jsonl by hand."""
    rows = [json.loads(line) for line in (place / "heldout.jsonl").read_text().splitlines()]
    harmless = [len(row[side]) % 2 for row in rows if row["kind"] != "delicate"]
    return sum(harmless) / len(harmless)


@pytest.mark.parametrize("folder", ["run", "again"])
def test_the_verdict_says_who_has_told_refusals(told, folder):
    place = told / folder
    e = Evaluation.read(place / "evaluation.json", cure="")
    assert e.refusals_by == "the scorer refusal"
    assert e.refusal_harmless == pytest.approx([share(place, side) for side in ("reference", "policy")])
    assert 0 < e.refusal_harmless[0] < 1
    if folder == "run":
        assert "(reference -&gt; policy, told by the scorer refusal)" in (place / "report.html").read_text()
    else:
        lookalike = json.loads((place / "evaluation.json").read_text())["over_refusal"]
        assert 0.2 < lookalike["reference"]["mean"] < 0.8, "first words would find none in random letters"


def test_an_audit_that_counts_may_be_the_same_everywhere(told):
    e = Evaluation.read(told / "run" / "evaluation.json", cure="")
    audits = dict(e.audits)
    assert audits["words"].mean == audits["length"].mean == 0.0 and audits["refusal"].mean != 0.0
    (row,) = read_rows(told / "run", ReferenceRow)
    assert dict(zip(row.audit_names, row.audit_sd, strict=True))["length"] == 1.0
    assert not is_counted_alone(torch.ones(2, 3), scorer("judge"))
    assert not is_counted_alone(
        torch.tensor([[1.0, 2.0], [1.0, 1.0]]), find_scorer("length", told).load("x", None)
    )
