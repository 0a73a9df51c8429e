"""Rows of jsonl, csv and parquet files and of `datasets`."""

import csv
import io
import json
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserError
from engine.files import escaped, one_line, shown

SUFFIXES = (".jsonl", ".csv", ".parquet")

# A row with its place, such as "FILE:7", which error messages name.
PlacedRow = tuple[str, dict]


class DuplicateKey(ValueError):
    """A JSON object gives one key two values, of which a parser would drop one."""


class _DamagedRow(dict):
    """A row with cells that could not be read: they matter only to those who ask for them."""

    def __init__(self, cells: dict, place: str, damaged: dict[str, str]) -> None:
        super().__init__(cells)
        self._place, self._damaged = place, damaged

    def __getitem__(self, column: str) -> object:
        if column in self._damaged:
            raise UserError(
                f"{self._place}: the cell of column {column!r} cannot be read ({self._damaged[column]}); "
                "correct or remove it."
            )
        return super().__getitem__(column)

    def get(self, column: str, default: object = None) -> object:
        return self[column] if column in self else default


def read_rows(source: str) -> list[PlacedRow]:
    """Reads every row of a file, or of the dataset of that name.

    Raises: UserError where neither can be read.
    """
    there = _kind_of_path(source)
    if Path(source).suffix in SUFFIXES or there not in ("folder", "nothing"):
        return read_file(source)
    return _read_dataset(source)


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


def read_file(source: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[PlacedRow]:
    """Reads every row of a file. The cells of a csv file are texts.

    Raises: UserError for a file that is missing, of another kind or malformed.
    """
    path = Path(source)
    if path.suffix not in suffixes:
        raise UserError(f"{shown(source)}: not one of {', '.join(suffixes)}; convert it or rename it.")
    there = _kind_of_path(source)
    if there == "nothing":
        raise UserError(f"{shown(source)}: no such file; check the path.")
    if there == "pipe or device":
        raise UserError(f"{shown(source)}: a pipe or device, which is read once; write the rows to a file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{shown(source)}: cannot be read ({error.strerror}); check the path and its permissions."
        ) from None
    if path.suffix == ".parquet":
        return _read_parquet(source, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise UserError(
            f"{shown(source)}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8."
        ) from None
    return _read_jsonl(source, text) if path.suffix == ".jsonl" else _read_csv(source, text)


def _read_jsonl(source: str, text: str) -> list[PlacedRow]:
    rows = []
    # splitlines() would also split at U+2028 and the like, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{shown(source)}:{number}"
        try:
            row = parse_json(line)
        except DuplicateKey as error:
            raise UserError(f"{place}: {error}; keep one of them.") from None
        except ValueError as error:
            raise UserError(
                f"{place}: malformed JSON ({error}); a jsonl file has one object per line."
            ) from None
        if not isinstance(row, dict):
            raise UserError(f'{place}: a JSON {type(row).__name__}, not an object; write {{"prompt": ...}}.')
        if "\\u" in line:
            check_encodes(json.dumps(row, ensure_ascii=False), place)
        rows.append((place, row))
    return rows


def parse_json(text: str) -> object:
    """Reads a JSON text.

    A whole number of 300 digits or more becomes a float, infinite where it is too large.
    Raises: DuplicateKey; ValueError with a reason of one line.
    """
    try:
        return json.loads(text, parse_int=_whole_number, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def _whole_number(digits: str) -> int | float:
    # Python refuses to read longer ones, and no use of a number here tells them from infinity.
    return int(digits) if len(digits) < 300 else float(digits)


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DuplicateKey(f"the key {_first_twice(key for key, _ in pairs)!r} stands twice in an object")
    return found


def _first_twice(names: Iterable[str]) -> str | None:
    """Returns the first name that stands there more than once, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_columns(source: str, names: Iterable[str]) -> None:
    """Refuses a table in which a name that says something stands over two columns. Raises: UserError."""
    twice = _first_twice(name for name in names if name.strip())
    if twice is not None:
        raise UserError(
            f"{shown(source)}: the column {twice!r} stands there twice; rename or remove one of them."
        )


def _read_csv(source: str, text: str) -> list[PlacedRow]:
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return _csv_rows(source, text)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(source: str, text: str) -> list[PlacedRow]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    # A quoted field may span several lines: a row is named by its first one.
    rows, header, line = [], None, 1
    try:
        for fields in reader:
            if fields and header is None:
                header = fields
                _check_columns(source, header)
            elif fields:
                if len(fields) != len(header):
                    raise UserError(
                        f"{shown(source)}:{line}: {len(fields)} fields, the header has {len(header)}; "
                        "quote fields with commas."
                    )
                rows.append((f"{shown(source)}:{line}", dict(zip(header, fields, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{shown(source)}:{line}: malformed CSV ({error}); check the quotes.") from None
    return rows


def _read_parquet(source: str, data: bytes) -> list[PlacedRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{shown(source)}: parquet needs the package pyarrow: pip install pyarrow.") from None
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), page_checksum_verification=True)
        _check_columns(source, file.schema_arrow.names)
        table = file.read()
    except UserError:
        raise
    # Damaged files end in errors of many kinds, OSError and UnicodeDecodeError among them.
    except Exception as error:
        raise UserError(
            f"{shown(source)}: not a readable parquet file ({first_line(error)}); write or fetch it again."
        ) from None
    damaged: dict[int, dict[str, str]] = {}
    columns = [
        _cells(column, name, damaged) for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    rows = []
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        place, row = f"{shown(source)} row {number}", dict(zip(table.column_names, cells, strict=True))
        rows.append((place, _DamagedRow(row, place, damaged[number]) if number in damaged else row))
    return rows


def _cells(column, name: str, damaged: dict[int, dict[str, str]]) -> list:
    """Returns the values of a parquet column; one that Python has no value for, such as a date after the year
    9999 or text that is no UTF-8, is None and goes to `damaged`: row, counted from 1 -> column -> reason."""
    try:
        return column.to_pylist()
    except Exception:
        values = []
    for number, value in enumerate(column, 1):
        try:
            values.append(value.as_py())
        except Exception as error:
            values.append(None)
            damaged.setdefault(number, {})[name] = first_line(error)
    return values


def _read_dataset(source: str) -> list[PlacedRow]:
    try:
        # Lazy: this import takes seconds.
        import datasets
    except ImportError:
        raise UserError(
            f"{shown(source)}: no such file; a dataset of that name needs the package datasets: "
            "pip install datasets."
        ) from None
    try:
        rows = list(datasets.load_dataset(source, split="train"))
    # A folder can hold anything, and what fails in there is no matter of this program.
    except Exception as error:
        kinds = ", ".join(SUFFIXES)
        raise UserError(
            f"{shown(source)}: neither a {kinds} file nor a dataset that loads ({first_line(error)}); "
            "check the name, or save its rows in such a file."
        ) from None
    return [(f"{shown(source)} row {number}", row) for number, row in enumerate(rows, 1)]


def check_encodes(text: str, place: str) -> None:
    """Refuses half a surrogate pair, which an escape in JSON can write and no tokenizer reads.

    Raises: UserError.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{place}: the text holds half a surrogate pair (\\ud800 to \\udfff alone); remove it."
        ) from None


def first_line(error: Exception) -> str:
    """Shortens an error to the first line of its message, or to its class where it has none."""
    return escaped(one_line(error))[:200]
