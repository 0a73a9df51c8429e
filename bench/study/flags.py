"""Flags of engine.train, as words of a command and by name."""

import re
from collections.abc import Sequence
from pathlib import Path

Flags = dict[str, tuple[str, ...]]  # name -> its values


def options(flags: Sequence[str]) -> Flags:
    """Returns the values of each flag. --threads is left out: it belongs to the machine,
    and stands with the versions."""
    by_name: Flags = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            by_name[name] = (value,) if equals else ()
        else:
            by_name[name] += (word,)
    return {name: values for name, values in by_name.items() if name != "--threads"}


def words(flags: Flags) -> list[str]:
    """Returns the words of flags, the inverse of `options`."""
    return [word for name, values in flags.items() for word in (name, *values)]


def shown(flags: Sequence[str]) -> list[str]:
    """Returns flags with the last name only of absolute paths, also of those behind NAME=."""
    return [re.sub("(^|=-?)(/.+)", lambda match: match[1] + Path(match[2]).name, flag) for flag in flags]
