"""The walk of lambda: from a run's config, or its dual, to the argument of the op that trains the policy."""

import inspect
from dataclasses import replace

import pytest
import torch

from engine import caid
from engine.baselines import cdpo, primal_dual, sacpo
from engine.config import CaidConfig, CdpoConfig, PrimalDualConfig, SacpoConfig, smoke
from engine.policy import preference_loss, update
from engine.run.rows import PolicyRow, read_rows
from engine.stages.run import RunStages


class Calls(list):
    """The arguments by name of each call of an op, and the samples of the update that made it."""

    def __init__(self, monkeypatch, module, name, updated):
        op, step = getattr(module, name), getattr(update, updated)

        def spied_op(*arguments, **keywords):
            call = inspect.signature(op).bind(*arguments, **keywords)
            call.apply_defaults()
            self.append(call.arguments | {"samples": self.samples})
            return op(*arguments, **keywords)

        def spied_step(own, samples, *rest):
            self.samples = samples
            return step(own, samples, *rest)

        monkeypatch.setattr(module, name, spied_op)
        monkeypatch.setattr(update, updated, spied_step)


def train(algorithm, config, folder, monkeypatch):
    """Runs an algorithm in its smallest form, without a verdict; returns the multipliers of each iteration,
    [T, J]."""
    monkeypatch.setattr(RunStages, "verdict", lambda self, policy, lam_J: None)
    algorithm.train(replace(smoke(config), threads=1, force=True, steps=2, least_weight=0.0, out=str(folder)))
    return torch.tensor([row.lam for row in read_rows(folder, PolicyRow)], dtype=torch.float64)


def lambdas(calls):
    """Returns lambda of each update, [T, J]; the calls of an update all have one."""
    found = []
    for call in calls:
        if not found or not torch.equal(call["lam"], found[-1]):
            found.append(call["lam"])
    return torch.stack(found)


def check_scores(call):
    """Asserts that reward and utility are those of the update's responses, in the run's units."""
    scaled = call["samples"].scaled
    known = torch.cat((scaled.reward_PG[..., None], scaled.utility_PGJ), 2).flatten(0, 1).tolist()
    handed = torch.cat((call["reward"][:, None], call["utility"]), 1).tolist()
    assert handed and all(row in known for row in handed)


TWO_COSTS = {"cost": ("harm", "length=-tests.helpers.scorers:brevity"), "threshold": (-9.0, 0.0)}


def test_a_preference_update_hands_lambda_of_the_config_and_of_each_dual_step(tmp_path, monkeypatch, cache):
    calls = Calls(monkeypatch, preference_loss, "lagrangian_preference_loss", "fit")
    config = CdpoConfig(lam_init=0.7, iterations=2, beta=0.3, labels="soft", **TWO_COSTS)
    logged = train(cdpo, config, tmp_path / "run", monkeypatch)
    assert calls[0]["lam"].tolist() == [0.7, 0.7]
    assert torch.equal(lambdas(calls), logged) and not torch.equal(logged[0], logged[1])
    assert {(call["labels"], call["beta"]) for call in calls} == {("soft", 0.3)}
    for call in calls:
        check_scores(call)


@pytest.mark.parametrize("labels", ["regression", "single", "listwise", "sampled-once"])
def test_each_form_of_labels_takes_the_dual_s_lambda(labels, tmp_path, monkeypatch, cache):
    calls = Calls(monkeypatch, preference_loss, "lagrangian_preference_loss", "fit")
    logged = train(caid, CaidConfig(iterations=1, labels=labels), tmp_path / "run", monkeypatch)
    assert torch.equal(lambdas(calls), logged) and logged.min() > 0
    for call in calls:
        check_scores(call)
        assert call["labels"] == ("sampled" if labels == "sampled-once" else labels)
        given = {name for name in ("uniform", "value", "group") if call[name] is not None}
        needed = {"single": {"value"}, "listwise": {"group"}, "sampled-once": {"uniform"}}
        assert given == needed.get(labels, set())


@pytest.mark.parametrize("advantage", ["rloo", "group_norm"])
def test_the_policy_gradient_hands_lambda_advantage_and_kl(advantage, tmp_path, monkeypatch, cache):
    calls = Calls(monkeypatch, update, "lagrangian_policy_loss", "ascend")
    config = PrimalDualConfig(
        lam_init=0.7, iterations=2, beta=0.3, advantage=advantage, ascent_prompts=4, **TWO_COSTS
    )
    logged = train(primal_dual, config, tmp_path / "run", monkeypatch)
    assert calls[0]["lam"].tolist() == [0.7, 0.7]
    assert torch.equal(lambdas(calls), logged) and not torch.equal(logged[0], logged[1])
    for call in calls:
        check_scores(call)
        handed = (call["advantage"], call["kl"], call["kl_coef"], call["normalize"])
        assert handed == (advantage, "score", 0.3, "token")
        assert set(call["ref_logprob"].tolist()) <= set(
            call["samples"].scores.ref_logprob_PG.flatten().tolist()
        )


def test_sacpo_s_second_stage_has_no_reward_and_lambda_in_beta(tmp_path, monkeypatch, cache):
    calls = Calls(monkeypatch, preference_loss, "lagrangian_preference_loss", "fit")
    train(sacpo, SacpoConfig(lam=(0.4, 1.2), beta=0.8, **TWO_COSTS), tmp_path / "run", monkeypatch)
    assert lambdas(calls).tolist() == [[0.0, 0.0], [0.4 / 1.6, 1.2 / 1.6]]
    assert [call["beta"] for call in (calls[0], calls[-1])] == [0.8, pytest.approx(0.5)]
    assert calls[0]["reward"].any() and not calls[-1]["reward"].any()
