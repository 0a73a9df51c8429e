"""Responses of the reference that are taken, from another run or from a file, instead of sampled.

What they lack of scores, this run's scorers give. The log-probs of another run's responses come with them,
those of a file from the frozen forward.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.files import shown
from engine.model import packing
from engine.policy.lora import first_layer
from engine.policy.samples import Samples
from engine.policy.surprise import surprise
from engine.policy.weights import whole
from engine.rollout.states import States
from engine.run.rows import GivenRow
from engine.run.run import Stage
from engine.scorers.scoring import layers_asked
from engine.stages.job import Job
from engine.stages.sampling import forward_of, log_gap, logprobs, scored
from engine.stages.shared import as_given

# Prompts of a file whose responses are compared with what the reference samples.
COMPARED_PROMPTS = 8
# Nats per token, and standard errors, from which on responses are none of the reference's.
ABSURD, CERTAIN = 0.5, 4.0
# Factor between two spreads of a score within prompts from which on one scorer hardly gave both.
FAR = 4.0


def shared(job: Job, stage: Stage, samples: Samples, lower_MD: Tensor | None = None) -> Samples:
    """Returns responses of the run that --samples-of names, with the scores of this run's scorers; those that
    have scored them there are not asked again.

    lower_MD: states below the adapter, where they were kept, in the order of the packed groups.
    """
    # Those of a file have not been sampled there either.
    if not (job.config.samples and stage.name == "reference"):
        log_gap(job, stage, samples.prompts, samples.rollouts, None)
    if (
        job.config.compares_with_reference
        and job.model.dtype.itemsize == 2
        and not job.samples.compares_with_reference
    ):
        # The other run has left them to its steps.
        ref_logprob_PG = logprobs(job, samples.prompts, samples.rollouts, None)
        samples = replace(samples, scores=replace(samples.scores, ref_logprob_PG=ref_logprob_PG))
    if job.samples.is_scored:
        return samples
    known = job.samples.known(samples.scores)
    if asked := ", ".join(n for n, score in zip(_names(job), known, strict=True) if score is None):
        job.run.display.line(
            f"{stage.name}: {asked} scored anew on the responses of {job.samples.run.folder}"
        )
    forward = forward_of(job.settings, logprob=False, states=_kept(job, samples, known, lower_MD))
    scores = scored(job, stage, samples.prompts, samples.rollouts, samples.texts, forward, known)
    scores = replace(scores, ref_logprob_PG=samples.scores.ref_logprob_PG)
    return replace(samples, scores=scores, scaled=None)


def _kept(
    job: Job, samples: Samples, known: Sequence[Tensor | None], lower_MD: Tensor | None
) -> States | None:
    """Returns the mean states that heads read, where those that were kept are all that they need; several
    ranks compute them again, each its own."""
    layers = layers_asked(job.scorers, known)
    if (
        job.ranks.size > 1
        or lower_MD is None
        or layers != [first_layer(job.model.config.num_layers, job.config.lora_from)]
    ):
        return None
    return States.kept(layers[0], lower_MD, packing.groups(samples.prompts, samples.rollouts))


def given(job: Job, stage: Stage) -> Samples:
    """Returns the responses of the file of --samples, with their log-probs and scores."""
    own = job.given
    known = own.known(_names(job))
    scores = scored(
        job, stage, own.prompts, own.rollouts, own.texts, forward_of(job.settings, logprob=True), known
    )
    groups = packing.groups(own.prompts, own.rollouts)[:COMPARED_PROMPTS]
    with whole(job.model, None) as (reference, _):
        found = surprise(reference, groups, job.config.temperature)
    row = GivenRow(
        prompts=len(groups),
        responses=own.rollouts.n,
        logprob=found.logprob,
        entropy=found.entropy,
        se=found.se,
    )
    stage.log(row)
    _say(job, row)
    return Samples(
        prompts=own.prompts,
        rollouts=own.rollouts,
        texts=own.texts,
        scores=scores,
        kl_PG=torch.zeros_like(scores.ref_logprob_PG),
    )


def _say(job: Job, row: GivenRow) -> None:
    """Says how likely a file's responses are under the reference, and warns where they cannot be its own."""
    line = (
        f"{shown(job.given.source)}: mean log-prob {row.logprob:.2f} per token under the reference; its own "
        f"samples would have {-row.entropy:.2f} (+- {row.se:.2f})"
    )
    apart = row.logprob + row.entropy
    # A distribution that is cut by --top-p or --top-k gives likelier responses.
    apart = min(apart, 0.0) if job.config.truncated else apart
    if abs(apart) > max(ABSURD, CERTAIN * row.se):
        job.run.display.warn(
            f"{line}, so these are not its samples at --temperature {job.config.temperature:g}, and "
            "multipliers from them are not those of the reference: check --model, --template, --system"
        )
    else:
        job.run.display.line(line)


def warn_of_scale(job: Job, reference: Samples, heldout: Samples) -> None:
    """Warns of scores in a file that spread otherwise than those that the scorer itself gives.

    reference: the file's responses. heldout: those of the reference to the held-out prompts.
    """
    known = job.given.known(_names(job))
    spreads = zip(_names(job), known, as_given(reference.scores), as_given(heldout.scores), strict=True)
    for name, score, given_PG, own_PG in spreads:
        if score is None or own_PG.shape[1] < 2:
            continue
        there, here = (float(x_PG.var(1).mean().sqrt()) for x_PG in (given_PG, own_PG))
        if here > 0 and not 1 / FAR <= there / here <= FAR:
            job.run.display.warn(
                f"{shown(job.given.source)}: {name} has a standard deviation of {there:.3g} within prompts; "
                f"its scorer gives the reference's held-out responses one of {here:.3g}, so it hardly gave "
                "these scores"
            )


def _names(job: Job) -> list[str]:
    """Names the scorers of a run as tables do."""
    return ["reward", *(scorer.name for scorer in job.scorers.all[1:])]
