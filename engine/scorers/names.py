"""Names of scorers: in messages, tables and files."""

import re

LONGEST = 100  # bytes of a name: it becomes part of a file's


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
