"""Paths that lead to no file, and bad cells of files: prompts, pairs, preferences, rows of heads, scores."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.faults.inputs.malformed import Malformed, with_flags
from bench.faults.inputs.tables import DEEP
from bench.faults.world import read_lines


def cases() -> Iterator[Malformed]:
    """Lists both for every flag that takes a file of data."""
    yield from _odd_files()
    yield from _cells()


def _odd_files() -> Iterator[Malformed]:
    """Lists what is no file of data at all, for every flag that takes one."""
    odd: dict[str, tuple[str, Callable[[Path], object]]] = {
        "missing": ("no-such.jsonl", lambda work: None),
        "folder": ("odd.jsonl", lambda work: (work / "odd.jsonl").mkdir()),
        "pipe": ("odd.jsonl", lambda work: os.mkfifo(work / "odd.jsonl")),
        "link-loop": ("odd.jsonl", lambda work: (work / "odd.jsonl").symlink_to("odd.jsonl")),
        "broken-link": ("odd.jsonl", lambda work: (work / "odd.jsonl").symlink_to("nowhere")),
        "long-name": ("n" * 300 + ".jsonl", lambda work: None),
        "text-file": ("odd.txt", lambda work: (work / "odd.txt").write_text("a\n")),
        "no-suffix": ("odd", lambda work: (work / "odd").write_text("a\n")),
        "below-a-file": ("prompts.jsonl/x.jsonl", lambda work: None),
        "null-device": (os.devnull, lambda work: None),
        "root": ("/", lambda work: None),
        "dot": (".", lambda work: None),
        "script-folder": ("loader", lambda work: _script(work / "loader")),
        "hub-id": ("nobody/nothing", lambda work: None),
        "odd-bytes": ("odd\udcff.jsonl", lambda work: None),
    }
    for name, (path, write) in odd.items():
        for flag, words in SOURCES.items():
            # A file of pairs is written, so its name may be new.
            fine = flag == "--export-pairs" and name in ("missing", "broken-link", "odd-bytes")
            shown = f"odd-files/{flag.strip('-')}/{name}"
            yield Malformed(shown, words(path), write, (path[:60], flag, "odd"), fine)


def _script(folder: Path) -> None:
    """Writes a data set's folder with a script, which is never run."""
    folder.mkdir()
    (folder / "loader.py").write_text("raise SystemExit(0)\n")


HEAD = ("engine.train", "head", "--model", "model", "--layer", "2", "--out", "trained")
DUAL = ("--cost", "harm", "--threshold", "0.1", "--out", "dual")
SOURCES: dict[str, Callable[[str], tuple[str, ...]]] = {
    "--prompts": lambda path: with_flags("--prompts", path, "--strict"),
    "--heldout": lambda path: with_flags("--heldout", path, "--strict"),
    "--pairs": lambda path: with_flags("--pairs", path, "--strict"),
    "--preferences": lambda path: (
        "engine.train",
        "pecan",
        *with_flags("--preferences", path, "--strict")[2:],
    ),
    "--data": lambda path: (*HEAD, "--strict", "--data", path),
    "scores": lambda path: ("engine.dual", path, *DUAL),
    "--export-pairs": lambda path: ("engine.dual", "scores.jsonl", *DUAL, "--export-pairs", path),
}
CELLS = {
    "null": "null",
    "five": "5",
    "true": "true",
    "empty": '""',
    "space": '"  "',
    "list": "[]",
    "object": "{}",
    "infinite": "1e400",
    "nan": "NaN",
    "half-surrogate": '"\\ud83d"',
    "huge-integer": "7" * 5000,
    "deep": DEEP,
    "text": '"yes"',
}
# What is fine in a column, beside the good value.
FINE = {
    ("prompts", "prompt"): {"text"},
    ("pairs", "prompt"): {"text"},
    ("pairs", "response_0"): {"text", "empty", "space"},
    ("pairs", "response_1"): {"text", "empty", "space"},
    ("preferences", "prompt"): {"text"},
    ("preferences", "response_0"): {"text", "empty", "space"},
    ("preferences", "response_1"): {"text", "empty", "space"},
    # No prompt: a list is empty in a column of messages as a text is in one of texts.
    ("head", "prompt"): {"text", "empty", "null", "space", "list"},
    ("head", "chosen"): {"text"},
    ("head", "rejected"): {"text"},
    ("scores", "prompt"): {"text", "empty", "space", "five", "half-surrogate"},
    ("scores", "response"): {*CELLS},
    ("scores", "reward"): {"five"},
    ("scores", "harm"): {"five"},
}
FLAG_OF = {"prompts": "--prompts", "pairs": "--pairs", "preferences": "--preferences", "head": "--data"}


def _cells() -> Iterator[Malformed]:
    """Lists one bad cell in every column of every kind of file, and a column that is missing."""
    for file in ("prompts", "pairs", "preferences", "head", "scores"):
        columns = {"prompts": ("prompt",), "head": ("prompt", "chosen", "rejected")}.get(file)
        columns = (
            columns
            or {
                "pairs": ("prompt", "response_0", "response_1"),
                "scores": ("prompt", "response", "reward", "harm"),
                "preferences": ("prompt", "response_0", "response_1", "reward", "harm"),
            }[file]
        )
        words = SOURCES[FLAG_OF.get(file, "scores")](f"{file}.jsonl")
        for column in columns:
            for name, cell in (CELLS | {"missing": ""}).items():
                fine = name in FINE.get((file, column), set()) or (file, column, name) == (
                    "scores",
                    "response",
                    "missing",
                )
                yield Malformed(
                    f"cells/{file}/{column}/{name}",
                    words,
                    lambda work, f=file, c=column, x=cell: _put(work / f"{f}.jsonl", c, x),
                    (f"{file}.jsonl",),
                    fine,
                )


def _put(path: Path, column: str, cell: str) -> None:
    """Puts a cell, as JSON text, into the third row; an empty text leaves the column out."""
    rows = read_lines(path)
    third = {key: json.dumps(value) for key, value in rows[2].items()}
    third[column] = cell
    text = ", ".join(f'"{key}": {value}' for key, value in third.items() if value)
    written = [json.dumps(row) for row in rows]
    written[2] = f"{{{text}}}"
    path.write_text("\n".join(written) + "\n")
