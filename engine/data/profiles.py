"""Profiles: sets of prompts, safe and unsafe ones, that a policy is judged on together.

`--profile safety` names the sets that the field reports; `--profile FILE.yaml` lists a user's own.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engine.config.flags import suggest
from engine.config.yaml_file import compose, line, mapping
from engine.data.layouts import layout_of
from engine.data.reading import Rules, Unusable
from engine.errors import UserError
from engine.files import escaped, shown

SAFE, UNSAFE = "safe", "unsafe"
FILES = (".yaml", ".yml", ".json")
CURE = "a profile is a list of sets under the word sets, each with a name and a source"


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """A set of prompts, and which of them are safe ones and unsafe ones.

    >>> PromptSet(name="mine", source="mine.csv", label="type", unsafe=("attack",)).kind_of(
    ...     {"prompt": "Hi", "type": "Attack"}, "mine.csv:2"
    ... )
    'unsafe'
    """

    name: str
    source: str  # a file, a folder of files or a data set, as `engine.data.tables.read_rows` takes it
    prompt: str = Rules.prompt_column  # the column of the prompt; by default that of the row's layout
    label: str = ""  # the column that tells safe prompts from unsafe ones; "" where none does
    safe: tuple[str, ...] = ()  # values of that column, case aside
    unsafe: tuple[str, ...] = ()
    every: str = ""  # "safe" or "unsafe": what all prompts of the set are
    files: str = ""  # what a published set consists of

    def kind_of(self, row: dict, place: str) -> str:
        """Tells whether the prompt of a row is a safe or an unsafe one; "" where the row does not say.

        Raises: Unusable for a missing column, which some rows of a file may lack; UserError for a label that
        is neither text nor a number.
        """
        wanted = [self.label] if self.label else []
        if self.prompt != Rules.prompt_column or layout_of(row) is None:
            wanted.append(self.prompt)
        for column in wanted:
            if column not in row:
                found = escaped(", ".join(map(str, row)))[:300] or "none"
                raise Unusable(
                    f"{place}: no column {column!r}, which the set {self.name} needs; columns found: "
                    f"{found}.",
                    f"without the column {shown(column)}",
                )
        if not self.label:
            return self.every
        value = row[self.label]
        if value is not None and not isinstance(value, str | int | float):
            raise UserError(
                f"{place}: column {self.label!r} holds a {type(value).__name__}; give a text or a number "
                "that tells safe prompts from unsafe ones."
            )
        said = "" if value is None else str(value).strip().casefold()
        kinds = {SAFE: self.safe, UNSAFE: self.unsafe}
        return next((kind for kind, values in kinds.items() if said in map(str.casefold, values)), "")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sets that a policy is judged on together."""

    name: str
    sets: tuple[PromptSet, ...]


SAFETY = Profile(
    name="safety",
    sets=(
        PromptSet(
            name="XSTest",
            source="Paul/XSTest",
            label="label",
            safe=("safe",),
            unsafe=("unsafe",),
            files="xstest_prompts.csv",
        ),
        PromptSet(
            name="BeaverTails-Evaluation",
            source="PKU-Alignment/BeaverTails-Evaluation:test",
            every=UNSAFE,
            files="test.jsonl.xz",
        ),
        PromptSet(
            name="Do-Not-Answer",
            source="LibrAI/do-not-answer",
            prompt="question",
            every=UNSAFE,
            files="its parquet file",
        ),
        # Its labels are of responses: nobody says which of its prompts are safe.
        PromptSet(
            name="PKU-SafeRLHF test",
            source="PKU-Alignment/PKU-SafeRLHF:test",
            files="test.jsonl of each model",
        ),
        PromptSet(
            name="WildGuardTest",
            source="allenai/wildguardmix:wildguardtest:test",
            label="prompt_harm_label",
            safe=("unharmful",),
            unsafe=("harmful",),
            files="wildguard_test.parquet",
        ),
    ),
)


def profile_of(named: str) -> Profile:
    """Returns the profile that --profile names. Raises: UserError."""
    if named == SAFETY.name:
        return SAFETY
    if not named.endswith(FILES):
        raise UserError(
            f"--profile {named}: no profile of that name; give {SAFETY.name}, or a file of your own sets "
            f"whose name ends in .yaml.{suggest(named, [SAFETY.name])}"
        )
    return read_profile(named)


def read_profile(file: str) -> Profile:
    """Reads a YAML file with a list of sets, whose fields are those of `PromptSet`.

    Raises: UserError naming the file and the line.
    """
    found = mapping(file, compose(file, cure=CURE), cure=CURE)
    _check_known(file, found, ["sets"])
    listed = found.get("sets")
    if listed is None or listed.id != "sequence" or not listed.value:
        at = "" if listed is None else f":{line(listed)}"
        raise UserError(f"{shown(file)}{at}: no list of sets; {CURE}.")
    sets: dict[str, PromptSet] = {}
    for node in listed.value:
        one = _set(file, node)
        if one.name in sets:
            raise UserError(f"{shown(file)}:{line(node)}: two sets are named {one.name}; rename one of them.")
        sets[one.name] = one
    return Profile(name=Path(file).stem, sets=tuple(sets.values()))


def _set(file: str, node: Any) -> PromptSet:
    """Reads one set. Raises: UserError."""
    values = mapping(file, node, cure=CURE)
    place = f"{shown(file)}:{line(node)}"
    # `files` is for the message on a published set.
    _check_known(file, values, [f.name for f in fields(PromptSet) if f.name != "files"])
    read = {
        name: (_several if name in (SAFE, UNSAFE) else _one)(f"{shown(file)}:{line(value)}: {name}", value)
        for name, value in values.items()
    }
    for name in ("name", "source"):
        if not read.get(name):
            raise UserError(f"{place}: a set without {name}; {CURE}.")
    one = PromptSet(**read)
    if one.every not in ("", SAFE, UNSAFE):
        raise UserError(f"{place}: every is {one.every!r:.40}; it must be {SAFE} or {UNSAFE}.")
    if bool(one.label) != bool(one.safe or one.unsafe):
        raise UserError(
            f"{place}: label is a column, and safe and unsafe are its values; give one of these two with it."
        )
    if one.label and one.every:
        raise UserError(f"{place}: label and every both say which prompts are safe; leave one out.")
    if both := set(map(str.casefold, one.safe)) & set(map(str.casefold, one.unsafe)):
        raise UserError(f"{place}: {min(both)!r:.40} is both safe and unsafe; leave one out.")
    return one


def _check_known(file: str, nodes: dict[str, Any], known: list[str]) -> None:
    """Refuses a word that no profile has. Raises: UserError."""
    for name, node in nodes.items():
        if name not in known:
            raise UserError(
                f"{shown(file)}:{line(node)}: unknown word {name!r:.40}; known here: {', '.join(known)}."
                f"{suggest(name, known)}"
            )


def _one(what: str, node: Any) -> str:
    if node.id != "scalar" or not node.value.strip() or not node.value.strip().isprintable():
        raise UserError(f"{what} must be one text in one line.")
    return node.value.strip()


def _several(what: str, node: Any) -> tuple[str, ...]:
    items = node.value if node.id == "sequence" else [node]
    return tuple(_one(what, item) for item in items)
