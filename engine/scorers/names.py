"""Names of scorers: in messages, tables and files; and how a model is named as one."""

import re
from pathlib import Path
from typing import NamedTuple

LONGEST = 100  # bytes of a name: it becomes part of a file's
_MODEL = re.compile(r"(?P<path>[^#]+?)(?:#(?P<label>[^@]*))?(?:@(?P<recipe>[\w:.-]+))?", re.DOTALL)


class ModelSpec(NamedTuple):
    """A model as a scorer, MODEL[#LABEL][@RECIPE]."""

    path: str  # a folder or hub id
    label: str = ""
    recipe: str = ""

    @staticmethod
    def of(spec: str) -> "ModelSpec":
        """Reads a scorer's value; a folder of that whole name comes first."""
        found = None if Path(spec).is_dir() else _MODEL.fullmatch(spec)
        return ModelSpec(**found.groupdict(default="")) if found else ModelSpec(spec)

    def __str__(self) -> str:
        label, recipe = f"#{self.label}" if self.label else "", f"@{self.recipe}" if self.recipe else ""
        return f"{self.path}{label}{recipe}"


def is_name(name: object) -> bool:
    """Tells whether something can name a scorer: a short text in one line."""
    return (
        type(name) is str
        and name.isprintable()
        and name == name.strip()
        and 0 < len(name.encode()) <= LONGEST
    )


def stage_name(kind: str, number: int, name: str) -> str:
    """Names the stage of a run that is about scorer `number`: KIND/NAME, where the name can be a file's.

    For other names, such as harm.v2, and for "scores", a stage of its own, it is KIND/NUMBER/NAME with every
    other character replaced.
    """
    safe = re.sub(r"[^\w-]", "_", name)
    return f"{kind}/{name}" if safe == name != "scores" else f"{kind}/{number}/{safe}"
