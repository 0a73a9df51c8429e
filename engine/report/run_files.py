"""The files of a run folder that its report shows."""

from dataclasses import dataclass
from pathlib import Path

from engine.config import shown_name
from engine.errors import UserError
from engine.files import is_file, read_json, read_json_lines
from engine.report.drawing import AXIS_UNITS, shortened
from engine.verdict.evaluation import Evaluation

FILES = ("config.json", "metrics.jsonl", "evaluation.json", "heldout.jsonl")
CURE = "resume the run to have the file written again"


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The contents of the files; empty where a file or a kind of row is missing."""

    config: dict  # {"algorithm", "config", "versions"}
    reference: dict  # the metrics row of kind "reference"
    dual: list[dict]  # the rows of this kind, and so on
    step: list[dict]
    policy: list[dict]
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
    def units(self) -> str:
        """The run's --units."""
        return self.config.get("config", {}).get("units", "deviation")

    @property
    def axis_unit(self) -> str:
        """The unit of improvements, for axes."""
        return AXIS_UNITS[self.units]

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
    if not any(is_file(folder / name) for name in FILES):
        raise UserError(
            f"{folder}: no run folder (it has none of {', '.join(FILES)}); "
            "name the folder that engine.train wrote."
        )
    config, metrics, evaluation, heldout = (folder / name for name in FILES)
    rows = _rows(metrics)
    names = ("reference", "dual", "step", "policy", "iteration")
    kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in names}
    return RunFiles(
        config=read_json(config, cure=CURE) if is_file(config) else {},
        reference=kinds["reference"][-1] if kinds["reference"] else {},
        dual=kinds["dual"],
        step=kinds["step"],
        policy=kinds["policy"],
        iteration=kinds["iteration"],
        evaluation=Evaluation.read(evaluation, cure=CURE) if is_file(evaluation) else None,
        heldout=_rows(heldout),
    )


def _rows(path: Path) -> list[dict]:
    """Reads the rows of a jsonl file, none where it is missing."""
    return list(read_json_lines(path, cure=CURE)) if is_file(path) else []
