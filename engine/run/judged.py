"""RUN/judged.jsonl: the verdicts on a run, so that the error of all that ever look at a policy, or at a
prompt, is shared among them (`engine.looks`).

Runs that stand in one folder know of one another: a policy that is trained again until it is met on the same
prompts has looked at them again. The runs of a sweep do not: each one's word is its own, and whoever chooses
among them judges the choice on other prompts.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.files import append_line, read_json_lines
from engine.records import Prompts
from engine.run.contents import Contents
from engine.run.folder import RunFolder

# Settings that change nothing of a policy.
BESIDE = ("out", "trackers", "threads", "device", "rollout_rows", "checkpoint_every")
SWEEP = "sweep.json"


@dataclass(frozen=True)
class Attempt:
    """A verdict on a policy, over one or more looks at responses to prompts."""

    policy: str  # tells policies apart: equal runs have equal ones
    prompts: tuple[str, ...]  # a hash of each prompt of all looks
    seed: int  # of the responses

    @staticmethod
    def of(contents: Contents, iterate: int, prompts: Prompts, seed: int) -> "Attempt":
        """Returns the verdict on an iterate of a run; 0 is the reference."""
        config = {key: value for key, value in contents.config.items() if key not in BESIDE}
        told = [contents.algorithm, config, contents.fingerprint, iterate]
        return Attempt(_hash(json.dumps(told, sort_keys=True)), tuple(map(_hash, prompts.text)), seed)

    @cached_property
    def id(self) -> str:
        """Tells verdicts apart: the same prompts, policy and responses are one, however often it is said."""
        return _hash(json.dumps([self.policy, sorted(self.prompts), self.seed]))


def begin(paths: RunFolder, attempt: Attempt, count: int) -> None:
    """Notes a verdict that `count` others came before. Raises: UserError where the file cannot be written."""
    if attempt.id not in _noted([paths.judged]):
        row = {
            "id": attempt.id,
            "policy": attempt.policy,
            "seed": attempt.seed,
            "earlier": count,
            "prompts": list(attempt.prompts),
        }
        append_line(paths.judged, json.dumps(row))


def earlier(paths: RunFolder, attempt: Attempt, own: Attempt | None = None) -> int:
    """Counts the verdicts before this one that judged the same policy, or any of the same prompts.

    own: the run's own verdict, which its stages know of without the file. One that was noted already has the
    number that it had then.
    """
    found = _noted(_files(paths))
    if own is not None and own.id not in found:
        found[own.id] = {"id": own.id, "policy": own.policy, "prompts": list(own.prompts)}
    return int(found[attempt.id].get("earlier", 0)) if attempt.id in found else _sharing(found, attempt)


def _noted(files: Iterable[Path]) -> dict[str, dict]:
    """Reads the verdicts that files hold, by their ids."""
    found: dict[str, dict] = {}
    for file in filter(Path.is_file, files):
        for row in read_json_lines(file, cure="make it readable", skip_damaged=True):
            if {"id", "policy", "prompts"} <= row.keys() and isinstance(row["prompts"], list):
                found.setdefault(row["id"], row)
    return found


def _sharing(found: dict[str, dict], attempt: Attempt) -> int:
    own = set(attempt.prompts)
    return sum(
        row["policy"] == attempt.policy or not own.isdisjoint(row["prompts"]) for row in found.values()
    )


def _files(paths: RunFolder) -> list[Path]:
    folder = paths.path.absolute().parent
    beside = [] if (folder / SWEEP).exists() else sorted(folder.glob(f"*/{paths.judged.name}"))
    return list(dict.fromkeys([paths.judged.absolute(), *beside]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
