"""Files of settings in YAML, or in JSON, which is YAML too: nodes, which know their lines."""

from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import one_line, reading, shown


def compose(file: str, *, cure: str) -> Any:
    """Returns the root node of a file, None where the file is empty. `cure` ends the message.

    Raises: UserError where the file cannot be read or is no YAML.
    """
    # Lazy: only those who name such a file need the package.
    import yaml

    try:
        with reading(Path(file), cure=cure):
            return yaml.compose(Path(file).read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        at = "" if mark is None else f":{mark.line + 1}"
        raise UserError(f"{shown(file)}{at}: no YAML ({problem or one_line(error)}); {cure}.") from None


def mapping(file: str, node: Any, *, cure: str) -> dict[str, Any]:
    """Returns the nodes of a mapping by name, with underscores for dashes. Raises: UserError."""
    if node is None:
        return {}
    if not isinstance(node.value, list) or node.id != "mapping":
        raise UserError(f"{shown(file)}:{line(node)}: no mapping from settings to values; {cure}.")
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = str(key.value).replace("-", "_")
        if name in found:
            raise UserError(
                f"{shown(file)}:{line(key)}: the setting {name!r} stands there twice; keep one of them."
            )
        found[name] = value
    return found


def line(node: Any) -> int:
    """Returns the line that a node begins in, counted from 1."""
    return node.start_mark.line + 1
