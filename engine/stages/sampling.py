"""Sample responses, score them, and log how far the sampler's log-probs lie from those of training."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model import packing
from engine.model.packing import LowerStates
from engine.policy.forward import LogprobGap, logprob_gap
from engine.policy.lora import first_layer
from engine.policy.weights import Weights
from engine.records import Prompts, Rollouts, Scores, Units
from engine.rollout.decoding import NEAR_TIE
from engine.rollout.sampler import generate
from engine.rollout.states import States
from engine.run import rows
from engine.run.plan import kept_states_bytes
from engine.run.run import Stage
from engine.run.store import RecordT, load
from engine.scorers.scoring import score
from engine.stages.job import Job, Subject
from kernels.sampling import combine

# Prompts of each sampling whose samples are run through the training forward again.
GAP_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses with their texts and raw scores. kl_PG: log pi - log pi_ref of each response, nats (0 for the reference)."""

    rollouts: Rollouts
    texts: list[str]
    scores: Scores
    kl_PG: Tensor


def respond(
    job: Subject, stage: Stage, prompts: Prompts, adapter: Weights | None, *, n: int, purpose: int, states: States | None = None
) -> tuple[Rollouts, list[str]]:
    """n responses of `adapter` (None: the reference) to each prompt, and their texts, prompt-major. `purpose` keys the random numbers.

    stage: of a run, or anything else with `progress` and `check_stop`.
    """
    config = job.config

    def on_step(tokens: int) -> None:
        made.advance(tokens)
        stage.check_stop()

    with stage.progress(len(prompts) * n * config.max_new_tokens, "tokens", "sampling") as made:
        rollouts = generate(
            job.model, prompts.token_ids, n=n, max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            stop_token_ids=job.stop_token_ids, seed=int(combine(config.seed, purpose)), prompt_key=prompts.key_P, adapter=adapter,
            max_rows=config.rollout_rows, on_step=on_step, states=states,
        )  # fmt: skip
    texts = [
        job.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(rollouts.tokens.tolist(), rollouts.length.tolist(), strict=True)
    ]
    return rollouts, texts


def sample(
    job: Subject, stage: Stage, prompts: Prompts, adapter: Weights | None, *, n: int, purpose: int, keep: bool = False
) -> tuple[Sampled, LowerStates | None]:
    """`respond`, and score the responses. stage: of a run, or anything else with `progress`, `check_stop`, `timing` and `row`, which gets
    the `log_gap` of these samples.

    The second value holds the states below the adapter where `keep` asks for them, heads read no higher and the states are not too
    large. The reference's own samples are not run through the model again for log-probs under the reference: in float32 those of the
    sampler are the same to rounding (`logprob_gap` measures it). In lower precision they are computed as the policy's are, so that ratios
    start at 1.
    """
    config = job.config
    start = time.monotonic()
    # Of a policy whose weights are all its own nothing equals the reference's states.
    below = first_layer(job.model.config.num_layers, config.lora_from) if config.tune == "lora" else -1
    own = adapter is None and job.model.dtype == torch.float32
    small = kept_states_bytes(
        [len(ids) for ids in prompts.token_ids], n * config.max_new_tokens, job.model.config.hidden_size, job.model.dtype
    )
    lower = LowerStates(below) if below >= 0 and small and (keep or not own) else None
    layers = job.scorers.layers
    states = States(layers, lower) if max(layers, default=0) <= below and (layers or lower) else None

    rollouts, texts = respond(job, stage, prompts, adapter, n=n, purpose=purpose, states=states)
    sampled = time.monotonic()

    def on_tokens(tokens: int) -> None:
        scored.advance(tokens)
        stage.check_stop()

    total = sum(g.tokens for g in packing.groups(prompts, rollouts))
    with stage.progress(total, "tokens", "scoring") as scored:
        scores = score(
            job.model, prompts, rollouts, texts, job.scorers, temperature=config.temperature,
            memory_budget_bytes=config.memory_budget_bytes, reference=not own, states=states, on_tokens=on_tokens,
        )  # fmt: skip
    tokens = int(rollouts.length.sum())
    stage.timing(
        tokens=tokens, sampling_s=sampled - start, scoring_s=time.monotonic() - sampled, tokens_per_s=tokens / (sampled - start),
        scored_tokens_per_s=scored.done / (time.monotonic() - sampled),
    )  # fmt: skip
    logprob_PG = rollouts.model_logprob.double().sum(dim=1).view(len(prompts), n)
    if own:
        scores = replace(scores, ref_logprob_PG=logprob_PG)
    log_gap(job, stage, prompts, rollouts, adapter)
    sampled = Sampled(rollouts=rollouts, texts=texts, scores=scores, kl_PG=logprob_PG - scores.ref_logprob_PG)
    return sampled, states.lower if states and keep else None


def log_gap(job: Subject, stage: Stage, prompts: Prompts, rollouts: Rollouts, adapter: Weights | None) -> None:
    """Log a row of kind "sampled": how far the sampler's log-probs lie from those of the training forward under the same weights, on the
    responses to the first prompts (`LogprobGap`, nats per token); and in how many of all draws the two best were nearly alike."""
    config, groups = job.config, packing.groups(prompts, rollouts)[:GAP_PROMPTS]
    gap = logprob_gap(
        job.model, groups, rollouts, temperature=config.temperature, memory_budget_bytes=config.memory_budget_bytes, adapter=adapter
    )
    near = {"near_ties": int(rollouts.near_tie.sum()), "draws": int(rollouts.length.sum())}
    stage.row("sampled", prompts=len(groups), responses=rollouts.n, logprob_gap=asdict(gap), **near)


def gap_text(row: dict) -> str:
    """What a row of `log_gap` says."""
    return f"{LogprobGap(**row['logprob_gap'])}; two best within {NEAR_TIE:g} in {row['near_ties']} of {row['draws']} draws"


def gap_of(run: Path, stage: str) -> str:
    """What `log_gap` found in a stage; empty where nothing was sampled there."""
    return next((gap_text(row) for row in rows.read_rows(run, "sampled") if row["stage"] == stage), "")


def samples_of(job: Job, stage: str, cls: type[RecordT]) -> RecordT | None:
    """The record of a stage of the run that --samples-of names; None without it. Raises: UserError where that run has none."""
    if not job.config.samples_of:
        return None
    folder = Path(job.config.samples_of)
    found = sorted((folder / "stages").glob(f"*-{stage.replace('/', '-')}.safetensors"))
    if not found:
        raise UserError(f"--samples-of {folder}: it has no whole stage {stage}; let that run end first (--resume {folder}).")
    return load(found[0], cls)


def in_units(sampled: Sampled, units: Units) -> Sampled:
    """The same samples with their scores in units."""
    return replace(sampled, scores=units.apply(sampled.scores))
