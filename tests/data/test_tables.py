"""From a name to rows: every format, compressed and not, folders and their splits, names of data sets."""

import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest

from engine.data.tables import files_of, read_rows
from engine.errors import UserError

ROWS = [{"prompt": "Über, \u2028 two\nlines", "kind": "x"}, {"prompt": '"Quoted"', "kind": ""}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def put(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(source) -> list[str]:
    return [row["prompt"] for _, row in read_rows(str(source))]


def refusal(source) -> str:
    with pytest.raises(UserError) as error:
        list(read_rows(str(source)))
    assert "\n" not in str(error.value)
    return str(error.value)


def as_parquet(path: Path) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=1)
    return path.read_bytes()


@pytest.mark.parametrize("packed", PACK)
def test_every_format_gives_the_same_rows_compressed_or_not(tmp_path, packed):
    contents = {
        "p.jsonl": LINES,
        "list.json": json.dumps(ROWS, indent=1),
        "object.json": json.dumps({"version": 2, "names": ["a"], "none": [], "data": ROWS}),
        "lines.json": LINES,
        "p.csv": 'prompt,kind\r\n"Über, \u2028 two\nlines",x\r\n"""Quoted""",\r\n',
        "mark.jsonl": "\ufeff" + LINES.replace("\n", "\r\n") + "\r\n",
        "p.parquet": as_parquet(tmp_path / "whole.parquet"),
    }
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else content.encode()
        file = put(tmp_path / (name + packed), PACK[packed](data))
        assert [row for _, row in read_rows(file)] == ROWS, name
        first = next(read_rows(file))[0]
        by_line = "json" in name and not name.startswith(("list", "object"))
        place = {"p.csv": f"{file}:2"}.get(name, f"{file}:1" if by_line else f"{file} row 1")
        assert first == place


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', ": an object with 2 lists of objects (a, b);"),
        ("p.json", '{"prompt": {"0": "a"}}', ": an object with no list of objects;"),
        ("p.json", '"a"', ": a JSON str, not a list of objects;"),
        ("p.json", '["a"]', " row 1: a JSON str, not an object;"),
        ("p.json", '[{"prompt": "a"},\n {"prompt": "b"', ": malformed JSON ("),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', ": the key 'prompt' stands twice"),
        ("p.json", '[{"prompt": "a"}, {"prompt": "\\ud800"}]', " row 2: the text holds half a surrogate"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"', ":2: malformed JSON"),
        ("p.json", b'["\xff"]', ":1: byte 0xff is not UTF-8"),
        ("p.jsonl.gz", LINES, ": damaged, or not compressed as its name says (Not a gzipped file"),
        ("p.jsonl.xz", LINES, ": damaged, or not compressed as its name says ("),
        ("p.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-40], ": damaged, or not compressed"),
        ("p.csv.xz", lzma.compress(b"prompt\n" + bytes(range(65, 91)) * 999)[:-40], ": damaged, or not"),
        ("p.parquet.gz", gzip.compress(b"PAR1", mtime=0), ": not a readable parquet file"),
        ("p.jsonl.zip", LINES, ": not one of .jsonl, .json, .csv, .parquet, also with .gz or .xz behind;"),
        ("p.gz", gzip.compress(LINES.encode(), mtime=0), ": not one of .jsonl"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, says):
    file = put(tmp_path / name, content)
    assert refusal(file).startswith(f"{file}{says}")


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    """A file of any length is not held: rows come before its end is known to be damaged."""
    for name, rest in (("p.jsonl", "{"), ("p.csv", "a,b,c\n")):
        start = "prompt\n" + "a\n" * 9 if name == "p.csv" else '{"prompt": "a"}\n' * 9
        rows = read_rows(put(tmp_path / name, start + rest))
        assert [next(rows)[1]["prompt"] for _ in range(9)] == ["a"] * 9
        with pytest.raises(UserError, match=r":1[01]: "):
            next(rows)


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "many"
    for name in (
        "b.jsonl",
        "a.csv",
        "sub/c.json.gz",
        ".hidden.jsonl",
        ".git/d.jsonl",
        "notes.txt",
        "LICENSE",
    ):
        row = {"prompt": name}
        text = f"prompt\n{name}\n" if name.endswith("csv") else json.dumps([row] if ".json." in name else row)
        put(folder / name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    assert texts(folder) == ["a.csv", "b.jsonl", "sub/c.json.gz"]
    assert files_of(str(folder)) == [folder / name for name in ("a.csv", "b.jsonl", "sub/c.json.gz")]
    places = [place for place, _ in read_rows(str(folder))]
    assert places == [f"{folder}/a.csv:2", f"{folder}/b.jsonl:1", f"{folder}/sub/c.json.gz row 1"]
    assert f"{folder}: no file's name tells that it is of the split test; try {folder}." in refusal(
        f"{folder}:test"
    )


def test_a_folder_has_the_splits_that_its_files_names_tell(tmp_path):
    folder = tmp_path / "set"
    names = (
        "data/train-0.jsonl",
        "data/train-1.jsonl",
        "helpful-base-test.jsonl",
        "val.jsonl",
        "latest.jsonl",
    )
    for name in names:
        put(folder / name, json.dumps({"prompt": name}))
    # A test set is no training data, and a file that tells nothing is of no split.
    assert texts(folder) == texts(f"{folder}:train") == list(names[:2])
    assert texts(f"{folder}:test") == [names[2]] and texts(f"{folder}:validation") == [names[3]]
    assert f"try {folder}:test, {folder}:train, {folder}:validation." in refusal(f"{folder}:round1")
    for name in names[:2]:
        (folder / name).unlink()
    assert f"{folder}: no file's name tells that it is of the split train; try" in refusal(folder)
    assert "a file has no splits; leave :test out" in refusal(f"{folder}/val.jsonl:test")
    odd = put(tmp_path / "a:test.jsonl", '{"prompt": "colon"}')
    assert texts(odd) == ["colon"]


def test_names_of_data_sets_have_splits_and_configurations(tmp_path, monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(*names: str, split: str):
            asked.append((*names, split))
            yield from ({"prompt": "a"}, {"prompt": "b"})
            raise ConnectionError("the hub went away\nlong story")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    carded = tmp_path / "carded"
    put(carded / "README.md", "---\nlicense: mit\nconfigs:\n- config_name: x\n---\n")
    put(carded / "train.jsonl", '{"prompt": "not this way"}')
    names = {
        "o/n": ("o/n", "train"),
        "o/n:test": ("o/n", "test"),
        "o/n:c-1:test": ("o/n", "c-1", "test"),
        "hf://datasets/o/n": ("hf://datasets/o/n", "train"),
        f"{carded}": (str(carded), "train"),
        f"{carded}:x:test": (str(carded), "x", "test"),
    }
    for source in names:
        rows = read_rows(source)
        assert next(rows) == (f"{source} row 1", {"prompt": "a"}) and next(rows)[0] == f"{source} row 2"
        assert f"{source}: neither a" in refusal(source) and "(the hub went away)" in refusal(source)
        assert files_of(source) is None
    assert list(dict.fromkeys(asked)) == list(names.values())


def test_a_folder_is_read_as_datasets_reads_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {i}"} for i in range(3)]
        put(folder / f"round0/{split}.jsonl.xz", lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    for split in ("train", "test"):
        theirs = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
        assert texts(f"{folder}:{split}") == theirs["prompt"][:]
