"""Reads and checks what the stages of a run have committed, without running it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from engine.config import RunConfig
from engine.errors import UserError
from engine.files import is_file
from engine.ranks import ALONE, Ranks
from engine.run import outputs
from engine.run.contents import Contents, read_contents
from engine.run.folder import RunFolder
from engine.run.rows import IterationRow, PolicyRow, RowT, typed
from engine.run.store import RecordT, Torn, dumps, load, read_whole


@dataclass(frozen=True, kw_only=True)
class Committed:
    """The whole stages of a run, in order: each matches its checksum and follows from the one before it."""

    folder: Path
    contents: Contents
    files: dict[str, Path]  # by the stage's name
    metrics: list[dict]  # the rows of these stages, as they are written
    broken: str  # says which file ends them before the last one; "" where all are whole
    written: list[int]  # iterates that had a noted folder when reading began: each has a stage by now

    @property
    def config(self) -> RunConfig:
        """Returns the settings that runs of all algorithms have."""
        known = {f.name for f in fields(RunConfig)}
        return RunConfig(**{name: value for name, value in self.contents.config.items() if name in known})

    @property
    def iterates(self) -> dict[int, list[float]]:
        """Returns the multipliers that each iterate was trained at, by its number, in order.

        Those past --max-kl were put aside by the run and are left out.
        """
        max_kl = self.contents.config.get("max_kl", math.inf)
        past = {row.iteration for row in self.rows(IterationRow) if row.kl is not None and row.kl > max_kl}
        return {row.iteration: list(row.lam) for row in self.rows(PolicyRow) if row.iteration not in past}

    def rows(self, cls: type[RowT]) -> list[RowT]:
        """Returns the metrics rows of one kind, in order. Raises: UserError where a row lacks a field."""
        return typed(self.metrics, cls, self.folder)

    def one(self, cls: type[RowT]) -> RowT:
        """Returns the first row of a kind. Raises: UserError where there is none yet, or it is damaged."""
        rows = self.rows(cls)
        if not rows:
            raise self.lacks(f"a row of kind {cls.KIND}")
        return rows[0]

    def load(self, stage: str, cls: type[RecordT], ranks: Ranks = ALONE) -> RecordT:
        """Loads the result of a stage, of several ranks on all. Raises: UserError where it has none, or it is
        damaged."""
        if stage not in self.files:
            raise self.lacks(f"stage {stage}")
        try:
            return load(self.files[stage], cls, ranks)
        except (Torn, FileNotFoundError) as error:
            raise UserError(f"{error}; {self._resume()}") from error

    def check_whole(self) -> None:
        """Checks that no stage is damaged, and none is gone whose iterate was written.

        Raises: UserError otherwise, since a later iterate may be missing.
        """
        if self.broken:
            raise self.lacks("")
        trained = {row.iteration for row in self.rows(PolicyRow)}
        if gone := [number for number in self.written if number not in trained]:
            raise UserError(
                f"{self.folder}: the stage that made iterate {gone[-1]} is gone; {self._resume()}"
            )

    def wrote_its_rows(self) -> bool:
        """Tells whether metrics.jsonl holds exactly the rows of these stages."""
        text = "".join(dumps(row) + "\n" for row in self.metrics)
        file = RunFolder(self.folder).metrics
        return is_file(file) and file.read_bytes() == text.encode()

    def lacks(self, what: str) -> UserError:
        """Returns the error that says what is not there, why, and what to do."""
        why = self.broken or f"{self.folder} has no {what} yet"
        return UserError(f"{why}; {self._resume()}")

    def _resume(self) -> str:
        return f"go on with python -m engine.train --resume {self.folder}"


def read_committed(folder: Path) -> Committed:
    """Reads the stages of a run; metrics.jsonl and what else is made from them are not looked at.

    Raises: UserError where there is no run.
    """
    paths, contents = RunFolder(folder), read_contents(folder)
    # A run that goes on meanwhile adds stages, and then the folders of their iterates.
    written = [number for number, path in paths.iterates().items() if outputs.has(paths, path)]
    files, metrics, after, broken = {}, [], contents.inputs, ""
    for number, path in enumerate(_numbered(paths), start=1):
        if path is None:
            broken = f"{paths.stages}: the file of stage {number} is missing"
            break
        try:
            _, content = read_whole(path)
            if (content.get("after"), content.get("fingerprint")) != (after, contents.fingerprint):
                raise Torn(f"{path} does not follow from the stages before it")
            files[content["stage"]] = path
            metrics += content["rows"]
        except (Torn, FileNotFoundError) as error:
            broken = str(error)
            break
        after = content["sha256"]
    return Committed(
        folder=folder, contents=contents, files=files, metrics=metrics, broken=broken, written=written
    )


def _numbered(paths: RunFolder) -> Iterator[Path | None]:
    """Yields the file of each stage from the first to the last that has one; None for one that is missing."""
    found = {
        int(path.name.partition("-")[0]): path
        for path in paths.stages.glob("*-*.safetensors")
        if path.name.partition("-")[0].isdecimal() and ".partial" not in path.name
    }
    for number in range(1, max(found, default=0) + 1):
        yield found.get(number)
