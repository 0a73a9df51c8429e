"""The stages as the algorithms call them, on a real model."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine import dual
from engine.data.dealing import deal
from engine.errors import UserError
from engine.model import packing
from engine.policy import update
from engine.policy.full import FullWeights
from engine.policy.iterates import is_saved, save_weights
from engine.policy.lora import Adapter
from engine.policy.update import Policy, Samples, ascend
from engine.policy.weights import Weights, copy_of
from engine.records import Prompts, Scores, Target, unsafe_counted
from engine.run.run import Stage
from engine.scorers.scoring import ReferenceForward, Responses, score
from engine.stages.inputs import DEFAULT_MODEL
from engine.stages.job import Job, deal_prompts, heldout_prompts
from engine.stages.protocol import Result, Slack
from engine.stages.reference import sample_reference
from engine.stages.sampling import Sampled, gap_of, log_gap, sample, samples_of
from engine.stages.slack import iteration_line
from engine.stages.solve import listed, one_shot, solve_dual, warn_of_lam_max
from engine.stages.verdict import HeldOut, verdict

# The numbers of iterations key the samples of the slack; those that policy updates learn from start here.
FRESH_PURPOSE = 1_000_000


class World:
    """The stages as the algorithms call them, on a real model: an iterate is an adapter with its optimizer, None the reference.

    The algorithms' loops know nothing else of the world, so a test can put an enumerated one in its place.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.reference = sample_reference(job)
        self.pairs = None if job.pairs is None else self._scored_pairs()
        config = job.config
        if config.tune == "full":
            self.adapter = FullWeights(job.model)
        else:
            self.adapter = Adapter.on(job.model, rank=config.lora_rank, alpha=config.lora_alpha, share=config.lora_from, seed=config.seed)
        self.untrained = self.adapter.tensors()
        self.audit_names = [s.name for s in job.scorers.audits]

    def solve_dual(self) -> dual.Solution:
        """See `solve_dual`."""
        return solve_dual(self.job, self.reference)

    def check_thresholds(self) -> None:
        """For algorithms that do not solve the dual: refuses the thresholds that it would refuse, see `one_shot`."""
        if not self.job.config.force:
            one_shot(self.job, self.reference)

    @property
    def scores(self) -> Scores:
        """The reference samples' scores in the run's units, as the Lagrangian counts them (`constraints.weighted`)."""
        return replace(self.reference.scores, utility_PGJ=self.reference.weighted(self.reference.scores, self.reference.prompts))

    def rescore(self, stage: Stage, prompts: Prompts, sampled: Sampled) -> Scores:
        """Scores of any policy's responses, in the run's units."""
        return self.reference.units.apply(sampled.scores)

    def unsafe(self, above: Sequence[float]) -> Tensor:
        """bool [P, G]: reference samples of which a cost lies above its number here, in the scorer's own units, and its constraint is
        about that prompt."""
        reference = self.reference
        unsafe_PGJ = unsafe_counted(reference.sampled.scores.utility_PGJ, list(above)) < 0
        about_PJ = torch.zeros(len(reference.prompts), len(reference.limits), dtype=torch.bool)
        for j, limit in enumerate(reference.limits):
            about_PJ[limit.rows(reference.prompts), j] = True
        return (unsafe_PGJ & about_PJ[:, None]).any(dim=2)

    def deal(self, iteration: int) -> tuple[list[int], list[int]]:
        """Prompts for the pairs and for the slack of an iteration, see `pairs.deal`."""
        return deal_prompts(self.job.config, self.reference.prompts, iteration)

    def fit(self, target: Target, iteration: int) -> Policy:
        """Stage iteration-t/policy: fit the target on pairs of responses (`_learned_from`); the iterate goes to adapters/iteration-t."""
        job = self.job
        self._begin(target.lam_J, target.start, iteration)
        anchor = None if target.anchor is None else copy_of(self.adapter, target.anchor.adapter)

        def compute(stage: Stage) -> Policy:
            shutil.rmtree(self._folder(iteration), ignore_errors=True)
            samples, fitted, train_on = self._learned_from(stage, target, iteration)
            trained = update.fit(
                stage, job.run, job.config, job.model, samples, fitted, self.adapter, anchor, train_on=train_on, iteration=iteration
            )
            stage.row("policy", iteration=iteration, lam=target.lam_J, loss=trained.loss)
            return trained

        return self._end(job.run.stage(f"iteration-{iteration}/policy", Policy, compute), iteration)

    def _learned_from(self, stage: Stage, target: Target, iteration: int) -> tuple[Samples, Target, list[int]]:
        """The responses that an update learns from (--pairs), the target on them, and which of their prompts to use.

        The policy's own are drawn afresh; the first update starts at the reference, whose samples are there. Of a file's rows those whose
        prompt measures this iteration's slack are left out.
        """
        job, reference = self.job, self.reference
        train_on, slack_on = self.deal(iteration)
        if self.pairs is not None:
            measured = {tuple(reference.prompts.token_ids[i]) for i in slack_on}
            dealt = deal(job.pairs.prompts, job.config.seed, max(1, iteration), job.config.steps * job.config.prompts_per_step, 0)[0]
            prompts, sampled, lower = job.pairs.prompts, self.pairs, None
            train_on = [i for i in dealt if tuple(prompts.token_ids[i]) not in measured]
            if not train_on:
                raise UserError(
                    f"--pairs {job.config.pairs}: every prompt of iteration {iteration} measures its slack; give other prompts."
                )
        elif getattr(job.config, "pairs", "reference") == "policy" and target.start is not None:
            prompts = reference.prompts.select(train_on)
            sampled, lower = sample(
                job, stage, prompts, self.adapter, n=job.config.n_responses, purpose=FRESH_PURPOSE + iteration, keep=True
            )
            train_on = list(range(len(prompts)))
        else:
            return reference.samples, target, train_on
        scores = self.rescore(stage, prompts, sampled)
        score_PG = scores.reward_PG + reference.weighted(scores, prompts) @ target.lam_J
        samples = Samples(prompts=prompts, rollouts=sampled.rollouts, scores=scores, lower=lower)
        return samples, replace(target, score_PG=score_PG), train_on

    def _scored_pairs(self) -> Sampled:
        """Stage pairs: the file's responses under the reference and the scorers."""
        job, own = self.job, self.job.pairs

        def compute(stage: Stage) -> Sampled:
            with stage.progress(sum(g.tokens for g in packing.groups(own.prompts, own.rollouts)), "tokens", "scoring") as scored:
                scores = score(
                    job.model,
                    job.scorers,
                    Responses(prompts=own.prompts, rollouts=own.rollouts, texts=own.texts),
                    ReferenceForward(temperature=job.config.temperature, memory_budget_bytes=job.config.memory_budget_bytes),
                    on_tokens=scored.advance,
                )
            stage.row("pairs", prompts=len(own.prompts))
            return Sampled(rollouts=own.rollouts, texts=own.texts, scores=scores, kl_PG=torch.zeros_like(scores.ref_logprob_PG))

        return job.run.stage("pairs", Sampled, compute)

    def ascend(self, start: Policy | None, lam_J: Tensor, iteration: int, *, rectified: bool = False) -> Policy:
        """Stage iteration-t/policy: policy-gradient steps on fresh samples of the policy, scored by r + lambda . g - beta x log-ratio.

        `rectified`: lambda counts only on prompts whose samples miss the aim (`constraints.missing`).
        """
        job, reference, config = self.job, self.reference, self.job.config
        self._begin(lam_J, start, iteration)
        chosen = self.deal(iteration)[0][: config.ascent_prompts]

        def compute(stage: Stage) -> Policy:
            shutil.rmtree(self._folder(iteration), ignore_errors=True)
            prompts = reference.prompts.select(chosen)
            sampled, lower = sample(job, stage, prompts, self.adapter, n=config.n_responses, purpose=FRESH_PURPOSE + iteration, keep=True)
            scores = self.rescore(stage, prompts, sampled)
            r, g = scores.reward_PG, scores.utility_PGJ
            if rectified:
                lam = lam_J * (reference.missing(g, chosen) > 0)[:, None]
            else:
                lam = lam_J.expand_as(g)
            if config.advantage == "group_norm":
                r, g = standardised(r), standardised(g)
            g = reference.weighted(replace(scores, utility_PGJ=g), prompts)
            score_PG = r + (lam * g).sum(2) - config.beta * sampled.kl_PG
            samples = Samples(prompts=prompts, rollouts=sampled.rollouts, scores=scores, lower=lower)
            trained = ascend(stage, job.run, config, job.model, samples, score_PG, self.adapter, start=start, iteration=iteration)
            stage.row("policy", iteration=iteration, lam=lam_J, loss=trained.loss)
            return trained

        return self._end(job.run.stage(f"iteration-{iteration}/policy", Policy, compute), iteration)

    def adopt(self, policy: Policy, lam_J: Tensor, iteration: int) -> Policy:
        """Stage iteration-t/policy without a step: a policy that is there already is iterate t too, with a folder and a row of its own."""
        self._begin(lam_J, policy, iteration)

        def compute(stage: Stage) -> Policy:
            shutil.rmtree(self._folder(iteration), ignore_errors=True)
            stage.row("policy", iteration=iteration, lam=lam_J, loss=policy.loss)
            return policy

        return self._end(self.job.run.stage(f"iteration-{iteration}/policy", Policy, compute), iteration)

    def _begin(self, lam_J: Tensor, start: Policy | None, iteration: int) -> None:
        self.job.run.display.line(f"iteration {iteration}: lambda {listed(lam_J)}")
        self.adapter.set_tensors(self.untrained if start is None else start.adapter)

    def _end(self, trained: Policy, iteration: int) -> Policy:
        self._tell_gap(f"iteration-{iteration}/policy")
        self.adapter.set_tensors(trained.adapter)
        if not is_saved(self._folder(iteration)):
            save_weights(self.adapter, self._folder(iteration), self.job.config.model or DEFAULT_MODEL, self.job.folder)
        return trained

    def _folder(self, iteration: int) -> Path:
        """Of an iterate's weights."""
        return self.job.run.folder / "adapters" / f"iteration-{iteration}"

    def measure_slack(self, policy: Policy, lam_J: Tensor, iteration: int) -> Slack:
        """Stage iteration-t/slack: roll out the policy, score, u(lambda) = mean(g - E_ref g) - aim (Algorithm 2, step 2)."""
        job, reference = self.job, self.reference
        config = job.config
        slack_on = self.deal(iteration)[1]
        self.adapter.set_tensors(policy.adapter)

        def compute(stage: Stage) -> Slack:
            chosen = reference.prompts.select(slack_on)
            sampled, _ = sample(job, stage, chosen, self.adapter, n=config.slack_responses, purpose=iteration)
            scores = self.rescore(stage, chosen, sampled)
            mean, se, violation = torch.zeros(3, len(reference.limits), dtype=torch.float64)
            missing_PJ = reference.missing(scores.utility_PGJ, slack_on)
            for j, limit in enumerate(reference.limits):
                own = limit.rows(chosen)
                after, before = scores.utility_PGJ[own, :, j], reference.scores.utility_PGJ[slack_on][own, :, j]
                mean[j], se[j] = dual.paired_improvement(after, before)
                violation[j] = missing_PJ[own, j].clamp(min=0).mean()
            reward, reward_se = dual.paired_improvement(scores.reward_PG, reference.scores.reward_PG[slack_on])
            slack = Slack(
                improvement_J=mean, se_J=se, slack_J=mean - reference.aim_J, violation_J=violation,
                reward=float(reward), reward_se=float(reward_se), kl=float(sampled.kl_PG.mean()),
                kl_se=float(dual.standard_error(sampled.kl_PG.mean(1))),
            )  # fmt: skip
            stage.row(
                "iteration", iteration=iteration, lam=lam_J, reward=slack.reward, reward_se=slack.reward_se, improvement=mean,
                improvement_se=se, threshold=reference.needed_J, aim=reference.aim_J, slack=slack.slack_J, slack_se=se, kl=slack.kl,
                kl_se=slack.kl_se, loss=policy.loss, finished=float(sampled.rollouts.finished.double().mean()), prompts=len(slack_on),
                responses=config.slack_responses,
            )  # fmt: skip
            return slack

        slack = job.run.stage(f"iteration-{iteration}/slack", Slack, compute)
        self._tell_gap(f"iteration-{iteration}/slack")
        job.run.display.line(iteration_line(job, reference, lam_J, slack, policy.loss, iteration))
        warn_of_lam_max(job, reference.limits, lam_J, slack.slack_J)
        return slack

    def passes_max_kl(self, slack: Slack, iteration: int) -> bool:
        """Whether the policy is too far from the reference; the loop then returns the iterate before it. Its adapter is put aside."""
        if slack.kl <= self.job.config.max_kl:
            return False
        adapters = self.job.run.folder / "adapters"
        shutil.rmtree(adapters / f"rejected-{iteration}", ignore_errors=True)
        self._folder(iteration).rename(adapters / f"rejected-{iteration}")
        self.job.run.display.warn(
            f"iteration {iteration}: KL {slack.kl:.2f} nats passes --max-kl {self.job.config.max_kl}; stopped, and the iterate "
            "before it is kept"
        )
        return True

    def verdict(self, policy: Policy | None, lam_J: Tensor) -> Result:
        """The last two stages, reference and policy (None: the reference again) on held-out prompts, and the report; see `verdict`."""
        self.adapter.set_tensors(self.untrained if policy is None else policy.adapter)
        # The seeds' held-out samples differ, the prompts may overlap: purposes below 0 never meet an iteration's number.
        before = self.heldout("heldout/reference", None, -1)
        after = self.heldout("heldout/policy", self.adapter, -2)
        prompts = heldout_prompts(self.job.config, self.job.heldout)
        return verdict(self.job, self.reference, prompts, before.judged, after.judged, self.audit_names, lam_J)

    def heldout(self, name: str, adapter: Weights | None, purpose: int) -> HeldOut:
        """Stage `name`: responses of the adapter (None: the reference) to the held-out prompts."""
        job, config = self.job, self.job.config
        prompts = heldout_prompts(config, job.heldout)

        def compute(stage: Stage) -> HeldOut:
            shared = samples_of(job, name, HeldOut) if adapter is None else None
            sampled = shared.sampled if shared else sample(job, stage, prompts, adapter, n=config.eval_responses, purpose=purpose)[0]
            if shared:
                log_gap(job, stage, prompts, sampled.rollouts, None)
            return HeldOut(sampled=sampled, scores=self.rescore(stage, prompts, sampled))

        made = job.run.stage(name, HeldOut, compute)
        self._tell_gap(name)
        return made

    def _tell_gap(self, stage: str) -> None:
        if gap := gap_of(self.job.run.folder, stage):
            self.job.run.display.line(f"{stage}: {gap}")


def standardised(x: Tensor) -> Tensor:
    """Zero mean and unit population standard deviation over the responses of each prompt; 0 where all are equal."""
    x = x - x.mean(1, keepdim=True)
    deviation = x.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > 0, x / deviation, 0)
