"""The study on foreign scorers: what they count, what is measured of a run, and that it goes on."""

import json
import math

import pytest
import torch

from bench.foreign import __main__ as foreign
from bench.foreign import scorers
from bench.foreign.page import page_text, summary, table, trained
from bench.foreign.pairs import PAIRS, RULES, Pair, spec
from bench.foreign.picture import picture
from bench.foreign.runs import Asked, causes, read, tilt_kl
from engine.policy.samples import Samples
from engine.run.committed import read_committed
from engine.stages.reference import ReferenceSamples
from tests.helpers.runs import SMOKE


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("length", "Two words, and three.", 4),
        ("word_length", "ab abcd", 3),
        ("variety", "a b a A", 0.5),
        ("punctuation", "ab, c!", 2 / 6),
        ("first_person", "I gave my cat to us", 3),
        ("hedging", "Perhaps it may help; consult me.", 2),
        ("questions", "Why not? Or?", 1),
        ("digits", "1 or 23", 3),
        ("copying", "the sea is salt", 0.75),
        ("reading_ease", "The cat sat.", 206.835 - 1.015 * 3 - 84.6),
    ],
)
def test_scores_by_hand(name, text, expected):
    score = getattr(scorers, name)
    found = score(["Is the sea blue?"] * 2, [text, ""])
    assert found[0] == pytest.approx(expected)
    assert math.isfinite(found[1])


def test_scores_that_cannot_be_counted_by_hand():
    texts = ["aaaa aaaa aaaa aaaa aaaa aaaa aaaa", "Every word here says another thing.", "x", ""]
    assert scorers.compression(texts, texts)[0] < scorers.compression(texts, texts)[1]
    head = scorers.random_head(texts, texts)
    assert head == scorers.random_head(texts, texts) and len({*head[:2]}) == 2 and head[2:] == [0, 0]
    assert scorers.heavy_tail(texts, texts)[2:] == [1, 1]


def test_there_are_twelve_pairs_at_least_and_every_scorer_exists():
    assert len(PAIRS) >= 12 and len(set(PAIRS)) == len(PAIRS)
    for name in {name.removeprefix("-") for pair in PAIRS for name in pair} - {"helpfulness", "harm"}:
        assert callable(getattr(scorers, name))
    assert spec("-length") == "less_length=-bench.foreign.scorers:length" and spec("harm") == "harm"


def test_a_study_runs_measures_and_goes_on(tmp_path, capsys):
    out, docs = tmp_path / "f", tmp_path / "docs"
    docs.mkdir()
    words = ["--pairs", "1", "--thresholds", "0.2", "--out", str(out), "--docs", str(docs)]
    flags = ["--", *SMOKE, "--force"]
    assert foreign.main([*words, *flags]) == 0
    printed = capsys.readouterr().out
    pair = Pair("length", "-variety")
    assert PAIRS[1] == pair and all(f"{rules}: 1 runs: " in printed for rules in ("plain", "defaults"))
    of_rules = [Asked(pair, 0.2, 0, rules) for rules in RULES]
    rows = [read(out / one.name / "run", one) for one in of_rules]
    measures = docs / "foreign.jsonl"
    assert [json.loads(line) for line in measures.read_text().splitlines()] == rows
    assert (docs / "foreign.md").read_text() == page_text(rows)
    assert (docs / "foreign.png").read_bytes() == picture(rows)
    plain, own = (read_committed(out / one.name / "run") for one in of_rules)
    assert plain.config.least_weight == 0 < own.config.least_weight
    first = [one.load("reference", ReferenceSamples).samples.rollouts for one in (plain, own)]
    assert torch.equal(*(rollouts.tokens for rollouts in first))
    folder, row, run = out / of_rules[1].name / "run", rows[1], own
    samples: Samples = run.load("reference", ReferenceSamples).samples
    reward, utility = samples.scores.reward_PG, samples.scores.utility_PGJ[..., 0]
    reward, utility = (x / x.var(1).mean().sqrt() for x in (reward, utility))
    score = reward + row["lam"][-1] * utility
    weights = [[math.exp(s / run.config.beta) for s in prompt] for prompt in score.tolist()]
    kl = [sum(w / sum(ws) * math.log(w / sum(ws) * len(ws)) for w in ws) for ws in weights]
    assert row["tilt"] == pytest.approx(sum(kl) / len(kl))
    assert row["off"] == pytest.approx(abs(row["improvement"] - 0.2))
    before = (folder / "evaluation.json").stat().st_mtime_ns
    assert foreign.main([*words, *flags]) == 0 and (folder / "evaluation.json").stat().st_mtime_ns == before
    # Measures alone are enough, also of runs that have been made elsewhere.
    assert foreign.main([*words, "--out", str(tmp_path / "empty"), *flags]) == 0
    assert not any((tmp_path / "empty").iterdir())
    assert foreign.main(["--pairs", "--out", str(out), "--docs", str(docs)]) == 0
    assert measures.read_text().count("\n") == 2
    one = tilt_kl(samples, 1e9, run)
    assert one <= math.log(samples.rollouts.n) + 1e-9 and torch.isfinite(torch.tensor(one))


def _row(pair: Pair, rules: str, **measures) -> dict:
    row = {"pair": str(pair), "b": 0.2, "seed": 0, "rules": rules, "dtype": "float32", "commit": "0" * 40}
    row |= {"word": "met", "improvement": 0.3, "low": 0.2, "high": 0.4, "off": 0.1, "reward": 0.1, "kl": 1.0}
    row |= {"tilt": 0.8, "finished": [0.7, 0.7], "spike": 2.0, "lam": [0.5, 0.6], "aim": 0.3, "ess": 4.0}
    return row | measures


def test_what_tells_that_a_policy_ran_away():
    assert causes(_row(PAIRS[0], "plain", kl=2.1)) == []
    assert causes(_row(PAIRS[0], "plain", kl=2.11)) == ["KL"]
    assert causes(_row(PAIRS[0], "plain", finished=[0.7, 0.49], spike=21.0)) == ["unfinished", "loss"]


def test_a_page_counts_words_and_pairs_the_rules_by_scorers():
    first, second = PAIRS[:2]
    rows = [
        _row(first, "plain", off=0.4, word="not met", kl=9.0),
        _row(first, "plain", off=0.2, b=0.4, word="not resolved"),
        _row(first, "defaults", off=0.1),
        _row(first, "defaults", off=0.1, b=0.4),
        _row(second, "plain", off=0.3),
        _row(second, "defaults", off=0.2),
        # Without its twin it stands in the tables alone.
        _row(PAIRS[2], "plain", off=5.0),
        {"pair": str(PAIRS[3]), "b": 0.4, "rules": "plain", "word": "refused", "dtype": "x", "commit": "y"},
    ]
    page = page_text(rows)
    assert (
        "| plain | 5 | 1 | 2 | 1 | 1 | 1 | 1 | 0 | 0 | 1.48 | +0.10 | 1.25, 11.25 | +0.0, +0.0 | 2 |" in page
    )
    assert "| defaults | 3 | 0 | 3 | 0 | 0 | 0 | 0 | 0 | 0 | 0.13 |" in page
    assert f"improves by b on average: {PAIRS[3]} (b 0.4)." in page
    assert "over 3 pairs of runs with 2 pairs of scorers" in page
    # By scorers: -0.2 on average over the thresholds, and -0.1; t with one degree of freedom.
    assert "| distance from b | -0.15 [-0.79, +0.49] |" in page
    assert len(table(trained(rows))) == 2 + len(rows) - 1
    assert summary(rows[:2]).startswith("2 runs: 0 met, 1 not met, 1 not resolved; 1 ran away; ")


def test_a_threshold_that_the_samples_do_not_support_is_a_result(tmp_path, capsys):
    words = ["--pairs", "1", "--thresholds", "90", "--rules", "defaults", "--out", str(tmp_path / "f")]
    assert foreign.main([*words, "--docs", str(tmp_path), "--", *SMOKE]) == 0
    assert "refused before training: length-less_variety-b90-seed0-defaults" in capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "foreign.jsonl").read_text().splitlines())
    assert row["word"] == "refused" and "improvement" not in row
    # Another failure is none.
    words[words.index("90")] = "nan"
    assert foreign.main([*words, "--docs", str(tmp_path), "--", *SMOKE]) != 0
    assert (tmp_path / "foreign.jsonl").read_text().count("\n") == 1
