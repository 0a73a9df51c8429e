"""Whole smoke runs: their flags, and the files that they leave and read."""

import json
from pathlib import Path

import torch

from engine.records import Prompts
from engine.run.rows import Row
from engine.run.run import Run, Stage
from engine.stages.run_inputs import RunInputs

SMOKE = ["--preset", "smoke", "--threads", "1"]


def files(folder: Path) -> dict[str, bytes]:
    """Reads every file of a run but its lock and its times; returns the bytes by relative path."""
    kept = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "timing.jsonl")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_run(
    folder: Path, algorithm: str, settings: dict, stages: dict[str, list[Row]], versions: dict | None = None
) -> None:
    """Writes a run folder, made from no prompts, whose stages logged these rows and have nothing else."""
    none = Prompts(text=[], kind=[], token_ids=[], key_P=torch.zeros(0, dtype=torch.int64))
    record = RunInputs(
        train=none,
        heldout=none,
        pairs=None,
        preferences=None,
        reading=[],
        began="",
        sources={},
        model={"model.safetensors": "1" * 64},
        scorers={},
    )

    def log(stage: Stage, rows: list[Row]) -> dict:
        for row in rows:
            stage.log(row)
        return {}

    with Run.create(
        folder, algorithm, settings, versions=versions or {}, fingerprint="f", inputs=record
    ) as run:
        for name, rows in stages.items():
            run.stage(name, dict, lambda stage, rows=rows: log(stage, rows))
