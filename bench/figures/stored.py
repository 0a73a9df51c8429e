"""Reads the reference's samples of a run folder."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from engine.config import RunConfig, was_by_preference
from engine.errors import UserError
from engine.records import Scores
from engine.run.contents import read_contents
from engine.run.rows import DualRow, PreferenceRow, ReferenceRow, RowT, read_rows
from engine.run.store import RecordT, Torn, load
from engine.stages.inputs import DEFAULT_MODEL
from engine.stages.preference import log_ratio_units
from engine.stages.reference import ReferenceSamples, units_of


@dataclass(frozen=True)
class Stored:
    """The reference's samples of a run, in the run's units."""

    reward_PG: Tensor
    utility_PGJ: Tensor
    aim_J: Tensor
    beta: float
    says: str  # its name, seed, model and versions


def read_stored(folder: Path) -> Stored:
    """Reads the scores of a run's reference samples: of its scorers, or of its aligned policies
    where it was trained on these.

    Raises: UserError for a folder without samples, or a constraint that the figures do not show.
    """
    contents = read_contents(folder)
    algorithm, values = contents.algorithm, contents.config
    # Older runs lack settings, which had one value then, today's default.
    config = RunConfig(**{f.name: values[f.name] for f in fields(RunConfig) if f.name in values})
    if set(config.cost_on) - {"all"} or min(config.cost_rate, default=1) < 1 or config.cost_worst:
        raise UserError(
            f"{folder}: it has a constraint on one kind of prompts or a rate, which these figures do not "
            "show; give another run."
        )
    if was_by_preference(algorithm, values):
        scores = preference_scores(folder)
        units = log_ratio_units(row(folder, PreferenceRow).log_ratio_sd, scores.audit_PGA.shape[2], config)
        aim = row(folder, DualRow).aim
    else:
        scores = _load(folder, "01-reference.safetensors", ReferenceSamples).samples.scores
        reference = row(folder, ReferenceRow)
        units, aim = units_of(reference, [], config.units), reference.aim
    scores = units.apply(scores)
    versions = json.loads((folder / "config.json").read_text())["versions"]
    shown = ", ".join(f"{name} {value[:12]}" for name, value in sorted(versions.items()))
    model = config.model or DEFAULT_MODEL
    return Stored(
        reward_PG=scores.reward_PG,
        utility_PGJ=scores.utility_PGJ,
        aim_J=torch.tensor(aim, dtype=torch.float64),
        beta=config.beta,
        says=f"`{folder.name}`: {algorithm}, seed {config.seed}, {model}; {shown}",
    )


def preference_scores(folder: Path) -> Scores:
    """Reads the scores of a run on log-ratios, before they are divided by units;
    the run's scorers come first among the audits."""
    return _load(folder, "*-preference-scores.safetensors", Scores)


def _load(folder: Path, pattern: str, cls: type[RecordT]) -> RecordT:
    files = sorted((folder / "stages").glob(pattern))
    if not files:
        raise UserError(
            f"{folder}: it has no samples with scores (stages/{pattern}); give a run whose first stages are "
            "done."
        )
    try:
        return load(files[0], cls)
    except Torn as error:
        raise UserError(f"{error}; give another run.") from error


def row(folder: Path, cls: type[RowT]) -> RowT:
    """Returns the first row of a kind in metrics.jsonl."""
    rows = read_rows(folder, cls)
    if not rows:
        raise UserError(
            f"{folder}: it has no row {cls.KIND!r} in metrics.jsonl; give a run whose first stages are done."
        )
    return rows[0]
