"""The values that a run's settings may have."""

import math
from dataclasses import fields

from engine.config.algorithms import (
    MocanConfig,
    OpdConfig,
    PdDpoConfig,
    PrimalDualConfig,
    SacpoConfig,
    SafeDpoConfig,
    by_preference,
)
from engine.config.run import IterativeConfig, RunConfig
from engine.errors import UserError


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
            raise UserError(
                f"--cost-rate {rate}: must lie above 0 and not above 1, such as 0.02; no sample can confirm a rate of 0."
            )
    for mean in config.cost_mean:
        if not mean > -math.inf:
            raise UserError(
                f"--cost-mean {mean}: must be a number, or inf for a cost that keeps --threshold."
            )
    both = [
        c
        for c, mean, rate in zip(config.cost, config.cost_mean, config.cost_rate, strict=False)
        if mean < math.inf and rate < 1
    ]
    if both:
        raise UserError(
            f"--cost-mean and --cost-rate both limit {both[0]}; give inf or 1 for one of the two."
        )
    if by_preference(config) and (
        min(config.cost_mean, default=math.inf) < math.inf or min(config.cost_rate, default=1) < 1
    ):
        raise UserError(
            "--cost-mean, --cost-rate: log-ratios of policies have no level of their own; use --threshold."
        )


# An infinite one of these limits nothing.
MAY_BE_INFINITE = ("cost_mean", "max_kl")


def check(config: RunConfig) -> None:
    """Refuse values that no run can use.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if field.name not in MAY_BE_INFINITE and not all(
            math.isfinite(x) for x in values if isinstance(x, float)
        ):
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
        raise UserError(
            f"--temperature {config.temperature}: must be above 0, as the policy is a distribution."
        )
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
        raise UserError(
            f"--tune full: --learning-rate {config.learning_rate:g}, the default, is for adapters; give one of about 1e-5."
        )
    if not config.cost:
        raise UserError("--cost is empty: name at least one cost, for example --cost harm.")
    if len(set(config.cost)) != len(config.cost):
        raise UserError(f"--cost {' '.join(config.cost)}: two costs have one name; name each once.")
    if getattr(config, "dual_rule", "") == "bisection" and len(config.cost) > 1:
        raise UserError(
            f"--dual-rule bisection: {len(config.cost)} costs; it takes one, use newton or secant."
        )
    if len(config.threshold) != len(config.cost):
        raise UserError(
            f"--threshold {' '.join(map(str, config.threshold))}: {len(config.threshold)} value(s) for {len(config.cost)} cost(s); "
            "give one threshold per cost."
        )
    _check_limits(config)
    if getattr(config, "preferences", "") and not by_preference(config):
        raise UserError(
            f"--preferences {config.preferences}: scores are those of models here; add --scores preference, or leave it out."
        )
    if config.labels not in ("soft", "sampled") and isinstance(config, SafeDpoConfig):
        raise UserError(f"--labels {config.labels}: safe responses win by labels here; use soft or sampled.")
    if config.labels == "single" and isinstance(config, SacpoConfig | PdDpoConfig | OpdConfig):
        raise UserError(
            "--labels single: its value is that of the reference, and here a policy is aligned to another one; use regression."
        )
    if config.labels == "single" and getattr(config, "pairs", "reference") != "reference":
        raise UserError(
            f"--labels single: its value is that of the reference's samples, and --pairs is {config.pairs}; use regression."
        )
    if isinstance(config, MocanConfig) and config.pairs == "policy":
        raise UserError(
            "--pairs policy: a one-shot method starts at the reference, whose samples are there already; use reference."
        )
    if isinstance(config, SacpoConfig) and not (len(config.lam) == len(config.cost) and min(config.lam) > 0):
        raise UserError(
            f"--lam {' '.join(map(str, config.lam))}: give one value above 0 for each of the {len(config.cost)} cost(s)."
        )
    if isinstance(config, PrimalDualConfig) and config.clip > 1:
        raise UserError(
            f"--clip {config.clip}: must be at most 1, as a probability ratio is above 0; 0.2 is usual."
        )
    if isinstance(config, PrimalDualConfig) and not config.lam_init > 0:
        raise UserError(
            f"--lam-init {config.lam_init}: must be above 0 here, as steps on ln lambda never leave 0."
        )
    if isinstance(config, IterativeConfig):
        if not config.lam_max_change > 1:
            raise UserError(f"--lam-max-change {config.lam_max_change}: must be above 1.")
        if config.slack_responses > config.n_responses:
            raise UserError(
                f"--slack-responses {config.slack_responses}: must be at most --n-responses {config.n_responses}."
            )
        if config.slack_prompts + config.prompts_per_step > config.n_prompts:
            raise UserError(
                f"--slack-prompts {config.slack_prompts}: slack and pairs need disjoint prompts, and {config.n_prompts} prompts "
                f"leave fewer than --prompts-per-step {config.prompts_per_step}; lower these or give more prompts."
            )
