"""The presets: a small run for trying things out, and the papers' own protocols; and settings fitted to the
prompts and pairs at hand.

A preset is a function of a config. It gives settings other defaults, so that flags win.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from engine.config.algorithms import (
    ALGORITHMS,
    CaidConfig,
    DpoConfig,
    MocanConfig,
    PecanConfig,
    PrimalDualConfig,
    SacpoConfig,
    SafeDpoConfig,
)
from engine.config.flags import names_of, suggest
from engine.config.run import MOST_STEPS, RunConfig
from engine.errors import UserError

Settings = Mapping[str, Any]

# The settings that determine the reference's samples, their scores and the kept states.
SAMPLING = (
    "seed", "device", "dtype", "threads", "model", "reward", "cost", "audit", "prompts", "samples", "heldout",
    "prompt_column", "system", "template", "chat_template_kwargs", "n_prompts", "n_responses",
    "max_new_tokens", "temperature", "top_p", "top_k", "tune", "lora_from", "memory_budget_mb",
    "eval_prompts", "eval_responses",
)  # fmt: skip
# The settings of `smoke`; those that an algorithm does not have are left out.
SMOKE = {
    "model": "smoke", "n_prompts": 12, "n_responses": 4, "max_new_tokens": 8, "rollout_rows": 32, "steps": 3,
    "prompts_per_step": 2, "responses_per_prompt": 3, "warmup_steps": 1, "margin": 0.0, "checkpoint_every": 1,
    "eval_prompts": 8, "eval_responses": 2, "eval_budget": 16, "iterations": 3, "slack_prompts": 6,
    "slack_responses": 2, "ascent_prompts": 4, "preference_steps": 3,
}  # fmt: skip
# What both protocols have in common.
_PAPERS = {
    "system": "", "units": "raw", "beta": 0.1, "margin": 0.0, "temperature": 1.0, "top_p": 0.9,
    "max_kl_ratio": math.inf, "least_weight": 0.0, "dual_rule": "newton",
    "adam_beta1": 0.9, "weight_average": 0.0,
    "labels": "sampled-once", "schedule": "cosine", "warmup_steps": 100, "lora_rank": 8, "lora_alpha": 16.0,
    "lora_from": 0.0, "eval_responses": 2, "activation_checkpointing": True, "checkpoint_every": 100,
}  # fmt: skip
_PKU = "PKU-Alignment/PKU-SafeRLHF-30K"
_SAFE_RLHF = {
    **_PAPERS, "model": "PKU-Alignment/alpaca-7b-reproduced", "template": "safe-rlhf",
    "reward": "PKU-Alignment/beaver-7b-v1.0-reward", "cost": ("PKU-Alignment/beaver-7b-v1.0-cost",),
    "audit": ("PKU-Alignment/beaver-7b-v3.0-cost",), "prompts": _PKU, "heldout": f"{_PKU}:test",
    "max_new_tokens": 480, "eval_prompts": 3000, "eval_budget": 6000, "learning_rate": 5e-4,
    "offload_scorers": True,
}  # fmt: skip
# All that align once have the reference's samples of MoCAN, which --samples-of shares.
_ONCE = {
    **_SAFE_RLHF, "pairs": _PKU, "threshold": (1.2,), "n_prompts": 1000, "n_responses": 128, "epochs": 3,
    "prompts_per_step": 16, "weight_decay": 0.05,
}  # fmt: skip
SAFE_RLHF: Mapping[type[RunConfig], Settings] = {
    MocanConfig: _ONCE,
    # As many steps as three passes over the 26,874 rows take.
    PecanConfig: {**_ONCE, "preferences": _PKU, "preference_steps": 5039, "threshold": (0.5,)},
    DpoConfig: _ONCE,
    SacpoConfig: _ONCE,
    SafeDpoConfig: _ONCE,
    CaidConfig: {
        **_SAFE_RLHF, "pairs": _PKU, "threshold": (5.0,), "n_prompts": 600, "n_responses": 64, "epochs": 1,
        "prompts_per_step": 35, "iterations": 4, "slack_prompts": 600, "slack_responses": 64,
        "dual_step": 1.0,
    },
    # 50 iterations of 64 prompts with 8 responses sample about as many responses as the set has rows.
    PrimalDualConfig: {
        **_SAFE_RLHF, "cost_mean": (0.0,), "beta": 0.01, "top_p": 1.0, "n_prompts": 2000, "n_responses": 8,
        "iterations": 50, "ascent_prompts": 64, "steps": 4, "prompts_per_step": 16, "slack_prompts": 128,
        "slack_responses": 1, "lam_init": 1.0, "dual_rate": 0.1, "lam_max": 5.0, "clip": 0.2,
        "schedule": "constant", "warmup_steps": 10, "learning_rate": 1e-4,
    },
}  # fmt: skip
_HH = "Anthropic/hh-rlhf"
_HH_RLHF = {
    **_PAPERS, "template": "hh", "reward": "Ray2333/gpt2-large-helpful-reward_model@hh",
    "cost": (
        "harmless=-Ray2333/gpt2-large-harmless-reward_model@hh",
        "humor=-mohameddhiab/humor-no-humor#1:logit@response",
    ),
    "audit": (), "prompts": _HH, "heldout": f"{_HH}:test", "pairs": _HH, "threshold": (0.5, 0.5),
    "n_prompts": 600, "n_responses": 64, "max_new_tokens": 128, "eval_prompts": 2000, "eval_budget": 4000,
    "prompts_per_step": 15, "learning_rate": 5e-5,
}  # fmt: skip
HH_RLHF: Mapping[type[RunConfig], Settings] = {
    MocanConfig: {**_HH_RLHF, "epochs": 3},
    CaidConfig: {
        **_HH_RLHF, "epochs": 1, "iterations": 3, "slack_prompts": 600, "slack_responses": 64,
        "dual_step": 1.0,
    },
}  # fmt: skip


def smoke(config: RunConfig) -> RunConfig:
    """Shrinks a run to a tiny random model and under 30 seconds: `python -m engine.train --preset smoke`.

    Settings that differ from their defaults stay as they are.
    """
    return _with_defaults(config, SMOKE)


def safe_rlhf(config: RunConfig) -> RunConfig:
    """Takes the protocol of MoCAN and PeCAN (arXiv 2405.19544) and of CAID with one constraint (2505.19387):
    `python -m engine.train mocan --preset safe-rlhf --threshold 1.2`.

    Predicted cost on one H100 of 80 GB: MoCAN 1 h 30 min, CAID 1 h 45 min for one threshold. To be expected:
    before training, means of the reference of -11.70 (helpful) and -1.61 (safe), and lambda .50 at b 1.2;
    after it an improvement of safety in [1.24, 1.91] there (2405.19544, appendix); of CAID at b 5 safe 5.76
    [5.04, 6.48] and helpful 9.77 (2505.19387, appendix). docs/protocols.md has the files and all cells.
    """
    return _with_defaults(config, SAFE_RLHF[type(config)])


def hh_rlhf(config: RunConfig) -> RunConfig:
    """Takes the protocol of CAID with two constraints (arXiv 2505.19387, appendix):
    `python -m engine.train caid --preset hh-rlhf --model SFT`, where SFT is your own Llama-2-7B, fine-tuned
    on HH-RLHF: the paper's is not published.

    Predicted cost on one H100 of 80 GB: about 5 h. To be expected at b .50 .50: helpful .776, harmless .542,
    humour .556 better than the reference.
    """
    return _with_defaults(config, HH_RLHF[type(config)])


def _with_defaults(config: RunConfig, settings: Settings) -> RunConfig:
    """Changes those settings that the algorithm has and that are at their defaults."""
    untouched = {f.name for f in fields(config) if getattr(config, f.name) == f.default}
    return replace(config, **{name: value for name, value in settings.items() if name in untouched})


class Preset(NamedTuple):
    """A row of the table of presets."""

    apply: Callable[[RunConfig], RunConfig]
    settings: Mapping[type[RunConfig], Settings]  # of each algorithm that has it; empty: all have


PRESETS = MappingProxyType(
    {
        "smoke": Preset(smoke, {}),
        "safe-rlhf": Preset(safe_rlhf, SAFE_RLHF),
        "hh-rlhf": Preset(hh_rlhf, HH_RLHF),
    }
)
# The settings whose values name repositories of a hub, and where in a value the repository stands.
_PUBLISHED = ("model", "reward", "cost", "audit", "prompts", "heldout", "pairs", "preferences")
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")


def preset_named(name: str, algorithm: str) -> Preset:
    """Returns a preset. Raises: UserError where there is none of that name, or none for the algorithm."""
    if name not in PRESETS:
        near = suggest(name, list(PRESETS))
        raise UserError(f"--preset {name}: there is none.{near} There are {', '.join(PRESETS)}.")
    kinds = PRESETS[name].settings
    names = [n for n, row in ALGORITHMS.items() if row.trains_policy and (not kinds or row.config in kinds)]
    if algorithm not in names:
        raise UserError(f"--preset {name}: {algorithm} has none; {', '.join(names)} have it.")
    return PRESETS[name]


def published(name: str, config: RunConfig) -> dict[str, str]:
    """Lists what a run takes from a hub as its preset says: flag and value -> repository.

    Raises: UserError where the preset has no model, and no flag names one.
    """
    settings = PRESETS[name].settings.get(type(config), {})
    if settings and not config.model:
        raise UserError(
            f"--preset {name}: no model of this protocol is published; fine-tune Llama-2-7B on the chosen "
            f"answers of {_HH}, and name its folder with --model."
        )
    found = {}
    for field in _PUBLISHED:
        value = settings.get(field, ())
        if value and getattr(config, field) == value:
            for text in value if isinstance(value, tuple) else (value,):
                found[f"--{field} {text}"] = _REPOSITORY.search(text).group()
    return found


def without_epochs(default: RunConfig, flags: list[str]) -> RunConfig:
    """Lets --steps among the flags count in place of the epochs of a preset or a file.

    Raises: UserError where --epochs is among them too.
    """
    given = names_of(flags)
    if "steps" not in given or "epochs" not in {f.name for f in fields(default)}:
        return default
    if "epochs" in given:
        raise UserError("--steps and --epochs: both count the policy steps; give one of them.")
    return replace(default, epochs=0) if default.epochs else default


def fit(config: RunConfig, n_train: int, n_heldout: int) -> tuple[RunConfig, str]:
    """Lowers the numbers of prompts to what the training and held-out prompts at hand allow.

    Returns the config and, for the user, which flags were lowered to what.
    """
    caps = {"n_prompts": n_train, "eval_prompts": n_heldout}
    n = min(config.n_prompts, n_train)
    if config.pairs_file:
        caps["slack_prompts"] = n
    else:
        if config.slack_prompts:
            if config.slack_prompts + config.prompts_per_step > n:
                caps["slack_prompts"] = max(2, n // 3)
            n -= min(config.slack_prompts, caps.get("slack_prompts", n))
        caps["prompts_per_step"] = max(1, n)
    lowered = {name: cap for name, cap in caps.items() if cap < getattr(config, name)}
    said = ", ".join(f"--{name.replace('_', '-')} is {cap}" for name, cap in lowered.items())
    return replace(config, **lowered), said


def with_steps(config: RunConfig, n_pairs: int) -> tuple[RunConfig, str]:
    """Turns --epochs into the steps of a policy update; the last one may begin another pass.

    n_pairs: of the data of --pairs. Returns the config and what to say of it, "" without --epochs.
    Raises: UserError for more steps than a run can have.
    """
    if not config.epochs:
        return config, ""
    steps = -(-config.epochs * n_pairs // config.prompts_per_step)
    said = f"--epochs {config.epochs} of {n_pairs} pairs, {config.prompts_per_step} a step"
    if steps > MOST_STEPS:
        raise UserError(f"{said}: {steps} steps, more than {MOST_STEPS}; lower --epochs.")
    return replace(config, steps=steps), f"{said}: {steps} steps in each policy update"
