"""Python functions as scorers."""

import importlib.util
from pathlib import Path

from engine.errors import UserError
from engine.scorers.base import TextFunction


def python_function(spec: str) -> TextFunction:
    """Imports module:function. Raises: UserError where there is no such thing."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"scorer {spec}: {error}; give module:function of something Python can import here."
        ) from error


def source_file(spec: str) -> Path:
    """Finds the file of the module of module:function, without running the module.

    Raises: UserError where Python finds no such module, or one without a file.
    """
    module = spec.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):  # a package above it is missing, or is none
        found = None
    if found is None or not found.has_location:
        raise UserError(f"scorer {spec}: no file of a module {module!r}; give module:function of a file.")
    return Path(found.origin)
