"""Sample responses, score them, and log how far the sampler's log-probs lie from those of training."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import NamedTuple

from torch import Tensor

from engine.errors import NonFiniteError
from engine.model import packing
from engine.model.packing import LowerStates
from engine.policy.forward import LogprobGap, frozen_forward, logprob_gap
from engine.policy.lora import first_layer
from engine.policy.samples import Samples
from engine.policy.weights import Weights, before_whole, whole
from engine.records import Prompts, Rollouts, Scores
from engine.rollout.decoding import NEAR_TIE
from engine.rollout.sampler import generate
from engine.rollout.states import States
from engine.run.needs import GAP_PROMPTS, kept_states_bytes
from engine.run.rows import SampledRow, SpeedRow
from engine.run.run import Run, Stage
from engine.scorers.base import Scorers
from engine.scorers.scoring import ReferenceForward, score
from engine.stages.job import SamplingSettings, Subject
from engine.stages.shares import by_shares
from kernels.random import combine


def respond(
    job: Subject,
    stage: Stage,
    prompts: Prompts,
    adapter: Weights | None,
    *,
    n: int,
    purpose: int,
    states: States | None = None,
) -> tuple[Rollouts, list[str]]:
    """Samples n responses of `adapter` (None: the reference) to each prompt, and their texts, prompt-major.
    `purpose` keys the random numbers. Of several ranks each has prompts of its own, or none, and all call it.

    stage: of a run, or anything else with `progress` and `check_stop`.
    """
    settings = job.settings

    def on_step(tokens: int) -> None:
        made.advance(tokens)
        stage.check_stop()

    work = len(prompts) * n * settings.max_new_tokens
    with (
        whole(job.model, adapter) as (model, policy),
        naming(stage),
        stage.progress(work, "tokens", "sampling") as made,
    ):
        rollouts = generate(
            model,
            prompts.token_ids,
            n=n,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_token_ids=job.stop_token_ids,
            seed=int(combine(settings.seed, purpose)),
            prompt_key=prompts.key_P,
            adapter=policy,
            max_rows=settings.rows,
            on_step=on_step,
            states=states,
        )
    if job.ranks.model is not None:
        # A slice that drew another token would go on with other states, and no sum would show it.
        drawn = hashlib.sha256(rollouts.tokens.numpy().tobytes()).hexdigest()[:16]
        job.ranks.model.check_alike({"tokens drawn by the slices of a model": drawn})
    texts = [
        job.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(rollouts.tokens.tolist(), rollouts.length.tolist(), strict=True)
    ]
    return rollouts, texts


def sample(job: Subject, stage: Stage, prompts: Prompts, adapter: Weights | None, **how: int) -> Samples:
    """Returns the samples of `drawn`, whose keywords `how` are; the stage logs their rows."""
    return drawn(job, stage, prompts, adapter, **how).logged(job, stage, adapter)


def drawn(
    job: Subject,
    stage: Stage,
    prompts: Prompts,
    adapter: Weights | None,
    *,
    n: int,
    purpose: int,
    keep: bool = False,
    recomputed: bool = True,
) -> "Drawn":
    """Samples responses as `respond` does and scores them; each rank takes its share of the prompts.

    stage: of a run, or anything else with `progress`, `check_stop` and `warn`.

    The samples hold the states below the adapter where `keep` asks for them, heads read no higher and the
    states are not too large; not on several ranks, as a policy step may be about another rank's prompts. The
    reference's own samples are not run through the model again for
    log-probs under the reference: in float32 those of the sampler are the same to rounding (`logprob_gap`
    measures it). In 16 bits they are computed as the policy's are, so that ratios start at 1, where
    `recomputed` asks for it: steps on an adapter compute theirs themselves (`PreferenceLoss`).
    """
    keep, spent = keep and job.ranks.size == 1, Spent(0.0, 0.0, 0)

    def work(own: range, part: Prompts) -> Samples | None:
        nonlocal spent
        samples, spent = _sampled(job, stage, part, adapter, n, purpose, keep, recomputed)
        return samples

    samples = by_shares(job.ranks, prompts, work)
    _have_scored(job, stage)
    return Drawn(samples, spent)


class Spent(NamedTuple):
    """What a rank has spent on its share of the samples."""

    sampling_s: float
    scoring_s: float
    passed: int  # tokens that passed the model to be scored


class Drawn(NamedTuple):
    """Samples, and what this rank has spent on them."""

    samples: Samples
    spent: Spent

    def logged(self, job: Subject, stage: Stage, adapter: Weights | None) -> Samples:
        """Logs how fast the samples were drawn, and their log-prob gap; returns them.

        stage: of a run, or anything else with `log_speed` and `log`.
        """
        rollouts = self.samples.rollouts
        _log_speed(job, stage, int(rollouts.length.sum()), self.spent)
        log_gap(job, stage, self.samples.prompts, rollouts, adapter)
        return self.samples


def _sampled(
    job: Subject,
    stage: Stage,
    prompts: Prompts,
    adapter: Weights | None,
    n: int,
    purpose: int,
    keep: bool,
    recomputed: bool,
) -> tuple[Samples | None, Spent]:
    """Samples and scores responses on this rank, see `drawn`; None without prompts."""
    settings = job.settings
    start = time.monotonic()
    # With --tune full every layer differs from the reference's, so no states can be shared.
    below = (
        -1
        if settings.adapter_from is None
        else first_layer(job.model.config.num_layers, settings.adapter_from)
    )
    own = adapter is None and not (recomputed and job.model.dtype.itemsize == 2)
    small = kept_states_bytes(
        [len(ids) for ids in prompts.token_ids],
        n * settings.max_new_tokens,
        job.model.config.hidden_size,
        job.model.dtype,
    )
    lower = LowerStates(below) if below >= 0 and small and (keep or not own) else None
    layers = job.scorers.layers
    states = States(layers, lower) if max(layers, default=0) <= below and (layers or lower) else None

    with before_whole(job.model):
        rollouts, texts = respond(job, stage, prompts, adapter, n=n, purpose=purpose, states=states)
    sampled = time.monotonic()
    forward = forward_of(settings, logprob=not own, states=states)
    scores, passed = _scored(job, stage, prompts, rollouts, texts, forward)
    spent = Spent(sampled - start, time.monotonic() - sampled, passed)
    if scores is None:
        return None, spent
    logprob_PG = rollouts.model_logprob.double().sum(dim=1).view(len(prompts), n)
    if own:
        scores = replace(scores, ref_logprob_PG=logprob_PG)
    samples = Samples(
        prompts=prompts,
        rollouts=rollouts,
        texts=texts,
        scores=scores,
        kl_PG=logprob_PG - scores.ref_logprob_PG,
        lower=states.lower if states and keep else None,
    )
    return samples, spent


def _log_speed(job: Subject, stage: Stage, tokens: int, spent: Spent) -> None:
    """Logs the speed of all ranks together, at the seconds of the slowest."""
    every = job.ranks.of_shares(spent)
    sampling_s, scoring_s = max(one.sampling_s for one in every), max(one.scoring_s for one in every)
    stage.log_speed(
        SpeedRow(
            tokens=tokens,
            sampling_s=sampling_s,
            scoring_s=scoring_s,
            tokens_per_s=tokens / sampling_s,
            scored_tokens_per_s=sum(one.passed for one in every) / scoring_s,
        )
    )


def scored(
    job: Subject,
    stage: Stage,
    prompts: Prompts,
    rollouts: Rollouts,
    texts: list[str],
    forward: ReferenceForward,
    known: Sequence[Tensor | None] = (),
) -> Scores:
    """Scores responses as `engine.scorers.scoring.score` does, each rank those of its prompts, and says what
    scorers have cut. stage: see `drawn`. On several ranks `forward` has no states."""
    n = rollouts.n

    def work(own: range, part: Prompts) -> Scores | None:
        given = [score_PG if score_PG is None else score_PG[own.start : own.stop] for score_PG in known]
        ours = texts[own.start * n : own.stop * n]
        return _scored(job, stage, part, rollouts.of_prompts(own), ours, forward, given)[0]

    scores = by_shares(job.ranks, prompts, work)
    _have_scored(job, stage)
    return scores


def _scored(
    job: Subject,
    stage: Stage,
    prompts: Prompts,
    rollouts: Rollouts,
    texts: list[str],
    forward: ReferenceForward,
    known: Sequence[Tensor | None] = (),
) -> tuple[Scores | None, int]:
    """Scores responses on this rank. Returns the scores, None without prompts, and the number of tokens that
    passed the model."""

    def on_tokens(tokens: int) -> None:
        passed.advance(tokens)
        stage.check_stop()

    total = sum(g.tokens for g in packing.groups(prompts, rollouts))
    with (
        whole(job.model, None) as (reference, _),
        naming(stage),
        stage.progress(total, "tokens", "scoring") as passed,
    ):
        if not len(prompts):
            return None, 0
        scores = score(
            reference, job.scorers, prompts, rollouts, texts, forward, on_tokens=on_tokens, known=known
        )
    return scores, passed.done


def _have_scored(job: Subject, stage: Stage) -> None:
    """Gives all ranks what judges have answered, and says what scorers have cut."""
    job.answers.share_out(job.ranks)
    warn_of_scorers(job, stage, job.scorers)


def warn_of_scorers(job: Subject, stage: Stage, scorers: Scorers) -> None:
    """Says what scorers have cut since it was said last, of each rank."""
    for rank, warnings in enumerate(job.ranks.gather(scorers.warnings())):
        for warning in warnings:
            stage.warn(f"rank {rank}: {warning}" if rank else warning)


def logprobs(
    job: Subject,
    prompts: Prompts,
    rollouts: Rollouts,
    adapter: Weights | None,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Computes the log-probs float64 [P, n] of responses under `adapter` (None: the reference), each rank
    those of its prompts. on_tokens: is called with the number of tokens of each batch."""

    def work(own: range, part: Prompts) -> Tensor | None:
        with whole(job.model, adapter) as (model, policy):
            if not own:
                return None
            logprob_N = frozen_forward(
                model,
                packing.groups(part, rollouts.of_prompts(own)),
                [],
                temperature=job.settings.temperature,
                memory_budget_bytes=job.settings.memory_budget_bytes,
                adapter=policy,
                on_tokens=on_tokens,
            )[1]
        return logprob_N.view(len(part), rollouts.n)

    return by_shares(job.ranks, prompts, work)


def forward_of(
    settings: SamplingSettings, *, logprob: bool, states: States | None = None
) -> ReferenceForward:
    """Says what a run wants of the reference's forward pass over responses."""
    return ReferenceForward(
        temperature=settings.temperature,
        memory_budget_bytes=settings.memory_budget_bytes,
        logprob=logprob,
        states=states,
    )


@contextmanager
def naming(stage: Stage) -> Iterator[None]:
    """Puts the stage, and with it the iterate, in front of what is said of numbers that are not finite."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{stage.name}: {error}") from error


def log_gap(
    job: Subject, stage: Stage, prompts: Prompts, rollouts: Rollouts, adapter: Weights | None
) -> None:
    """Logs a row of kind "sampled": how far the sampler's log-probs lie from those of the training forward
    under the same weights, on the responses to the first prompts (`LogprobGap`, nats per token); and in how
    many of all draws the two best were nearly alike."""
    settings, groups = job.settings, packing.groups(prompts, rollouts)[:GAP_PROMPTS]
    with whole(job.model, adapter) as (model, policy):
        gap = logprob_gap(
            model,
            groups,
            rollouts,
            temperature=settings.temperature,
            memory_budget_bytes=settings.memory_budget_bytes,
            adapter=policy,
        )
    stage.log(
        SampledRow(
            prompts=len(groups),
            responses=rollouts.n,
            logprob_gap=asdict(gap),
            near_ties=int(rollouts.near_tie.sum()),
            draws=int(rollouts.length.sum()),
        )
    )


def gap_text(row: SampledRow) -> str:
    """Says a row of `log_gap` in words."""
    return (
        f"{LogprobGap(**row.logprob_gap)}; two best within {NEAR_TIE:g} in {row.near_ties} of "
        f"{row.draws} draws"
    )


def gap_of(run: Run, stage: str) -> str:
    """Says what `log_gap` found in a stage of a run; empty where nothing was sampled there."""
    return next((gap_text(row) for row in run.rows(SampledRow) if row.stage == stage), "")
