"""Constraints on a kind of prompts, a mean cost and a rate: what training aims at,
and whole runs with them."""

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from engine import constraints, dual, mocan
from engine.baselines import repo, safe_dpo
from engine.config import CaidConfig, EvaluateConfig, MocanConfig, RepoConfig, SafeDpoConfig, check, smoke
from engine.constraints import KINDS, Improvement, Limit, MeanCost, Rate
from engine.errors import UserError
from engine.intervals import estimate
from engine.ranks import Ranks
from engine.records import Counted, Prompts, ScaledScores, Scored, Scores, Units
from engine.run.folder import RunFolder
from engine.stages import slack, update
from engine.stages.evaluate import run_evaluation
from engine.stages.reference import ByScorers, Reference, deviations
from engine.stages.update import Updates
from engine.verdict.evaluation import Evaluation
from engine.verdict.sentences import answer, judgement_sentences
from tests.helpers.samples import samples_of
from tests.helpers.scorers import brevity

DTYPE = torch.float64


def prompts_of(kinds: list[str]) -> Prompts:
    return Prompts(
        text=kinds, kind=kinds, token_ids=[[i] for i in range(len(kinds))], key_P=torch.arange(len(kinds))
    )


def scores_of(utility_PGJ: torch.Tensor, reward_PG: torch.Tensor | None = None) -> Scores:
    reward_PG = utility_PGJ[..., 0] if reward_PG is None else reward_PG
    return Scores(
        reward_PG=reward_PG,
        utility_PGJ=utility_PGJ,
        audit_PGA=utility_PGJ[..., :0],
        ref_logprob_PG=torch.zeros_like(reward_PG),
    )


def scaled_of(utility_PGJ: torch.Tensor, reward_PG: torch.Tensor | None = None) -> ScaledScores:
    return ScaledScores(**vars(scores_of(utility_PGJ, reward_PG)))


def reference_of(
    scores: ScaledScores, units: Units, limits: list[Limit], prompts: Prompts, **changes
) -> Reference:
    """Returns a reference with these scores in units, which asks for nothing but what `changes` says."""
    none_J = torch.zeros(len(limits), dtype=DTYPE)
    reference = Reference(
        samples=replace(samples_of(prompts, None, Scores(**vars(scores))), scaled=scores),
        scoring=ByScorers(units=units, audit_names=[]),
        limits=limits,
        needed_J=none_J,
        aimed=none_J.tolist(),
        aim_J=none_J,
        margin=0.0,
    )
    return replace(reference, **changes)


def units_of(*unit: float, above: list | None = None) -> Units:
    return Units(reward=1.0, utility_J=list(unit), audit_A=[], counted_J=above or [])


def test_each_cost_has_the_limit_that_is_set_for_it():
    config = MocanConfig(
        cost=("a", "b", "c"),
        threshold=(0.1, 0.2, 0.3),
        cost_mean=(math.inf, -1.5, math.inf),
        cost_rate=(1, 1, 0.02),
        cost_on=("delicate", "all", "all"),
        unsafe_above=(0.5,),
    )
    check(config)
    found = constraints.limits(config, ["A", "B", "C"])
    assert found == [
        Improvement(name="A", value=0.1, on="delicate"),
        MeanCost(name="B", value=-1.5),
        Rate(name="C", value=0.02, unsafe_above=0.5),
    ]


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"cost_rate": (0.1, 0.2)}, "--cost-rate 0.1 0.2: 2 value"),
        ({"cost_rate": (0.0,)}, "above 0"),
        ({"cost_rate": (1.2,)}, "not above 1"),
        ({"cost_mean": (math.nan,)}, "--cost-mean nan"),
        ({"cost_mean": (0.0,), "cost_rate": (0.1,)}, "both limit harm"),
        ({"cost_rate": (0.1,), "scores": "preference"}, "no level"),
        ({"cost_on": ("x", "y")}, "--cost-on x y"),
        ({"unsafe_above": ()}, "--unsafe-above"),
    ],
)
def test_limits_that_cannot_be_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        check(CaidConfig(**flags))


def test_the_weighted_dual_is_the_dual_of_the_constraint_on_the_subset():
    """At the solved multiplier the mean improvement of the tilt over the subset's prompts is b."""
    generator = torch.Generator().manual_seed(0)
    kinds = ["delicate"] * 5 + ["everyday"] * 15
    r = torch.randn(20, 8, generator=generator, dtype=DTYPE)
    g = torch.randn(20, 8, 1, generator=generator, dtype=DTYPE) - 0.5 * r[..., None]
    prompts, limit = prompts_of(kinds), Improvement(name="harm", value=0.3, on="delicate")
    weighted = g * constraints.weights([limit], prompts, prompts)[:, None]
    assert (weighted[5:] == 0).all() and torch.equal(weighted[:5], 4 * g[:5])
    lam = dual.solve(r, weighted, [0.3], 1.0).lam
    tilt = (r + weighted @ lam).softmax(1)
    improved = (tilt * g[..., 0]).sum(1) - g[..., 0].mean(1)
    assert float(improved[:5].mean()) == pytest.approx(0.3, abs=1e-9)
    # Everyday prompts are tilted by the reward alone.
    assert torch.equal(tilt[5:], r[5:].softmax(1))
    # On other prompts of another mixture the weights are those of the training prompts.
    other = prompts_of(["everyday", "delicate"])
    assert torch.equal((g[:2] * constraints.weights([limit], other, prompts)[:, None])[1], 4 * g[1])
    # The stages count the utilities so, both for the dual and for the rules of the algorithms.
    reference = reference_of(scaled_of(g, r), units_of(1.0), [limit], prompts)
    samples = samples_of(other, None, scores_of(g[:2], r[:2]))
    assert torch.equal(reference.scored(samples).counted_PGJ[1], 4 * g[1])
    reference = replace(reference, samples=samples_of(prompts, None, scores_of(g, r)))
    assert torch.equal(reference.problem[0], r) and torch.equal(reference.problem[1], weighted)


def test_levels_become_the_improvements_that_reach_them():
    generator = torch.Generator().manual_seed(1)
    cost = torch.randn(40, 6, 2, generator=generator, dtype=DTYPE) + 0.7
    prompts = prompts_of(["delicate", "everyday"] * 20)
    limits = [MeanCost(name="a", value=0.2, on="delicate"), Rate(name="b", value=0.1, unsafe_above=0.5)]
    units = units_of(2.0, 0.4, above=[None, Counted(above=0.5)])
    scores = units.apply(scores_of(-cost))
    needed = constraints.required(limits, scores, prompts, units)
    assert float(needed[0]) == pytest.approx(float(cost[::2, :, 0].mean() - 0.2) / 2.0)
    assert float(needed[1]) == pytest.approx(float((cost[..., 1] > 0.5).double().mean() - 0.1) / 0.4)
    aimed = constraints.aims(limits, scores, prompts, units, margin=0.0, heldout=prompts, n_responses=4)
    assert aimed == pytest.approx([0.2, 0.1])
    assert torch.allclose(constraints.aimed_improvement(limits, aimed, needed, units), needed)
    aimed = constraints.aims(limits, scores, prompts, units, margin=2.0, heldout=prompts, n_responses=4)
    assert aimed[0] < 0.2 and 0 < aimed[1] < 0.1
    extra = constraints.aimed_improvement(limits, aimed, needed, units) - needed
    assert extra.tolist() == pytest.approx([(0.2 - aimed[0]) / 2.0, (0.1 - aimed[1]) / 0.4])


def test_the_margin_of_a_mean_and_of_a_rate_covers_the_heldout_sampling():
    """A policy exactly at the aim ends 2 predicted standard errors below the limit."""
    generator = torch.Generator().manual_seed(2)
    P, n, m = 4000, 50, 3
    own = torch.randn(P, 1, 1, generator=generator, dtype=DTYPE)
    cost = own + 0.5 * torch.randn(P, 8, 1, generator=generator, dtype=DTYPE)
    prompts, heldout, units = prompts_of(["x"] * P), prompts_of(["x"] * n), units_of(1.0)
    (aimed,) = constraints.aims(
        [MeanCost(name="a", value=1.0)],
        scaled_of(-cost),
        prompts,
        units,
        margin=2.0,
        heldout=heldout,
        n_responses=m,
    )
    assert (1.0 - aimed) / 2 == pytest.approx(math.sqrt((1 + 0.25 / m) / n), rel=0.03)
    unsafe = (torch.rand(P, 8, 1, generator=generator) < 0.3).double()
    limit = Rate(name="a", value=0.1)
    (a,) = constraints.aims(
        [limit], scaled_of(-unsafe), prompts, units, margin=2.0, heldout=heldout, n_responses=m
    )
    assert a + 2 * math.sqrt(a * (1 - a) / (n * m)) == pytest.approx(0.1, rel=0.01)


def test_a_kind_that_is_too_rare_is_named_before_any_compute(tmp_path):
    config = smoke(MocanConfig(cost_on=("delicat",), threads=1, out=str(tmp_path / "run")))
    with pytest.raises(
        UserError, match=r"--cost-on delicat: 0 of the 12 training prompts.*kinds there: delicate, everyday"
    ):
        mocan.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("limit", "costs", "said"),
    [
        (
            Rate(name="harm", value=0.02, on="delicate"),
            [-1.0, -1.0],
            r"--unsafe-above 0: every cost harm of the reference on delicate prompts lies at or below",
        ),
        (
            Rate(name="harm", value=0.02, on="delicate"),
            [1.0, 2.0],
            r"every cost harm of the reference on delicate prompts lies above it",
        ),
        (
            Improvement(name="harm", value=0.3, on="delicate"),
            [2.5, 2.5],
            r"scorer harm on delicate prompts gave 2.5 for every response",
        ),
        (
            MeanCost(name="harm", value=0.3, on="delicate"),
            [1.0, 2.0],
            r"scorer harm on delicate prompts gives all responses of a prompt one score",
        ),
    ],
)
def test_a_cost_that_is_constant_where_its_constraint_looks_is_named(limit, costs, said):
    """Two delicate prompts have one cost each; elsewhere the cost varies."""
    generator = torch.Generator().manual_seed(3)
    cost = torch.randn(6, 4, 1, generator=generator, dtype=DTYPE)
    cost[:2, :, 0] = torch.tensor(costs, dtype=DTYPE)[:, None]
    prompts, harm = prompts_of(["delicate"] * 2 + ["everyday"] * 4), SimpleNamespace(name="harm")
    scorers = SimpleNamespace(reward=SimpleNamespace(name="good"), costs=(harm,), audits=())
    scores = scores_of(-cost, torch.randn(6, 4, generator=generator, dtype=DTYPE))
    with pytest.raises(UserError, match=said):
        deviations(scores, scorers, [limit], prompts)
    if not isinstance(limit, Rate):
        everywhere = deviations(scores, scorers, [replace(limit, on="")], prompts)
        assert everywhere.utility_J == pytest.approx([float(cost[..., 0].var(1).mean().sqrt())])


def test_a_response_is_unsafe_only_where_its_constraint_looks():
    cost = torch.tensor([[[1.0, -1.0], [-1.0, 0.7]], [[1.0, -1.0], [-1.0, 0.7]]], dtype=DTYPE)
    limits = [Improvement(name="a", value=0.3, on="delicate"), Improvement(name="b", value=0.3)]
    prompts = prompts_of(["delicate", "everyday"])
    samples = samples_of(prompts, None, scores_of(-cost))
    # The costs are compared in the scorers' units, whatever one unit is in the run.
    units = units_of(2.0, 0.25)
    reference = reference_of(units.apply(samples.scores), units, limits, prompts)
    scored = reference.scored(replace(samples, scaled=reference.scores))
    assert unsafe_of(scored, (0.0, 0.5)).tolist() == [[True, True], [False, True]]
    assert unsafe_of(scored, (0.0, 0.8)).tolist() == [[True, False], [False, False]]


def unsafe_of(scored: Scored, above: tuple[float, ...]) -> torch.Tensor:
    """Returns the pairs of responses that SafeDPO's update is told to drop."""
    config = SafeDpoConfig(cost=("a", "b"), unsafe_above=above)
    stages = SimpleNamespace(sample_reference=lambda: None, n_constraints=2, fit=lambda target, t: target)
    target, _ = safe_dpo.loop(stages, config)
    return target.dropped(scored)


@pytest.mark.parametrize(("kind", "unit", "aimed"), [("mean", 2.0, 1.0), ("rate", 0.5, 0.25)])
def test_repo_compares_a_prompts_own_level_with_the_limit(monkeypatch, tmp_path, kind, unit, aimed):
    """Prompt 0 lies below the limit and has not moved, prompt 1 has improved much and lies above
    it, so only prompt 1 misses."""
    before = torch.tensor([[0.0, 0.0, 0.0, 0.0], [10.0, 10.0, 10.0, 10.0]], dtype=DTYPE)
    after = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 4.0, 4.0]], dtype=DTYPE)
    if kind == "rate":
        before, after = (
            (before > 0).double(),
            torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=DTYPE),
        )
    limit, units = KINDS[kind](name="harm", value=aimed), Units(reward=unit, utility_J=[unit], audit_A=[])
    old, new = (units.apply(scores_of(-cost[..., None])) for cost in (before, after))
    prompts = prompts_of(["x", "x"])
    needed = constraints.required([limit], old, prompts, units)
    level = after[1].mean() / unit - aimed / unit
    missing_PJ = constraints.missing([limit], [aimed], needed, units, new.utility_PGJ, old.utility_PGJ)
    assert missing_PJ[:, 0].tolist() == pytest.approx([-aimed / unit, float(level)])
    # The mean over prompts is what the constraint itself misses.
    improvement = new.utility_PGJ.mean() - old.utility_PGJ.mean()
    assert float(missing_PJ.mean()) == pytest.approx(float(needed[0] - improvement))
    # The stages use it: lambda counts on prompt 1 alone, and the violation is
    # the mean of what it misses and 0.
    reference = reference_of(old, units, [limit], prompts, needed_J=needed, aimed=[aimed], aim_J=needed)
    rollouts = SimpleNamespace(finished=torch.ones(8), n=4)
    samples = samples_of(prompts, rollouts, scores_of(-after[..., None]))
    taken, logged = {}, []

    def one_stage(name, cls, compute):
        taken[name] = compute(SimpleNamespace(log=logged.append))
        return taken[name]

    def ascend(step, samples, score):
        taken["score"] = score
        return SimpleNamespace(adapter={}, loss=0.0)

    monkeypatch.setattr("engine.policy.update.ascend", ascend)
    answered = SimpleNamespace(logged=lambda *a: samples)
    monkeypatch.setattr(update, "sample", lambda *a, **b: samples)
    monkeypatch.setattr(slack, "drawn", lambda *a, **b: answered)
    for module in (update, slack):
        monkeypatch.setattr(module, "deal_prompts", lambda *a: ([0, 1], [0, 1]))
    monkeypatch.setattr(update, "gap_of", lambda *a: "")
    monkeypatch.setattr(update, "save_weights", lambda *a: None)
    config, show = smoke(RepoConfig(beta=1.0)), SimpleNamespace(line=lambda text: None)
    run = SimpleNamespace(stage=one_stage, display=show, folder=tmp_path, paths=RunFolder(tmp_path))
    job = SimpleNamespace(config=config, model=None, folder=tmp_path, texts=tmp_path, run=run, ranks=Ranks())
    weights = SimpleNamespace(tensors=dict, set_tensors=lambda x: None)
    lam = torch.tensor([3.0], dtype=DTYPE)
    Updates(job, reference, weights, None).ascend(None, lam, repo.rectified(lam), 1)
    utility = new.utility_PGJ[..., 0]
    score_PG = new.reward_PG + torch.tensor([[0.0], [3.0]], dtype=DTYPE) * utility
    assert torch.equal(taken["score"].total_PG, score_PG) and torch.equal(taken["score"].lam_J, lam)
    measured = slack.measure(job, reference, weights, SimpleNamespace(adapter={}, loss=0.0), lam, 1)
    assert float(measured.violation_J[0]) == pytest.approx(float(level) / 2)
    assert [row.KIND for row in logged] == ["policy", "iteration"] and logged[1].slack is measured.slack_J


@pytest.mark.parametrize("kind", ["mean", "rate"])
def test_runs_with_two_constraints_of_different_kinds(tmp_path, kind):
    from engine import caid

    own = (
        {"cost_mean": (math.inf, 5.0)}
        if kind == "mean"
        else {"cost_rate": (1.0, 0.9), "unsafe_above": (COST_MIDDLE,)}
    )
    config = smoke(
        CaidConfig(
            cost=("harm", "length=-tests.helpers.scorers:brevity"),
            threshold=(-9.0, 0.0),
            cost_on=("delicate", "all"),
            n_prompts=24,
            slack_prompts=12,
            eval_prompts=20,
            threads=1,
            force=True,
            out=str(tmp_path / "run"),
            **own,
        )
    )
    result = caid.train(config)
    first, second = result.evaluation.constraints
    assert (first.name, first.limit.kind, first.limit.on) == ("harm", "improvement", "delicate")
    assert first.estimate.n < result.evaluation.n_prompts == second.estimate.n
    assert (second.name, second.limit.kind) == ("length", kind)
    rows = [json.loads(line) for line in (tmp_path / "run" / "heldout.jsonl").read_text().splitlines()]
    # brevity is larger for shorter answers and enters with a minus: the cost is what it negates.
    costs = [-brevity([""], [row["policy"]])[0] for row in rows]
    if kind == "rate":
        costs = [float(c > COST_MIDDLE) for c in costs]
    assert second.measured.mean == pytest.approx(sum(costs) / len(costs), abs=1e-9)
    delicate = [row for row in rows if row["kind"] == "delicate"]
    gain = sum(row["policy_utility"][0] - row["reference_utility"][0] for row in delicate) / len(delicate)
    assert first.estimate.mean == pytest.approx(gain, abs=1e-9)
    # Judged again with the run's own seed: the same constraints, measures and words.
    again, _ = run_evaluation(tmp_path / "run", EvaluateConfig(seed=config.seed))
    assert again.evaluation.constraints == result.evaluation.constraints
    assert any(line.startswith("slack length (limit - ") for line in judgement_sentences(again))


COST_MIDDLE = 12.0


@dataclass(frozen=True, kw_only=True)
class WorstTenth(MeanCost):
    """Mean cost of the worst tenth of each prompt's responses <= value:
    a kind that the engine does not have."""

    kind: ClassVar[str] = "tenth"
    measured: ClassVar[str] = "worst tenth"

    def prompt_levels(self, utility_PG):
        return -utility_PG.sort(1).values[:, : math.ceil(utility_PG.shape[1] / 10)].mean(1)

    def level(self, utility_PG):
        return float(self.prompt_levels(utility_PG).mean())

    def aim(self, utility_PG, unit, *, margin, n_prompts, n_responses):
        return self.value - margin * unit * float(self.prompt_levels(utility_PG).std()) / math.sqrt(n_prompts)

    def values(self, policy_PG, reference_PG, unit):
        return self.prompt_levels(policy_PG) * unit


def test_a_further_kind_of_constraint_is_one_class(monkeypatch):
    """Each of two prompts has costs 0 to 9, the first shifted by 10, so that the worst tenth has 19 and 9;
    the policy's costs are 3 less."""
    cost = torch.arange(10, dtype=DTYPE).repeat(2, 1) + torch.tensor([[10.0], [0.0]], dtype=DTYPE)
    before, after, units, prompts = (
        -cost[..., None] / 2,
        -(cost[..., None] - 3) / 2,
        units_of(2.0),
        prompts_of(["x", "x"]),
    )
    limit = WorstTenth(name="harm", value=12.0)
    needed = constraints.required([limit], scaled_of(before), prompts, units)
    assert needed.tolist() == [(14 - 12) / 2]
    aimed = constraints.aims(
        [limit], scaled_of(before), prompts, units, margin=1.0, heldout=prompts_of(["x"] * 50), n_responses=10
    )
    assert aimed == pytest.approx([12 - math.sqrt(50) / math.sqrt(50)])
    aim = constraints.aimed_improvement([limit], aimed, needed, units)
    assert aim.tolist() == pytest.approx([1.5])
    missing = constraints.missing([limit], aimed, aim, units, after, before)
    assert missing[:, 0].tolist() == pytest.approx([(16 - 11) / 2, (6 - 11) / 2])
    (judged,) = constraints.judge([limit], aimed, [after[..., 0]], [before[..., 0]], [2.0])
    assert (
        judged.measured == estimate(torch.tensor([16.0, 6.0]))
        and judged.word == "not resolved"
        and judged.reference == 14
    )
    assert judged.required == 1 and judged.slack.mean == pytest.approx(1.0)
    assert limit.opening(1.0, 11.0, 2.0, 2).startswith(
        "constraint harm: worst tenth at most 12, aim 11; the reference has 14; "
    )
    assert limit.progress(1.5, 0.25, 1.0, 11.0, 2.0) == "harm worst tenth 11 +- 0.5 (at most 12, aim 11)"
    said = limit.verdict_text(judged, 0.95)
    assert said.startswith("constraint harm: not resolved (worst tenth 11.00, 95 % [")
    assert said.endswith("reference 14.00; improvement +1.50, 95 % [1.50, 1.50])")
    assert limit.slack_text(judged.slack, 0.95).startswith("slack harm (limit - worst tenth): +1.00, 95 % [")
    # A verdict that was written is read again once the kind stands in the table.
    monkeypatch.setitem(KINDS, "tenth", WorstTenth)
    still = estimate(torch.zeros(2))
    whole = Evaluation(
        reward=still,
        constraints=(judged,),
        audits=(),
        kl=still,
        finished=(1, 1),
        mean_length=(9, 9),
        refusal_harmless=None,
        n_prompts=2,
        n_responses=10,
    )
    assert Evaluation.from_dict(json.loads(json.dumps(whole.as_dict()))) == whole
    assert answer(whole).endswith("constraint harm (worst tenth at most 12) is not resolved")
