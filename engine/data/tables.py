"""Rows of jsonl, csv and parquet files and of `datasets`."""

import csv
import io
import json
from pathlib import Path

from engine.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".parquet")

# A row with its place, such as "FILE:7", which error messages name.
PlacedRow = tuple[str, dict]


def read_rows(source: str) -> list[PlacedRow]:
    """Reads every row of a file, or of the dataset of that name.

    Raises: UserError where neither can be read.
    """
    path = Path(source)
    return read_file(source) if path.suffix in SUFFIXES or path.is_file() else _read_dataset(source)


def read_file(source: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[PlacedRow]:
    """Reads every row of a file. The cells of a csv file are texts.

    Raises: UserError for a file that is missing, of another kind or malformed.
    """
    path = Path(source)
    if path.suffix not in suffixes:
        raise UserError(f"{source}: not one of {', '.join(suffixes)}; convert it or rename it.")
    if not path.exists():
        raise UserError(f"{source}: no such file; check the path.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{source}: cannot be read ({error.strerror}); check the path and its permissions."
        ) from None
    if path.suffix == ".parquet":
        return _read_parquet(source, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise UserError(f"{source}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8.") from None
    return _read_jsonl(source, text) if path.suffix == ".jsonl" else _read_csv(source, text)


def _read_jsonl(source: str, text: str) -> list[PlacedRow]:
    rows = []
    # splitlines() would also split at U+2028 and the like, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            parsed = isinstance(error, json.JSONDecodeError)
            reason = f"{error.msg}, column {error.colno}" if parsed else "nested too deep"
            raise UserError(
                f"{place}: malformed JSON ({reason}); a jsonl file has one object per line."
            ) from None
        if not isinstance(row, dict):
            raise UserError(f'{place}: a JSON {type(row).__name__}, not an object; write {{"prompt": ...}}.')
        if "\\u" in line:
            check_encodes(json.dumps(row, ensure_ascii=False), place)
        rows.append((place, row))
    return rows


def _read_csv(source: str, text: str) -> list[PlacedRow]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    # A quoted field may span several lines: a row is named by its first one.
    rows, header, line = [], None, 1
    try:
        for fields in reader:
            if fields and header is None:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    raise UserError(
                        f"{source}:{line}: {len(fields)} fields, the header has {len(header)}; "
                        "quote fields with commas."
                    )
                rows.append((f"{source}:{line}", dict(zip(header, fields, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}:{line}: malformed CSV ({error}); check the quotes.") from None
    return rows


def _read_parquet(source: str, data: bytes) -> list[PlacedRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{source}: parquet needs the package pyarrow: pip install pyarrow.") from None
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: not a readable parquet file ({first_line(error)}).") from None
    return [(f"{source} row {number}", row) for number, row in enumerate(rows, 1)]


def _read_dataset(source: str) -> list[PlacedRow]:
    try:
        # Lazy: this import takes seconds.
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: no such file; a dataset of that name needs the package datasets: "
            "pip install datasets."
        ) from None
    try:
        rows = datasets.load_dataset(source, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        kinds = ", ".join(SUFFIXES)
        raise UserError(
            f"{source}: neither a {kinds} file nor a dataset that loads ({first_line(error)})."
        ) from None
    return [(f"{source} row {number}", row) for number, row in enumerate(rows, 1)]


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
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
