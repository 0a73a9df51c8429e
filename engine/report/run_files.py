"""The files of a run folder that its report shows."""

import json
from dataclasses import dataclass
from pathlib import Path

from engine.config import shown_name
from engine.errors import UserError
from engine.report.drawing import shortened
from engine.verdict.evaluation import Evaluation

FILES = ("config.json", "metrics.jsonl", "evaluation.json", "heldout.jsonl")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The contents of the files; empty where a file or a kind of row is missing."""

    config: dict  # {"algorithm", "config", "versions"}
    reference: dict  # the metrics row of kind "reference"
    dual: list[dict]  # the rows of this kind, and so on
    step: list[dict]
    iteration: list[dict]
    evaluation: Evaluation | None
    heldout: list[dict]  # a row for each prompt and response

    @property
    def names(self) -> list[str]:
        """The names of the constraints, from the first file that has them."""
        if self.evaluation is not None:
            return [c.name for c in self.evaluation.constraints]
        return list(self.reference.get("names") or self.config.get("config", {}).get("cost") or [])

    @property
    def title(self) -> str:
        """The algorithm and the model, as a headline."""
        algorithm = shown_name(str(self.config.get("algorithm") or "run"))
        model = str(self.config.get("config", {}).get("model") or "the default model")
        return f"{algorithm[0].upper()}{algorithm[1:]} on {shortened(model, 80)}"


def read(folder: Path) -> RunFiles:
    """Reads the files of a run folder.

    Raises: UserError where the folder has none of them, or one cannot be read as JSON.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise UserError(
            f"{folder}: no run folder (it has none of {', '.join(FILES)}); "
            "name the folder that engine.train wrote."
        )
    metrics = _json_lines(folder / "metrics.jsonl")
    names = ("reference", "dual", "step", "iteration")
    kinds = {kind: [row for row in metrics if row.get("kind") == kind] for kind in names}
    evaluation = _json(folder / "evaluation.json")
    return RunFiles(
        config=_json(folder / "config.json") or {},
        reference=kinds["reference"][-1] if kinds["reference"] else {},
        dual=kinds["dual"],
        step=kinds["step"],
        iteration=kinds["iteration"],
        evaluation=Evaluation.from_dict(evaluation) if evaluation else None,
        heldout=_json_lines(folder / "heldout.jsonl"),
    )


def _json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete the file or run again.") from None


def _json_lines(path: Path) -> list[dict]:
    """Reads the rows of a jsonl file; a last line that a stopped run has cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise UserError(f"{path}: line {i + 1} is not JSON ({error}); delete that line.") from None
    return rows
