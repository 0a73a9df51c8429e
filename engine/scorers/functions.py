"""Python functions as scorers."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from engine.errors import UserError
from engine.scorers import guest
from engine.scorers.base import TextScorer

CURE = "give module:function of something Python can import here"


# What a function may take besides prompts and responses, in lists with an entry for each response: the
# messages of the prompt, whether the response ended by itself, and the row that the prompt was read from. A
# run keeps rows only for a function that names them.
KEYWORDS = ("messages", "finished", "row")


def python_function(spec: str) -> TextScorer:
    """Imports module:function, which may be an async function.

    Raises: UserError where there is no such thing, where it is no function that can be called, and where its
    module fails.
    """
    file = str(source_file(spec))
    name = spec.partition(":")[2]
    function = _visit(spec, lambda: getattr(importlib.import_module(_module(spec)), name, None), file)
    if function is None:
        raise UserError(f"scorer {spec}: {file} has no {name}; {CURE}.")
    if not callable(function):
        raise UserError(f"scorer {spec}: a {type(function).__name__}, not a function; {CURE}.")
    if inspect.isasyncgenfunction(function):
        raise UserError(f"scorer {spec}: an async generator; give a function that returns the scores.")
    return TextScorer(name=name, function=function, keywords=_keywords(function))


def _keywords(function: Callable) -> tuple[str, ...]:
    """Returns those of `KEYWORDS` that a function takes; **more takes all but rows."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature
        return ()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named |= {"messages", "finished"}
    return tuple(k for k in KEYWORDS if k in named)


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
