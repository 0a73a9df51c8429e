"""The policy update: its loss and gradients against plain autograd DPO through transformers
and peft; pairs; the schedule."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, get_scheduler

from engine import caid, model
from engine.baselines import primal_dual
from engine.config import CaidConfig, PrimalDualConfig, SafeDpoConfig, smoke
from engine.data.dealing import Schedule, deal
from engine.errors import UserError
from engine.model import packing
from engine.model.packing import LowerStates
from engine.policy import update
from engine.policy.forward import frozen_forward
from engine.policy.full import FullWeights
from engine.policy.lora import Adapter
from engine.policy.pairs import within_prompts
from engine.policy.peft import save_peft
from engine.policy.preference_loss import PreferenceLoss, parts
from engine.policy.steps import Step, Update, learning_rate_factor, take_steps
from engine.policy.update import ascend, fit
from engine.records import Prompts, Score, ScoredTarget, Scores
from engine.rollout.sampler import generate
from engine.run.rows import AscentStepRow, PairStepRow, StepRow, read_rows
from tests.helpers.architectures import write_model
from tests.helpers.samples import samples_of

PROMPTS = [[1, 70, 75, 80], [1, 90], [1, 66, 67, 68, 69]]


def update_of(config, network, weights, stage=None, start=None):
    return Update(stage=stage, config=config, model=network, weights=weights, start=start, iteration=1)


@pytest.fixture(scope="module", params=["tiny", "gemma 2"])
def folder(request, tiny_folder, tmp_path_factory):
    """Gives the tiny model, and one with a window and with caps on attention scores and logits."""
    if request.param == "tiny":
        return tiny_folder
    other = tmp_path_factory.mktemp("gemma")
    write_model(other, request.param)
    return other


@pytest.fixture(scope="module")
def world(folder):
    network = model.load(folder)
    prompts = Prompts(
        text=["a", "b", "c"], kind=["", "", ""], token_ids=PROMPTS, key_P=torch.tensor([11, 22, 33])
    )
    rollouts = generate(
        network, PROMPTS, n=4, max_new_tokens=9, seed=0, stop_token_ids=(2, *range(60, 90)), temperature=0.8
    )
    _, logprob = frozen_forward(
        network, packing.groups(prompts, rollouts), [], temperature=0.8, memory_budget_bytes=2**20
    )
    generator = torch.Generator().manual_seed(0)
    scores = Scores(
        reward_PG=torch.randn(3, 4, generator=generator, dtype=torch.float64),
        utility_PGJ=torch.randn(3, 4, 2, generator=generator, dtype=torch.float64),
        audit_PGA=torch.zeros(3, 4, 0, dtype=torch.float64),
        ref_logprob_PG=logprob.view(3, 4),
    )
    adapter = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=0)
    with torch.no_grad():
        for value in adapter.up.values():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return network, prompts, rollouts, scores, adapter


def kept_states(network, prompts, rollouts, layer):
    whole = packing.groups(prompts, rollouts)
    packed = packing.pack(whole, network.device)
    lower = LowerStates(layer)
    lower.keep(whole, network(packed.tokens, packed.layout, stop=layer))
    return lower


def same_gradients(adapter, tuned, tolerance=2e-4):
    """Asserts that the adapter's gradients are those of peft's copy of it."""
    gradients = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    for kind, group in (("lora_A", adapter.down), ("lora_B", adapter.up)):
        for key, value in group.items():
            layer, *name = key.split("|")
            expected = gradients[
                f"base_model.model.model.layers.{layer}.{'.'.join(name)}.{kind}.default.weight"
            ]
            assert (value.grad.double() - expected).abs().max() <= tolerance * expected.abs().max() + 1e-9, (
                kind,
                key,
            )


def in_peft(adapter, base_folder, folder):
    """Loads transformers' model in float64 with the adapter in peft;
    returns it with a function of response log-probs."""
    save_peft(adapter, folder, str(base_folder))
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.float32, attn_implementation="eager"
    ).double()
    tuned = PeftModel.from_pretrained(base, folder, is_trainable=True).double()

    def token_logprob(rollouts, r):
        prompt, response = PROMPTS[r // 4], rollouts.tokens[r, : rollouts.length[r]]
        logits = (
            tuned(torch.cat([torch.tensor(prompt), response])[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        )
        return torch.log_softmax(logits, -1)[range(len(response)), response]

    return tuned, token_logprob


def test_anchor_shift_and_dropped_pairs_equal_plain_autograd(world, folder, tmp_path):
    """The margin is coefficient x (log pi - log of the mixture of reference and anchor),
    less differences of the shift."""
    network, prompts, rollouts, scores, adapter = world
    generator = torch.Generator().manual_seed(5)
    anchor = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=3)
    with torch.no_grad():
        for value in anchor.up.values():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    shift = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    dropped = torch.tensor(
        [[True, False, True, False], [True, True, True, False], [False, False, False, True]]
    )
    target = ScoredTarget(
        score=Score.plain(scores.reward_PG),
        coefficient=0.4,
        anchor="any",
        anchor_share=0.3,
        shift_PG=shift,
        dropped_PG=dropped,
    )
    samples = samples_of(prompts, rollouts, scores)
    pairs = within_prompts(target.score_PG, [2, 1, 0], 4, dropped)
    kept = [(pairs.row[a], pairs.row[b]) for a, b in pairs.pairs.tolist()]
    assert len(kept) == 3 * 6 - 1 - 3 and not any(
        dropped.flatten()[a] and dropped.flatten()[b] for a, b in kept
    )
    adapter.zero_grad()
    config = smoke(CaidConfig(temperature=0.8, labels="soft"))
    result = PreferenceLoss(
        config=config, model=network, weights=adapter, samples=samples, target=target, anchor=anchor
    )(pairs, step=0)
    result.loss.backward()
    with torch.no_grad():
        tuned, token_logprob = in_peft(anchor, folder, tmp_path / "anchor")
        at_anchor = {r: token_logprob(rollouts, r).sum() for r in range(12)}
        with tuned.disable_adapter():
            at_reference = {r: token_logprob(rollouts, r).sum() for r in range(12)}
    tuned, token_logprob = in_peft(adapter, folder, tmp_path / "adapter")
    own = {r: token_logprob(rollouts, r).sum() for r in range(12)}
    ratio = {r: own[r] - 0.3 * at_anchor[r] - 0.7 * at_reference[r] for r in range(12)}
    s, moved = scores.reward_PG.flatten(), shift.flatten()
    losses = []
    for a, b in kept:
        margin, q = 0.4 * (ratio[a] - ratio[b]) - (moved[a] - moved[b]), torch.sigmoid(s[a] - s[b])
        losses.append(-q * F.logsigmoid(margin) - (1 - q) * F.logsigmoid(-margin))
    oracle = torch.stack(losses).mean()
    oracle.backward()
    assert float(result.loss.detach()) == pytest.approx(float(oracle.detach()), rel=1e-5)
    same_gradients(adapter, tuned)


def test_a_step_of_policy_gradient_equals_reinforce_with_the_others_as_baseline(
    world, folder, tmp_path, monkeypatch
):
    network, prompts, rollouts, scores, adapter = world
    config = smoke(PrimalDualConfig(temperature=0.8, steps=1, prompts_per_step=3, clip=1.0, beta=0.3))
    # The samples are those of a policy that is not the reference.
    generator = torch.Generator().manual_seed(7)
    apart_PG = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    scores = replace(scores, ref_logprob_PG=scores.ref_logprob_PG + apart_PG)
    samples = samples_of(prompts, rollouts, scores)
    seen = []
    monkeypatch.setattr(update, "take_steps", lambda *rest: seen.append(rest[-1]))
    ascend(update_of(config, network, adapter), samples, Score.plain(scores.reward_PG))
    adapter.zero_grad()
    step = seen[0](0)
    tuned, token_logprob = in_peft(adapter, folder, tmp_path / "adapter")
    old, total, count = rollouts.model_logprob, 0.0, 0
    score_PG = scores.reward_PG - 0.3 * (old.double().sum(1).view(3, 4) - scores.ref_logprob_PG)
    for r in range(12):
        p, i = divmod(r, 4)
        others = [score_PG[p, k] for k in range(4) if k != i]
        now = token_logprob(rollouts, r)
        ratio, advantage = (now - old[r, : len(now)]).exp(), score_PG[p, i] - sum(others) / 3
        total = total - torch.minimum(ratio * advantage, ratio.clamp(0, 2) * advantage).sum()
        count += len(now)
    (total / count).backward()
    assert step.loss == pytest.approx(float(total.detach()) / count, rel=1e-4)
    assert step.counts["responses"] == 12
    same_gradients(adapter, tuned)


@pytest.mark.parametrize("beta, kept", [(0.1, True), (1.0, True), (1.0, False)])
def test_loss_and_gradients_equal_plain_dpo(world, folder, tmp_path, beta, kept):
    network, prompts, rollouts, scores, adapter = world
    lam = torch.tensor([0.7, 0.2], dtype=torch.float64)
    config = smoke(CaidConfig(beta=beta, temperature=0.8, labels="soft"))
    lower = kept_states(network, prompts, rollouts, adapter.first_layer) if kept else None
    target = ScoredTarget(
        score=Score(reward_PG=scores.reward_PG, utility_PGJ=scores.utility_PGJ, lam_J=lam), coefficient=beta
    )
    samples = samples_of(prompts, rollouts, scores, lower)
    pairs = within_prompts(target.score_PG, [2, 0], 3)
    adapter.zero_grad()
    result = PreferenceLoss(config=config, model=network, weights=adapter, samples=samples, target=target)(
        pairs, step=0
    )
    result.loss.backward()

    tuned, token_logprob = in_peft(adapter, folder, tmp_path / "adapter")
    losses = []
    for a, b in pairs.pairs.tolist():
        ra, rb = pairs.row[a], pairs.row[b]
        with torch.no_grad(), tuned.disable_adapter():
            reference = token_logprob(rollouts, ra).sum() - token_logprob(rollouts, rb).sum()
        margin = beta * (token_logprob(rollouts, ra).sum() - token_logprob(rollouts, rb).sum() - reference)
        s = [scores.reward_PG.flatten()[r] + scores.utility_PGJ.flatten(0, 1)[r] @ lam for r in (ra, rb)]
        q = torch.sigmoid(s[0] - s[1])
        losses.append(-q * F.logsigmoid(margin) - (1 - q) * F.logsigmoid(-margin))
    oracle = torch.stack(losses).mean()
    oracle.backward()
    assert len(losses) == 6
    assert float(result.loss.detach()) == pytest.approx(float(oracle.detach()), rel=1e-5)
    same_gradients(adapter, tuned)


@pytest.mark.parametrize("labels", ["regression", "listwise", "single"])
def test_other_label_forms_equal_plain_autograd(world, folder, tmp_path, labels):
    network, prompts, rollouts, scores, adapter = world
    config = smoke(CaidConfig(temperature=0.8, labels=labels))
    beta, shift = 0.4, torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    target = ScoredTarget(score=Score.plain(scores.reward_PG), coefficient=beta, shift_PG=shift)
    samples = samples_of(prompts, rollouts, scores)
    pairs = within_prompts(target.score_PG, [2, 0], 3)
    adapter.zero_grad()
    result = PreferenceLoss(config=config, model=network, weights=adapter, samples=samples, target=target)(
        pairs, step=0
    )
    result.loss.backward()

    tuned, token_logprob = in_peft(adapter, folder, tmp_path / "adapter")
    s = scores.reward_PG.flatten()
    moved = {}
    for r in pairs.row:
        with torch.no_grad(), tuned.disable_adapter():
            reference = token_logprob(rollouts, r).sum()
        moved[r] = beta * (token_logprob(rollouts, r).sum() - reference) - shift.flatten()[r]
    if labels == "regression":
        both = [(pairs.row[a], pairs.row[b]) for a, b in pairs.pairs.tolist()]
        terms = [(moved[a] - moved[b] - s[a] + s[b]) ** 2 / 2 for a, b in both]
        expected = sum(bool((moved[a] > moved[b]) == (s[a] > s[b])) for a, b in both) / len(both)
        assert float(result.accuracy) == pytest.approx(expected)
    elif labels == "listwise":
        terms = []
        for p in (2, 0):
            own = [r for r in pairs.row if r // 4 == p]
            ratio = torch.stack([moved[r] / beta for r in own])
            terms.append(-((s[own] / beta).softmax(0) * ratio.log_softmax(0)).sum())
    else:
        value = {p: beta * (scores.reward_PG[p] / beta).exp().mean().log() for p in (2, 0)}
        terms = [(moved[r] - s[r] + value[r // 4]) ** 2 / 2 for r in pairs.row]
    oracle = torch.stack(terms).mean()
    oracle.backward()
    assert float(result.loss.detach()) == pytest.approx(float(oracle.detach()), rel=1e-5)
    same_gradients(adapter, tuned)


def test_few_responses_of_a_prompt_are_those_at_both_ends_of_the_score():
    score = torch.tensor([[3.0, 1.0, 2.0, 0.0, 5.0], [0.0, 9.0, 1.0, 8.0, 2.0]])
    pairs = within_prompts(score, [1, 0, 1], 3)
    assert pairs.prompt == [1, 1, 1, 0, 0, 0]
    assert pairs.row == [5, 6, 8, 0, 3, 4]
    assert pairs.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]]


def test_no_number_of_responses_takes_all_of_them(tmp_path, cache):
    config = replace(
        smoke(CaidConfig(iterations=1)),
        threads=1,
        force=True,
        responses_per_prompt=0,
        out=str(tmp_path / "run"),
    )
    caid.train(config)
    pairs = {row.pairs for row in read_rows(tmp_path / "run", PairStepRow)}
    assert pairs == {2 * 6}  # two prompts with four responses each


def test_schedule_covers_all_prompts_before_it_repeats(world):
    _, prompts, *_ = world

    def schedule(seed, steps=6):
        return [Schedule(prompts, seed, "x", 2)[i] for i in range(steps)]

    plan = schedule(0)
    flat = [p for step in plan for p in step]
    assert [len(step) for step in plan] == [2] * 6
    assert sorted(flat[:3]) == sorted(flat[3:6]) == [0, 1, 2]
    assert plan == schedule(0) and plan != schedule(1)
    assert Schedule(prompts, 0, "x", 2)[10**9] == Schedule(prompts, 0, "x", 2)[10**9]  # made when asked for


def test_a_later_step_without_a_pair_is_named_before_the_first_step():
    prompts = Prompts(
        text=["a", "b", "c"], kind=["", "", ""], token_ids=PROMPTS, key_P=torch.tensor([11, 22, 33])
    )
    config = smoke(SafeDpoConfig(prompts_per_step=1, steps=3))
    (last,) = Schedule(prompts, config.seed, "iteration-1", 1)[2]
    dropped = torch.zeros(3, 4, dtype=torch.bool)
    dropped[last] = True
    target = ScoredTarget(
        score=Score.plain(torch.arange(12.0).view(3, 4)), coefficient=1.0, dropped_PG=dropped
    )
    samples = SimpleNamespace(prompts=prompts, rollouts=SimpleNamespace(n=4))
    # There is no stage, model or weights, since nothing is done before the error.
    with pytest.raises(
        UserError, match="policy update 1: no pair of the 1 prompts of step 3 has a safe response"
    ):
        fit(update_of(config, None, None), samples, target, [0, 1, 2])


def test_learning_rate_rises_then_stays():
    config = CaidConfig(steps=8, warmup_steps=3)
    rates = [learning_rate_factor(config, i, 0) for i in range(8)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert learning_rate_factor(replace(config, warmup_steps=0), 0, 0) == 1.0
    # A warm-up that is longer than an update goes on in the next one.
    config = replace(config, steps=2)
    assert [learning_rate_factor(config, i, taken) for taken in (0, 2, 4) for i in range(2)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_are_those_of_transformers(name):
    """After the warm-up the schedule runs over the steps of one update.

    A later update has no warm-up and starts at the peak.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for warmup, taken, rising in ((3, 0, 3), (3, 10, 0), (0, 0, 0)):
        oracle = get_scheduler(name, optimizer, num_warmup_steps=rising, num_training_steps=10).lr_lambdas[0]
        rates = [
            learning_rate_factor(CaidConfig(steps=10, warmup_steps=warmup, schedule=name), i, taken)
            for i in range(10)
        ]
        assert rates[rising:] == pytest.approx([oracle(i) for i in range(rising, 10)], abs=1e-12)
        assert rates[:rising] == [0.25, 0.5, 0.75][:rising] and rates[rising] == 1.0
    # These are the first, the middle and the last step.
    last = {"linear": 0.1, "cosine": 0.02447}[name]
    assert rates[0] == 1 and rates[5] == pytest.approx(0.5) and rates[9] == pytest.approx(last, abs=1e-5)
    config = CaidConfig(steps=2, warmup_steps=3, schedule=name)
    assert [learning_rate_factor(config, i, taken) for taken in (0, 2) for i in range(2)] == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]


class Steps:
    """Stands for a stage; stops after its second partial."""

    name = "iteration-1/policy"

    def __init__(self, state=None, rows=(), stop=False):
        self.state, self.rows, self.stop, self.stopping, self.saved = state, list(rows), stop, False, 0

    def partial(self, cls):
        return self.state

    def progress(self, *args):
        return nullcontext(SimpleNamespace(advance=lambda n: None))

    def log(self, row):
        self.rows.append(row)

    def save_partial(self, state):
        tensors = {
            key: {n: t.clone() for n, t in getattr(state, key).items()}
            for key in ("adapter", "last", "first_moment", "second_moment")
        }
        self.state, self.saved = replace(state, **tensors, losses=list(state.losses)), self.saved + 1

    def check_stop(self):
        if self.stop and self.saved == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_stopped_update_goes_on_at_the_rate_where_it_was(tiny_folder, name):
    """It does so bitwise, in the first update, which has the warm-up, and in one that goes on from it."""
    network = model.load(tiny_folder)
    config = smoke(CaidConfig(steps=9, warmup_steps=2, schedule=name, checkpoint_every=3))

    def take(stage, start):
        adapter = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=0)
        parameters = list(adapter.parameters())

        def step_of(i):
            loss = sum(((p - (i + 1) / 10) ** 2).sum() for p in parameters)
            loss.backward()
            return Step(loss=float(loss.detach()), figures={}, batch={})

        return take_steps(update_of(config, network, adapter, stage, start), StepRow, step_of)

    start = None
    for _ in range(2):
        whole = Steps()
        made = take(whole, start)
        stopped = Steps(stop=True)
        with pytest.raises(KeyboardInterrupt):
            take(stopped, start)
        assert len(stopped.rows) == 6
        later = Steps(stopped.state, stopped.rows)
        resumed = take(later, start)
        assert later.rows == whole.rows and resumed.steps == made.steps and resumed.losses == made.losses
        for part in ("adapter", "last"):
            again = getattr(resumed, part)
            assert all(torch.equal(value, again[key]) for key, value in getattr(made, part).items())
        rates = [row.learning_rate / config.learning_rate for row in whole.rows]
        assert max(rates) == 1 and (rates[-1] == 1) == (name == "constant")
        start = made
    assert start.steps == 18


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_a_policy_is_the_running_mean_of_its_weights_over_all_updates(tiny_folder, monkeypatch, share):
    network = model.load(tiny_folder)
    config = smoke(CaidConfig(steps=4, weight_average=share, learning_rate=0.1))
    adapter = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=0)
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    after, step = [], torch.optim.AdamW.step

    def recorded(optimizer):
        step(optimizer)
        after.append([value.detach().double() for value in parameters])

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)

    def step_of(i):
        loss = sum(((p - (-1) ** i) ** 2).sum() for p in parameters)
        loss.backward()
        return Step(loss=float(loss.detach()), figures={}, batch={})

    made = None
    for number in (1, 2):
        made = take_steps(update_of(config, network, adapter, Steps(), made), StepRow, step_of)
        weight = torch.tensor([share**i for i in reversed(range(4 * number))], dtype=torch.float64)
        for place, name in enumerate(names):
            steps = torch.stack([values[place] for values in after])
            mean = torch.einsum("s,s...->...", weight / weight.sum(), steps)
            torch.testing.assert_close(made.adapter[name].double(), mean, rtol=1e-5, atol=1e-7)
            if share:
                assert torch.equal(made.last[name].double(), after[-1][place])
            assert torch.equal(dict(adapter.named_parameters())[name], made.adapter[name])
        assert len(after) == 4 * number and bool(made.last) == bool(share)


def test_lower_states_of_chosen_responses_equal_a_direct_run(world):
    network, prompts, rollouts, _, _ = world
    whole = packing.groups(prompts, rollouts)
    lower = kept_states(network, prompts, rollouts, 2)
    chosen = packing.Group(whole[1].prompt, [whole[1].responses[i] for i in (0, 3)], [4, 7])
    packed = packing.pack([chosen, whole[0]], network.device)
    direct = network(packed.tokens, packed.layout, stop=2)
    assert (lower.of([chosen, whole[0]]) - direct).abs().max() < 1e-5


def test_iterations_use_fresh_prompts_until_all_are_used():
    prompts = Prompts(text=["x"] * 20, kind=[""] * 20, token_ids=[[1]] * 20, key_P=torch.arange(20))
    dealt = [deal(prompts, 0, t, n_pairs=6, n_slack=4) for t in (1, 2, 3, 4)]
    for pairs, slack in dealt:
        assert len(pairs) == len(set(pairs)) == 6 and len(slack) == len(set(slack)) == 4
        assert not set(pairs) & set(slack)
    assert len({p for pairs, _ in dealt[:3] for p in pairs}) == 18
    assert dealt[0][1] == dealt[1][0][:4]
    assert set(dealt[3][0]) == {p for p in range(20)} - {p for pairs, _ in dealt[:3] for p in pairs} | set(
        dealt[0][0][:4]
    )
    assert (
        dealt
        == [deal(prompts, 0, t, n_pairs=6, n_slack=4) for t in (1, 2, 3, 4)]
        != [deal(prompts, 1, t, 6, 4) for t in (1, 2, 3, 4)]
    )


def test_all_prompts_but_the_slack_serve_when_more_pairs_are_asked_for():
    prompts = Prompts(text=["x"] * 20, kind=[""] * 20, token_ids=[[1]] * 20, key_P=torch.arange(20))
    for t in range(1, 5):
        pairs, slack = deal(prompts, 3, t, n_pairs=1000, n_slack=4)
        assert sorted(pairs + slack) == list(range(20))
    assert sorted(deal(prompts, 3, 1, n_pairs=1000, n_slack=0)[0]) == list(range(20))


def test_parts_are_whole_prompts_within_the_budget():
    score = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    pairs = within_prompts(score, [3, 0, 4, 1], 3)
    rows = [pairs.row[i : i + 3] for i in range(0, 12, 3)]
    groups = [packing.Group([1] * 5, [[1, 2]] * 3, own) for own in rows]
    for budget, sizes in ((1, [3] * 4), (21, [3] * 4), (22, [6, 6]), (33, [9, 3]), (10**6, [12])):
        found = parts(pairs, groups, budget)
        assert [len(part.row) for part, _ in found] == sizes
        assert [r for part, _ in found for r in part.row] == pairs.row and [
            p for part, _ in found for p in part.prompt
        ] == pairs.prompt
        assert torch.equal(torch.cat([part.pairs + first for part, first in found]), pairs.pairs)


@pytest.mark.parametrize("labels", ["soft", "sampled", "regression", "listwise", "single", "policy gradient"])
def test_gradients_of_parts_add_up_to_those_of_the_whole_step(labels, tmp_path, cache):
    """They do so with activation checkpointing too, which changes no bit."""
    gradient = labels == "policy gradient"
    config = smoke(
        PrimalDualConfig(iterations=1, ascent_prompts=8)
        if gradient
        else CaidConfig(labels=labels, iterations=1)
    )
    # Prompts have several sizes, and responses several lengths.
    config = replace(
        config, threads=1, force=True, prompts_per_step=5, responses_per_prompt=3, steps=2, max_new_tokens=12
    )
    rows = {}
    changed = {"whole": {}, "parts": {"tokens_per_forward": 90}}
    if labels == "regression":
        changed["again"] = {"activation_checkpointing": True}
    for name, changes in changed.items():
        train = (primal_dual if gradient else caid).train
        train(replace(config, out=str(tmp_path / name), **changes))
        cls = AscentStepRow if gradient else PairStepRow
        rows[name] = [row.as_dict() for row in read_rows(tmp_path / name, cls)]
    assert len(rows["whole"]) == 2 and rows.get("again", rows["whole"]) == rows["whole"]
    assert rows["parts"] != rows["whole"]
    for part, whole in zip(rows["parts"], rows["whole"], strict=True):
        assert part.keys() == whole.keys()
        for key, value in whole.items():
            if key == "accuracy" and whole["step"] == 1:
                continue  # the policy is the reference: all margins are 0 to rounding
            # This is the rounding of the difference of two log-probs of some 60 nats.
            rounding = 1e-5 if key == "margin" else 1e-6
            assert part[key] == (
                pytest.approx(value, rel=2e-4, abs=rounding) if isinstance(value, float) else value
            ), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("labels", ["regression", "listwise", "single", "policy gradient"])
def test_the_gradient_of_a_step_cut_into_parts_is_that_of_one_batch(
    world, folder, labels, tune, dtype, monkeypatch
):
    _, prompts, rollouts, scores, _ = world
    # Responses have unlike lengths, so that parts weigh differently in a mean over tokens.
    rollouts = replace(
        rollouts, length=torch.minimum(rollouts.length, torch.tensor([9] * 4 + [2, 1, 3, 2] + [5] * 4))
    )
    network = model.load(folder, dtype=dtype)
    weights = (
        FullWeights(network) if tune == "full" else Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=0)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in weights.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    samples = samples_of(prompts, rollouts, scores)
    # The middle prompt has fewer pairs than the others.
    dropped = torch.tensor([[False] * 4, [True, True, True, False], [False] * 4])
    target = ScoredTarget(score=Score.plain(scores.reward_PG), coefficient=0.4, dropped_PG=dropped)
    cls, own = (PrimalDualConfig, {}) if labels == "policy gradient" else (CaidConfig, {"labels": labels})
    base = smoke(
        cls(
            temperature=0.8,
            tune=tune,
            learning_rate=1e-5,
            steps=1,
            prompts_per_step=3,
            responses_per_prompt=4,
            **own,
        )
    )
    taken, batches = [], []
    monkeypatch.setattr(update, "take_steps", lambda *rest: taken.append(rest[-1]))
    pack = packing.pack
    monkeypatch.setattr(
        packing, "pack", lambda batch, device: batches.append(len(batch)) or pack(batch, device)
    )

    def step(**changes):
        config = replace(base, **changes)
        if labels == "policy gradient":
            ascend(update_of(config, network, weights), samples, Score.plain(scores.reward_PG))
        else:
            fit(update_of(config, network, weights), samples, target, [0, 1, 2])
        weights.zero_grad()
        batches.clear()
        found = taken[-1](0)
        gradients = {name: value.grad.clone() for name, value in weights.named_parameters()}
        return list(batches), found.loss, found.figures, gradients

    sizes, loss, figures, whole = step()
    assert sizes == [3]
    largest = max(value.abs().max() for value in whole.values())
    assert largest > 1e-3
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for checkpointing in (False, True):
        sizes, part_loss, part_figures, parts = step(
            tokens_per_forward=1, activation_checkpointing=checkpointing
        )
        assert (
            sizes == [1, 1, 1]
            and part_loss == pytest.approx(loss, rel=tolerance)
            and part_figures == pytest.approx(figures, rel=1e-5)
        )
        for name, value in whole.items():
            assert (parts[name] - value).abs().max() <= tolerance * largest, name
