"""The verdict's statistics against scipy and hand computations, its error rate, and its sentences."""

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from engine.constraints import Improvement, Judged, MeanCost, Rate, word
from engine.errors import UserError
from engine.intervals import Estimate, Share, betting, estimate, improvement, rate, t_quantile, wilson
from engine.records import Prompts, Rollouts, ScaledScores
from engine.verdict.evaluation import Asked, Evaluation, Judgement, Side, evaluate, pair_order
from engine.verdict.refusals import OverRefusal, is_refusal, over_refusal
from engine.verdict.sentences import answer, judgement_sentences, sentences


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 7, 10, 31, 79, 80, 500, 2001])
def test_t_quantile_equals_scipy(degrees):
    for probability in (0.51, 0.9, 0.95, 0.975, 0.9995):
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), abs=1e-6)


def _symmetric(n: int, *, seed: int) -> torch.Tensor:
    """Returns n normal numbers without skewness, whose bounds are Student's."""
    half = torch.randn(n // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat((half, torch.zeros(n % 2, dtype=torch.float64), -half))


def test_estimate_equals_scipy_intervals():
    x = _symmetric(23, seed=1) + 0.3
    result = estimate(x)
    se = stats.sem(x.numpy())
    low, high = stats.t.interval(0.95, 22, loc=x.mean().item(), scale=se)
    lower, upper = stats.t.interval(0.90, 22, loc=x.mean().item(), scale=se)
    expected = (x.mean().item(), se, low, high, lower, upper, 23)
    assert tuple(vars(result).values()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.99])
def test_intervals_at_another_confidence_equal_scipy(confidence):
    x = _symmetric(17, seed=2)
    y = torch.stack([_symmetric(17, seed=s) for s in (3, 4, 5)], dim=1)
    for result, values in (
        (estimate(x, confidence), x),
        (improvement(x[:, None], y, confidence), x - y.mean(1)),
    ):
        mean, se = values.mean().item(), stats.sem(values.numpy())
        low, high = stats.t.interval(confidence, 16, loc=mean, scale=se)
        lower, upper = stats.t.interval(2 * confidence - 1, 16, loc=mean, scale=se)
        assert tuple(vars(result).values()) == pytest.approx(
            (mean, se, low, high, lower, upper, 17), abs=1e-9
        )


def test_estimate_by_hand_in_float64():
    # mean 2, standard deviation 1, three prompts; t(0.975, 2) = 4.30265273.
    result = estimate(torch.tensor([1.0, 2.0, 3.0]))
    assert (result.mean, result.se, result.n) == (2.0, pytest.approx(1 / math.sqrt(3), abs=1e-12), 3)
    assert result.high - 2 == pytest.approx(4.30265273 / math.sqrt(3), abs=1e-7)


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_estimate_refuses_what_has_no_standard_error(bad):
    with pytest.raises(UserError, match="held-out prompt"):
        estimate(torch.tensor(bad))


def test_improvement_is_paired_by_prompt_and_takes_unequal_numbers_of_responses():
    level = torch.tensor([[0.0], [100.0], [-40.0]])
    policy, reference = level + torch.tensor([1.0, 2.0, 3.0]), level + torch.tensor([0.0, 1.0])
    assert improvement(policy, reference) == estimate(torch.tensor([1.5, 1.5, 1.5]))


def test_word_at_and_beside_the_bounds():
    e = Estimate(mean=0.5, se=0.1, low=0.3, high=0.7, lower=0.35, upper=0.65, n=50)
    expected = {0.32: "met", 0.35: "met", 0.36: "not resolved", 0.65: "not resolved", 0.66: "not met"}
    assert {b: word(e, b) for b in expected} == expected


def test_false_met_rate_is_five_percent_at_the_boundary():
    generator = torch.Generator().manual_seed(0)
    runs, n_prompts, b = 4000, 12, 0.3
    prompt_effect = torch.randn(runs, n_prompts, 1, generator=generator, dtype=torch.float64)
    policy = prompt_effect + b + torch.randn(runs, n_prompts, 4, generator=generator, dtype=torch.float64)
    reference = prompt_effect + torch.randn(runs, n_prompts, 2, generator=generator, dtype=torch.float64)
    words = [word(improvement(policy[i], reference[i]), b) for i in range(runs)]
    tolerance = 4 * math.sqrt(0.05 * 0.95 / runs)
    assert words.count("met") / runs == pytest.approx(0.05, abs=tolerance)
    assert words.count("not met") / runs == pytest.approx(0.05, abs=tolerance)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help.",
        " I\u2019m sorry, but no.",
        "I am sorry, but that is wrong.",
        "I can't do that.",
        "I can\u2019t.",
        "I cannot help.",
        "I can not help.",
        "I'm unable to.",
        "I am not able to.",
        "As an AI language model, I",
        '"I cannot say."',
        "SORRY, I cannot",
        "I'm\nsorry for any confusion, but",
    ],
)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris.",
        "You can say: I'm sorry, but I can't come.",
        "I'm sorry to hear that you feel ill.",
        "I can't wait to hear it!",
        "I canoe.",
    ],
)
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_pair_order_equals_counting():
    generator = torch.Generator().manual_seed(4)
    # Whole numbers, so that there are ties of either kind; two prompts have no pair.
    log_ratio, score = (torch.randint(4, (9, 5), generator=generator).double() for _ in range(2))
    score[3], score[7] = 1.0, 2.0
    shares = []
    for p in range(9):
        agreed = []
        for a in range(5):
            for b in range(a):
                if score[p, a] != score[p, b]:
                    by_policy, by_score = log_ratio[p, a] - log_ratio[p, b], score[p, a] - score[p, b]
                    agreed.append(0.5 if by_policy == 0 else float((by_policy > 0) == (by_score > 0)))
        if agreed:
            shares.append(sum(agreed) / len(agreed))
    expected = torch.tensor(shares, dtype=torch.float64)
    assert len(shares) == 7
    for beta in (1.0, 0.01):
        result = pair_order(beta * log_ratio, score)
        assert tuple(vars(result).values()) == pytest.approx(
            tuple(vars(estimate(expected)).values()), abs=1e-12
        )
    assert pair_order(log_ratio, score, 0.8).high < pair_order(log_ratio, score).high


def test_pair_order_at_its_ends():
    score = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert pair_order(7 * score, score).mean == 1.0
    assert pair_order(-score, score).mean == 0.0
    assert pair_order(torch.zeros_like(score), score).mean == 0.5
    wide = pair_order(torch.stack([score[0], -score[1]]), score[:2])
    assert (wide.mean, wide.low, wide.high, wide.lower, wide.upper, wide.n) == (0.5, 0.0, 1.0, 0.0, 1.0, 2)
    assert pair_order(score, torch.ones_like(score)) is None
    assert pair_order(score[:1], score[:1]) is None
    with pytest.raises(UserError, match="not finite"):
        pair_order(score.log().fill_(-math.inf), score)


@pytest.mark.parametrize(("k", "n"), [(0, 60), (1, 7), (30, 76), (76, 76)])
def test_wilson_equals_scipy(k, n):
    for confidence in (0.8, 0.95):
        expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
        assert wilson(k / n, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_over_refusal_counts_prompts_not_responses():
    no, yes = False, True
    before, after = [no, no, yes, no, no, no], [yes, yes, yes, no, yes, no, no, no, no]
    result = over_refusal(before, after, 3, 0.9)
    assert (result.reference.mean, result.policy.mean) == (pytest.approx(1 / 6), pytest.approx(4 / 9))
    assert (result.policy.low, result.policy.high, result.policy.n) == (*wilson(4 / 9, 3, 0.9), 3)
    assert result.change == estimate(torch.tensor([1.0, 1 / 3 - 1 / 2, 0.0], dtype=torch.float64), 0.9)
    # Equal responses to each prompt carry no more than one.
    assert over_refusal([no, yes, no], [no, yes, yes], 3) == over_refusal(
        [no, no, yes, yes, no, no], [no, no, yes, yes, yes, yes], 3
    )


def test_the_wilson_interval_covers_however_responses_are_clustered():
    generator = torch.Generator().manual_seed(6)
    runs, n_prompts, p = 2000, 60, 0.15
    for alike in (0.0, 0.5, 1.0):
        common = torch.rand(runs, n_prompts, 1, generator=generator) < p
        own = torch.rand(runs, n_prompts, 4, generator=generator) < p
        copied = torch.rand(runs, n_prompts, 4, generator=generator) < alike
        shares = torch.where(copied, common, own).double().mean((1, 2)).tolist()
        covered = sum(low <= p <= high for low, high in (wilson(share, n_prompts) for share in shares)) / runs
        assert covered > 0.95 - 4 * math.sqrt(0.05 * 0.95 / runs), (alike, covered)


def _rollouts(n: int, length: list[int], finished: list[bool]) -> Rollouts:
    empty = torch.zeros(len(length), 9)
    length, finished = torch.tensor(length), torch.tensor(finished)
    return Rollouts(
        n=n,
        tokens=empty.long(),
        length=length,
        finished=finished,
        logprob=empty,
        model_logprob=empty,
        near_tie=empty > 0,
    )


def _stage_outputs(kind: list[str]) -> dict:
    """Returns scores of two prompts, with 2 responses of the policy and 3 of the reference,
    a constraint and an audit."""

    def scores(reward, utility, audit):
        as_3d = [torch.tensor(x, dtype=torch.float64).unsqueeze(2) for x in (utility, audit)]
        reward = torch.tensor(reward, dtype=torch.float64)
        return ScaledScores(
            reward_PG=reward,
            utility_PGJ=as_3d[0],
            audit_PGA=as_3d[1],
            ref_logprob_PG=torch.zeros_like(reward),
        )

    policy = Side(
        scores=scores([[1.0, 3.0], [2.0, 2.0]], [[1.0, 1.0], [3.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]]),
        rollouts=_rollouts(2, [4, 6, 8, 9], [True, True, True, False]),
        texts=["Yes.", "I cannot.", "I'm sorry, but no.", "No."],
    )
    reference = Side(
        scores=scores(
            [[0.0, 0.0, 3.0], [1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [[0.0] * 3, [0.0] * 3]
        ),
        rollouts=_rollouts(3, [9, 9, 9, 1, 1, 1], [False] * 3 + [True] * 3),
        texts=["Yes."] * 5 + ["I can't."],
    )
    return {
        "policy": policy,
        "reference": reference,
        "prompts": Prompts(text=["a", "b"], kind=kind, token_ids=[[1], [2]], key_P=torch.tensor([1, 2])),
        "kl_PG": torch.tensor([[1.0, 2.0], [4.0, 5.0]]),
        "asked": Asked(limits=[Improvement(name="harm", value=0.5)], aims=[0.75], unit_J=[1.0]),
        "audit_names": ["harm-audit"],
    }


def test_evaluate_by_hand():
    e = evaluate(**_stage_outputs(["everyday", "delicate"]))
    assert e.reward == estimate(torch.tensor([1.0, 1.0]))
    assert e.constraints == (
        Judged(
            Improvement(name="harm", value=0.5),
            0.75,
            estimate(torch.tensor([1.0, 1.0])),
            "not resolved",
            spread=False,
        ),
    )
    assert (e.word, e.looks[0].words, e.looks[0].bounds) == ("not resolved", ("not resolved",), ((1.0, 1.0),))
    assert e.audits == (("harm-audit", estimate(torch.tensor([0.0, 1.0]))),)
    assert e.kl == estimate(torch.tensor([1.5, 4.5]))
    assert (e.finished, e.mean_length) == ((0.5, 0.75), (5.0, 6.75))
    assert (e.n_prompts, e.n_responses) == (2, 2)
    assert e.refusal_harmless == (0.0, 0.5)


def test_refusals_count_on_prompts_not_marked_delicate():
    assert evaluate(**_stage_outputs(["", "everyday"])).refusal_harmless == (pytest.approx(1 / 6), 0.5)
    alone = evaluate(**_stage_outputs(["delicate", "delicate"]))
    assert alone.refusal_harmless is None
    assert not [line for line in sentences(alone) if "refusals" in line]


def test_evaluation_survives_json():
    for kind in (["everyday", "delicate"], ["delicate", "delicate"]):
        e = evaluate(**_stage_outputs(kind))
        assert Evaluation.from_dict(json.loads(json.dumps(e.as_dict()))) == e


def test_samples_that_are_cut_have_no_kl():
    outputs = _stage_outputs(["", ""])
    whole = evaluate(**outputs)
    cut = evaluate(**{**outputs, "asked": replace(outputs["asked"], truncated=True)})
    assert cut == replace(whole, truncated=True) and cut.kl.mean != 0
    assert "truncated" not in whole.as_dict() and cut.as_dict() == {**whole.as_dict(), "truncated": True}
    for e in (whole, cut):
        assert Evaluation.from_dict(json.loads(json.dumps(e.as_dict()))) == e
        said = [line for line in sentences(e) if "KL" in line]
        assert len(said) == 1 and f": {e.kl.mean:.2f} nats per response" in said[0]
        assert said[0].startswith("KL(policy || reference)") != e.truncated
        assert ("which is no KL" in said[0]) == e.truncated


def _at(confidence: float, outputs: dict) -> Evaluation:
    """Returns the verdict at another confidence."""
    return evaluate(**{**outputs, "asked": replace(outputs["asked"], confidence=confidence)})


def test_the_confidence_reaches_every_estimate():
    e = _at(0.8, _stage_outputs(["", ""]))
    assert e.reward == estimate(torch.tensor([1.0, 1.0]), 0.8)
    assert e.audits[0][1] == estimate(torch.tensor([0.0, 1.0]), 0.8)
    assert e.kl == estimate(torch.tensor([1.5, 4.5]), 0.8)
    assert e.constraints[0].estimate == estimate(torch.tensor([1.0, 1.0]), 0.8)
    uneven = _stage_outputs(["", ""])
    utility_PGJ = torch.tensor([[1.0, 1.0], [3.0, 5.0]])[..., None].double()
    uneven["policy"] = replace(
        uneven["policy"], scores=replace(uneven["policy"].scores, utility_PGJ=utility_PGJ)
    )
    for confidence in (0.6, 0.95):
        found = _at(confidence, uneven).constraints[0].estimate
        assert found == estimate(torch.tensor([1.0, 3.0]), confidence)


def test_evaluation_without_a_confidence_is_one_at_95_percent():
    e = _at(0.8, _stage_outputs(["", ""]))
    data = e.as_dict()
    assert data.pop("confidence") == 0.8
    assert Evaluation.from_dict(data) == replace(e, confidence=0.95)


def test_slack_is_the_interval_of_what_is_above_b():
    gain = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    slack = Judged(Improvement(name="harm", value=0.25), 0.5, estimate(gain), "met").slack
    assert tuple(vars(slack).values()) == pytest.approx(
        tuple(vars(estimate(gain - 0.25)).values()), abs=1e-12
    )


def test_rate_bounds_are_no_closer_than_the_exact_binomial_ones_for_one_response_a_prompt():
    unsafe = torch.zeros(30, 1)
    unsafe[:4] = 1
    e, expected = rate(unsafe, 0.9), stats.binomtest(4, 30).proportion_ci(0.9, method="exact")
    assert 0 < e.low <= expected.low and expected.high <= e.high < 0.4
    none = rate(torch.zeros(50, 6))
    assert (none.mean, none.low, none.lower) == (0, pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    # Its cost against the binomial bound is the share of the capital that is bet on no harm at all.
    assert 1 - 0.05 ** (1 / 50) < none.upper <= 1 - (0.4 * 0.05) ** (1 / 50)
    assert rate(torch.ones(50, 6)).lower == pytest.approx(1 - none.upper)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_rate_bounds_keep_their_confidence_however_responses_are_clustered(p, alike):
    generator = torch.Generator().manual_seed(8)
    runs, P, G = 2000, 100, 6
    common, own, copied = (torch.rand(runs, P, n, generator=generator) for n in (1, G, G))
    unsafe = torch.where(copied < alike, common < p, own < p)
    lower, upper = betting.bounds(unsafe.double().mean(2), 0, 1, 0.05)
    for i in range(3):
        found = rate(unsafe[i])
        assert (found.lower, found.upper) == (pytest.approx(lower[i]), pytest.approx(upper[i]))
    tolerance = 4 * math.sqrt(0.05 * 0.95 / runs)
    assert (upper < p).double().mean() < 0.05 + tolerance
    assert (lower > p).double().mean() < 0.05 + tolerance


def test_constraints_on_a_kind_of_prompts_a_mean_cost_and_a_rate():
    outputs = _stage_outputs(["everyday", "delicate"])
    p = Prompts(
        text=list("abc"),
        kind=["everyday", "delicate", "delicate"],
        token_ids=[[1], [2], [3]],
        key_P=torch.arange(3),
    )

    def thrice(side):
        """Returns the scores of the first prompt, and those of the second for two prompts."""
        names = ("reward_PG", "utility_PGJ", "audit_PGA", "ref_logprob_PG")
        n = side.rollouts.n
        return Side(
            scores=replace(side.scores, **{name: getattr(side.scores, name)[[0, 1, 1]] for name in names}),
            rollouts=_rollouts(n, [1] * 3 * n, [True] * 3 * n),
            texts=["x"] * 3 * n,
        )

    policy, reference = thrice(outputs["policy"]), thrice(outputs["reference"])

    def judged(kind, **values):
        asked = Asked(limits=[kind(name="harm", **values)], aims=[values["value"]], unit_J=[2.0])
        return evaluate(policy, reference, p, torch.zeros(3, 2), asked, ["harm-audit"])

    on = judged(Improvement, value=0.5, on="delicate").constraints[0]
    assert on.estimate == estimate(torch.tensor([1.0, 1.0])) and on.word == "not resolved"
    e = judged(MeanCost, value=-3.9)
    mean = e.constraints[0]
    # Utilities 1, 2, 2 of the policy in units of 2: costs -2, -4, -4.
    assert mean.measured == estimate(torch.tensor([-2.0, -4.0, -4.0]))
    assert mean.reference == pytest.approx(-4 / 3) and mean.word == "not resolved"
    assert mean.slack.mean == pytest.approx(-3.9 + 10 / 3) and mean.required == pytest.approx(
        (-4 / 3 + 3.9) / 2
    )
    line = next(
        x for x in sentences(e) if x.startswith("constraint harm: not resolved (mean cost -3.33, 95 % [")
    )
    assert "3 prompts are too few" in line and "reference -1.33" in line
    assert Evaluation.from_dict(json.loads(json.dumps(e.as_dict()))) == e
    # From here on no response of the policy is unsafe, and every one of the reference.
    safe, unsafe = torch.zeros(3, 2, 1, dtype=torch.float64), -torch.ones(3, 3, 1, dtype=torch.float64) / 2
    policy = replace(policy, scores=replace(policy.scores, utility_PGJ=safe))
    reference = replace(reference, scores=replace(reference.scores, utility_PGJ=unsafe))
    e = judged(Rate, value=0.7, on="delicate")
    assert e.constraints[0].measured == rate(torch.zeros(2, 2)) and e.constraints[
        0
    ].reference == pytest.approx(1.0)
    assert any(
        x.startswith("constraint harm: not resolved (on 2 delicate prompts: rate 0.00 %, 95 % [0.00, ")
        for x in sentences(e)
    )
    assert judged(Rate, value=0.9, on="delicate").constraints[0].word == "met"


def _judgement(confidence: float = 0.95, **changes) -> Judgement:
    refusal = over_refusal([False, True], [True, True], 2, confidence)
    e = _at(confidence, _stage_outputs(["", ""]))
    order = estimate(torch.tensor([0.5, 0.75]), confidence)
    return replace(Judgement(evaluation=e, pair_order=(None, order), over_refusal=refusal), **changes)


def test_judgement_as_json_holds_the_evaluation_too():
    judgement = _judgement(0.8)
    data = json.loads(json.dumps(judgement.as_dict()))
    assert Evaluation.from_dict(data) == judgement.evaluation
    assert Estimate(**data["slack"][0]) == judgement.evaluation.constraints[0].slack
    assert data["pair_order"][0] is None and Estimate(**data["pair_order"][1]) == judgement.pair_order[1]
    refusal = data["over_refusal"]
    found = OverRefusal(
        Share(**refusal["reference"]), Share(**refusal["policy"]), Estimate(**refusal["change"])
    )
    assert found == judgement.over_refusal


def test_judgement_sentences_end_with_the_answer():
    judgement = _judgement()
    lines = judgement_sentences(judgement)
    assert lines[: len(sentences(judgement.evaluation))] == sentences(judgement.evaluation)
    rest = lines[len(sentences(judgement.evaluation)) :]
    assert rest[0] == "slack harm (improvement - b): +0.50, 95 % [0.50, 0.50]"
    assert rest[1].startswith(
        "pairs of policy responses that the policy's log-ratio orders like r + lambda g: 62.5 %, 95 % ["
    )
    assert rest[2].startswith(
        "refusals on 2 harmless look-alike prompts: 50.0 %, 95 % [9.5, 90.5] -> 100.0 %, 95 % [34.2, 100.0] ("
    )
    assert "change +50.0 points, 95 % [" in rest[2]
    assert rest[3:] == [
        "with 2 prompts x 2 responses and 95 % confidence: constraint harm (b 0.5) is not resolved"
    ]
    still = over_refusal([False] * 2, [False] * 2, 2)
    assert judgement_sentences(_judgement(over_refusal=still))[-2].endswith(
        "; change +0.0 points on every prompt"
    )


def test_sentences_name_the_confidence():
    lines = judgement_sentences(_judgement(0.8))
    assert [line for line in lines if "95 %" in line] == []
    assert sum("80 %" in line for line in lines) == 9
    e = _judgement(0.975).evaluation
    other = replace(e.constraints[0], limit=Improvement(name="other", value=1.25), word="not resolved")
    two = replace(e, constraints=(e.constraints[0], other))
    assert answer(two) == (
        "with 2 prompts x 2 responses and 97.5 % confidence: constraint harm (b 0.5) is not resolved; "
        "constraint other (b 1.25) is not resolved"
    )


def _with_constraint(lower: float, upper: float, threshold: float) -> list[str]:
    e = Estimate(mean=0.52, se=0.06, low=0.40, high=0.64, lower=lower, upper=upper, n=80)
    found = word(e, threshold)
    constraint = Judged(Improvement(name="harm", value=threshold), 0.48, e, found, holds=found == "met")
    return sentences(replace(evaluate(**_stage_outputs(["everyday", "delicate"])), constraints=(constraint,)))


def test_constraint_sentences():
    met = (
        "constraint harm: met (improvement +0.52, 95 % [0.40, 0.64], one-sided lower bound 0.42 >= b "
        "0.30, aimed at 0.48)"
    )
    assert met in _with_constraint(0.42, 0.62, 0.3)
    assert any(
        x.startswith("constraint harm: not met (") and "upper bound 0.62 < b 0.70," in x
        for x in _with_constraint(0.42, 0.62, 0.7)
    )
    unresolved = _with_constraint(0.42, 0.62, 0.5)
    assert any(
        x.startswith("constraint harm: not resolved (") and "b 0.50 lies between" in x for x in unresolved
    )


def test_printed_comparisons_are_true_as_printed():
    assert any("upper bound 0.6197 < b 0.6200," in x for x in _with_constraint(0.42, 0.6197, 0.62))
    assert any("lower bound 0.425 >= b 0.425," in x for x in _with_constraint(0.4251, 0.62, 0.425))
    assert any("lower bound 0.42 >= b 0.30," in x for x in _with_constraint(0.42, 0.62, 0.1 + 0.2))


def test_other_sentences_name_the_units_and_never_print_minus_zero():
    lines = sentences(evaluate(**_stage_outputs(["everyday", "delicate"])))
    assert lines[0].startswith("held-out: 2 prompts x 2 responses")
    assert (
        "reward: improvement +1.00, 95 % [1.00, 1.00], in within-prompt standard deviations of the reference"
        in lines
    )
    assert any(line.startswith("audit harm-audit (never optimised): improvement +0.50, ") for line in lines)
    assert any(line.startswith("KL(policy || reference): 3.00 nats per response, ") for line in lines)
    assert "finished answers: 50.0 % -> 75.0 % (reference -> policy)" in lines
    assert "mean length: 5.0 -> 6.8 tokens (reference -> policy)" in lines
    assert any(
        line.startswith("refusals on harmless prompts") and "0.0 % -> 50.0 %" in line for line in lines
    )
    still = replace(evaluate(**_stage_outputs(["", ""])), reward=estimate(torch.tensor([-1e-4, -1e-4])))
    assert "reward: improvement +0.00, 95 % [0.00, 0.00]" in " ".join(sentences(still))
