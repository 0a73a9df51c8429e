"""The stages that the algorithms share: open a run, sample and score, solve the dual, update, measure the slack, give the verdict."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from engine import data, dual, evaluate, metrics, model, packing, pairs, policy, quickstart, report
from engine.checkpoint import Run, Stage, write_whole
from engine.config import RunConfig, check, fit
from engine.errors import UserError
from engine.evaluate import Evaluation
from engine.lora import Adapter, first_layer, save_peft
from engine.memory import Plan, keep_freed_memory, kept_states_bytes
from engine.model import DTYPES, Decoder
from engine.packing import LowerStates
from engine.policy import Policy
from engine.records import DualState, Prompts, Rollouts, Scores, Units
from engine.rollout import States, generate
from engine.score import Scorers, frozen_forward, load_scorers, score
from engine.smoke import smoke_folder
from kernels.sampling import combine


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every stage of a run needs."""

    config: RunConfig
    run: Run
    model: Decoder
    folder: Path  # the model's Hugging Face folder
    tokenizer: object
    scorers: Scorers
    train: Prompts
    heldout: Prompts
    stop_token_ids: tuple[int, ...]


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
    out = Path(resume or config.out or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}-{algorithm}-seed{config.seed}")
    if resume is None and out.exists():
        raise UserError(f"run folder {out} exists; choose another --out, or go on with --resume {out}.")
    device = torch.device(_device(config.device))
    dtype = DTYPES["bfloat16" if device.type == "cuda" else "float32"] if config.dtype == "auto" else DTYPES[config.dtype]
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    keep_freed_memory()
    folder = model_folder(config.model)
    fingerprint = model.fingerprint(folder)
    tokenizer = _tokenizer(folder)
    raw = model.read_config(folder)
    shape = model.ModelConfig.from_json(raw, folder / "config.json")
    train, heldout = _prompts(config, tokenizer, shape.max_positions - config.max_new_tokens)
    config, lowered = fit(config, len(train), len(heldout))
    check(config)
    used = reference_prompts(config, train), heldout_prompts(config, heldout)
    plan = Plan.of(config, shape, dtype, device, *([len(ids) for ids in prompts.token_ids] for prompts in used))
    plan.check()
    scorers = load_scorers(config.reward, config.cost, config.audit, folder=folder, trunk=fingerprint, device=device)
    display = metrics.Display(n_stages=n_stages)
    display.line(
        f"{algorithm} on {config.model or 'SmolLM2-135M-Instruct'} ({shape.parameter_count() / 1e6:.0f}M weights, {dtype}, {device})"
    )
    if lowered:
        display.line(f"{len(train)} training and {len(heldout)} held-out prompts are there, so {lowered}")
    display.line(plan.sentence())
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
        network = model.load(folder, dtype=dtype, device=device)
        yield Job(
            config=config, run=run, model=network, folder=folder, tokenizer=tokenizer, scorers=scorers, train=train, heldout=heldout,
            stop_token_ids=stop_tokens(folder, tokenizer),
        )  # fmt: skip


def sample(
    job: Job, stage: Stage, prompts: Prompts, adapter: Adapter | None, *, n: int, purpose: int, keep: bool = False
) -> tuple[Sampled, LowerStates | None]:
    """Roll out `adapter` (None: the reference) on `prompts` and score the responses. `purpose` keys the random numbers.

    The second value holds the states below the adapter where `keep` asks for them, heads read no higher and the states are not too
    large. The reference's own samples are not run through the model again for log-probs under the reference: in float32 those of the
    sampler are the same to rounding (`logprob_gap` measures it). In lower precision they are computed as the policy's are, so that ratios
    start at 1.
    """
    config = job.config
    start = time.monotonic()
    below = first_layer(job.model.config.num_layers, config.lora_from)
    own = adapter is None and job.model.dtype == torch.float32
    small = kept_states_bytes(
        [len(ids) for ids in prompts.token_ids], n * config.max_new_tokens, job.model.config.hidden_size, job.model.dtype
    )
    lower = LowerStates(below) if small and (keep or not own) else None
    layers = job.scorers.layers
    states = States(layers, lower) if max(layers, default=0) <= below and (layers or lower) else None

    def on_step(tokens: int) -> None:
        made.advance(tokens)
        stage.check_stop()

    with stage.progress(len(prompts) * n * config.max_new_tokens, "tokens", "sampling") as made:
        rollouts = generate(
            job.model, prompts.token_ids, n=n, max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            stop_token_ids=job.stop_token_ids, seed=int(combine(config.seed, purpose)), prompt_key=prompts.key_P, adapter=adapter,
            max_rows=config.rollout_rows, on_step=on_step, states=states,
        )  # fmt: skip
    sampled = time.monotonic()
    texts = [
        job.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(rollouts.tokens.tolist(), rollouts.length.tolist(), strict=True)
    ]

    def on_tokens(tokens: int) -> None:
        scored.advance(tokens)
        stage.check_stop()

    total = sum(g.tokens for g in packing.groups(prompts, rollouts))
    with stage.progress(total, "tokens", "scoring") as scored:
        scores = score(
            job.model, prompts, rollouts, texts, job.scorers, temperature=config.temperature,
            memory_budget_bytes=config.memory_budget_mb * 2**20, reference=not own, states=states, on_tokens=on_tokens,
        )  # fmt: skip
    tokens = int(rollouts.length.sum())
    stage.timing(
        tokens=tokens, sampling_s=sampled - start, scoring_s=time.monotonic() - sampled, tokens_per_s=tokens / (sampled - start),
        scored_tokens_per_s=scored.done / (time.monotonic() - sampled),
    )  # fmt: skip
    logprob_PG = rollouts.model_logprob.double().sum(dim=1).view(len(prompts), n)
    if own:
        scores = replace(scores, ref_logprob_PG=logprob_PG)
    sampled = Sampled(rollouts=rollouts, texts=texts, scores=scores, kl_PG=logprob_PG - scores.ref_logprob_PG)
    return sampled, states.lower if states and keep else None


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
    aim_J: Tensor  # float64 [J]: b + margin x predicted standard error, in units
    lower: LowerStates | None  # states below the adapter, unless they are too large to keep


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

    def compute(stage: Stage) -> ReferenceSamples:
        sampled, lower = sample(job, stage, prompts, None, n=config.n_responses, purpose=0, keep=True)
        units = reference_units(sampled.scores, job.scorers)
        scores = units.apply(sampled.scores)
        r, g = scores.reward_PG, scores.utility_PGJ
        stage.row(
            "reference", names=[s.name for s in job.scorers.costs], audit_names=[s.name for s in job.scorers.audits],
            reward_sd=units.reward, utility_sd=units.utility_J, audit_sd=units.audit_A,
            correlation=[within_correlation(r, g[..., j]) for j in range(g.shape[2])],
            finished=float(sampled.rollouts.finished.double().mean()), mean_length=float(sampled.rollouts.length.double().mean()),
            logprob_gap=logprob_gap(job, prompts, sampled), prompts=len(prompts), responses=config.n_responses,
        )  # fmt: skip
        groups = packing.groups(prompts, sampled.rollouts)
        return ReferenceSamples(sampled=sampled, lower_MD=lower.of(groups).cpu() if lower else None)

    made = job.run.stage("reference", ReferenceSamples, compute)
    sampled, lower = made.sampled, None
    if made.lower_MD is not None:
        lower = LowerStates(first_layer(job.model.config.num_layers, config.lora_from))
        lower.keep(packing.groups(prompts, sampled.rollouts), made.lower_MD.to(job.model.device))
    units = reference_units(sampled.scores, job.scorers)
    scores = units.apply(sampled.scores)
    b_J = torch.tensor(config.threshold, dtype=torch.float64)
    n_heldout = min(config.eval_prompts, len(job.heldout))
    se_J = [dual.predicted_se(scores.utility_PGJ[..., j], n_heldout, config.eval_responses) for j in range(len(b_J))]
    aim_J = b_J + config.margin * torch.tensor(se_J, dtype=torch.float64)
    row = next(r for r in metrics.read_rows(job.run.folder, "reference"))
    show = job.run.display
    show.line(
        f"reference: {len(prompts)} prompts x {config.n_responses} responses, {100 * row['finished']:.0f} % finished, mean length "
        f"{row['mean_length']:.0f} tokens; sampled and recomputed log-probs differ by at most {row['logprob_gap']:.1e} nats per response"
    )
    for j, cost in enumerate(job.scorers.costs):
        show.line(
            f"constraint {cost.name}: b {b_J[j]:.2f} + margin {aim_J[j] - b_J[j]:.2f} = aim {aim_J[j]:.2f} (within-prompt standard "
            f"deviations; one is {units.utility_J[j]:.3g} of the scorer's units); correlation with the reward {row['correlation'][j]:+.2f}"
        )
    return Reference(prompts=prompts, sampled=sampled, units=units, scores=scores, aim_J=aim_J, lower=lower)


def logprob_gap(job: Job, prompts: Prompts, sampled: Sampled, n_prompts: int = 4) -> float:
    """Largest difference of the sampler's log-probs from those of a forward over whole responses, nats, on the first few prompts."""
    groups = packing.groups(prompts, sampled.rollouts)[:n_prompts]
    again = frozen_forward(
        job.model, groups, [], temperature=job.config.temperature, memory_budget_bytes=job.config.memory_budget_mb * 2**20
    )[1]
    return float((sampled.rollouts.model_logprob[: len(again)].double().sum(dim=1) - again).abs().max())


def reference_units(scores: Scores, scorers: Scorers) -> Units:
    """Pooled within-prompt standard deviations. Raises: UserError for a scorer that is constant within every prompt."""

    return Units(
        reward=dual.within_deviation(scores.reward_PG, f"scorer {scorers.reward.name}"),
        utility_J=[dual.within_deviation(scores.utility_PGJ[..., j], f"scorer {s.name}") for j, s in enumerate(scorers.costs)],
        audit_A=[dual.within_deviation(scores.audit_PGA[..., a], f"scorer {s.name}") for a, s in enumerate(scorers.audits)],
    )


def within_correlation(a_PG: Tensor, b_PG: Tensor) -> float:
    """Pooled correlation of two scores within prompts."""
    a, b = a_PG - a_PG.mean(1, keepdim=True), b_PG - b_PG.mean(1, keepdim=True)
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def solve_dual(job: Job, reference: Reference) -> dual.Solution:
    """The one-shot multipliers for the aimed thresholds, from reference samples (arXiv 2405.19544, Algorithm 1, step 2).

    Raises: dual.Infeasible unless --force.
    """
    config, scores = job.config, reference.scores
    aim = reference.aim_J
    try:
        solution = dual.solve(scores.reward_PG, scores.utility_PGJ, aim, config.beta, lam_max=config.lam_max, force=config.force)
    except dual.Infeasible as error:
        margin = aim - torch.tensor(config.threshold, dtype=torch.float64)
        raise UserError(
            f"--threshold {' '.join(map(str, config.threshold))} (with its margin the dual aims at {_list(aim)}) is beyond what the "
            f"{config.n_responses} samples of each prompt show, which is no proof that it cannot be met; alone, they support b up to "
            f"{_list(error.largest_improvement - margin)}, together {error.largest_multiple:.2f} of the aim; lower --threshold or "
            "--margin, raise --n-responses, or go on with --force."
        ) from error
    at_zero = dual.solve(scores.reward_PG, scores.utility_PGJ, torch.full_like(aim, -1e6), config.beta).predicted_improvement

    def compute(stage: Stage) -> DualState:
        stage.row(
            "dual", lam=solution.lam, predicted_improvement=solution.predicted_improvement, improvement_at_zero=at_zero,
            ess=solution.ess.mean(), kkt=solution.kkt, aim=aim, threshold=list(config.threshold),
        )  # fmt: skip
        return DualState(lam_J=solution.lam)

    job.run.stage("dual", DualState, compute)
    show = job.run.display
    if warning := dual.ess_warning(solution.ess, config.n_responses):
        show.warn(warning)
    show.line(
        f"one-shot lambda {_list(solution.lam)}: predicted improvement {_list(solution.predicted_improvement)} (at lambda 0: "
        f"{_list(at_zero)}); effective sample size {float(solution.ess.mean()):.1f} of {config.n_responses}"
    )
    return solution


@dataclass(frozen=True, kw_only=True)
class Slack:
    """On-policy improvements over the reference on prompts outside the iteration's pairs, in units, clustered by prompt."""

    improvement_J: Tensor
    se_J: Tensor
    slack_J: Tensor  # improvement - aim
    reward: float
    reward_se: float
    kl: float  # nats per response


class World:
    """The stages as the algorithms call them, on a real model: the policy is an adapter that is continued from call to call.

    The algorithms' loops know nothing else of the world, so a test can put an enumerated one in its place.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.reference = sample_reference(job)
        config = job.config
        self.adapter = Adapter.on(job.model, rank=config.lora_rank, alpha=config.lora_alpha, share=config.lora_from, seed=config.seed)
        self.before = self.adapter.tensors()
        self.trained: Policy | None = None

    def solve_dual(self) -> dual.Solution:
        """See `solve_dual`."""
        return solve_dual(self.job, self.reference)

    def deal(self, iteration: int, n_slack: int) -> tuple[list[int], list[int]]:
        """Prompts for the pairs and for the slack of an iteration, see `pairs.deal`."""
        config = self.job.config
        return pairs.deal(self.reference.prompts, config.seed, iteration, config.steps * config.prompts_per_step, n_slack)

    def update_policy(self, lam_J: Tensor, iteration: int, n_slack: int = 0) -> None:
        """Stage iteration-t/policy: continue the adapter on pairs labelled at lambda, `n_slack` prompts left out; its iterate goes to
        adapters/iteration-t."""
        job, reference, adapter = self.job, self.reference, self.adapter
        job.run.display.line(f"iteration {iteration}: lambda {_list(lam_J)}")
        self.before = adapter.tensors()
        train_on = self.deal(iteration, n_slack)[0]

        def compute(stage: Stage) -> Policy:
            return policy.update(
                stage, job.run, job.config, job.model, reference.lower, reference.prompts, reference.sampled.rollouts, reference.scores,
                lam_J, adapter, before=self.trained, train_on=train_on, iteration=iteration,
            )  # fmt: skip

        self.trained = job.run.stage(f"iteration-{iteration}/policy", Policy, compute)
        adapter.set_tensors(self.trained.adapter)
        save_peft(adapter, job.run.folder / "adapters" / f"iteration-{iteration}", job.config.model or "SmolLM2-135M-Instruct")

    def measure_slack(self, lam_J: Tensor, iteration: int) -> Slack:
        """Stage iteration-t/slack: roll out the policy, score, u(lambda) = mean(g - E_ref g) - aim (Algorithm 2, step 2)."""
        job, reference = self.job, self.reference
        config = job.config
        slack_on = self.deal(iteration, config.slack_prompts)[1]

        def compute(stage: Stage) -> Slack:
            chosen = reference.prompts.select(slack_on)
            sampled, _ = sample(job, stage, chosen, self.adapter, n=config.slack_responses, purpose=iteration)
            scores = reference.units.apply(sampled.scores)
            mean, se = dual.paired_improvement(scores.utility_PGJ, reference.scores.utility_PGJ[slack_on])
            reward, reward_se = dual.paired_improvement(scores.reward_PG, reference.scores.reward_PG[slack_on])
            slack = Slack(
                improvement_J=mean, se_J=se, slack_J=mean - reference.aim_J, reward=float(reward), reward_se=float(reward_se),
                kl=float(sampled.kl_PG.mean()),
            )  # fmt: skip
            stage.row(
                "iteration", iteration=iteration, lam=lam_J, reward=slack.reward, reward_se=slack.reward_se, improvement=mean,
                improvement_se=se, threshold=list(config.threshold), aim=reference.aim_J, slack=slack.slack_J, slack_se=se, kl=slack.kl,
                loss=self.trained.loss, finished=float(sampled.rollouts.finished.double().mean()), prompts=len(slack_on),
                responses=config.slack_responses,
            )  # fmt: skip
            return slack

        slack = job.run.stage(f"iteration-{iteration}/slack", Slack, compute)
        job.run.display.line(_iteration_line(job, reference, lam_J, slack, self.trained.loss, iteration))
        return slack

    def passes_max_kl(self, slack: Slack, iteration: int) -> bool:
        """Whether the policy is too far from the reference; then it is put back to the iterate before."""
        if slack.kl <= self.job.config.max_kl:
            return False
        self.adapter.set_tensors(self.before)
        self.job.run.display.warn(
            f"iteration {iteration}: KL {slack.kl:.2f} nats passes --max-kl {self.job.config.max_kl}; stopped, and the iterate "
            "before it is kept"
        )
        return True

    def verdict(self, lam_J: Tensor) -> Result:
        """See `verdict`."""
        return verdict(self.job, self.reference, self.adapter, lam_J)


def _iteration_line(job: Job, reference: Reference, lam_J: Tensor, slack: Slack, loss: float, iteration: int) -> str:
    stage = f"iteration-{iteration}/slack"
    speed = [row["tokens_per_s"] for row in metrics.read_timing(job.run.folder) if row["stage"] == stage and "tokens_per_s" in row]
    constraints = [
        f"{s.name} {slack.improvement_J[j]:+.2f} +- {slack.se_J[j]:.2f} (b {job.config.threshold[j]:.2f}, aim {reference.aim_J[j]:.2f})"
        for j, s in enumerate(job.scorers.costs)
    ]
    parts = [
        f"iteration {iteration}: lambda {_list(lam_J)}", f"reward {slack.reward:+.2f} +- {slack.reward_se:.2f}", *constraints,
        f"KL {slack.kl:.2f} nats", f"loss {loss:.3f}", *(f"{x:.0f} tokens/s" for x in speed[-1:]),
    ]  # fmt: skip
    return " | ".join(parts)


def verdict(job: Job, reference: Reference, adapter: Adapter, lam_J: Tensor) -> Result:
    """The last two stages: reference and policy on held-out prompts; then evaluation.json, heldout.jsonl and the report."""
    config, run = job.config, job.run
    prompts = heldout_prompts(config, job.heldout)
    # The seeds' held-out samples differ, the prompts may overlap: purposes below 0 never meet an iteration's number.
    before = run.stage("heldout/reference", Sampled, lambda s: sample(job, s, prompts, None, n=config.eval_responses, purpose=-1)[0])
    after = run.stage("heldout/policy", Sampled, lambda s: sample(job, s, prompts, adapter, n=config.eval_responses, purpose=-2)[0])
    scores_before, scores_after = reference.units.apply(before.scores), reference.units.apply(after.scores)
    evaluation = evaluate.evaluate(
        scores_after, scores_before, after.rollouts, before.rollouts, after.texts, before.texts, prompts, after.kl_PG, config.threshold,
        reference.aim_J.tolist(), [s.name for s in job.scorers.costs], [s.name for s in job.scorers.audits],
    )  # fmt: skip
    lines = []
    for p in range(len(prompts)):
        for i in range(config.eval_responses):
            row = {"prompt": prompts.text[p], "kind": prompts.kind[p], "sample": i}
            for name, sampled, scores in (("reference", before, scores_before), ("policy", after, scores_after)):
                r = p * config.eval_responses + i
                row[name] = sampled.texts[r]
                row[f"{name}_finished"] = bool(sampled.rollouts.finished[r])
                row[f"{name}_reward"] = float(scores.reward_PG[p, i])
                row[f"{name}_utility"] = scores.utility_PGJ[p, i].tolist()
                row[f"{name}_audit"] = scores.audit_PGA[p, i].tolist()
            lines.append(json.dumps(row, sort_keys=True, ensure_ascii=False))
    write_whole(run.folder / "heldout.jsonl", ("\n".join(lines) + "\n").encode())
    write_whole(run.folder / "evaluation.json", (json.dumps(evaluation.as_dict(), sort_keys=True, indent=1) + "\n").encode())
    for line in evaluate.sentences(evaluation):
        run.display.line(line)
    written = report.write(run.folder)
    run.display.table(
        [[stage, metrics.duration(seconds), f"{100 * share:.0f} %"] for stage, seconds, share in metrics.time_table(run.folder)],
        ["where the time went", "time", "share"],
    )
    run.display.line(f"report: {' and '.join(map(str, written))}")
    return Result(folder=run.folder, evaluation=evaluation, lam=lam_J.tolist())


def model_folder(name: str) -> Path:
    """The folder of --model: the quickstart model by default, `smoke` for a tiny random one, else a folder or hub id."""
    if name == "smoke":
        return smoke_folder()
    return model.resolve(name) if name else quickstart.model_folder()


def stop_tokens(folder: Path, tokenizer) -> tuple[int, ...]:
    """End-of-sequence ids of tokenizer, generation_config.json and config.json together: they disagree in many checkpoints."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(ids) if isinstance(ids, list) else {ids}
    return tuple(sorted(found - {None}))


def _tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer could be loaded ({str(error).splitlines()[0]}); give a complete model folder.") from error


def _prompts(config: RunConfig, tokenizer, longest: int) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts, disjoint. Without --heldout a seeded fifth of the user's --prompts is held out."""

    def read(source) -> Prompts:
        return data.load_prompts(source, tokenizer, column=config.prompt_column, system=config.system, max_prompt_tokens=longest)

    train = read(config.prompts or data.shipped_prompts("train"))
    if config.heldout or not config.prompts:
        heldout = read(config.heldout or data.shipped_prompts("heldout"))
    else:
        chosen, held = data.split(train, config.seed)
        train, heldout = train.select(chosen), train.select(held)
    data.assert_disjoint(train, heldout)
    return train, heldout


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _versions() -> dict[str, str]:
    """What the numbers of a run depend on: commit, packages, threads."""
    root = Path(__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {"commit": commit or "unknown", "threads": str(torch.get_num_threads()), **packages}


def _list(values: Tensor) -> str:
    return ", ".join(f"{x:.3f}" for x in values.tolist())
