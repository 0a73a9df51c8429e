"""What judges behind HTTP have answered: in memory, and in RUN/judge-cache.jsonl once there is a run.

A line is {"key": SHA-256 of what was asked of whom, "score": the number}. So a resumed run asks nothing
twice, and gets the same numbers from a judge that would answer otherwise today.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from engine.files import append_line, is_file, move_aside, read_json_lines
from engine.ranks import Ranks


def key_of(*asked: Any) -> str:
    """Hashes what is asked of whom."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Answers:
    """Keeps one score per key."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}
        self._new: dict[str, float] = {}  # since `share_out`
        self._file: Path | None = None

    def get(self, key: str) -> float | None:
        """Returns a score; None where nothing is known."""
        return self._known.get(key)

    def put(self, key: str, score: float) -> None:
        """Keeps a score. Raises: NotWritten."""
        self._known[key] = self._new[key] = score
        if self._file is not None:
            _append(self._file, key, score)

    def share_out(self, ranks: Ranks) -> None:
        """Gives all ranks the scores that each has got since the last call. Raises: NotWritten."""
        every = ranks.gather(self._new)
        for key, score in (item for theirs in every for item in theirs.items()):
            if key not in self._known:
                self.put(key, score)
        self._new = {}

    def keep_in(self, file: Path, *, read_only: bool = False) -> None:
        """Goes on with what a file holds, and keeps all answers there, unless it is only to be read.

        Lines that a killed process has cut, and those that hold anything else, are left out.
        Raises: NotWritten; UserError where the file cannot be read.
        """
        move_aside(file)
        stored = {}
        if is_file(file):
            for row in read_json_lines(file, cure="make it readable", skip_damaged=True):
                key, score = row.get("key"), row.get("score")
                if type(key) is str and type(score) is float and math.isfinite(score):
                    stored[key] = score
        new = {key: score for key, score in self._known.items() if key not in stored}
        self._known |= stored
        if not read_only:
            self._file = file
            for key, score in new.items():
                _append(file, key, score)


def _append(file: Path, key: str, score: float) -> None:
    append_line(file, json.dumps({"key": key, "score": score}))
