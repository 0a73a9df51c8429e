"""From a name to rows: of a file, of a folder of files, or of a data set that `datasets` knows.

NAME:SPLIT and NAME:CONFIG:SPLIT name a split, by default train, of a folder or a data set.
"""

import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engine.data.formats import COMPRESSED, FORMATS, PlacedRow, first_line, format_of, rows_of
from engine.errors import UserError
from engine.files import shown

# Words in the names of files and folders that tell of a split, each with the name of the split.
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluate": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
DEFAULT_SPLIT = "train"
DEEPEST = 3  # folders below a folder of data, as in NAME/data/MODEL/train.jsonl


class NotFound(UserError):
    """A source that names no file, no split of a folder, and no data set that can be loaded."""


class _Named(NamedTuple):
    """What a source names; config and split are empty where it does not say."""

    name: str
    config: str
    split: str


def read_rows(source: str) -> Iterator[PlacedRow]:
    """Yields every row of what a source names, one after another.

    Raises: UserError where it cannot be read.
    """
    files = files_of(source)
    if files is None:
        yield from _dataset_rows(source)
        return
    for file in files:
        yield from read_file(str(file))


def files_of(source: str) -> list[Path] | None:
    """Lists the files that a source names, those of a folder in the order of their names; None for a data set
    that `datasets` is to find.

    Raises: UserError for a file or folder that cannot be read, and for a split that a folder does not have.
    """
    named = _parsed(source)
    there = _kind_of_path(named.name)
    if format_of(named.name) or there not in ("folder", "nothing"):
        if named.split:
            raise UserError(
                f"{shown(source)}: a file has no splits; leave :{source[len(named.name) + 1 :]} out."
            )
        return [Path(named.name)]
    if there == "nothing":
        return None
    return _files_below(Path(named.name), named)


def _parsed(source: str) -> _Named:
    """Parts NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; a colon in the name of what is there stays."""
    for n in range(3):
        name, *rest = source.rsplit(":", n)
        if _kind_of_path(name) != "nothing":
            break
    if any("/" in part for part in rest):  # as in hf://datasets/NAME
        return _Named(source, "", "")
    config, split = ["", "", *rest][-2:]
    return _Named(name, config, split)


def _files_below(folder: Path, named: _Named) -> list[Path] | None:
    """Lists the files of a split in a folder and below; None for a folder that `datasets` is to read: one
    whose card lists its files, and one that holds none of the formats.

    A configuration is of the files whose paths have its letters and digits next to each other, as
    test/wildguard_test.parquet has those of wildguardtest.
    """
    card, split = folder / "README.md", named.split
    if card.is_file() and re.search(r"^(configs|dataset_info):", _start_of(card), re.MULTILINE):
        return None
    files = sorted(_data_files(folder))
    if named.config and files:
        wanted = _bare(named.config)
        files = [file for file in files if wanted in _bare(str(file.relative_to(folder)))]
        if not files:
            raise NotFound(
                f"{shown(folder)}: no file's path tells that it is of the configuration {named.config}; "
                f"leave it out, as in {shown(folder)}:{split}."
            )
    splits: dict[str, list[Path]] = {}
    for file in files:
        if told := _split_of(file.relative_to(folder)):
            splits.setdefault(told, []).append(file)
    wanted = SPLITS.get(split, split) or DEFAULT_SPLIT
    if not files or (not splits and not split):
        return files or None
    if wanted not in splits:
        there = ", ".join(f"{shown(folder)}:{name}" for name in sorted(splits)) or shown(folder)
        raise NotFound(
            f"{shown(folder)}: no file's name tells that it is of the split {wanted}; try {there}."
        )
    return splits[wanted]


def _bare(text: str) -> str:
    """Returns the letters and digits of a text, in lower case."""
    return "".join(re.findall(r"[a-z0-9]+", text.lower()))


def _data_files(folder: Path) -> Iterator[Path]:
    """Yields the files of the known formats in a folder and `DEEPEST` below, hidden ones left out."""
    for name, below, files in os.walk(folder):
        deep = len(Path(name).relative_to(folder).parts)
        below[:] = [part for part in below if not part.startswith(".") and deep < DEEPEST]
        yield from (Path(name, file) for file in files if format_of(file) and not file.startswith("."))


def _split_of(path: Path) -> str:
    """Tells the split that a path's last word of that kind names; "" where there is none."""
    words = re.findall(r"[a-z]+", str(path).lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")


def _start_of(card: Path) -> str:
    try:
        with open(card, encoding="utf-8", errors="replace") as file:
            return file.read(100_000)
    except OSError:
        return ""


def _kind_of_path(source: str) -> str:
    """Tells what stands at a path: "file", "folder", "nothing" or "pipe or device". Raises: UserError."""
    try:
        mode = Path(source).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{shown(source)}: cannot be read ({reason}); check the path and its permissions."
        ) from None
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "pipe or device"


def read_file(source: str, formats: tuple[str, ...] = FORMATS) -> Iterator[PlacedRow]:
    """Yields every row of a file. The cells of a csv file are texts.

    Raises: UserError for a file that is missing, of another kind or malformed.
    """
    if format_of(source) not in formats:
        raise UserError(
            f"{shown(source)}: not one of {', '.join(formats)}, also with {' or '.join(COMPRESSED)} behind; "
            "convert it or rename it."
        )
    there = _kind_of_path(source)
    if there == "nothing":
        raise NotFound(f"{shown(source)}: no such file; check the path.")
    if there == "pipe or device":
        raise UserError(f"{shown(source)}: a pipe or device, which is read once; write the rows to a file.")
    yield from rows_of(source)


def _dataset_rows(source: str) -> Iterator[PlacedRow]:
    try:
        # Lazy: this import takes seconds.
        import datasets
    except ImportError:
        raise NotFound(
            f"{shown(source)}: no such file; a dataset of that name needs the package datasets: "
            "pip install datasets."
        ) from None
    named = _parsed(source)
    number = 0
    try:
        config = (named.config,) if named.config else ()
        with _hub_warnings_off():
            rows = datasets.load_dataset(named.name, *config, split=named.split or DEFAULT_SPLIT)
        for row in rows:
            number += 1
            yield f"{shown(source)} row {number}", row
    # A folder can hold anything, and what fails in there is no matter of this program.
    except Exception as error:
        kinds = ", ".join(FORMATS)
        raise (UserError if number else NotFound)(
            f"{shown(source)}: neither a {kinds} file nor a dataset that loads ({first_line(error)}); "
            "check the name, or save its rows in such a file."
        ) from None


@contextmanager
def _hub_warnings_off() -> Iterator[None]:
    """Keeps off stderr what the hub's client says of every attempt to reach it: the last one's error is said
    in one line."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
