"""From a command line to a config dataclass. Every flag is checked first,
so that a mistake costs one line."""

import difflib
import os
import shutil
from collections.abc import Callable, Iterable
from typing import TypeVar, get_type_hints

from engine.config.help import print_grouped
from engine.errors import UserError

ConfigT = TypeVar("ConfigT")
NARROWEST = 40  # columns of the help


def parse_flags(
    default: ConfigT,
    flags: list[str],
    *,
    prog: str,
    usage: str,
    first: str,
    others: tuple[str, ...] = (),
    grouped: bool = False,
) -> ConfigT | None:
    """Returns `default` with `flags` on top, or prints the help where it is asked for and returns None.

    usage: stands above the flags in the help. first: names what stands before the flags; others: flags that
    are no fields. These two are for messages only. grouped: the help shows the usual flags by subject, and
    all of them with --help-all; see `engine.config.help`.
    Raises: UserError for an unknown flag, a stray word, or a value of the wrong type.
    """
    everything = grouped and "--help-all" in flags
    if everything or "--help" in flags or "-h" in flags:
        print(usage)
        if grouped:
            _in_columns(lambda: print_grouped(prog, default, everything=everything))
        else:
            _in_columns(lambda: _print_flags(prog, default))
        return None
    _check(flags, type(default), first, others)

    import tyro

    return tyro.cli(type(default), prog=prog, args=flags, default=default)


def _print_flags(prog: str, default: object) -> None:
    import tyro

    tyro.cli(type(default), prog=prog, args=["--help"], default=default)


def _in_columns(print_help: Callable[[], None]) -> None:
    """Prints a help in 40 columns at least: tyro never ends in a terminal of a few."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(shutil.get_terminal_size().columns, NARROWEST))
    try:
        print_help()
    except SystemExit:
        pass
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def take(flags: list[str], name: str) -> tuple[list[str], str | None]:
    """Takes `name VALUE` or `name=VALUE` out of `flags`; returns the rest and the value,
    None where it is absent."""
    rest, value, words = [], None, iter(flags)
    for word in words:
        if word.startswith(f"{name}="):
            value = word.partition("=")[2]
        elif word == name:
            value = next(words, "")
        else:
            rest.append(word)
            continue
        if not value or value.startswith("--"):
            raise UserError(f"{name}: a value is missing; see --help.")
    return rest, value


def _check(flags: list[str], config_class: type, first: str, others: tuple[str, ...]) -> None:
    """Refuses the first flag or value that cannot be used, in one line and with a suggestion."""
    types = get_type_hints(config_class)
    accepted = {f"--{name.replace('_', '-')}": kind for name, kind in types.items()}
    switches = {
        switch for flag, kind in accepted.items() if kind is bool for switch in (flag, f"--no-{flag[2:]}")
    }
    given: list[tuple[str, list[str]]] = []
    for word in flags:
        # A single dash starts a negative number, not a flag.
        if word.startswith("--") or (word.startswith("-") and not _is(float, word)):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in accepted and flag not in switches:
                nearest = suggest(flag, [*accepted, *sorted(switches), *others])
                raise UserError(f"unknown flag {flag}.{nearest} See --help.")
            given.append((flag, [value] if equals else []))
        elif not given:
            raise UserError(f"unexpected word {word!r}; the {first} comes first, then flags; see --help.")
        else:
            given[-1][1].append(word)
    for number, (flag, values) in enumerate(given):
        kind = accepted.get(flag, bool)
        if kind is bool and values:
            raise UserError(f"{flag} {' '.join(values)}: takes no value; write {flag} alone.")
        if kind in (int, float, str) and len(values) != 1:
            raise UserError(f"{flag} {' '.join(values) or 'without a value'}: takes one value; see --help.")
        several = getattr(kind, "__origin__", None) is tuple
        if several and flag in [other for other, _ in given[:number]]:
            raise UserError(f"{flag} is given twice; give it once, with all its values.")
        element = kind.__args__[0] if several else kind
        for value in values:
            if element in (int, float) and not _is(element, value):
                raise UserError(f"{flag} {value}: must be a {'whole ' if element is int else ''}number.")


def names_of(flags: Iterable[str]) -> list[str]:
    """Lists the names of the fields that flags set."""
    return [
        flag.partition("=")[0][2:].removeprefix("no-").replace("-", "_")
        for flag in flags
        if flag.startswith("--")
    ]


def parted(flags: list[str], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Parts the words of a command line into the flags that set one of these fields, with their values, and
    all others."""
    own, others = [], []
    to = others
    for word in flags:
        if word.startswith("--"):
            to = own if names_of([word])[0] in names else others
        to.append(word)
    return own, others


def suggest(word: str, accepted: list[str]) -> str:
    """Suggests the nearest of the accepted words, as ` Did you mean ...?`;
    an empty text where none is near."""
    near = difflib.get_close_matches(word, accepted, 1)
    return f" Did you mean {near[0]}?" if near else ""


def _is(kind: type, text: str) -> bool:
    """Tells whether a text can be read as a value of this type."""
    try:
        kind(text)
    except ValueError:
        return False
    return True
