"""Rows of a file, one after another: jsonl, json, csv and parquet, each also as .gz and .xz."""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.errors import UserError
from engine.files import escaped, one_line, shown

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}

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


def format_of(name: str | Path) -> str:
    """Tells the format of a file from its name, such as ".jsonl" of a.jsonl.gz; "" where it tells none."""
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in FORMATS else ""


def rows_of(source: str) -> Iterator[PlacedRow]:
    """Yields the rows of a file whose name tells its format. The cells of a csv file are texts.

    Raises: UserError for a file that cannot be read, or is malformed.
    """
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[format_of(source)]
    with _named(source):
        yield from reader(source)


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Turns what an unreadable or damaged file raises into one line."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(
            f"{shown(source)}: damaged, or not compressed as its name says ({first_line(error)}); fetch it "
            "again, or rename it."
        ) from None
    except OSError as error:
        raise UserError(
            f"{shown(source)}: cannot be read ({error.strerror}); check the path and its permissions."
        ) from None


def _open(source: str) -> BinaryIO:
    opener = COMPRESSED.get(Path(source).suffix)
    return opener(source, "rb") if opener else open(source, "rb")


def _lines(source: str, newline: str) -> Iterator[str]:
    """Yields the lines of a text file without its byte order mark. Raises: UserError where it is no UTF-8."""
    with io.TextIOWrapper(
        _open(source), encoding="utf-8-sig", errors="surrogateescape", newline=newline
    ) as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                # This is how the decoder passes on a byte that it could not decode.
                byte = ord(line[error.start]) - 0xDC00
                raise UserError(
                    f"{shown(source)}:{number}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8."
                ) from None
            yield line


def _jsonl(source: str) -> Iterator[PlacedRow]:
    # Lines end at \n alone: JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(_lines(source, "\n"), 1):
        if not line.strip():
            continue
        place = f"{shown(source)}:{number}"
        try:
            row = parse_json(line.removesuffix("\n"))
        except DuplicateKey as error:
            raise UserError(f"{place}: {error}; keep one of them.") from None
        except ValueError as error:
            raise UserError(
                f"{place}: malformed JSON ({error}); a jsonl file has one object per line."
            ) from None
        yield place, _checked(row, place, escapes="\\u" in line)


def _json(source: str) -> Iterator[PlacedRow]:
    """Yields the objects of a list, or of the only list of objects in an object; the file is read whole.

    Many files of this name hold an object per line: they are read as jsonl.
    """
    text = "".join(_lines(source, "\n"))
    try:
        content = parse_json(text)
    except DuplicateKey as error:
        raise UserError(f"{shown(source)}: {error}; keep one of them.") from None
    except ValueError as error:
        if str(error).startswith("Extra data"):
            yield from _jsonl(source)
            return
        raise UserError(
            f"{shown(source)}: malformed JSON ({error}); a json file is a list of objects."
        ) from None
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if _is_table(value)}
        if len(lists) != 1:
            found = f"{len(lists)} lists of objects ({', '.join(lists)})" if lists else "no list of objects"
            raise UserError(
                f"{shown(source)}: an object with {escaped(found)[:200]}; write one list of objects."
            )
        (content,) = lists.values()
    if not isinstance(content, list):
        raise UserError(
            f"{shown(source)}: a JSON {type(content).__name__}, not a list of objects; write one."
        )
    escapes = "\\u" in text
    for number, row in enumerate(content, 1):
        place = f"{shown(source)} row {number}"
        yield place, _checked(row, place, escapes=escapes)


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _checked(row: object, place: str, *, escapes: bool) -> dict:
    """Returns a row of JSON that is an object of encodable text. Raises: UserError."""
    if not isinstance(row, dict):
        raise UserError(f'{place}: a JSON {type(row).__name__}, not an object; write {{"prompt": ...}}.')
    if escapes:
        check_encodes(json.dumps(row, ensure_ascii=False), place)
    return row


def parse_json(text: str) -> object:
    """Reads a JSON text.

    A whole number of 300 digits or more becomes a float, infinite where it is too large.
    Raises: DuplicateKey; ValueError with a reason of one line.
    """
    try:
        return json.loads(text, parse_int=_whole_number, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise ValueError(f"{error.msg}, {line}column {error.colno}") from None
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


def _csv(source: str) -> Iterator[PlacedRow]:
    # The limit of a field's length belongs to the process, so it is put back.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield from _csv_rows(source)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(source: str) -> Iterator[PlacedRow]:
    reader = csv.reader(_lines(source, ""), strict=True)
    # A quoted field may span several lines: a row is named by its first one.
    header, line = None, 1
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
                yield f"{shown(source)}:{line}", dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{shown(source)}:{line}: malformed CSV ({error}); check the quotes.") from None


def _parquet(source: str) -> Iterator[PlacedRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{shown(source)}: parquet needs the package pyarrow: pip install pyarrow.") from None
    first = 1
    with _open(source) as opened:
        # Parquet is read from its end, to where a compressed stream cannot jump.
        content = pyarrow.BufferReader(opened.read()) if Path(source).suffix in COMPRESSED else opened
        try:
            file = pyarrow.parquet.ParquetFile(content, page_checksum_verification=True)
            _check_columns(source, file.schema_arrow.names)
            for batch in file.iter_batches():
                yield from _batch_rows(source, batch, first)
                first += batch.num_rows
        except UserError:
            raise
        # Damaged files end in errors of many kinds, OSError and UnicodeDecodeError among them.
        except Exception as error:
            raise UserError(
                f"{shown(source)}: not a readable parquet file ({first_line(error)}); write or fetch it "
                "again."
            ) from None


def _batch_rows(source: str, batch, first: int) -> Iterator[PlacedRow]:
    damaged: dict[int, dict[str, str]] = {}
    columns = [
        _cells(column, name, damaged) for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        place = f"{shown(source)} row {first + number - 1}"
        row = dict(zip(batch.schema.names, cells, strict=True))
        yield place, _DamagedRow(row, place, damaged[number]) if number in damaged else row


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
