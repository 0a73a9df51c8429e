"""The mean of the worst share: its value, the threshold that is solved with lambda, its verdict, and runs."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from engine import constraints, mocan, train
from engine.config import EvaluateConfig, MocanConfig, check, smoke
from engine.constraints import Improvement, MeanCost, Rate, WorstShare, judge
from engine.errors import UserError
from engine.intervals import betting
from engine.ranks import Ranks
from engine.records import Counted, Prompts, Scores, Units
from engine.run.committed import read_committed
from engine.run.rows import ReferenceRow
from engine.scorers.base import Scorers, TextScorer
from engine.stages import reference as reference_stage
from engine.stages.evaluate import run_evaluation
from engine.stages.reference import reference_of, solved
from engine.stages.solve import one_shot
from engine.stages.worst_share import Worth, choose
from engine.verdict.evaluation import Evaluation
from tests.helpers import scorers
from tests.helpers.samples import samples_of

DTYPE = torch.float64


def worst_mean(cost: np.ndarray, weight: np.ndarray, share: float) -> float:
    """Averages the worst share of costs with probabilities `weight`, by sorting them."""
    order = np.argsort(-cost.ravel())
    cost, weight = cost.ravel()[order], weight.ravel()[order]
    taken = np.clip(share - (np.cumsum(weight) - weight), 0, weight)
    return float((taken * cost).sum() / share)


def tilted(r: np.ndarray, counted: np.ndarray, lam: float, beta: float) -> np.ndarray:
    z = (r - lam * counted) / beta
    w = np.exp(z - z.max(1, keepdims=True))
    return w / w.sum(1, keepdims=True)


def best_at(t: float, r: np.ndarray, c: np.ndarray, share: float, limit: float, beta: float):
    """Maximises E r - beta KL where t + E(c - t)+ / share <= limit; returns it, lambda and the policy."""
    counted = t + np.maximum(c - t, 0) / share

    def excess(lam: float) -> float:
        return (tilted(r, counted, lam, beta) * counted).sum(1).mean() - limit

    if counted.min(1).mean() > limit - 1e-6:
        return -math.inf, math.nan, None
    lam = brentq(excess, 0, 1e5, xtol=1e-14, rtol=1e-14) if excess(0) > 0 else 0.0
    pi = tilted(r, counted, lam, beta)
    kl = (pi * np.log(np.maximum(pi, 1e-300) * c.shape[1])).sum(1).mean()
    return (pi * r).sum(1).mean() - beta * kl, lam, pi


def prompts_of(n: int) -> Prompts:
    return Prompts(text=["x"] * n, kind=["x"] * n, token_ids=[[i] for i in range(n)], key_P=torch.arange(n))


def world(seed: int, P: int = 5, Y: int = 10, J: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists rewards [P, Y] and costs [P, Y, J] that rise with them and have a heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(P, Y, generator=generator, dtype=DTYPE)
    return r, (0.5 * r[..., None] + torch.randn(P, Y, J, generator=generator, dtype=DTYPE)).exp()


def job_of(config: MocanConfig, heldout: int = 40) -> SimpleNamespace:
    good, *costs = (TextScorer(name=name, function=len) for name in ("good", *config.cost))
    prompts = prompts_of(heldout)
    found = Scorers(reward=good, costs=tuple(costs), audits=())
    return SimpleNamespace(config=config, scorers=found, heldout=prompts, heldout_pool=prompts, ranks=Ranks())


def reference_at(config: MocanConfig, r: torch.Tensor, c: torch.Tensor, heldout: int = 40):
    scores = Scores(reward_PG=r, utility_PGJ=-c, audit_PGA=c[..., :0], ref_logprob_PG=torch.zeros_like(r))
    return reference_of(job_of(config, heldout), samples_of(prompts_of(len(r)), None, scores))


def exact(**changes) -> MocanConfig:
    """Returns settings of the plain problem: raw units, no margin."""
    return MocanConfig(
        **{"cost": ("harm",), "units": "raw", "margin": 0.0, "beta": 1.0, "lam_max": 1e6, **changes}
    )


def test_a_worst_share_counts_costs_so_that_its_mean_is_that_of_the_worst_ones_at_the_best_threshold():
    _, c = world(3, P=7, Y=11)
    cost = c[..., 0]
    means = {float(t): float(Counted(above=float(t), share=0.3)(cost).mean()) for t in cost.flatten()}
    weight = np.full(cost.shape, 1 / cost.numel())
    assert min(means.values()) == pytest.approx(worst_mean(cost.numpy(), weight, 0.3), rel=1e-12)
    t = sorted(means)[20]
    counted = t + np.maximum(cost.numpy() - t, 0) / 0.3
    assert means[t] == pytest.approx(counted.mean(), rel=1e-12) and means[t] > min(means.values())
    # In a run's units a utility is minus what its cost counts; a cost beside it stays as it is.
    units = Units(reward=2.0, utility_J=[0.5, 4.0], audit_A=[], counted_J=[Counted(above=t, share=0.3), None])
    both = torch.stack((-cost, -cost), dim=2)
    scores = Scores(reward_PG=cost, utility_PGJ=both, audit_PGA=both[..., :0], ref_logprob_PG=cost)
    found = units.apply(scores).utility_PGJ
    assert np.allclose(found[..., 0], -counted / 0.5, rtol=1e-12, atol=0)
    assert torch.equal(found[..., 1], -cost / 4.0)


@pytest.mark.parametrize("seed", range(6))
def test_threshold_and_lambda_are_those_of_the_best_policy_of_all(seed):
    """In a world whose responses are all listed, against a fine grid of thresholds, by scipy."""
    r, c = world(seed)
    share, part = (0.1, 0.3, 0.5)[seed % 3], (0.4, 0.7)[seed % 2]
    costs = c[..., 0].numpy()
    uniform = np.full(costs.shape, 1 / costs.size)
    limit = part * worst_mean(costs, uniform, share)
    config = exact(cost_worst=(limit,), worst_share=(share,))
    reference = reference_at(config, r, c)
    solution = solved(reference, config)
    grid = np.concatenate((np.unique(costs), np.linspace(0, limit, 200)))
    objective, lam, pi = max(
        (best_at(t, r.numpy(), costs, share, limit, 1.0) for t in grid), key=lambda x: x[0]
    )
    assert solution.value == pytest.approx(objective, abs=1e-9)
    assert lam > 0 and float(solution.lam) == pytest.approx(lam, rel=1e-6)
    counted = reference.limits[0].counted(c[..., 0]).numpy()
    own = tilted(r.numpy(), counted, float(solution.lam), 1.0)
    assert np.abs(own - pi).max() < 1e-6
    assert worst_mean(costs, own / len(own), share) == pytest.approx(limit, abs=1e-6)


def test_more_costs_than_are_tried_at_once_lead_to_the_same_threshold():
    r, c = world(9, P=40, Y=8)
    limit = 0.7 * worst_mean(c[..., 0].numpy(), np.full((40, 8), 1 / 320), 0.2)
    found = limits_found(exact(cost_worst=(limit,), worst_share=(0.2,)), r, c)[0]
    values = {t: best_at(t, r.numpy(), c[..., 0].numpy(), 0.2, limit, 1.0)[0] for t in np.unique(c)}
    assert found.above == max(values, key=values.get)


def limits_found(config: MocanConfig, r: torch.Tensor, c: torch.Tensor) -> list:
    return reference_at(config, r, c).limits


def test_a_mean_and_a_worst_share_of_one_scorer_hold_together():
    """Two levels of one cost, of which each alone leaves the other one broken."""
    r, c = world(1, P=12, Y=12)
    costs, uniform = c[..., 0].numpy(), np.full((12, 12), 1 / 144)
    mean, worst = 0.75 * costs.mean(), 0.4 * worst_mean(costs, uniform, 0.1)
    config = exact(
        cost=("harm", "tail"),
        threshold=(0.0, 0.0),
        cost_mean=(mean, math.inf),
        cost_worst=(math.inf, worst),
    )
    check(config)
    reference = reference_at(config, r, c.repeat(1, 1, 2))
    assert [type(limit) for limit in reference.limits] == [MeanCost, WorstShare]
    lam = solved(reference, config).lam
    counted = reference.limits[1].counted(c[..., 0]).numpy()
    own = tilted(r.numpy() - float(lam[0]) * costs, counted, float(lam[1]), 1.0)
    assert lam.min() > 0
    assert (own * costs).sum(1).mean() == pytest.approx(mean, abs=1e-8)
    assert worst_mean(costs, own / 12, 0.1) == pytest.approx(worst, abs=1e-6)


def best_together(r: np.ndarray, choices: list[list[np.ndarray]], beta: float):
    """Maximises E r - beta KL where all constraints hold; returns it, the multipliers and the policy.

    choices: for each constraint, the [P, Y] whose policy mean may be at most 0, one for each threshold.
    Tries all combinations of thresholds, each by scipy's minimiser of the dual.
    """
    lowest = r.min(1).mean() - beta * math.log(r.shape[1])  # of any policy: a dual below it has no minimum
    best = -math.inf, None, None
    possible = [[x for x in each if x.min(1).mean() < -1e-7] for each in choices]
    for excess in itertools.product(*possible):

        def dual(lam, excess=excess):
            z = (r - sum(x * y for x, y in zip(lam, excess, strict=True))) / beta
            top = z.max(1, keepdims=True)
            weight = np.exp(z - top)
            pi = weight / weight.sum(1, keepdims=True)
            value = beta * (top[:, 0] + np.log(weight.mean(1))).mean()
            return value, np.array([-(pi * x).sum(1).mean() for x in excess])

        found = minimize(
            dual,
            np.ones(len(excess)),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, 1e4)] * len(excess),
            options={"ftol": 1e-16, "gtol": 1e-12, "maxiter": 1000},
        )
        if found.fun > max(best[0], lowest):
            best = found.fun, found.x, tilted(r, sum(map(np.multiply, found.x, excess)), 1.0, beta)
    return best


def excesses(cost: np.ndarray, share: float, limit: float) -> list[np.ndarray]:
    return [t + np.maximum(cost - t, 0) / share - limit for t in np.unique(cost)]


# World, prompts and responses, beta, worst shares, limits in parts of the reference's, opposed costs. Where
# thresholds were chosen in turn alone, the second and third were missed, and the fourth to the sixth were
# taken for infeasible.
TOGETHER = (
    (2, (3, 8), 1.0, (0.2, 0.2), (0.6, 0.6), False),
    (664548, (2, 10), 0.2, (0.3, 0.3), (0.7, 0.6), True),
    (297794, (2, 10), 0.2, (0.5, 0.3), (0.6, 0.4), False),
    (269553, (2, 10), 0.2, (0.2, 0.5), (0.6, 0.4), True),
    (832093, (2, 10), 1.0, (0.5, 0.3), (0.7, 0.2), True),
    (875156, (3, 8), 0.2, (0.3, 0.5), (0.5, 0.4), True),
    (5, (2, 5), 0.5, (0.2, 0.3, 0.5), (0.7, 0.7, 0.8), False),
)


@pytest.mark.parametrize("problem", TOGETHER, ids=lambda problem: str(problem[0]))
def test_several_worst_shares_are_those_of_the_best_policy_of_all(problem):
    """Two or three thresholds and multipliers at once, against all combinations of thresholds by scipy."""
    seed, (P, Y), beta, share, part, opposed = problem
    r, c = world(seed, P, Y, len(share))
    if opposed:
        c = torch.stack((c[..., 0], (1 + 0.3 * c[..., 1]) / c[..., 0]), 2)
    costs, uniform = [x.numpy() for x in c.unbind(2)], np.full((P, Y), 1 / (P * Y))
    limit = [p * worst_mean(x, uniform, a) for p, x, a in zip(part, costs, share, strict=True)]
    names = tuple("abc"[: len(share)])
    config = exact(
        cost=names, threshold=(0.0,) * len(names), cost_worst=tuple(limit), worst_share=share, beta=beta
    )
    reference = reference_at(config, r, c)
    solution = solved(reference, config)
    choices = [excesses(*each) for each in zip(costs, share, limit, strict=True)]
    objective, lam, pi = best_together(r.numpy(), choices, beta)
    assert solution.value == pytest.approx(objective, abs=1e-8)
    assert solution.lam.tolist() == pytest.approx(lam, rel=1e-3, abs=1e-4)
    counted = [x.counted(y).numpy() for x, y in zip(reference.limits, c.unbind(2), strict=True)]
    own = tilted(r.numpy(), sum(map(np.multiply, solution.lam.tolist(), counted)), 1.0, beta)
    assert np.abs(own - pi).max() < 1e-4
    for x, a, most, own_lam in zip(costs, share, limit, solution.lam, strict=True):
        level = worst_mean(x, own / P, a)
        assert level == pytest.approx(most, abs=1e-6) if own_lam > 0 else level < most


@pytest.mark.parametrize("seed", range(4))
def test_a_worst_share_beside_an_improvement_is_that_of_the_best_policy_of_all(seed):
    r, c = world(seed, P=4, Y=9, J=2)
    harm, tail = (x.numpy() for x in c.unbind(2))
    b, limit = 0.3 * harm.std(), 0.6 * worst_mean(tail, np.full((4, 9), 1 / 36), 0.2)
    config = exact(
        cost=("harm", "tail"), threshold=(b, 0.0), cost_worst=(math.inf, limit), worst_share=(0.2,)
    )
    reference = reference_at(config, r, c)
    assert [type(x) for x in reference.limits] == [Improvement, WorstShare]
    solution = solved(reference, config)
    choices = [[harm - harm.mean() + b], excesses(tail, 0.2, limit)]
    objective, lam, pi = best_together(r.numpy(), choices, 1.0)
    assert solution.value == pytest.approx(objective, abs=1e-8)
    assert solution.lam.min() > 0 and solution.lam.tolist() == pytest.approx(lam, rel=1e-3)
    counted = reference.limits[1].counted(c[..., 1]).numpy()
    own = tilted(r.numpy() - float(solution.lam[0]) * harm, counted, float(solution.lam[1]), 1.0)
    assert np.abs(own - pi).max() < 1e-4
    assert harm.mean() - (own * harm).sum(1).mean() == pytest.approx(b, abs=1e-8)
    assert worst_mean(tail, own / 4, 0.2) == pytest.approx(limit, abs=1e-6)


@pytest.mark.parametrize("J", [1, 2, 3])
def test_the_choice_is_the_best_entry_of_a_table_whatever_it_looks_like(J):
    """Tables without any shape, but that a combination is worth no more than its parts, and of which few
    entries can be met."""
    generator = np.random.default_rng(J)
    for _ in range(20):
        n = int(generator.integers(2, (64, 32, 10)[J - 1] + 1))
        alone = generator.normal(size=(J, n))
        axes = np.meshgrid(*alone, indexing="ij")
        table = np.min(axes, 0) - (J > 1) * generator.exponential(size=(n,) * J)
        table[generator.random(table.shape) < 0.7] = -np.inf
        costs = [torch.arange(n + 1, dtype=DTYPE)[None]] * J

        def worth(fixed, table=table, alone=alone):
            at = tuple(int(x.above) for x in fixed)
            value = table[at] if len(fixed) == len(alone) else alone[int(fixed[0].name), at[0]]
            return None if value == -np.inf else Worth(objective=float(value), slack_J=[0.0] * len(fixed))

        limits = [WorstShare(name=str(j), value=1.0) for j in range(J)]
        found = choose(limits, costs, worth)
        if table.max() > -np.inf:
            assert table[tuple(int(x.above) for x in found)] == table.max()


def test_where_the_limit_does_not_bind_the_threshold_leaves_the_most_room():
    r, c = world(4)
    config = exact(cost_worst=(1e3,), worst_share=(0.2,))
    reference = reference_at(config, r, c)
    solution = solved(reference, config)
    assert float(solution.lam) == 0
    own = tilted(r.numpy(), 0 * r.numpy(), 0.0, 1.0)
    level = (own * reference.limits[0].counted(c[..., 0]).numpy()).sum(1).mean()
    assert level == pytest.approx(worst_mean(c[..., 0].numpy(), own / len(own), 0.2), rel=1e-9)


def test_a_limit_that_no_samples_support_names_what_they_do():
    r, c = world(5)
    costs = c[..., 0].numpy()
    config = exact(cost_worst=(0.5 * costs.min(),), worst_share=(0.2,))
    reference = reference_at(config, r, c)
    # The threshold is that of the lowest mean of each prompt's best response.
    lowest = [(t + np.maximum(costs - t, 0) / 0.2).min(1).mean() for t in np.unique(costs)]
    assert reference.limits[0].above == np.unique(costs)[int(np.argmin(lowest))]
    with pytest.raises(UserError, match=r"--cost-worst 0\.\d+ .* is beyond what the 8 samples"):
        one_shot(job_of(config), reference)
    with_force = exact(cost_worst=(0.5 * costs.min(),), worst_share=(0.2,), force=True, lam_max=50.0)
    assert float(one_shot(job_of(with_force), reference_at(with_force, r, c)).lam) == 50.0


def test_no_threshold_is_chosen_with_which_the_heldout_prompts_cannot_confirm_the_limit():
    r, c = world(6, P=20)
    c = c / (1 + c)
    limit = 0.9 * worst_mean(c[..., 0].numpy(), np.full((20, 10), 1 / 200), 0.5)
    free = limits_found(exact(cost_worst=(limit,), worst_share=(0.5,)), r, c)[0]
    config = exact(cost_worst=(limit,), worst_share=(0.5,), cost_range=("0:1",))
    found = reference_at(config, r, c, heldout=20).limits[0]
    job = job_of(config, heldout=20)
    error = reference_stage.error_of(job)
    constraints.check_confirmable([found], job.heldout_pool, error)
    assert found.above < free.above
    with pytest.raises(UserError, match="--cost-worst .*cannot confirm it whatever"):
        constraints.check_confirmable([free_of(found, free)], job.heldout_pool, error)


def free_of(found: WorstShare, free: WorstShare) -> WorstShare:
    return WorstShare(
        name="harm", value=found.value, share=0.5, above=free.above, costs_within=found.costs_within
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"worst_share": (0.0,)}, r"--worst-share 0.0: must lie in \(0, 1\)"),
        ({"worst_share": (1.0,)}, r"--worst-share 1.0: must lie in \(0, 1\)"),
        ({"worst_share": (0.1, 0.2)}, r"--worst-share 0.1 0.2: 2 value\(s\) for 1 cost"),
        ({"cost_worst": (0.5, 0.5)}, r"--cost-worst 0.5 0.5: 2 value\(s\) for 1 cost"),
        ({"cost_mean": (0.1,)}, r"--cost-mean and --cost-worst both limit harm.*name its scorer twice"),
        ({"cost_rate": (0.1,)}, r"--cost-rate and --cost-worst both limit harm"),
    ],
)
def test_settings_of_a_worst_share_that_no_run_can_use(changes, said):
    with pytest.raises(UserError, match=said):
        check(exact(**{"cost_worst": (0.5,), **changes}))


def test_bounds_of_a_worst_share_are_exact_within_its_own_range():
    """A cost between 0 and 1 counts between t and t + (1 - t) / A; one beyond that ends the exactness."""
    limit = WorstShare(name="harm", value=0.9, share=0.25, above=0.2, costs_within=(0.0, 1.0))
    assert limit.span(0.7) == pytest.approx((0.2, 3.4))
    assert WorstShare(name="harm", value=0.9, share=0.25, costs_within=(-1.0, 1.0)).span(1.0) == (-1.0, 7.0)
    cost = torch.rand(300, 4, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    counted, unit = limit.counted(cost), 0.7
    (judged,) = judge([limit], [0.8], [-counted / unit], [-counted / unit], [unit])
    assert judged.exact and judged.measured.mean == pytest.approx(float(counted.mean()), rel=1e-12)
    assert judged.reference == pytest.approx(float(counted.mean()), rel=1e-12)
    assert "mean of the worst 25 %" in limit.verdict_text(judged, 0.95)
    beyond = limit.counted(cost.clone().index_fill(1, torch.tensor([0]), 1.5))
    (judged,) = judge([limit], [0.8], [-beyond / unit], [-counted / unit], [unit])
    assert not judged.exact


@pytest.mark.parametrize("clustered", [False, True], ids=["answers", "prompts"])
def test_false_met_stays_below_the_error_where_the_worst_share_is_at_its_limit(clustered):
    """A tenth of the costs is uniform on [0.8, 1], the others lie below 0.3, so that the worst tenth has the
    mean 0.9 exactly. Whole prompts are harmful, or single answers: 4,000 verdicts at an error of 5 %."""
    generator, n, P, G = torch.Generator().manual_seed(7), 4000, 96, 6
    harmful = torch.rand(n, P, 1 if clustered else G, generator=generator, dtype=DTYPE) < 0.1
    draw = torch.rand(n, P, G, generator=generator, dtype=DTYPE)
    cost = torch.where(harmful, 0.8 + 0.2 * draw, 0.3 * draw)
    false = {}
    for t in (0.5, 0.2):  # the best threshold, and one at which the mean is higher
        limit = WorstShare(name="harm", value=0.9, share=0.1, above=t, costs_within=(0.0, 1.0))
        counted = limit.counted(cost)
        mean = 0.9 if t == 0.5 else 0.2 + (0.1 * 0.7 + 0.9 * 0.1**2 / 0.6) / 0.1
        assert float(counted.mean()) == pytest.approx(mean, abs=0.01)
        upper = betting.bounds(counted.mean(2), *limit.span(1.0), 0.05)[1]
        false[t] = int((upper <= 0.9).sum())
        (judged,) = judge([limit], [0.8], [-counted[0]], [-counted[0]], [1.0], alpha=0.05)
        assert judged.exact and judged.measured.upper == pytest.approx(float(upper[0]), abs=1e-9)
    assert false[0.2] <= false[0.5] <= 0.05 * n
    # Betting loses most where a number lies at one of the two ends of its range: there the level is used.
    assert not clustered or false[0.5] > 0


def settings_of_two_levels(out, **changes) -> MocanConfig:
    return smoke(
        MocanConfig(
            cost=("length=-tests.helpers.scorers:brevity", "tail=-tests.helpers.scorers:brevity"),
            threshold=(0.0, 0.0),
            cost_mean=(20.0, math.inf),
            cost_worst=(math.inf, 24.0),
            worst_share=(0.25,),
            n_prompts=24,
            eval_prompts=20,
            margin=0.0,
            threads=1,
            out=str(out),
            **changes,
        )
    )


def test_a_scorer_limited_at_two_levels_is_asked_once_and_its_threshold_outlives_an_interruption(
    tmp_path, monkeypatch
):
    asked, brevity = [], scorers.brevity

    def counting(prompts, responses):
        asked.append(len(responses))
        return brevity(prompts, responses)

    monkeypatch.setattr(scorers, "brevity", counting)
    config = settings_of_two_levels(tmp_path / "run")
    with monkeypatch.context() as broken:
        broken.setattr(mocan, "loop", lambda stages, config: stages.sample_reference() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mocan.train(config)
    responses = [n for n in asked if n > 4]
    assert responses == [config.n_prompts * config.n_responses]  # the reference's samples, once
    row = read_committed(tmp_path / "run").one(ReferenceRow)
    assert row.worst_above[0] is None and row.worst_above[1] is not None
    # Whoever goes on, or judges, takes it from there.
    monkeypatch.setattr("engine.stages.worst_share.choose", lambda *a: pytest.fail("chosen again"))
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    evaluation = Evaluation.read(tmp_path / "run" / "evaluation.json", cure="")
    mean, worst = evaluation.constraints
    assert worst.limit == WorstShare(name="tail", value=24.0, share=0.25, above=row.worst_above[1])
    lines = (tmp_path / "run" / "heldout.jsonl").read_text().splitlines()
    costs = np.array([-brevity([""], [json.loads(line)["policy"]])[0] for line in lines])
    t = worst.limit.above
    assert mean.measured.mean == pytest.approx(costs.mean(), abs=1e-9)
    assert worst.measured.mean == pytest.approx((t + np.maximum(costs - t, 0) / 0.25).mean(), abs=1e-9)
    again, _ = run_evaluation(tmp_path / "run", EvaluateConfig(seed=config.seed))
    assert again.evaluation.constraints[1].limit == worst.limit
    (_, said) = json.loads((tmp_path / "run" / "certificate.json").read_text())["constraints"]
    assert said["counted"] == {"above": row.worst_above[1], "share": 0.25}
    assert again.evaluation.constraints[1].measured.mean == worst.measured.mean


def test_a_verdict_that_is_read_again_has_what_its_costs_were_counted_by():
    for limit in (
        Rate(name="harm", value=0.1, unsafe_above=0.7, on="delicate"),
        WorstShare(name="harm", value=0.4, share=0.2, above=-1.5, costs_within=(-3.0, 3.0)),
    ):
        counted = torch.rand(30, 2, generator=torch.Generator().manual_seed(1), dtype=DTYPE).round()
        (judged,) = judge([limit], [0.05], [-counted], [-counted], [1.0])
        still = judged.estimate
        whole = Evaluation(
            reward=still, constraints=(judged,), audits=(), kl=still, finished=(1, 1), mean_length=(9, 9),
            refusal_harmless=None, n_prompts=30, n_responses=2,
        )  # fmt: skip
        assert Evaluation.from_dict(json.loads(json.dumps(whole.as_dict()))).constraints[0].limit == limit


def test_needs_and_aims_are_those_of_the_mean_that_it_counts_on_its_own_prompts():
    """Half of the prompts are delicate, and the limit is about them; a verdict takes 30 prompts x 5."""
    _, c = world(8, P=40, Y=6)
    kinds = ["delicate", "everyday"] * 20
    prompts = Prompts(text=kinds, kind=kinds, token_ids=[[i] for i in range(40)], key_P=torch.arange(40))
    heldout = prompts.select(list(range(0, 40, 2)) + list(range(0, 20, 2)))
    limit = WorstShare(name="harm", value=1.5, on="delicate", share=0.2, above=0.7)
    unit, own = 0.4, c[::2, :, 0].numpy()
    counted = 0.7 + np.maximum(own - 0.7, 0) / 0.2
    units = Units(reward=1.0, utility_J=[unit], audit_A=[], counted_J=[limit.counted])
    scores = Scores(reward_PG=c[..., 0], utility_PGJ=-c, audit_PGA=c[..., :0], ref_logprob_PG=c[..., 0])
    scaled = units.apply(scores)
    needed_J = constraints.required([limit], scaled, prompts, units)
    assert float(needed_J) == pytest.approx((counted.mean() - 1.5) / unit, rel=1e-12)
    aimed = constraints.aims([limit], scaled, prompts, units, margin=2.0, heldout=heldout, n_responses=5)
    within = counted.var(1, ddof=1).mean()
    between = max(0.0, counted.mean(1).var(ddof=1) - within / 6)
    se = math.sqrt((between + within / 5) / 30)
    assert aimed == pytest.approx([1.5 - 2 * se], rel=1e-12)
    aim_J = constraints.aimed_improvement([limit], aimed, needed_J, units)
    assert float(aim_J) == pytest.approx((counted.mean() - 1.5 + 2 * se) / unit, rel=1e-12)
