"""engine.files: JSON that is refused with its place, lines cut by a killed process,
folders that appear whole."""

import pytest

from engine.errors import UserError
from engine.files import read_json, read_json_lines, whole_folder, write_json


def test_json_comes_back_and_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [None, "x"]})
    assert read_json(path, cure="fetch it again") == {"a": [None, "x"], "b": 1}
    for content, says in (
        ("{", "not valid JSON"),
        ("[1]", "a JSON list, not an object"),
        ("[" * 100_000, "not valid"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=f"a.json: {says}.*; fetch it again.$"):
            read_json(path, cure="fetch it again")
    with pytest.raises(UserError, match="missing.json: not valid JSON"):
        read_json(tmp_path / "missing.json", cure="fetch it again")


def test_a_line_cut_by_a_killed_process_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\u2028"}\n{"a": ', encoding="utf-8")
    assert list(read_json_lines(path, cure="resume")) == [{"a": 1}, {"a": "\u2028"}]
    path.write_text('{"a": 1}\n{"a": {"a": 2}\n{"a": 3}\n')
    with pytest.raises(UserError, match="a.jsonl: line 2 is not JSON .*; resume.$"):
        list(read_json_lines(path, cure="resume"))
    assert list(read_json_lines(path, cure="resume", skip_damaged=True)) == [{"a": 1}, {"a": 3}]
    path.write_text("3\n")
    with pytest.raises(UserError, match="line 1 is a JSON int, not an object; resume.$"):
        list(read_json_lines(path, cure="resume"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "parent" / "out"
    with whole_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="--out .*out: cannot be made"), whole_folder(out):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "out", "parent"]
