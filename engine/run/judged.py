"""RUN/judged.jsonl: which prompts have judged a run, so that a second look at a test split is told as one."""

import hashlib
import json

from engine.files import append_line, read_json_lines
from engine.records import Prompts
from engine.run.folder import RunFolder


def note(paths: RunFolder, prompts: Prompts) -> None:
    """Notes that prompts have judged the run. Raises: UserError where the file cannot be written."""
    append_line(paths.judged, json.dumps({"prompts": len(prompts), "sha256": _hash(prompts)}))


def times(paths: RunFolder, prompts: Prompts, own: Prompts) -> int:
    """Counts the final verdicts that these prompts have given on the run.

    own: the prompts of the run's own verdict.
    """
    known = [_hash(own)] if paths.evaluation.is_file() else []
    if paths.judged.is_file():
        rows = read_json_lines(paths.judged, cure="make it readable", skip_damaged=True)
        known += [row.get("sha256") for row in rows]
    return known.count(_hash(prompts))


def _hash(prompts: Prompts) -> str:
    """Hashes a set of prompts, independent of their order."""
    return hashlib.sha256(json.dumps(sorted(prompts.text)).encode()).hexdigest()
