"""Scores from preferences (arXiv 2405.19544, Algorithm 2; 2505.19387, Algorithm 3).

One policy is aligned by DPO to the preferences of each kind, and ln(policy / reference) of a response is its score. The papers'
constraint E[beta ln(policy_g / reference)] + beta KL(reference || policy_g) >= b is an improvement over the reference's mean, as for scores
from models; so everything after the scores is the same. Decided here: log-ratios are divided by their pooled within-prompt standard
deviation, as other scores are, so that beta drops out of them and b and lambda are in that unit.

Without a file of preferences the labels are Bradley-Terry draws from the run's scorers on reference samples, in place of people; the
verdict then also shows what these scorers say of the policy.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.model import packing
from engine.policy import update
from engine.policy.forward import frozen_forward
from engine.policy.lora import Adapter
from engine.policy.update import Policy, Samples
from engine.records import Prompts, Scores, Target, Units
from engine.run import rows
from engine.run.run import Stage
from engine.run.store import load
from engine.scorers.base import Scorers
from engine.stages.job import Job, Subject
from engine.stages.reference import aims, reference_units, within_correlation
from engine.stages.sampling import Sampled
from engine.stages.update import World
from kernels.sampling import combine

# With the number of a kind of preference it keys that policy's labels and the order of its prompts.
LABEL_PURPOSE = 2_000_000


@dataclass(frozen=True, kw_only=True)
class LogRatios:
    """Scores by aligned policies: log-ratios to the reference, and as audits what the run's scorers say, in their units."""

    subject: Subject
    aligned: list[Adapter]  # to the reward, then to each utility
    scorer_units: Units

    def __call__(self, stage: Stage, prompts: Prompts, sampled: Sampled) -> Scores:
        """Log-ratios of sampled responses, nats. stage: of a run, or anything else with `progress` and `check_stop`."""
        subject, scores = self.subject, sampled.scores
        groups, n = packing.groups(prompts, sampled.rollouts), sampled.rollouts.n
        ratios = []
        with stage.progress(len(self.aligned) * sum(g.tokens for g in groups), "tokens", "log-ratios") as progress:
            for adapter in self.aligned:
                logprob = frozen_forward(
                    subject.model, groups, [], temperature=subject.config.temperature,
                    memory_budget_bytes=subject.config.memory_budget_bytes, adapter=adapter, on_tokens=progress.advance,
                )[1]  # fmt: skip
                ratios.append(logprob.view(len(prompts), n) - scores.ref_logprob_PG)
                stage.check_stop()
        own = self.scorer_units.apply(scores)
        return Scores(
            reward_PG=ratios[0],
            utility_PGJ=torch.stack(ratios[1:], dim=2),
            audit_PGA=torch.cat([own.reward_PG[..., None], own.utility_PGJ, own.audit_PGA], dim=2),
            ref_logprob_PG=scores.ref_logprob_PG,
        )


def audit_names(scorers: Scorers) -> list[str]:
    """Of what `LogRatios` audits, in order."""
    by_scorers = [scorers.reward, *scorers.costs]
    return [*(f"{s.name} (its scorer)" for s in by_scorers), *(s.name for s in scorers.audits)]


def restored(run: Path, subject: Subject, scorer_units: Units) -> tuple[LogRatios, Units]:
    """What a run on preferences with an iterate scores by, and the units of its log-ratios; audits have the scorers' units already."""
    (row,), aligned = rows.read_rows(run, "preference"), []
    for name in row["names"]:
        wanted = f"preference-{name.replace('/', '-')}.safetensors"
        path = next(path for path in (run / "stages").iterdir() if path.name.partition("-")[2] == wanted)
        aligned.append(_adapter(subject))
        aligned[-1].set_tensors(load(path, Policy).adapter)
    sd = row["log_ratio_sd"]
    units = Units(reward=sd[0], utility_J=sd[1:], audit_A=[1.0] * len(audit_names(subject.scorers)))
    return LogRatios(subject=subject, aligned=aligned, scorer_units=scorer_units), units


def _adapter(subject: Subject) -> Adapter:
    config = subject.config
    return Adapter.on(subject.model, rank=config.lora_rank, alpha=config.lora_alpha, share=config.lora_from, seed=config.seed)


class PreferenceWorld(World):
    """`engine.stages.World` whose scores are log-ratios of aligned policies; what the run's scorers say is audited."""

    def __init__(self, job: Job) -> None:
        names = ["reward", *(s.name for s in job.scorers.costs)]
        super().__init__(job)
        by_scorers = self.reference
        samples, labels_PGO = _from_scorers(self) if job.preferences is None else _from_file(job)
        aligned = [self._align(i, name, samples, labels_PGO[..., i]) for i, name in enumerate(names)]
        self.log_ratios = LogRatios(subject=job, aligned=aligned, scorer_units=by_scorers.units)

        def compute(stage: Stage) -> Scores:
            scores = self.log_ratios(stage, by_scorers.prompts, by_scorers.sampled)
            units = reference_units(scores, job.scorers, by_scorers.limits, by_scorers.prompts)
            stage.row(
                "preference", names=names, log_ratio_sd=[units.reward, *units.utility_J], agreement=_agreement(scores, by_scorers.scores)
            )
            return scores

        raw = job.run.stage("preference/scores", Scores, compute)
        units = reference_units(raw, job.scorers, by_scorers.limits, by_scorers.prompts)
        # Audits have the scorers' units already.
        self.units = Units(reward=units.reward, utility_J=units.utility_J, audit_A=[1.0] * raw.audit_PGA.shape[2])
        scores = self.units.apply(raw)
        self.reference = replace(
            by_scorers, scores=scores, units=self.units, **aims(job, by_scorers.limits, by_scorers.prompts, scores, self.units)
        )
        self.audit_names = audit_names(job.scorers)

    def rescore(self, stage: Stage, prompts: Prompts, sampled: Sampled) -> Scores:
        return self.units.apply(self.log_ratios(stage, prompts, sampled))

    def _align(self, number: int, name: str, samples: Samples, label_PG: Tensor) -> Adapter:
        """Stage preference/NAME: plain DPO on the preferences of one kind, drawn independently of the others'."""
        job, config = self.job, self.job.config
        adapter = _adapter(job)
        seed = int(combine(config.seed, LABEL_PURPOSE + number))
        settings = replace(config, steps=config.preference_steps, labels="sampled", seed=seed)
        target = Target(lam_J=torch.zeros(0, dtype=torch.float64), score_PG=label_PG, coefficient=config.beta)

        def compute(stage: Stage) -> Policy:
            return update.fit(
                stage, job.run, settings, job.model, samples, target, adapter, None, train_on=list(range(len(samples.prompts))), iteration=0
            )

        adapter.set_tensors(job.run.stage(f"preference/{name}", Policy, compute).adapter)
        return adapter


def _from_scorers(world: World) -> tuple[Samples, Tensor]:
    """Reference samples, and the scores [P, G, 1 + J] from which labels are drawn."""
    reference = world.reference
    return reference.samples, torch.cat([reference.scores.reward_PG[..., None], reference.scores.utility_PGJ], dim=2)


def _from_file(job: Job) -> tuple[Samples, Tensor]:
    """The file's responses with their log-probs under the reference, and what gives their labels."""
    config, own = job.config, job.preferences
    reference = frozen_forward(
        job.model, packing.groups(own.prompts, own.rollouts), [], temperature=config.temperature,
        memory_budget_bytes=config.memory_budget_bytes,
    )[1]  # fmt: skip
    label = own.label_PGO
    scores = Scores(reward_PG=label[..., 0], utility_PGJ=label[..., 1:], audit_PGA=label[..., :0], ref_logprob_PG=reference.view(-1, 2))
    return Samples(prompts=own.prompts, rollouts=own.rollouts, scores=scores, lower=None), label


def _agreement(ratios: Scores, scores: Scores) -> list[float]:
    """Pooled within-prompt correlation of each log-ratio with the scorer of its kind."""
    pairs = [(ratios.reward_PG, scores.reward_PG)]
    pairs += [(ratios.utility_PGJ[..., j], scores.utility_PGJ[..., j]) for j in range(ratios.utility_PGJ.shape[2])]
    return [within_correlation(a, b) for a, b in pairs]
