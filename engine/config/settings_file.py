"""Settings in a file: `--config FILE.yaml`, where FILE may be a run's own config.json."""

from dataclasses import dataclass

from engine.config.yaml_file import compose, line, mapping
from engine.errors import UserError
from engine.files import shown

CURE = "write one setting per line, such as steps: 8"


@dataclass(frozen=True, kw_only=True)
class SettingsFile:
    """What a file of settings says."""

    algorithm: str | None  # None: the file names none
    flags: list[str]  # the settings as words of a command line


def read_settings(file: str) -> SettingsFile:
    """Reads a YAML or JSON file with one mapping from settings to values.

    Settings are named as flags are, with dashes or underscores; `algorithm` may be among them. Values are
    taken as they are written, so that 1e-5 is a number; a setting without a value keeps its default.

    Raises: UserError naming the file and the line: where it cannot be read, names a setting twice, or nests
    values.
    """
    settings = mapping(file, compose(file, cure=CURE), cure=CURE)
    if {"algorithm", "config", "versions"} <= settings.keys():
        algorithm, settings = settings["algorithm"].value, mapping(file, settings["config"], cure=CURE)
    else:
        named = settings.pop("algorithm", None)
        algorithm = None if named is None else str(named.value)
    words = [word for name, node in settings.items() for word in _words(file, name, node)]
    return SettingsFile(algorithm=algorithm, flags=words)


def _words(file: str, name: str, node) -> list[str]:
    """Writes one setting as words of a command line."""
    flag = f"--{name.replace('_', '-')}"
    if node.id == "sequence":
        values = [_scalar(file, name, item) for item in node.value]
        for value in values:
            if value.startswith("--"):
                raise UserError(f"{shown(file)}:{line(node)}: {name}: {value!r} begins as a flag does.")
        return [flag, *values]
    if node.tag.endswith(":null"):
        return []
    if node.tag.endswith(":bool"):
        return [flag if node.value.lower() in ("true", "yes", "on") else f"--no-{flag[2:]}"]
    return [f"{flag}={_scalar(file, name, node)}"]


def _scalar(file: str, name: str, node) -> str:
    if node.id == "mapping" and [key.value for key, _ in node.value] == ["__float__"]:
        return node.value[0][1].value  # an infinite number in a run's config.json
    if node.id != "scalar":
        raise UserError(
            f"{shown(file)}:{line(node)}: {name} holds a {node.id} where one value is wanted; {CURE}."
        )
    return node.value
