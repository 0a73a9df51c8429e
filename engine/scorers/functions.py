"""Python functions as scorers."""

import importlib

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
