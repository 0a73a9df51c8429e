"""Python functions as scorers."""

import importlib.util
import inspect
from pathlib import Path

from engine.errors import UserError
from engine.scorers import guest
from engine.scorers.base import TextFunction

CURE = "give module:function of something Python can import here"


def python_function(spec: str) -> TextFunction:
    """Imports module:function.

    Raises: UserError where there is no such thing, where it is no function that can be called and returns at
    once, and where its module fails.
    """
    file = str(source_file(spec))
    name = spec.partition(":")[2]
    function = _visit(spec, lambda: getattr(importlib.import_module(_module(spec)), name, None), file)
    if function is None:
        raise UserError(f"scorer {spec}: {file} has no {name}; {CURE}.")
    if not callable(function):
        raise UserError(f"scorer {spec}: a {type(function).__name__}, not a function; {CURE}.")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"scorer {spec}: an async function; give one that returns the scores when called.")
    return function


def source_file(spec: str) -> Path:
    """Finds the file of the module of module:function; packages above it are run, the module is not.

    Raises: UserError where Python finds no such module, or one without a file.
    """
    module = _module(spec)
    found = _visit(spec, lambda: _find(module), None)
    if found is None or not found.has_location:
        raise UserError(f"scorer {spec}: No module named {module!r} with a file; {CURE}.")
    return Path(found.origin)


def _find(module: str):
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return None  # a package above it is missing, or is none
        raise


def _visit(spec: str, call, file: str | None):
    return guest.visit(f"scorer {spec}: importing it raised", call, lambda: file)


def _module(spec: str) -> str:
    """Returns the module of module:function. Raises: UserError where one of the two is no name."""
    module, _, name = spec.partition(":")
    if not (all(module.split(".")) and name):
        raise UserError(f"scorer {spec}: no module:function; {CURE}.")
    return module
