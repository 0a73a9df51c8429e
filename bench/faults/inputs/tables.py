"""Malformed files of prompts."""

import io
import json
import random
from collections.abc import Iterator

from bench.faults.inputs.malformed import Malformed, with_flags

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
    "empty": b"",
    "blank-lines": b"\n\n \n",
    "no-json": behind("hello"),
    "cut": lines()[:-9],
    "list": behind("[1]"),
    "text": behind('"a"'),
    "number": behind("5"),
    "null": behind("null"),
    "no-column": lines({"text": "a"}),
    "empty-object": lines({}),
    "prompt-null": lines({"prompt": None}),
    "prompt-number": lines({"prompt": 5}),
    "prompt-true": lines({"prompt": True}),
    "prompt-empty-list": lines({"prompt": []}),
    "prompt-nested-list": lines({"prompt": [["a"]]}),
    "prompt-texts": lines({"prompt": ["a", "b"]}),
    "prompt-object": lines({"prompt": {"a": 1}}),
    "prompt-empty": lines({"prompt": ""}),
    "prompt-space": lines({"prompt": " \t "}),
    "no-role": messages({"content": "a"}),
    "no-content": messages({"role": "user"}),
    "content-number": messages({"role": "user", "content": 5}),
    "content-null": messages({"role": "user", "content": None}),
    "content-parts": messages({"role": "user", "content": [{"type": "image"}]}),
    "ends-with-assistant": messages(USER, {"role": "assistant", "content": "water"}),
    "system-alone": messages({"role": "system", "content": "be brief"}),
    "last-turn-empty": messages(
        USER, {"role": "assistant", "content": "w"}, {"role": "user", "content": " "}
    ),
    "half-surrogate": behind('{"prompt": "a \\ud800 b"}'),
    "same-twice": lines(GOOD[0]),
    "half-surrogate-role": behind('{"prompt": [{"role": "us\\udc00er", "content": "a"}]}'),
    "duplicate-keys": behind('{"prompt": "one of two", "prompt": "two of two"}'),
    "huge-integer-prompt": behind('{"prompt": ' + "9" * 5000 + "}"),
    "deep": behind('{"prompt": ' + DEEP + "}"),
    "kind-number": lines({"prompt": "a b", "kind": 5}),
    "kind-list": lines({"prompt": "a b", "kind": ["x"]}),
    "too-long": lines({"prompt": "word " * 3000}),
    "latin-1": behind('{"prompt": "caf\u00e9"}'.encode("latin-1")),
    "utf-16": lines().decode().encode("utf-16"),
    "zeros": bytes(1000),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(range(256)),
    "one-row": lines(first=GOOD[:1]),
    "two-objects-a-line": behind('{"prompt": "a"} {"prompt": "b"}'),
    "nan": behind('{"prompt": NaN}'),
    "messages-cut": lines({"prompt": '[{"role": "user", "content": "abc"'}),
    "messages-of-python": lines({"prompt": "[{'role': 'assistant', 'content': 'abc'}]"}),
    "one-object": lines({"prompt": {"role": "user"}}),
    "array-file": json.dumps(GOOD).encode(),
}
ACCEPTED = {
    "bom": b"\xef\xbb\xbf" + lines(GOOD[11]),
    "huge-integer-elsewhere": behind('{"prompt": "a b", "id": ' + "9" * 5000 + "}"),
    "infinite-elsewhere": behind('{"prompt": "a b", "x": 1e400}'),
    "nul": lines({"prompt": "a \0 b"}),
    "unknown-role": messages({"role": "poet", "content": "a"}, USER),
    "emoji": lines({"prompt": "\U0001f600" * 20}),
    "bracket": lines({"prompt": "[1, 2, 3"}),
    "long-number-in-bracket": lines({"prompt": "[" + "9" * 5000 + "]"}),
    "special-token": lines({"prompt": "a <|im_end|> b"}),
    "carriage-return": lines(GOOD[11]).replace(b"\n", b"\r\n"),
    "line-separator": lines({"prompt": "a \u2028 b"}),
    "right-to-left": lines({"prompt": "\u202e abc"}),
    "bytes-elsewhere": behind(b'{"prompt": "a b", "raw": "\xff\xfe"}'),
    "one-message-object": lines({"prompt": USER}),
    "messages-in-python": lines({"prompt": "[{'role': 'user', 'content': 'abc'}]"}),
    "megabyte-elsewhere": lines({"prompt": "a b", "x": "y" * 2_000_000}),
}
CSV_REFUSED = {
    "empty": b"",
    "header-alone": b"prompt\n",
    "no-header": b"1,2\n3,4\n",
    "open-quote": b'prompt\n"abc\nd\n',
    "many-fields": b"prompt\na,b\n",
    "few-fields": b"prompt,kind\na\n",
    "two-columns": b"prompt,prompt\na,b\nc,d\n",
    "empty-cell": b"prompt,kind\n,x\na,y\nb,z\n",
    "latin-1": "prompt\ncaf\u00e9\n".encode("latin-1"),
    "quote-inside": b'prompt\na"b"c"\n"d"e\n',
    "zeros": bytes(500),
}


def cases() -> Iterator[Malformed]:
    """Lists malformed files of prompts."""
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


def _file(flag: str, suffix: str, name: str, data: bytes, accepts: bool = False) -> Malformed:
    file = f"bad.{suffix}"
    # Without --strict some of these rows are left out, and counted.
    words = with_flags(flag, file, "--strict")
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
