"""The help of engine.train: its flags in groups by subject, the few that most people need or all of them."""

import ast
import inspect
import textwrap
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

# The settings of all algorithms, by subject. Those that an algorithm does not have are left out of its help.
GROUPS = {
    "model-and-data": (
        "model", "prompts", "heldout", "prompt_column", "response_columns", "strict", "pairs", "preferences",
        "preference_columns", "system", "template", "chat_template_kwargs", "n_prompts", "samples",
        "samples_of",
    ),
    "scorers": ("reward", "cost", "audit", "offload_scorers", "scores", "preference_steps", "units"),
    "constraints": (
        "threshold", "cost_mean", "cost_rate", "unsafe_above", "cost_worst", "worst_share", "cost_range",
        "cost_on", "margin", "force",
    ),
    "sampling": ("n_responses", "max_new_tokens", "temperature", "top_p", "top_k", "rollout_rows"),
    "multipliers": (
        "beta", "lam_max", "lam", "offset", "objective", "iterations", "slack_prompts", "slack_responses",
        "lam_max_change", "max_kl", "dual_rule", "dual_step", "lam_init", "dual_rate", "advantage",
        "proximity",
    ),
    "training": (
        "steps", "epochs", "prompts_per_step", "responses_per_prompt", "labels", "learning_rate",
        "warmup_steps", "schedule", "adam_beta1", "weight_average", "weight_decay", "clip_norm",
        "least_weight", "max_kl_ratio", "clip",
        "ascent_prompts", "tune", "lora_rank", "lora_alpha", "lora_from", "lora_targets", "lora_dropout",
    ),
    "verdict": ("eval_prompts", "eval_responses", "eval_budget", "require_met"),
    "run-and-machine": (
        "out", "seed", "device", "dtype", "threads", "model_ranks", "tokens_per_forward",
        "activation_checkpointing", "memory_budget_mb", "checkpoint_every", "accept_changes", "trackers",
    ),
}  # fmt: skip
# The settings that most people need.
USUAL = (
    "model", "prompts", "heldout", "n_prompts", "reward", "cost", "audit", "threshold", "n_responses",
    "max_new_tokens", "beta", "iterations", "steps", "out", "seed", "device",
)  # fmt: skip


def print_grouped(prog: str, default: Any, *, everything: bool) -> None:
    """Prints the flags of an algorithm in groups: all of them, or the `USUAL` ones. Raises: SystemExit."""
    import tyro

    config_class = type(default)
    types, docs = get_type_hints(config_class), docstrings(config_class)
    grouped_names = {name for names in GROUPS.values() for name in names}
    # What an algorithm alone has, and nobody has put into a group, is always shown.
    own = tuple(f.name for f in fields(config_class) if f.name not in grouped_names)
    groups = []
    for subject, names in {**GROUPS, "own": own}.items():
        shown = [name for name in names if name in types and (everything or name in (*USUAL, *own))]
        if shown:
            flags = [
                (
                    name,
                    Annotated[types[name], tyro.conf.arg(help=docs[name])],
                    field(default=getattr(default, name)),
                )
                for name in shown
            ]
            group = make_dataclass(subject, flags, frozen=True, kw_only=True)
            groups.append((subject.replace("-", "_"), group, field(default_factory=group)))
    grouped = make_dataclass("Flags", groups, kw_only=True)
    grouped.__doc__ = inspect.getdoc(config_class)
    tyro.cli(tyro.conf.OmitArgPrefixes[grouped], prog=prog, args=["--help"])


def docstrings(config_class: type) -> dict[str, str]:
    """Returns the text under each field of a dataclass, that of the nearest class which has one."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in config_class.__mro__ if c is not object]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for declared, below in zip(body, body[1:], strict=False):
            if isinstance(declared, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[declared.target.id] = " ".join(ast.literal_eval(below.value).split())
    return {f.name: found[f.name] for f in fields(config_class)}
