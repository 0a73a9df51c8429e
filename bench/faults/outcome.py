"""Classifies how a disturbed command ended: clean, refused, wrong, traceback or hang."""

import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench.faults.children import Ended

CLEAN, REFUSED, WRONG, TRACEBACK, HANG = OUTCOMES = ("clean", "refused", "wrong", "traceback", "hang")
BAD = (WRONG, TRACEBACK, HANG)
# What a killed command leaves behind until the next one: a.tmp, .a-PID, .a.PID.tmp, .a-RANDOM.
LEFTOVER = re.compile(r"(^|/)(\.[^/]+-[0-9a-z_]{3,}|[^/]+\.tmp)(/|$)")
# A cure is an instruction, so one of these stands in the line.
CURES = re.compile(
    r"; |\b(use|give|name|choose|remove|make|write|put|leave|raise|lower|go on|start|free|see|run|add|end|"
    r"correct|check|fetch|repair|drop|shorten|fill|quote|save|convert|rename|merge|undo|return|must|wanted|"
    r"needs at least)\b",
    re.IGNORECASE,
)

BAR = re.compile(r"\d+%\|")
Tree = dict[str, bytes | str]


class Outcome(NamedTuple):
    """The outcome of a case."""

    kind: str  # one of OUTCOMES
    detail: str = ""


def tree(folder: Path) -> Tree:
    """Reads everything below a folder: bytes of files, and a word for folders and links. Timing differs
    between equal runs, and is left out."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("timing.jsonl", ".lock"):
            continue
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = _without_seconds(path)
    return found


def _without_seconds(path: Path) -> bytes:
    """Reads a file; the column of seconds in a sweep's table, the last but one, is left out."""
    data = path.read_bytes()
    if path.name == "table.csv":
        return re.sub(rb",[^,\n]*(,[^,\n]*\r?\n)", rb"\1", data)
    if path.name == "index.html":
        return re.sub(rb"<td>[^<]*</td>(<td>[^<]*</td></tr>)", rb"\1", data)
    return data


def differing(found: Tree, oracle: Tree) -> list[str]:
    """Says for each path in which two trees differ how they do."""
    said = []
    for name in sorted(found.keys() | oracle.keys()):
        if name not in found:
            said.append(f"{name} is missing")
        elif name not in oracle:
            said.append(f"{name} is left over" if LEFTOVER.search(name) else f"{name} is new")
        elif found[name] != oracle[name]:
            said.append(f"{name} differs")
    return said


def ending(ended: Ended, names: Iterable[str] = ()) -> Outcome | None:
    """Classifies all endings that need no look at files; None for exit code 0.

    names: a refusal must hold one of these words, if any are given: the value or the file.
    """
    said = ended.err.strip()
    if ended.hung:
        return Outcome(HANG, f"killed after {ended.seconds:.0f} s")
    if "Traceback (most recent call last)" in ended.err + ended.out:
        return Outcome(TRACEBACK, last_line(said))
    if ended.code < 0:
        return Outcome(TRACEBACK, f"died of {signal.Signals(-ended.code).name}")
    if ended.code == 0:
        return None
    if ended.code not in (2, 3):
        return Outcome(TRACEBACK, f"exit code {ended.code}: {last_line(said) or 'without a word'}")
    return _refusal(ended, list(names))


def _refusal(ended: Ended, names: list[str]) -> Outcome:
    """Judges a refusal: one line, which names what is refused and a cure."""
    # The bars of transformers' progress are overwritten, and no lines.
    lines = [line for line in ended.err.strip().splitlines() if not BAR.search(line)]
    if len(lines) != 1:
        return Outcome(WRONG, f"{len(lines)} lines on stderr instead of 1: {' | '.join(lines)[:300]}")
    if names and not any(name in lines[0] for name in names):
        return Outcome(WRONG, f"names none of {', '.join(names)}: {lines[0]}")
    if not CURES.search(lines[0]):
        return Outcome(WRONG, f"names no cure: {lines[0]}")
    return Outcome(REFUSED, lines[0])


def last_line(text: str) -> str:
    """Returns the last line of a text that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:300]


def compared(found: Tree, oracle: Tree) -> Outcome:
    """Classifies a command that went through by what it left: equal bytes are clean."""
    said = differing(found, oracle)
    if not said:
        return Outcome(CLEAN)
    more = f", and {len(said) - 4} more" if len(said) > 4 else ""
    return Outcome(WRONG, "exit 0, but " + ", ".join(said[:4]) + more)


def lost(before: Tree, after: Tree) -> list[str]:
    """Lists the files that a refused command took away or changed; leftovers may go."""
    return [
        name
        for name, content in before.items()
        if not LEFTOVER.search(name) and after.get(name) != content and content != "folder"
    ]
