"""The model card of a head."""

import shlex
from dataclasses import fields
from pathlib import Path

from engine.scorers.head_config import HeadConfig


def table(figures: dict[str, dict]) -> str:
    """The figures as a Markdown table."""
    columns = ["rows", "positives", "pair_accuracy", "auc", "accuracy", "calibration_error"]
    columns = [c for c in columns if any(c in f for f in figures.values())]
    lines = ["| held-out rows of | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---|" + "---|" * len(columns)]
    for part, figure in figures.items():
        cells = [f"{figure[c]:.3f}" if isinstance(figure.get(c), float) else str(figure.get(c, "")) for c in columns]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def card(config: HeadConfig, figures: dict, command: str) -> str:
    """The model card in Markdown."""
    trunk = config.model or "SmolLM2-135M-Instruct (Apache-2.0), converted by engine.quickstart"
    sources = ", ".join(f"{source} ({n} rows)" for source, n in figures["rows_by_source"].items())
    bullets = {
        "Data": [*config.licence, f"Training rows after the split: {sources}.", f"{figures['removed_shared_rows']} rows were removed "
                 "because their texts are also in the test rows."],
        "Limits": [*config.limits, "The head is linear, small and made for English; it reads at most "
                   f"{config.max_new_tokens} response tokens.", "It is a scorer for experiments. Do not use it to moderate content, and "
                   "do not take its score for safety or truth."],
    }  # fmt: skip
    sections = {title: "\n".join(f"- {line}" for line in lines) for title, lines in bullets.items()}
    return f"""# {figures["name"]}

{config.about or "A linear score of responses."}
The score is weight . (mean state of the response's tokens after {config.layer} layers) + bias.

- Trunk: {trunk}, fingerprint `{figures["trunk"]}`; the states are read without training it.
- System line in training: "{config.system}"
- Use: as `--reward`, `--cost` or `--audit` of `python -m engine.train` with this trunk.
- Command: `{command}`

## Data

{sections["Data"]}

## Held-out figures

{table(figures["test"])}

Pair accuracy counts pairs in the right order. AUC, accuracy (threshold 0) and expected calibration error (10 bins, the logistic function of
the score against the label) are for labelled rows.

## Limits

{sections["Limits"]}
"""


def command_line(config: HeadConfig) -> str:
    words = ["python", "-m", "engine.train", "head"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in ("about", "licence", "limits"):
            values = (
                [Path(v).name for v in value] if field.name in ("data", "test") else value if isinstance(value, tuple) else [str(value)]
            )
            words += [f"--{field.name.replace('_', '-')}", *values]
    return shlex.join(words)
