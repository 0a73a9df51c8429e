"""Sample responses, score them, and log how far the sampler's log-probs lie from those of training."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor

from engine.errors import NonFiniteError
from engine.model import packing
from engine.model.packing import LowerStates
from engine.policy.forward import LogprobGap, logprob_gap
from engine.policy.lora import first_layer
from engine.policy.samples import Samples
from engine.policy.weights import Weights
from engine.records import Prompts, Rollouts, Scores
from engine.rollout.decoding import NEAR_TIE
from engine.rollout.sampler import generate
from engine.rollout.states import States
from engine.run.plan import kept_states_bytes
from engine.run.rows import SampledRow, SpeedRow
from engine.run.run import Run, Stage
from engine.scorers.scoring import ReferenceForward, score
from engine.stages.job import SamplingSettings, Subject
from kernels.random import combine

# Prompts of each sampling whose samples are run through the training forward again.
GAP_PROMPTS = 4


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
    `purpose` keys the random numbers.

    stage: of a run, or anything else with `progress` and `check_stop`.
    """
    settings = job.settings

    def on_step(tokens: int) -> None:
        made.advance(tokens)
        stage.check_stop()

    work = len(prompts) * n * settings.max_new_tokens
    with naming(stage), stage.progress(work, "tokens", "sampling") as made:
        rollouts = generate(
            job.model,
            prompts.token_ids,
            n=n,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_token_ids=job.stop_token_ids,
            seed=int(combine(settings.seed, purpose)),
            prompt_key=prompts.key_P,
            adapter=adapter,
            max_rows=settings.rows,
            on_step=on_step,
            states=states,
        )
    texts = [
        job.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(rollouts.tokens.tolist(), rollouts.length.tolist(), strict=True)
    ]
    return rollouts, texts


def sample(
    job: Subject,
    stage: Stage,
    prompts: Prompts,
    adapter: Weights | None,
    *,
    n: int,
    purpose: int,
    keep: bool = False,
) -> Samples:
    """Samples responses as `respond` does and scores them. stage: of a run, or anything else with `progress`,
    `check_stop`, `warn`, `log_speed` and `log`, which gets the `log_gap` of these samples.

    The samples hold the states below the adapter where `keep` asks for them, heads read no higher and the
    states are not too large. The reference's own samples are not run through the model again for
    log-probs under the reference: in float32 those of the sampler are the same to rounding (`logprob_gap`
    measures it). In lower precision they are computed as the policy's are, so that ratios start at 1.
    """
    settings = job.settings
    start = time.monotonic()
    # With --tune full every layer differs from the reference's, so no states can be shared.
    below = (
        -1
        if settings.adapter_from is None
        else first_layer(job.model.config.num_layers, settings.adapter_from)
    )
    own = adapter is None and job.model.dtype == torch.float32
    small = kept_states_bytes(
        [len(ids) for ids in prompts.token_ids],
        n * settings.max_new_tokens,
        job.model.config.hidden_size,
        job.model.dtype,
    )
    lower = LowerStates(below) if below >= 0 and small and (keep or not own) else None
    layers = job.scorers.layers
    states = States(layers, lower) if max(layers, default=0) <= below and (layers or lower) else None

    rollouts, texts = respond(job, stage, prompts, adapter, n=n, purpose=purpose, states=states)
    sampled = time.monotonic()
    forward = forward_of(settings, logprob=not own, states=states)
    scores, passed = scored(job, stage, prompts, rollouts, texts, forward)
    tokens = int(rollouts.length.sum())
    stage.log_speed(
        SpeedRow(
            tokens=tokens,
            sampling_s=sampled - start,
            scoring_s=time.monotonic() - sampled,
            tokens_per_s=tokens / (sampled - start),
            scored_tokens_per_s=passed / (time.monotonic() - sampled),
        )
    )
    logprob_PG = rollouts.model_logprob.double().sum(dim=1).view(len(prompts), n)
    if own:
        scores = replace(scores, ref_logprob_PG=logprob_PG)
    log_gap(job, stage, prompts, rollouts, adapter)
    return Samples(
        prompts=prompts,
        rollouts=rollouts,
        texts=texts,
        scores=scores,
        kl_PG=logprob_PG - scores.ref_logprob_PG,
        lower=states.lower if states and keep else None,
    )


def scored(
    job: Subject,
    stage: Stage,
    prompts: Prompts,
    rollouts: Rollouts,
    texts: list[str],
    forward: ReferenceForward,
    known: Sequence[Tensor | None] = (),
) -> tuple[Scores, int]:
    """Scores responses as `engine.scorers.scoring.score` does, and says what scorers have cut.

    Returns the scores and the number of tokens that passed the model. stage: see `sample`.
    """

    def on_tokens(tokens: int) -> None:
        passed.advance(tokens)
        stage.check_stop()

    total = sum(g.tokens for g in packing.groups(prompts, rollouts))
    with naming(stage), stage.progress(total, "tokens", "scoring") as passed:
        scores = score(
            job.model, job.scorers, prompts, rollouts, texts, forward, on_tokens=on_tokens, known=known
        )
    for warning in job.scorers.warnings():
        stage.warn(warning)
    return scores, passed.done


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
    gap = logprob_gap(
        job.model,
        groups,
        rollouts,
        temperature=settings.temperature,
        memory_budget_bytes=settings.memory_budget_bytes,
        adapter=adapter,
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
