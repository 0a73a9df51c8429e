"""The variables of a chat template, as --chat-template-kwargs gives them."""

import json
from collections.abc import Sequence
from typing import Any

from engine.errors import UserError

FLAG = "--chat-template-kwargs"
# JSON in the spelling of Python, which as a text would be true whatever it says.
CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


def template_kwargs(words: Sequence[str]) -> dict[str, Any]:
    """Reads words NAME=VALUE, or one that is a JSON object. A value is JSON, else a text.

    Raises: UserError naming a word that is neither, and a name that is no variable's or is given twice.
    """
    kwargs: dict[str, Any] = {}
    for word in words:
        for name, value in _pairs(word):
            if not name.isidentifier():
                raise UserError(f"{FLAG} {word!r:.60}: {name!r:.40} is no name of a variable; correct it.")
            if name in kwargs:
                raise UserError(f"{FLAG} {word!r:.60}: {name} is given twice; give it once.")
            kwargs[name] = value
    return kwargs


def _pairs(word: str) -> list[tuple[str, Any]]:
    if word.lstrip().startswith("{"):
        try:
            pairs = json.loads(word, object_pairs_hook=_Pairs)
        except ValueError as error:
            raise UserError(f"{FLAG} {word!r:.60}: no JSON object ({error}); correct it.") from None
        return [(name, _plain(value)) for name, value in pairs]
    name, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{FLAG} {word!r:.60}: give NAME=VALUE, or a JSON object.")
    try:
        return [(name, json.loads(value))]
    except ValueError:
        return [(name, CONSTANTS.get(value.lower(), value))]


class _Pairs(list):
    """The pairs of a JSON object, of which a dict would drop all but the last of one name."""


def _plain(value: Any) -> Any:
    """Turns the objects inside a value into dicts."""
    if isinstance(value, _Pairs):
        return {name: _plain(inner) for name, inner in value}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
