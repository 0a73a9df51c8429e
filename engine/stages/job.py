"""The stages that the algorithms share: open a run, sample and score, solve the dual, update, measure the slack, give the verdict."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from engine import constraints
from engine.config import SAMPLING, IterativeConfig, RunConfig, by_preference, check, fit, pairs_file, policy_updates, shown_name
from engine.constraints import Limit
from engine.data import prompts as data
from engine.data.response_pairs import ResponsePairs, read_response_pairs
from engine.dual import solver as dual
from engine.errors import UserError
from engine.model import decoder as model
from engine.model import packing, quickstart
from engine.model.decoder import DTYPES, Decoder, ModelConfig
from engine.model.packing import LowerStates
from engine.policy import pairs
from engine.policy import update as policy
from engine.policy.full import FullWeights, Weights, copy_of, is_saved, save_weights
from engine.policy.lora import Adapter, first_layer
from engine.policy.update import Policy
from engine.records import DualState, Prompts, Rollouts, Scores, Target, Units, unsafe_counted
from engine.report import run_page as report
from engine.rollout.sampler import NEAR_TIE, States, generate
from engine.run import display as metrics
from engine.run.plan import Plan, keep_freed_memory, kept_states_bytes
from engine.run.store import RecordT, Run, Stage, load, write_whole
from engine.scorers.scoring import LogprobGap, Scorers, load_scorers, logprob_gap, score, try_out
from engine.stages.smoke import smoke_folder
from engine.verdict import evaluation as evaluate
from engine.verdict.evaluation import Evaluation
from kernels.sampling import combine

# The numbers of iterations key the samples of the slack; those that policy updates learn from start here.
FRESH_PURPOSE = 1_000_000
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
# Prompts of each sampling whose samples are run through the training forward again.
GAP_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a config's model and prompts are, read and checked; no weights are loaded yet."""

    device: torch.device
    dtype: torch.dtype
    folder: Path  # the model's Hugging Face folder
    fingerprint: str
    shape: ModelConfig
    tokenizer: object
    stop_token_ids: tuple[int, ...]
    train: Prompts
    heldout: Prompts

    @staticmethod
    def of(config: RunConfig) -> "Inputs":
        """Read them; the process gets the config's number of threads. Raises: UserError."""
        device = torch.device(_device(config.device))
        dtype = DTYPES["bfloat16" if device.type == "cuda" else "float32"] if config.dtype == "auto" else DTYPES[config.dtype]
        torch.set_num_threads(config.threads or _cores())
        keep_freed_memory()
        folder = model_folder(config.model)
        fingerprint = model.fingerprint(folder)
        shape = ModelConfig.from_json(model.read_config(folder), folder / "config.json")
        model.check_weights(folder, shape)
        tokenizer = model.load_tokenizer(folder)
        stop_token_ids = stop_tokens(folder, tokenizer)
        unknown = [number for number in stop_token_ids if not 0 <= number < shape.vocab_size]
        if unknown:
            raise UserError(
                f"{folder}: end-of-sequence token {unknown[0]} is not among the {shape.vocab_size} of config.json's vocab_size; "
                "correct eos_token_id in generation_config.json, config.json or the tokenizer."
            )
        train, heldout = _prompts(config, tokenizer, shape)
        return Inputs(
            device=device, dtype=dtype, folder=folder, fingerprint=fingerprint, shape=shape, tokenizer=tokenizer,
            stop_token_ids=stop_token_ids, train=train, heldout=heldout,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What sampling and scoring need: the loaded model, its scorers and the config's settings."""

    config: RunConfig
    folder: Path  # the model's Hugging Face folder
    model: Decoder
    tokenizer: object
    scorers: Scorers
    stop_token_ids: tuple[int, ...]

    @staticmethod
    def load(config: RunConfig, inputs: Inputs, scorers: Scorers) -> "Subject":
        """Load the weights."""
        network = model.load(inputs.folder, dtype=inputs.dtype, device=inputs.device)
        return Subject(
            config=config, folder=inputs.folder, model=network, tokenizer=inputs.tokenizer, scorers=scorers,
            stop_token_ids=inputs.stop_token_ids,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job(Subject):
    """What every stage of a run needs."""

    run: Run
    train: Prompts
    heldout: Prompts
    pairs: ResponsePairs | None  # of a file, to learn from
    preferences: ResponsePairs | None  # of a file, to be scored by


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses with their texts and raw scores. kl_PG: log pi - log pi_ref of each response, nats (0 for the reference)."""

    rollouts: Rollouts
    texts: list[str]
    scores: Scores
    kl_PG: Tensor


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `train` returns: the run folder, the held-out verdict of the last iterate, and the multipliers it was trained with."""

    folder: Path
    evaluation: Evaluation
    lam: list[float]


@contextmanager
def open_job(algorithm: str, config: RunConfig, resume: str | None, n_stages: int) -> Iterator[Job]:
    """Load and check everything, print the plan, then create or resume the run folder.

    Raises: UserError before any compute is spent.
    """
    check(config)
    out = Path(resume or config.out or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}-{algorithm}-seed{config.seed}")
    if resume is None and out.exists():
        raise UserError(f"run folder {out} exists; choose another --out, or go on with --resume {out}.")
    inputs = Inputs.of(config)
    train, heldout, fingerprint = inputs.train, inputs.heldout, inputs.fingerprint
    config, lowered = fit(config, len(train), len(heldout))
    # Again: so few prompts may be there that no verdict is possible.
    check(config)
    _check_samples_of(config, fingerprint)
    used = reference_prompts(config, train), heldout_prompts(config, heldout)
    # Rows that were asked for stay; a run that goes on has no flags.
    plan = Plan.of(
        config, inputs.shape, inputs.dtype, inputs.device, *([len(ids) for ids in prompts.token_ids] for prompts in used),
        fewer_rows=resume is not None or config.rollout_rows == RunConfig.rollout_rows,
    )  # fmt: skip
    plan.check()
    asked_rows, config = config.rollout_rows, replace(config, rollout_rows=plan.rows)
    scorers = load_scorers(config.reward, config.cost, config.audit, folder=inputs.folder, trunk=fingerprint, device=inputs.device)
    names = [s.name for s in scorers.costs]
    limits = constraints.limits(config, names)
    constraints.check_prompts(limits, _judged_on(config, *used))
    own_pairs = preferences = None
    if source := pairs_file(config):
        own_pairs = read_response_pairs(source, [], config, inputs.tokenizer, inputs.shape)
    if by_preference(config) and config.preferences:
        preferences = read_response_pairs(config.preferences, ["reward", *names], config, inputs.tokenizer, inputs.shape)
    for flag, own in (("--pairs", own_pairs), ("--preferences", preferences)):
        if own is not None:
            data.assert_disjoint(_by_tokens(own.prompts), heldout, f"prompt of {flag}")
    if own_pairs is not None:
        constraints.check_prompts(limits, {f"rows of {source}": own_pairs.prompts})
    warnings = try_out(scorers, used[0].text)
    display = metrics.Display(n_stages=n_stages)
    display.line(
        f"{shown_name(algorithm)} on {config.model or DEFAULT_MODEL} "
        f"({inputs.shape.parameter_count() / 1e6:.0f}M weights, {inputs.dtype}, {inputs.device})"
    )
    if lowered:
        display.line(f"{len(train)} training and {len(heldout)} held-out prompts are there, so {lowered}")
    for warning in warnings:
        display.warn(warning)
    display.line(plan.sentence())
    if plan.rows < asked_rows:
        display.line(f"memory is short, so --rollout-rows is {plan.rows}")
    display.line(f"run folder {out}")
    if resume is None:
        settings = {f.name: getattr(config, f.name) for f in fields(config)}
        run = Run.create(
            out, algorithm, settings, versions=_versions(), fingerprint=fingerprint, display=display, tensorboard=config.tensorboard
        )
    else:
        run = Run.resume(out, fingerprint=fingerprint, display=display, tensorboard=config.tensorboard)
        if run.versions != (here := _versions()):
            changed = sorted(k for k in here if here[k] != run.versions.get(k))
            display.warn(f"resumed with other versions of {', '.join(changed)}: results may differ in the last bits")
    with run:
        subject = Subject.load(config, inputs, scorers)
        yield Job(**vars(subject), run=run, train=train, heldout=heldout, pairs=own_pairs, preferences=preferences)


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
    return next((gap_text(row) for row in metrics.read_rows(run, "sampled") if row["stage"] == stage), "")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Responses to the held-out prompts with the scorers' own scores, and their scores in the run's units."""

    sampled: Sampled
    scores: Scores

    @property
    def judged(self) -> Sampled:
        """The responses with their scores in units."""
        return replace(self.sampled, scores=self.scores)


@dataclass(frozen=True, kw_only=True)
class ReferenceSamples:
    """What stage 1 leaves: the samples, and the states below the adapter in the order of their packed groups."""

    sampled: Sampled
    lower_MD: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Reference samples of the training prompts, and what is fixed by them: units, thresholds aimed at."""

    prompts: Prompts
    sampled: Sampled
    units: Units
    scores: Scores  # in units
    limits: list[Limit]
    needed_J: Tensor  # float64 [J]: improvements that the constraints ask for, in units; b itself where they are given so
    aimed: list[float]  # what to aim at, in each constraint's own measure
    aim_J: Tensor  # float64 [J]: the improvements to aim at, in units
    lower: LowerStates | None  # states below the adapter, unless they are too large to keep

    @property
    def samples(self) -> policy.Samples:
        """The reference's responses as an update learns from them."""
        return policy.Samples(prompts=self.prompts, rollouts=self.sampled.rollouts, scores=self.scores, lower=self.lower)

    def weighted(self, scores: Scores, prompts: Prompts) -> Tensor:
        """Utilities [P, G, J] of scores in units, as the Lagrangian counts them."""
        return constraints.weighted(self.limits, scores, prompts, self.prompts)

    def missing(self, utility_PGJ: Tensor, chosen: Sequence[int]) -> Tensor:
        """What each of the prompts `chosen` misses of its own constraints, float64 [P, J]; utilities of its responses, in units."""
        before_PGJ = self.scores.utility_PGJ[list(chosen)]
        return constraints.missing(self.limits, self.aimed, self.aim_J, self.units, utility_PGJ, before_PGJ)


def reference_prompts(config: RunConfig, train: Prompts) -> Prompts:
    """The training prompts of a run, a seeded subset."""
    return train.select(data.subset(train, config.n_prompts, config.seed, "reference"))


def heldout_prompts(config: RunConfig, heldout: Prompts) -> Prompts:
    """The prompts of the verdict, a seeded subset."""
    return heldout.select(data.subset(heldout, config.eval_prompts, config.seed, "heldout"))


def sample_reference(job: Job) -> Reference:
    """Stage 1: sample and score the reference offline (Algorithm 2, step 1), fix the units and the aim."""
    config = job.config
    prompts = reference_prompts(config, job.train)

    shared = samples_of(job, "reference", ReferenceSamples)

    def compute(stage: Stage) -> ReferenceSamples:
        if shared is None:
            sampled, lower = sample(job, stage, prompts, None, n=config.n_responses, purpose=0, keep=True)
        else:
            sampled, lower = shared.sampled, None
            log_gap(job, stage, prompts, sampled.rollouts, None)
        made = reference_of(job, prompts, sampled, None)
        units, r, g = made.units, made.scores.reward_PG, made.scores.utility_PGJ
        groups = packing.groups(prompts, sampled.rollouts)
        stage.row(
            "reference", names=[s.name for s in job.scorers.costs], audit_names=[s.name for s in job.scorers.audits],
            reward_sd=units.reward, utility_sd=units.utility_J, audit_sd=units.audit_A,
            correlation=[within_correlation(r, g[..., j]) for j in range(g.shape[2])],
            finished=float(sampled.rollouts.finished.double().mean()), mean_length=float(sampled.rollouts.length.double().mean()),
            prompts=len(prompts), responses=config.n_responses, needed=made.needed_J, aimed=made.aimed, aim=made.aim_J,
        )  # fmt: skip
        return ReferenceSamples(sampled=sampled, lower_MD=lower.of(groups).cpu() if lower else None)

    made = job.run.stage("reference", ReferenceSamples, compute)
    sampled, lower = made.sampled, None
    # Shared states stay where they are: they are hundreds of megabytes.
    lower_MD = made.lower_MD if shared is None else shared.lower_MD
    if lower_MD is not None:
        lower = LowerStates(first_layer(job.model.config.num_layers, config.lora_from))
        lower.keep(packing.groups(prompts, sampled.rollouts), lower_MD.to(job.model.device))
    reference = reference_of(job, prompts, sampled, lower)
    row = next(r for r in metrics.read_rows(job.run.folder, "reference"))
    gap, show = gap_of(job.run.folder, "reference"), job.run.display
    show.line(
        f"reference: {len(prompts)} prompts x {config.n_responses} responses, {100 * row['finished']:.0f} % finished, mean length "
        f"{row['mean_length']:.0f} tokens{f'; {gap}' if gap else ''}"
    )
    for j, limit in enumerate(reference.limits):
        opening = constraints.opening(
            limit, float(reference.needed_J[j]), reference.aimed[j], reference.units.utility_J[j], len(limit.rows(prompts))
        )
        show.line(f"{opening}; correlation with the reward {row['correlation'][j]:+.2f}")
    return reference


def samples_of(job: Job, stage: str, cls: type[RecordT]) -> RecordT | None:
    """The record of a stage of the run that --samples-of names; None without it. Raises: UserError where that run has none."""
    if not job.config.samples_of:
        return None
    folder = Path(job.config.samples_of)
    found = sorted((folder / "stages").glob(f"*-{stage.replace('/', '-')}.safetensors"))
    if not found:
        raise UserError(f"--samples-of {folder}: it has no whole stage {stage}; let that run end first (--resume {folder}).")
    return load(found[0], cls)


def _check_samples_of(config: RunConfig, fingerprint: str) -> None:
    """Raises: UserError where --samples-of names a run whose samples are not those that this one would draw."""
    if config.samples_of:
        _, other = Run.read_config(config.samples_of)
        Run.check_model(config.samples_of, fingerprint)
        for name in SAMPLING:
            theirs, own = other.get(name, getattr(RunConfig, name)), getattr(config, name)
            if theirs != own:
                raise UserError(f"--samples-of {config.samples_of}: it has --{name.replace('_', '-')} {theirs}, this run has {own}.")


def reference_of(job: Job, prompts: Prompts, sampled: Sampled, lower: LowerStates | None) -> Reference:
    """What reference samples fix."""
    limits = constraints.limits(job.config, [s.name for s in job.scorers.costs])
    units = reference_units(sampled.scores, job.scorers, limits, prompts)
    scores = units.apply(sampled.scores)
    return Reference(
        prompts=prompts, sampled=sampled, units=units, scores=scores, limits=limits, lower=lower,
        **aims(job, limits, prompts, scores, units),
    )  # fmt: skip


def aims(job: Job, limits: list[Limit], prompts: Prompts, scores: Scores, units: Units) -> dict:
    """The fields needed_J, aimed and aim_J of a `Reference`; scores: of its samples, in units."""
    config = job.config
    needed_J = constraints.required(limits, scores, prompts, units)
    aimed = constraints.aims(
        limits, scores, prompts, units, margin=config.margin, heldout=heldout_prompts(config, job.heldout),
        n_responses=config.eval_responses,
    )  # fmt: skip
    return {"needed_J": needed_J, "aimed": aimed, "aim_J": constraints.aimed_improvement(limits, aimed, needed_J, units)}


def reference_units(scores: Scores, scorers: Scorers, limits: Sequence[Limit], prompts: Prompts) -> Units:
    """Pooled within-prompt standard deviations of the reference's scores on `prompts`.

    Raises: UserError for a scorer that is constant within every prompt, also where it is so on those that its constraint is about.
    """
    above_J = constraints.counted_above(limits)
    utility_PGJ = unsafe_counted(scores.utility_PGJ, above_J)
    for limit, utility_PG in zip(limits, utility_PGJ.unbind(2), strict=True):
        on, own_PG = f" on {limit.on} prompts" if limit.on else "", utility_PG[limit.rows(prompts)]
        if limit.kind == "rate" and own_PG.min() == own_PG.max():
            side = "above" if own_PG.min() < 0 else "at or below"
            raise UserError(
                f"--unsafe-above {limit.unsafe_above:g}: every cost {limit.name} of the reference{on} lies {side} it, so that a rate says "
                "nothing; choose a value among the costs."
            )
        _deviation(-own_PG, f"scorer {limit.name}{on}")
    return Units(
        reward=_deviation(scores.reward_PG, f"scorer {scorers.reward.name}"),
        utility_J=[_deviation(-utility_PGJ[..., j], f"scorer {s.name}") for j, s in enumerate(scorers.costs)],
        audit_A=[_deviation(-scores.audit_PGA[..., a], f"scorer {s.name}") for a, s in enumerate(scorers.audits)],
        unsafe_above_J=above_J,
    )


def _deviation(score_PG: Tensor, name: str) -> float:
    """`dual.within_deviation`, and a score that is one number everywhere is named with it."""
    if score_PG.min() == score_PG.max():
        raise UserError(
            f"{name} gave {float(score_PG[0, 0]):g} for every response of the reference, so there is nothing to align; use another one, or "
            "prompts whose answers it tells apart."
        )
    return dual.within_deviation(score_PG, name)


def units_of(row: dict, limits: Sequence[Limit]) -> Units:
    """Those of a run, from its metrics row of kind "reference"."""
    return Units(
        reward=row["reward_sd"], utility_J=row["utility_sd"], audit_A=row["audit_sd"], unsafe_above_J=constraints.counted_above(limits)
    )


def within_correlation(a_PG: Tensor, b_PG: Tensor) -> float:
    """Pooled correlation of two scores within prompts."""
    a, b = a_PG - a_PG.mean(1, keepdim=True), b_PG - b_PG.mean(1, keepdim=True)
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def one_shot(job: Job, reference: Reference, start_J: Tensor | None = None) -> dual.Solution:
    """The multipliers for the aimed thresholds, from reference samples. Raises: UserError for unsupported thresholds unless --force."""
    config, aim = job.config, reference.aim_J
    bounds = [0.0 if limit.kind == "rate" else None for limit in reference.limits]  # such a utility is minus the share of unsafe responses
    try:
        return dual.solve(
            reference.scores.reward_PG, reference.weighted(reference.scores, reference.prompts), aim, config.beta, start_J=start_J,
            bounds=bounds, lam_max=config.lam_max, force=config.force,
        )  # fmt: skip
    except dual.Infeasible as error:
        margin = aim - reference.needed_J
        flags = {"improvement": "--threshold", "mean": "--cost-mean", "rate": "--cost-rate"}
        asked = ", ".join(f"{flags[limit.kind]} {limit.value:g}" for limit in reference.limits)
        opening = f"{asked} (with its margin the dual aims at an improvement of {_list(aim)})"
        if error.proven:
            raise UserError(
                f"{opening} is infeasible, which is proven: no policy improves by {_list(error.largest_improvement)} or more; ask for "
                "less, lower --margin, or go on with --force."
            ) from error
        raise UserError(
            f"{opening} is beyond what the {config.n_responses} samples of each prompt show, which is no proof that it cannot be met; "
            f"alone, they support b up to {_list(error.largest_improvement - margin)}, together {error.largest_multiple:.2f} of the aim; "
            "ask for less, lower --margin, raise --n-responses, or go on with --force."
        ) from error


def solve_dual(job: Job, reference: Reference) -> dual.Solution:
    """Stage dual: the one-shot multipliers (arXiv 2405.19544, Algorithm 1, step 2), with intervals over prompts.

    Raises: UserError as `one_shot`.
    """
    config, aim, limits = job.config, reference.aim_J, reference.limits
    solution = one_shot(job, reference)
    scores = reference.scores.reward_PG, reference.weighted(reference.scores, reference.prompts)
    at_zero = dual.solve(*scores, torch.full_like(aim, -1e6), config.beta).predicted_improvement
    predicted_se = _predicted_se(reference, dual.tilted_improvement(*scores, solution.lam, config.beta)[1])
    interval = None  # lam_max holds a multiplier
    if not _stopped(config, solution.lam, solution.gradient).any():
        # Where a constraint is about some prompts, their number counts as random too: its interval is a little wide.
        interval = dual.lam_interval(*scores, aim, config.beta, solution)
    low, high, lam_se = (interval.low, interval.high, interval.se) if interval else (None, None, None)

    def compute(stage: Stage) -> DualState:
        stage.row(
            "dual", lam=solution.lam, lam_low=low, lam_high=high, lam_se=lam_se, predicted_improvement=solution.predicted_improvement,
            predicted_improvement_se=predicted_se, improvement_at_zero=at_zero, ess=solution.ess.mean(), kkt=solution.kkt, aim=aim,
            threshold=reference.needed_J,
        )  # fmt: skip
        return DualState(lam_J=solution.lam)

    job.run.stage("dual", DualState, compute)
    show = job.run.display
    if warning := dual.ess_warning(solution.ess, config.n_responses):
        show.warn(warning + dual.half_sample(*scores, aim, config.beta, solution.lam, seed=config.seed))
    _warn_of_lam_max(job, limits, solution.lam, solution.gradient)
    shown = [f"{lam:.3f}" + (f" {_interval(interval, j)}" if interval else "") for j, lam in enumerate(solution.lam.tolist())]
    predicted = zip(solution.predicted_improvement.tolist(), predicted_se.tolist(), strict=True)
    show.line(
        f"one-shot lambda {', '.join(shown)}{' (95 % over prompts)' if interval else ''}: predicted improvement "
        f"{', '.join(f'{x:.3f} +- {se:.3f}' for x, se in predicted)} (at lambda 0: {_list(at_zero)}); effective sample size "
        f"{float(solution.ess.mean()):.1f} of {config.n_responses}"
    )
    return solution


def _predicted_se(reference: Reference, improvement_PJ: Tensor) -> Tensor:
    """Standard errors of the predicted improvements, each over the prompts that its constraint is about. float64 [J]."""
    found = []
    for j, limit in enumerate(reference.limits):
        own = limit.rows(reference.prompts)
        # Their weight in the Lagrangian taken out.
        found.append(dual.standard_error(improvement_PJ[own, j] * len(own) / len(reference.prompts)))
    return torch.stack(found)


def _interval(interval: dual.Interval, j: int) -> str:
    if interval.se[j].isinf():
        return "(not identified)"
    return f"[{interval.low[j]:.3f}, {interval.high[j]:.3f}]"


def _stopped(config: RunConfig, lam_J: Tensor, gradient_J: Tensor) -> Tensor:
    """bool [J]: multipliers that would rise if lam_max let them."""
    return (lam_J >= config.lam_max * (1 - 1e-12)) & (gradient_J < 0)


def _warn_of_lam_max(job: Job, limits: Sequence[Limit], lam_J: Tensor, gradient_J: Tensor) -> None:
    for j in _stopped(job.config, lam_J, gradient_J).nonzero()[:, 0].tolist():
        job.run.display.warn(
            f"lambda of {limits[j].name} is held by --lam-max {job.config.lam_max:g}, where the improvement misses the aim by "
            f"{-float(gradient_J[j]):.3f}; raise --lam-max or ask for less."
        )


@dataclass(frozen=True, kw_only=True)
class Slack:
    """On-policy improvements over the reference on prompts outside the iteration's pairs, in units, clustered by prompt."""

    improvement_J: Tensor
    se_J: Tensor
    slack_J: Tensor  # improvement - aim
    violation_J: Tensor  # mean over prompts of what each misses of the aim, 0 where it does not
    reward: float
    reward_se: float
    kl: float  # nats per response
    kl_se: float


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
        return _deal(self.job.config, self.reference.prompts, iteration)

    def fit(self, target: Target, iteration: int) -> Policy:
        """Stage iteration-t/policy: fit the target on pairs of responses (`_learned_from`); the iterate goes to adapters/iteration-t."""
        job = self.job
        self._begin(target.lam_J, target.start, iteration)
        anchor = None if target.anchor is None else copy_of(self.adapter, target.anchor.adapter)

        def compute(stage: Stage) -> Policy:
            shutil.rmtree(self._folder(iteration), ignore_errors=True)
            samples, fitted, train_on = self._learned_from(stage, target, iteration)
            trained = policy.fit(
                stage, job.run, job.config, job.model, samples, fitted, self.adapter, anchor, train_on=train_on, iteration=iteration
            )
            stage.row("policy", iteration=iteration, lam=target.lam_J, loss=trained.loss)
            return trained

        return self._end(job.run.stage(f"iteration-{iteration}/policy", Policy, compute), iteration)

    def _learned_from(self, stage: Stage, target: Target, iteration: int) -> tuple[policy.Samples, Target, list[int]]:
        """The responses that an update learns from (--pairs), the target on them, and which of their prompts to use.

        The policy's own are drawn afresh; the first update starts at the reference, whose samples are there. Of a file's rows those whose
        prompt measures this iteration's slack are left out.
        """
        job, reference = self.job, self.reference
        train_on, slack_on = self.deal(iteration)
        if self.pairs is not None:
            measured = {tuple(reference.prompts.token_ids[i]) for i in slack_on}
            dealt = pairs.deal(job.pairs.prompts, job.config.seed, max(1, iteration), job.config.steps * job.config.prompts_per_step, 0)[0]
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
        samples = policy.Samples(prompts=prompts, rollouts=sampled.rollouts, scores=scores, lower=lower)
        return samples, replace(target, score_PG=score_PG), train_on

    def _scored_pairs(self) -> Sampled:
        """Stage pairs: the file's responses under the reference and the scorers."""
        job, own = self.job, self.job.pairs

        def compute(stage: Stage) -> Sampled:
            with stage.progress(sum(g.tokens for g in packing.groups(own.prompts, own.rollouts)), "tokens", "scoring") as scored:
                scores = score(
                    job.model, own.prompts, own.rollouts, own.texts, job.scorers, temperature=job.config.temperature,
                    memory_budget_bytes=job.config.memory_budget_bytes, on_tokens=scored.advance,
                )  # fmt: skip
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
                r, g = _standardised(r), _standardised(g)
            g = reference.weighted(replace(scores, utility_PGJ=g), prompts)
            score_PG = r + (lam * g).sum(2) - config.beta * sampled.kl_PG
            samples = policy.Samples(prompts=prompts, rollouts=sampled.rollouts, scores=scores, lower=lower)
            trained = policy.ascend(stage, job.run, config, job.model, samples, score_PG, self.adapter, start=start, iteration=iteration)
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
        self.job.run.display.line(f"iteration {iteration}: lambda {_list(lam_J)}")
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
        job.run.display.line(_iteration_line(job, reference, lam_J, slack, policy.loss, iteration))
        _warn_of_lam_max(job, reference.limits, lam_J, slack.slack_J)
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


def _deal(config: RunConfig, prompts: Prompts, iteration: int) -> tuple[list[int], list[int]]:
    n_slack = config.slack_prompts if isinstance(config, IterativeConfig) else 0
    return pairs.deal(prompts, config.seed, max(1, iteration), config.steps * config.prompts_per_step, n_slack)


def _judged_on(config: RunConfig, reference: Prompts, heldout: Prompts) -> dict[str, Prompts]:
    """The sets of prompts on which constraints will be measured, by what they are called."""
    sets = {"training prompts": reference, "held-out prompts": heldout}
    if isinstance(config, IterativeConfig):
        for t in range(1, policy_updates(config) + 1):
            sets[f"slack prompts of iteration {t} (see --slack-prompts)"] = reference.select(_deal(config, reference, t)[1])
    return sets


def _by_tokens(prompts: Prompts) -> Prompts:
    """With keys that are equal where the tokens are: those of a file of pairs are its rows' numbers."""
    return replace(prompts, key_P=torch.tensor([data.prompt_key(ids) for ids in prompts.token_ids]))


def _standardised(x: Tensor) -> Tensor:
    """Zero mean and unit population standard deviation over the responses of each prompt; 0 where all are equal."""
    x = x - x.mean(1, keepdim=True)
    deviation = x.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > 0, x / deviation, 0)


def _iteration_line(job: Job, reference: Reference, lam_J: Tensor, slack: Slack, loss: float, iteration: int) -> str:
    stage = f"iteration-{iteration}/slack"
    speed = [row["tokens_per_s"] for row in metrics.read_timing(job.run.folder) if row["stage"] == stage and "tokens_per_s" in row]
    measured = zip(slack.improvement_J.tolist(), slack.se_J.tolist(), reference.needed_J.tolist(), reference.aimed, strict=True)
    held = [
        constraints.text(limit, *values, reference.units.utility_J[j])
        for j, (limit, values) in enumerate(zip(reference.limits, measured, strict=True))
    ]
    parts = [
        f"iteration {iteration}: lambda {_list(lam_J)}", f"reward {slack.reward:+.2f} +- {slack.reward_se:.2f}", *held,
        f"KL {slack.kl:.2f} +- {slack.kl_se:.2f} nats", f"loss {loss:.3f}", *(f"{x:.0f} tokens/s" for x in speed[-1:]),
    ]  # fmt: skip
    return " | ".join(parts)


def verdict(
    job: Job, reference: Reference, prompts: Prompts, before: Sampled, after: Sampled, audit_names: list[str], lam_J: Tensor
) -> Result:
    """Judge the policy's held-out responses (`after`, scores in units) against the reference's; evaluation.json, heldout.jsonl, report."""
    run = job.run
    evaluation = judge(prompts, before, after, reference.limits, reference.aimed, reference.units, audit_names)
    write_heldout(run.folder, prompts, before, after)
    write_json(run.folder / "evaluation.json", evaluation.as_dict())
    for line in evaluate.sentences(evaluation):
        run.display.line(line)
    written = report.write(run.folder)
    run.display.table(
        [[stage, metrics.duration(seconds), f"{100 * share:.0f} %"] for stage, seconds, share in metrics.time_table(run.folder)],
        ["where the time went", "time", "share"],
    )
    run.display.line(f"report: {' and '.join(map(str, written))}")
    return Result(folder=run.folder, evaluation=evaluation, lam=lam_J.tolist())


def in_units(sampled: Sampled, units: Units) -> Sampled:
    """The same samples with their scores in units."""
    return replace(sampled, scores=units.apply(sampled.scores))


def judge(
    prompts: Prompts, before: Sampled, after: Sampled, limits: Sequence[Limit], aimed: Sequence[float], units: Units,
    audit_names: list[str], confidence: float = 0.95,
) -> Evaluation:  # fmt: skip
    """The verdict on samples of the reference and of a policy, with scores in units."""
    return evaluate.evaluate(
        after.scores, before.scores, after.rollouts, before.rollouts, after.texts, before.texts, prompts, after.kl_PG, limits, aimed,
        units.utility_J, audit_names, confidence,
    )  # fmt: skip


def write_heldout(folder: Path, prompts: Prompts, before: Sampled, after: Sampled) -> None:
    """Write heldout.jsonl: a line per prompt and response of either side, with their scores in units."""
    n = before.rollouts.n
    lines = []
    for p in range(len(prompts)):
        for i in range(n):
            row = {"prompt": prompts.text[p], "kind": prompts.kind[p], "sample": i}
            for name, sampled in (("reference", before), ("policy", after)):
                r = p * n + i
                row[name] = sampled.texts[r]
                row[f"{name}_finished"] = bool(sampled.rollouts.finished[r])
                row[f"{name}_reward"] = float(sampled.scores.reward_PG[p, i])
                row[f"{name}_utility"] = sampled.scores.utility_PGJ[p, i].tolist()
                row[f"{name}_audit"] = sampled.scores.audit_PGA[p, i].tolist()
            lines.append(json.dumps(row, sort_keys=True, ensure_ascii=False))
    write_whole(folder / "heldout.jsonl", ("\n".join(lines) + "\n").encode())


def write_json(path: Path, contents: dict) -> None:
    """Write a JSON file, whole or not at all; equal contents give equal bytes."""
    write_whole(path, (json.dumps(contents, sort_keys=True, indent=1) + "\n").encode())


def model_folder(name: str) -> Path:
    """The folder of --model: the quickstart model by default, `smoke` for a tiny random one, else a folder or hub id."""
    if name == "smoke":
        return smoke_folder()
    return model.resolve(name) if name else quickstart.model_folder()


def stop_tokens(folder: Path, tokenizer) -> tuple[int, ...]:
    """End-of-sequence ids of tokenizer, generation_config.json and config.json together: they disagree in many checkpoints.

    Raises: UserError naming a file whose ids are not whole numbers.
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = model.read_json(folder / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if not all(number is None or type(number) is int for number in ids):
                raise UserError(f"{folder / name}: eos_token_id is {ids!r:.60}; it must be a token id, or a list of them.")
            found |= set(ids)
    return tuple(sorted(found - {None}))


def read_prompts(source: str | list[str], config: RunConfig, tokenizer, shape: ModelConfig) -> Prompts:
    """Prompts as the run's own are read: its column, system line and longest response."""
    longest = shape.max_positions - config.max_new_tokens
    prompts = data.load_prompts(source, tokenizer, column=config.prompt_column, system=config.system, max_prompt_tokens=longest)
    for text, ids in zip(prompts.text, prompts.token_ids, strict=True):
        data.check_known(ids, shape.vocab_size, f"prompt {text[:60]!r}")
    return prompts


def _prompts(config: RunConfig, tokenizer, shape: ModelConfig) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts, disjoint. Without --heldout a seeded fifth of the user's --prompts is held out."""
    train = read_prompts(config.prompts or data.shipped_prompts("train"), config, tokenizer, shape)
    if config.heldout or not config.prompts:
        heldout = read_prompts(config.heldout or data.shipped_prompts("heldout"), config, tokenizer, shape)
    else:
        chosen, held = data.split(train, config.seed)
        train, heldout = train.select(chosen), train.select(held)
    data.assert_disjoint(train, heldout)
    return train, heldout


def _cores() -> int:
    """Those that this process may run on (taskset, containers)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _versions() -> dict[str, str]:
    """What the numbers of a run depend on: commit, packages, threads."""
    root = Path(__file__).resolve().parents[2]
    commit = ""
    if (root / ".git").exists():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {"commit": commit or "unknown", "threads": str(torch.get_num_threads()), **packages}


def _list(values: Tensor) -> str:
    return ", ".join(f"{x:.3f}" for x in values.tolist())
