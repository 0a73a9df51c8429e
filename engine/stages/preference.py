"""Scores from preferences (arXiv 2405.19544, Algorithm 2; 2505.19387, Algorithm 3).

One policy is aligned by DPO to the preferences of each kind, and ln(policy / reference) of a response is its
score. The papers' constraint E[beta ln(policy_g / reference)] + beta KL(reference || policy_g) >= b is an
improvement over the reference's mean, as for scores from models; so everything after the scores is the same.
Decided here: log-ratios are divided by their pooled within-prompt standard deviation, as other scores are, so
that beta drops out of them and b and lambda are in that unit. With --units raw the scores are the papers',
beta x log-ratio.

Without a file of preferences the labels are Bradley-Terry draws from the run's scorers on reference samples,
in place of people; the verdict then also shows what these scorers say of the policy.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine import keys
from engine.config import RunConfig
from engine.model import packing
from engine.policy import update
from engine.policy.lora import Adapter
from engine.policy.samples import Samples
from engine.policy.steps import Policy, Update
from engine.policy.weights import new_adapter
from engine.records import ScaledScores, Score, ScoredTarget, Scores, Units
from engine.run.committed import Committed
from engine.run.rows import PreferenceRow
from engine.run.run import Stage
from engine.scorers.base import Scorers
from engine.scorers.names import stage_name
from engine.stages.job import Job, Subject
from engine.stages.reference import Reference, aims, deviations, within_correlation
from engine.stages.sampling import logprobs, naming
from kernels.random import combine


@dataclass(frozen=True, kw_only=True)
class LogRatios:
    """The log-ratios of aligned policies to the reference, and as audits what the run's
    scorers say, in their units."""

    subject: Subject
    aligned: list[Adapter]  # to the reward, then to each utility
    scorer_units: Units

    def __call__(self, stage: Stage, samples: Samples) -> Scores:
        """Returns log-ratios of sampled responses, nats. stage: of a run, or anything else with
        `progress` and `check_stop`."""
        subject, prompts, scores = self.subject, samples.prompts, samples.scores
        ratios = []
        tokens = sum(g.tokens for g in packing.groups(prompts, samples.rollouts))
        total = len(self.aligned) * tokens // subject.ranks.shares
        with naming(stage), stage.progress(total, "tokens", "log-ratios") as progress:
            for adapter in self.aligned:
                logprob_PG = logprobs(subject, prompts, samples.rollouts, adapter, progress.advance)
                ratios.append(logprob_PG - scores.ref_logprob_PG)
                stage.check_stop()
        by_scorers = self.scorer_units.apply(scores)
        return Scores(
            reward_PG=ratios[0],
            utility_PGJ=torch.stack(ratios[1:], dim=2),
            audit_PGA=torch.cat(
                [by_scorers.reward_PG[..., None], by_scorers.utility_PGJ, by_scorers.audit_PGA], dim=2
            ),
            ref_logprob_PG=scores.ref_logprob_PG,
        )


@dataclass(frozen=True, kw_only=True)
class ByLogRatios:
    """Scores by log-ratios (`engine.stages.reference.Scoring`): their audits have
    the scorers' units already."""

    units: Units
    audit_names: list[str]
    log_ratios: LogRatios

    @staticmethod
    def of(log_ratios: LogRatios, log_ratio_sd: list[float], config: RunConfig) -> "ByLogRatios":
        """Scores in the units of a run; log_ratio_sd: standard deviations, nats."""
        names = audit_names(log_ratios.subject.scorers)
        units = log_ratio_units(log_ratio_sd, len(names), config)
        return ByLogRatios(units=units, audit_names=names, log_ratios=log_ratios)

    def __call__(self, stage: Stage, samples: Samples) -> ScaledScores:
        return self.units.apply(self.log_ratios(stage, samples))


def log_ratio_units(log_ratio_sd: list[float], n_audits: int, config: RunConfig) -> Units:
    """Returns the units of log-ratios, nats: the standard deviations, or with --units raw 1 / beta."""
    one = log_ratio_sd if config.units == "deviation" else [1 / config.beta] * len(log_ratio_sd)
    return Units(reward=one[0], utility_J=one[1:], audit_A=[1.0] * n_audits)


def audit_names(scorers: Scorers) -> list[str]:
    """Names what `LogRatios` audits, in order."""
    by_scorers = [scorers.reward, *scorers.costs]
    return [*(f"{s.name} (its scorer)" for s in by_scorers), *(s.name for s in scorers.audits)]


def restored(run: Committed, config: RunConfig, subject: Subject, scorer_units: Units) -> ByLogRatios:
    """Returns what a run on preferences with an iterate scores by.

    Raises: UserError where a policy it aligned is missing or damaged.
    """
    row, aligned = run.one(PreferenceRow), []
    for number, name in enumerate(row.names):
        aligned.append(new_adapter(subject.model, config))
        aligned[-1].set_tensors(run.load(stage_name("preference", number, name), Policy).adapter)
    log_ratios = LogRatios(subject=subject, aligned=aligned, scorer_units=scorer_units)
    return ByLogRatios.of(log_ratios, row.log_ratio_sd, config)


def align(job: Job, reference: Reference) -> Reference:
    """Stages preference/NAME and preference/scores: the same samples, scored
    by policies aligned to preferences.

    reference: as the run's scorers score it.
    """
    names = ["reward", *(s.name for s in job.scorers.costs)]
    samples, labels_PGO = _from_scorers(reference) if job.preferences is None else _from_file(job)
    aligned = [_aligned(job, i, name, samples, labels_PGO[..., i]) for i, name in enumerate(names)]
    log_ratios = LogRatios(subject=job, aligned=aligned, scorer_units=reference.units)

    def compute(stage: Stage) -> Scores:
        scores = log_ratios(stage, reference.samples)
        stage.log(
            PreferenceRow(
                names=names,
                log_ratio_sd=log_ratio_sd(scores),
                agreement=_agreement(scores, reference.scores),
            )
        )
        return scores

    def log_ratio_sd(scores: Scores) -> list[float]:
        sd = deviations(scores, job.scorers, reference.limits, reference.prompts)
        return [sd.reward, *sd.utility_J]

    raw = job.run.stage("preference/scores", Scores, compute)
    scoring = ByLogRatios.of(log_ratios, log_ratio_sd(raw), job.config)
    scaled = scoring.units.apply(raw)
    fixed = aims(job, reference.limits, reference.prompts, scaled, scoring.units)
    return replace(reference, samples=replace(reference.samples, scaled=scaled), scoring=scoring, **fixed)


def _aligned(job: Job, number: int, name: str, samples: Samples, label_PG: Tensor) -> Adapter:
    """Runs stage preference/NAME: plain DPO on the preferences of one kind,
    drawn independently of the others'."""
    config = job.config
    adapter = new_adapter(job.model, config)
    seed = int(combine(config.seed, keys.preference(number)))
    labels = config.labels if config.labels == "sampled-once" else "sampled"
    settings = replace(config, steps=config.preference_steps, labels=labels, seed=seed)
    target = ScoredTarget(score=Score.plain(label_PG), coefficient=config.beta)

    def compute(stage: Stage) -> Policy:
        step = Update(
            stage=stage,
            config=settings,
            model=job.model,
            weights=adapter,
            start=None,
            iteration=0,
            ranks=job.ranks,
        )
        return update.fit(step, samples, target, train_on=list(range(len(samples.prompts))))

    adapter.set_tensors(job.run.stage(stage_name("preference", number, name), Policy, compute).adapter)
    return adapter


def _from_scorers(reference: Reference) -> tuple[Samples, Tensor]:
    """Returns the reference's samples, and the scores [P, G, 1 + J] from which labels are drawn."""
    return reference.samples, torch.cat(
        [reference.scores.reward_PG[..., None], reference.scores.utility_PGJ], dim=2
    )


def _from_file(job: Job) -> tuple[Samples, Tensor]:
    """Returns the file's responses with their log-probs under the reference, and the scores
    [P, 2, 1 + J] of their labels."""
    file = job.preferences
    logprob_PG = logprobs(job, file.prompts, file.rollouts, None)
    label = file.label_PGO
    scores = Scores(
        reward_PG=label[..., 0],
        utility_PGJ=label[..., 1:],
        audit_PGA=label[..., :0],
        ref_logprob_PG=logprob_PG,
    )
    unscaled = Units(reward=1.0, utility_J=[1.0] * (label.shape[2] - 1), audit_A=[])
    samples = Samples(
        prompts=file.prompts,
        rollouts=file.rollouts,
        texts=file.texts,
        scores=scores,
        kl_PG=torch.zeros_like(scores.ref_logprob_PG),
        scaled=unscaled.apply(scores),
    )
    return samples, label


def _agreement(ratios: Scores, scores: ScaledScores) -> list[float]:
    """Correlates each log-ratio with the scorer of its kind, within prompts."""
    pairs = [(ratios.reward_PG, scores.reward_PG)]
    pairs += [
        (ratios.utility_PGJ[..., j], scores.utility_PGJ[..., j]) for j in range(ratios.utility_PGJ.shape[2])
    ]
    return [within_correlation(a, b) for a, b in pairs]
