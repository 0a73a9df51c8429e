"""The smoke preset, and settings fitted to the prompts at hand."""

from dataclasses import fields, replace

from engine.config.run import RunConfig

# The settings that determine the reference's samples, their scores and the kept states.
SAMPLING = (
    "seed", "device", "dtype", "threads", "model", "reward", "cost", "audit", "prompts", "heldout",
    "prompt_column", "system", "template", "chat_template_kwargs", "n_prompts", "n_responses",
    "max_new_tokens", "temperature", "top_p", "top_k", "tune", "lora_from", "memory_budget_mb",
    "eval_prompts", "eval_responses",
)  # fmt: skip
# The settings of `smoke`; those that an algorithm does not have are left out.
SMOKE = {
    "model": "smoke", "n_prompts": 12, "n_responses": 4, "max_new_tokens": 8, "rollout_rows": 32, "steps": 3,
    "prompts_per_step": 2, "responses_per_prompt": 3, "warmup_steps": 1, "margin": 0.0, "checkpoint_every": 1,
    "eval_prompts": 8, "eval_responses": 2, "iterations": 3, "slack_prompts": 6, "slack_responses": 2,
    "ascent_prompts": 4, "preference_steps": 3,
}  # fmt: skip


def smoke(config: RunConfig) -> RunConfig:
    """Shrinks a run to a tiny random model and under 30 seconds: `python -m engine.train --preset smoke`.

    Settings that differ from their defaults stay as they are.
    """
    untouched = {f.name for f in fields(config) if getattr(config, f.name) == f.default}
    return replace(config, **{name: value for name, value in SMOKE.items() if name in untouched})


def fit(config: RunConfig, n_train: int, n_heldout: int) -> tuple[RunConfig, str]:
    """Lowers the numbers of prompts to what the training and held-out prompts at hand allow.

    Returns the config and, for the user, which flags were lowered to what.
    """
    caps = {"n_prompts": n_train, "eval_prompts": n_heldout}
    n = min(config.n_prompts, n_train)
    if config.slack_prompts:
        if config.slack_prompts + config.prompts_per_step > n:
            caps["slack_prompts"] = max(2, n // 3)
        n -= min(config.slack_prompts, caps.get("slack_prompts", n))
    caps["prompts_per_step"] = max(1, n)
    lowered = {name: cap for name, cap in caps.items() if cap < getattr(config, name)}
    said = ", ".join(f"--{name.replace('_', '-')} is {cap}" for name, cap in lowered.items())
    return replace(config, **lowered), said
