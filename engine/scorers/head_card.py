"""The model card of a head."""

import shlex
from dataclasses import fields
from pathlib import Path

from engine.scorers.head_config import HeadConfig

EXPLANATION = (
    "Pair accuracy counts pairs in the right order. AUC, accuracy (threshold 0) and expected calibration "
    "error (10 bins, the logistic function of\nthe score against the label) are for labelled rows."
)


def model_card(config: HeadConfig, figures: dict, command: str) -> str:
    """Writes the model card in Markdown; figures: the content of metrics.json."""
    trunk = config.model or "SmolLM2-135M-Instruct (Apache-2.0), converted by engine.quickstart"
    sources = ", ".join(f"{source} ({n} rows)" for source, n in figures["rows_by_source"].items())
    data = [
        *config.licence,
        f"Training rows after the split: {sources}.",
        f"{figures['removed_shared_rows']} rows were removed because their texts are also in the test rows.",
    ]
    limits = [
        *config.limits,
        "The head is linear, small and made for English; "
        f"it reads at most {config.max_new_tokens} response tokens.",
        "It is a scorer for experiments. Do not use it to moderate content, "
        "and do not take its score for safety or truth.",
    ]
    return f"""# {figures["name"]}

{config.about or "A linear score of responses."}
The score is weight . (mean state of the response's tokens after {config.layer} layers) + bias.

- Trunk: {trunk}, fingerprint `{figures["trunk"]}`; the states are read without training it.
- System line in training: "{config.system}"
- Use: as `--reward`, `--cost` or `--audit` of `python -m engine.train` with this trunk.
- Command: `{command}`

## Data

{_bullets(data)}

## Held-out figures

{figures_table(figures["test"])}

{EXPLANATION}

## Limits

{_bullets(limits)}
"""


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def figures_table(figures: dict[str, dict]) -> str:
    """Writes the held-out figures of each part of the rows as a Markdown table."""
    columns = ["rows", "positives", "pair_accuracy", "auc", "accuracy", "calibration_error"]
    columns = [c for c in columns if any(c in figure for figure in figures.values())]
    titles = [column.replace("_", " ") for column in columns]
    lines = ["| held-out rows of | " + " | ".join(titles) + " |", "|---|" + "---|" * len(columns)]
    for part, figure in figures.items():
        values = [figure.get(column, "") for column in columns]
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command_line(config: HeadConfig) -> str:
    """Writes the command that trains this head, without the card's texts and the folders of data files."""
    words = ["python", "-m", "engine.train", "head"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in ("about", "licence", "limits"):
            continue
        values = value if isinstance(value, tuple) else [str(value)]
        if field.name in ("data", "test"):
            values = [Path(file).name for file in values]
        words += [f"--{field.name.replace('_', '-')}", *values]
    return shlex.join(words)
