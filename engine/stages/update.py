"""Stage iteration-t/policy: one policy update, and its iterate on disk."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine import dual, keys
from engine.data.dealing import deal
from engine.data.prompts import by_tokens, overlap
from engine.errors import UserError
from engine.files import clear
from engine.model.folder import lasting_name
from engine.policy import update
from engine.policy.iterates import files_of, save_weights
from engine.policy.samples import Samples
from engine.policy.steps import Policy, Update
from engine.policy.weights import Weights, copy_of, whole
from engine.records import ScoreRule, Target
from engine.run import outputs
from engine.run.rows import PairsRow, PolicyRow
from engine.run.run import Stage
from engine.stages import slack, trust
from engine.stages.job import Job, deal_prompts
from engine.stages.reference import Reference
from engine.stages.sampling import Drawn, forward_of, gap_of, sample, scored
from engine.stages.solve import listed


def score_pairs(job: Job) -> Samples:
    """Runs stage pairs: scores the responses of the file of --pairs, and computes their log-probs under the
    reference, unless steps on an adapter do so themselves (`PreferenceLoss`)."""
    pairs = job.pairs
    compared = job.config.compares_with_reference or job.model.dtype.itemsize > 2

    def compute(stage: Stage) -> Samples:
        forward = forward_of(job.settings, logprob=compared)
        scores = scored(job, stage, pairs.prompts, pairs.rollouts, pairs.texts, forward)
        stage.log(PairsRow(prompts=len(pairs.prompts)))
        return Samples(
            prompts=pairs.prompts,
            rollouts=pairs.rollouts,
            texts=pairs.texts,
            scores=scores,
            kl_PG=torch.zeros_like(scores.ref_logprob_PG),
        )

    return job.run.stage("pairs", Samples, compute)


class Updates:
    """The policy updates of a run: `weights` are what is trained, and hold an iterate after each of them."""

    def __init__(self, job: Job, reference: Reference, weights: Weights, pairs: Samples | None) -> None:
        self.job, self.reference, self.weights, self.pairs = job, reference, weights, pairs
        self.untrained = weights.tensors()
        # Those of the last iterate, where its KL was measured on them, by its number.
        self.slack_answers: dict[int, Drawn] = {}

    def hold(self, policy: Policy | None) -> None:
        """Gives the weights the values of an iterate; None is the reference."""
        self.weights.set_tensors(self.untrained if policy is None else policy.adapter)

    def fit(self, target: Target, iteration: int) -> Policy:
        """Fits the target on pairs of responses (`_learned_from`)."""
        anchor = None if target.anchor is None else copy_of(self.weights, target.anchor.adapter)
        tilt_kl = self._tilt_kl(target)

        def compute(stage: Stage) -> Policy:
            samples, train_on = self._learned_from(stage, target.start, iteration)
            scored = target.on(self.reference.scored(samples)).bounded(self.job.config.least_weight)
            own = self._update(stage, target.start, iteration)
            policy = update.fit(own, samples, scored, train_on, anchor)
            return policy if tilt_kl is None else self._trusted(stage, policy, tilt_kl, iteration)

        return self._iterate(target.start, target.lam_J, iteration, compute, tilt_kl)

    def ascend(self, start: Policy | None, lam_J: Tensor, rule: ScoreRule, iteration: int) -> Policy:
        """Takes policy-gradient steps on fresh samples of the policy, scored
        by the rule less beta x log-ratio."""
        reference, config = self.reference, self.job.config
        tilt_kl = None
        # With group_norm the optimum moves with the policy, whose own deviations are the units.
        if config.advantage == "rloo":
            missing_PJ = reference.missing(reference.scores.utility_PGJ, range(len(reference.prompts)))
            asked = rule(reference.scored(reference.samples, missing_PJ))
            tilt_kl = dual.tilt_kl(asked.total_PG, config.beta)
        chosen = deal_prompts(config, reference.prompts, iteration)[0][: config.ascent_prompts]

        def compute(stage: Stage) -> Policy:
            samples = self._fresh(stage, chosen, iteration)
            scored = reference.scored(samples, reference.missing(samples.scaled.utility_PGJ, chosen))
            return update.ascend(self._update(stage, start, iteration), samples, rule(scored))

        return self._iterate(start, lam_J, iteration, compute, tilt_kl)

    def adopt(self, policy: Policy, lam_J: Tensor, iteration: int) -> Policy:
        """Takes no step: a policy that exists already becomes this iterate too,
        with a folder and a row of its own."""
        return self._iterate(policy, lam_J, iteration, lambda stage: policy.read(self.weights), None)

    def _tilt_kl(self, target: Target) -> float | None:
        """Returns the KL of the tilt that a target asks for, nats per response;
        None for a target that does not start from the reference alone."""
        if target.anchor is not None or target.shift is not None:
            return None
        scored = target.on(self.reference.scored(self.reference.samples))
        return dual.tilt_kl(scored.score_PG, scored.coefficient)

    def _trusted(self, stage: Stage, policy: Policy, tilt_kl: float, iteration: int) -> Policy:
        """Takes back a policy that went further from the reference than its target
        needs (`engine.stages.trust`)."""
        job, config, prompts = self.job, self.job.config, self.reference.prompts
        if not config.trusts:
            return policy
        known = None
        if config.measured_slacks and iteration > 0:
            self.slack_answers = {
                iteration: slack.answers(job, stage, self.reference, self.weights, iteration)
            }
            kl_PG = self.slack_answers[iteration].samples.kl_PG
            known = float(kl_PG.mean()), float(dual.standard_error(kl_PG.mean(1)))
        pairs, measured = deal_prompts(config, prompts, iteration)
        asked, limit = prompts.select(measured + pairs), config.max_kl_ratio * tilt_kl
        found = trust.taken_back(
            job, stage, policy, self.weights, self.untrained, asked, limit, iteration, known
        )
        if found is not policy:
            self.slack_answers = {}
        return found

    def _update(self, stage: Stage, start: Policy | None, iteration: int) -> Update:
        job = self.job
        return Update(
            stage=stage,
            config=job.config,
            model=job.model,
            weights=self.weights,
            start=start,
            iteration=iteration,
            ranks=job.ranks,
        )

    def _iterate(
        self,
        start: Policy | None,
        lam_J: Tensor,
        iteration: int,
        compute: Callable[[Stage], Policy],
        tilt_kl: float | None,
    ) -> Policy:
        """Runs the stage around an update from `start`; the iterate goes to adapters/iteration-t."""
        job, name, folder = self.job, f"iteration-{iteration}/policy", self.job.run.paths.iterate(iteration)
        job.run.display.line(f"iteration {iteration}: lambda {listed(lam_J)}")
        self.hold(start)

        def updated(stage: Stage) -> Policy:
            job.ranks.first(lambda: _remove(folder))
            policy = compute(stage)
            stage.log(PolicyRow(iteration=iteration, lam=lam_J, loss=policy.loss, tilt_kl=tilt_kl))
            return policy

        policy = job.run.stage(name, Policy, updated)
        if gap := gap_of(job.run, name):
            job.run.display.line(f"{name}: {gap}")
        self.hold(policy)
        with whole(job.model, self.weights) as (_, weights):
            job.ranks.first(lambda: self._write(folder, weights))
        return policy

    def _write(self, folder: Path, weights: Weights) -> None:
        """Writes weights as an iterate, unless its folder is whole."""
        job, paths = self.job, self.job.run.paths
        noted = all(outputs.has(paths, folder / file) for file in files_of(weights))
        if not (noted and outputs.is_whole(paths, folder)):
            if outputs.has(paths, folder):
                job.run.display.warn(f"{folder} is not as it was written: made again from {paths.stages}")
            _remove(folder)
            base = lasting_name(job.config.model, job.folder)
            save_weights(weights, folder, base, job.texts, job.config.lora_dropout)
            outputs.note(paths, [folder])

    def _learned_from(self, stage: Stage, start: Policy | None, iteration: int) -> tuple[Samples, list[int]]:
        """Chooses the responses that an update learns from (--pairs), and which of their prompts to use.

        The policy's own are drawn afresh; the first update starts at the reference, whose samples exist
        already. Of a file's rows those whose prompt measures this iteration's slack, however it is written
        there, are left out.
        """
        job, reference = self.job, self.reference
        train_on, measured_on = deal_prompts(job.config, reference.prompts, iteration)
        if self.pairs is not None:
            prompts = job.pairs.prompts
            dealt = deal(
                prompts, job.config.seed, max(1, iteration), job.config.steps * job.config.prompts_per_step, 0
            )[0]
            measuring = reference.prompts.select(measured_on)
            measured = set(overlap(by_tokens(prompts.select(dealt)), measuring))
            train_on = [i for place, i in enumerate(dealt) if place not in measured]
            if not train_on:
                raise UserError(
                    f"--pairs {job.config.pairs}: every prompt of iteration {iteration} measures its "
                    "slack; give other prompts."
                )
            return replace(self.pairs, scaled=reference.scoring(stage, self.pairs)), train_on
        if job.config.pairs == "policy" and start is not None:
            return self._fresh(stage, train_on, iteration), list(range(len(train_on)))
        return reference.samples, train_on

    def _fresh(self, stage: Stage, chosen: list[int], iteration: int) -> Samples:
        """Samples new responses of the policy that the weights hold to the prompts
        `chosen` of the reference's."""
        job, prompts = self.job, self.reference.prompts.select(chosen)
        samples = sample(
            job,
            stage,
            prompts,
            self.weights,
            n=job.config.n_responses,
            purpose=keys.fresh(iteration),
            keep=True,
        )
        return replace(samples, scaled=self.reference.scoring(stage, samples))


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        clear(folder)
