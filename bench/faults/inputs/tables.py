"""Malformed files of data: prompts, pairs, preferences, rows of heads, scores."""

import csv
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.faults.inputs.malformed import Malformed, with_flags
from bench.faults.world import read_lines

GOOD = [{"prompt": f"What is number {i}"} for i in range(12)]
DEEP = "[" * 100_000 + "]" * 100_000


def lines(*rows: object, first: list = GOOD[:11]) -> bytes:
    """Writes rows as JSON lines, behind rows that are good."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in (*first, *rows))


def behind(text: str | bytes) -> bytes:
    """Writes a line of any kind behind rows that are good."""
    return lines() + (text.encode() if isinstance(text, str) else text) + b"\n"


def messages(*turns: object) -> bytes:
    """Writes a row whose prompt is a list of messages."""
    return lines({"prompt": list(turns)})


USER = {"role": "user", "content": "What is a lake"}
REFUSED = {
    "empty": b"", "blank-lines": b"\n\n \n", "no-json": behind("hello"), "cut": lines()[:-9], "list": behind("[1]"),
    "text": behind('"a"'), "number": behind("5"), "null": behind("null"), "no-column": lines({"text": "a"}),
    "empty-object": lines({}), "prompt-null": lines({"prompt": None}), "prompt-number": lines({"prompt": 5}),
    "prompt-true": lines({"prompt": True}), "prompt-empty-list": lines({"prompt": []}),
    "prompt-nested-list": lines({"prompt": [["a"]]}), "prompt-texts": lines({"prompt": ["a", "b"]}),
    "prompt-object": lines({"prompt": {"a": 1}}), "prompt-empty": lines({"prompt": ""}),
    "prompt-space": lines({"prompt": " \t "}), "no-role": messages({"content": "a"}),
    "no-content": messages({"role": "user"}), "content-number": messages({"role": "user", "content": 5}),
    "content-null": messages({"role": "user", "content": None}),
    "content-parts": messages({"role": "user", "content": [{"type": "image"}]}),
    "ends-with-assistant": messages(USER, {"role": "assistant", "content": "water"}),
    "system-alone": messages({"role": "system", "content": "be brief"}),
    "last-turn-empty": messages(USER, {"role": "assistant", "content": "w"}, {"role": "user", "content": " "}),
    "half-surrogate": behind('{"prompt": "a \\ud800 b"}'), "same-twice": lines(GOOD[0]),
    "half-surrogate-role": behind('{"prompt": [{"role": "us\\udc00er", "content": "a"}]}'),
    "duplicate-keys": behind('{"prompt": "one of two", "prompt": "two of two"}'),
    "huge-integer-prompt": behind('{"prompt": ' + "9" * 5000 + "}"),
    "deep": behind('{"prompt": ' + DEEP + "}"), "kind-number": lines({"prompt": "a b", "kind": 5}),
    "kind-list": lines({"prompt": "a b", "kind": ["x"]}), "too-long": lines({"prompt": "word " * 3000}),
    "latin-1": behind('{"prompt": "caf\u00e9"}'.encode("latin-1")), "utf-16": lines().decode().encode("utf-16"),
    "zeros": bytes(1000), "gzip": b"\x1f\x8b\x08\x00" + bytes(range(256)), "one-row": lines(first=GOOD[:1]),
    "two-objects-a-line": behind('{"prompt": "a"} {"prompt": "b"}'), "nan": behind('{"prompt": NaN}'),
    "messages-cut": lines({"prompt": '[{"role": "user", "content": "abc"'}),
    "messages-of-python": lines({"prompt": "[{'role': 'assistant', 'content': 'abc'}]"}),
    "one-object": lines({"prompt": {"role": "user"}}), "array-file": json.dumps(GOOD).encode(),
}  # fmt: skip
ACCEPTED = {
    "bom": b"\xef\xbb\xbf" + lines(GOOD[11]), "huge-integer-elsewhere": behind('{"prompt": "a b", "id": ' + "9" * 5000 + "}"),
    "infinite-elsewhere": behind('{"prompt": "a b", "x": 1e400}'), "nul": lines({"prompt": "a \0 b"}),
    "unknown-role": messages({"role": "poet", "content": "a"}, USER), "emoji": lines({"prompt": "\U0001f600" * 20}),
    "bracket": lines({"prompt": "[1, 2, 3"}), "long-number-in-bracket": lines({"prompt": "[" + "9" * 5000 + "]"}),
    "special-token": lines({"prompt": "a <|im_end|> b"}), "carriage-return": lines(GOOD[11]).replace(b"\n", b"\r\n"),
    "line-separator": lines({"prompt": "a \u2028 b"}), "right-to-left": lines({"prompt": "\u202e abc"}),
    "bytes-elsewhere": behind(b'{"prompt": "a b", "raw": "\xff\xfe"}'),
    "one-message-object": lines({"prompt": USER}),
    "messages-in-python": lines({"prompt": "[{'role': 'user', 'content': 'abc'}]"}),
    "megabyte-elsewhere": lines({"prompt": "a b", "x": "y" * 2_000_000}),
}  # fmt: skip
CSV_REFUSED = {
    "empty": b"", "header-alone": b"prompt\n", "no-header": b"1,2\n3,4\n", "open-quote": b'prompt\n"abc\nd\n',
    "many-fields": b"prompt\na,b\n", "few-fields": b"prompt,kind\na\n", "two-columns": b"prompt,prompt\na,b\nc,d\n",
    "empty-cell": b"prompt,kind\n,x\na,y\nb,z\n", "latin-1": "prompt\ncaf\u00e9\n".encode("latin-1"),
    "quote-inside": b'prompt\na"b"c"\n"d"e\n', "zeros": bytes(500),
}  # fmt: skip


def cases() -> Iterator[Malformed]:
    """Lists malformed files of prompts, then cells of every kind of file."""
    for flag in ("--prompts", "--heldout"):
        for name, data in REFUSED.items():
            if flag == "--heldout" and name in ("same-twice", "one-row", "too-long"):
                continue
            yield _file(flag, "jsonl", name, data)
        for name, data in ACCEPTED.items():
            yield _file(flag, "jsonl", name, data, accepts=True)
        for name, data in CSV_REFUSED.items():
            yield _file(flag, "csv", name, data)
    huge = f"prompt,kind\n{'word ' * 30000},x\n".encode()
    yield _file("--prompts", "csv", "huge-cell", huge)
    yield from _parquet()
    yield from _odd_files()
    yield from _cells()


def _file(flag: str, suffix: str, name: str, data: bytes, accepts: bool = False) -> Malformed:
    file = f"bad.{suffix}"
    words = with_flags(flag, file)
    shown = f"{flag[2:]}-{suffix}/{name}"
    return Malformed(shown, words, lambda work: (work / file).write_bytes(data), (file, flag), accepts)


def parquet(columns: dict[str, list], **options) -> bytes:
    """Returns the bytes of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, **options)
    return sink.getvalue()


def _parquet() -> Iterator[Malformed]:
    """Lists malformed parquet files."""
    texts = [row["prompt"] for row in GOOD]
    whole = parquet({"prompt": texts})

    def file(name: str, data: bytes, accepts: bool = False) -> Malformed:
        return _file("--prompts", "parquet", name, data, accepts)

    yield file("empty", b"")
    yield file("cut", whole[: len(whole) // 2])
    yield file("text", lines())
    yield file("no-column", parquet({"text": texts}))
    yield file("no-rows", parquet({"prompt": []}))
    yield file("null", parquet({"prompt": [*texts, None]}))
    yield file("numbers", parquet({"prompt": list(range(12))}))
    yield file("bytes", parquet({"prompt": [text.encode() for text in texts]}), accepts=True)
    yield file("structs", parquet({"prompt": [{"a": 1}] * 12}))
    yield file("two-kinds", parquet({"prompt": texts, "kind": list(range(12))}))
    import pyarrow

    far = pyarrow.array([2**60] * 12, pyarrow.timestamp("us"))
    yield file("far-dates", parquet({"prompt": texts, "day": far}), accepts=True)
    raw = pyarrow.array([b"\xff\xfe"] * 12, pyarrow.binary())
    invalid = pyarrow.Array.from_buffers(pyarrow.string(), 12, raw.buffers())
    yield file("invalid-text-elsewhere", parquet({"prompt": texts, "raw": invalid}), accepts=True)
    yield file("invalid-text", parquet({"prompt": invalid}))
    rng = random.Random(0)
    for k in range(12):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        # A flip may fall into a text, which parquet keeps no checksum of.
        yield file(f"bit-{k}", bytes(changed), accepts=True)


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
            yield Malformed(
                f"odd-files/{flag.strip('-')}/{name}", words(path), write, (path[:60], flag, "odd")
            )


def _script(folder: Path) -> None:
    """Writes a data set's folder with a script, which is never run."""
    folder.mkdir()
    (folder / "loader.py").write_text("raise SystemExit(0)\n")


HEAD = ("engine.train", "head", "--model", "model", "--layer", "2", "--out", "trained")
DUAL = ("--cost", "harm", "--threshold", "0.1", "--draws", "40", "--out", "dual")
SOURCES: dict[str, Callable[[str], tuple[str, ...]]] = {
    "--prompts": lambda path: with_flags("--prompts", path),
    "--heldout": lambda path: with_flags("--heldout", path),
    "--pairs": lambda path: with_flags("--pairs", path),
    "--preferences": lambda path: ("engine.train", "pecan", *with_flags("--preferences", path)[2:]),
    "--data": lambda path: (*HEAD, "--data", path),
    "scores": lambda path: ("engine.dual", path, *DUAL),
    "--export-pairs": lambda path: ("engine.dual", "scores.jsonl", *DUAL, "--export-pairs", path),
}
CELLS = {
    "null": "null", "five": "5", "true": "true", "empty": '""', "space": '"  "', "list": "[]", "object": "{}",
    "infinite": "1e400", "nan": "NaN", "half-surrogate": '"\\ud83d"', "huge-integer": "7" * 5000, "deep": DEEP,
    "text": '"yes"',
}  # fmt: skip
# What is fine in a column, beside the good value.
FINE = {
    ("prompts", "prompt"): {"text"},
    ("pairs", "prompt"): {"text"},
    ("pairs", "response_0"): {"text", "empty", "space"},
    ("pairs", "response_1"): {"text", "empty", "space"},
    ("preferences", "prompt"): {"text"},
    ("preferences", "response_0"): {"text", "empty", "space"},
    ("preferences", "response_1"): {"text", "empty", "space"},
    ("head", "prompt"): {"text", "empty", "null", "space"},
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
        columns = columns or {
            "pairs": ("prompt", "response_0", "response_1"), "scores": ("prompt", "response", "reward", "harm"),
            "preferences": ("prompt", "response_0", "response_1", "reward", "harm"),
        }[file]  # fmt: skip
        words = SOURCES[FLAG_OF.get(file, "scores")](f"{file}.jsonl")
        for column in columns:
            for name, cell in (CELLS | {"missing": ""}).items():
                fine = name in FINE.get((file, column), set()) or (file, column, name) == (
                    "scores",
                    "response",
                    "missing",
                )
                yield Malformed(
                    f"cells/{file}/{column}/{name}", words,
                    lambda work, f=file, c=column, x=cell: _put(work / f"{f}.jsonl", c, x), (f"{file}.jsonl",), fine,
                )  # fmt: skip


def _put(path: Path, column: str, cell: str) -> None:
    """Puts a cell, as JSON text, into the third row; an empty text leaves the column out."""
    rows = read_lines(path)
    third = {key: json.dumps(value) for key, value in rows[2].items()}
    third[column] = cell
    text = ", ".join(f'"{key}": {value}' for key, value in third.items() if value)
    written = [json.dumps(row) for row in rows]
    written[2] = f"{{{text}}}"
    path.write_text("\n".join(written) + "\n")


def as_csv(rows: list[dict]) -> str:
    """Writes rows as csv."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()
