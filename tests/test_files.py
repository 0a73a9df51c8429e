"""engine.files: JSON that is refused with its place, lines cut by a killed process,
folders that appear whole."""

import errno
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest

from engine.errors import NotWritten, UserError
from engine.files import (
    append_line,
    is_file,
    is_folder,
    is_there,
    read_json,
    read_json_lines,
    whole_files,
    whole_folder,
    write_json,
)


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
    with pytest.raises(UserError, match="missing.json: does not exist; fetch it again.$"):
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


def test_a_taken_name_becomes_the_next_free_one(tmp_path):
    out = tmp_path / "evaluation-1"

    def otherwise():
        nonlocal out
        out = tmp_path / "evaluation-2"
        return out

    with whole_folder(out, otherwise=otherwise) as folder:
        (folder / "mine").write_text("x")
        out.mkdir()
        (out / "theirs").write_text("y")
    assert (tmp_path / "evaluation-1" / "theirs").read_text() == "y"
    assert (out / "mine").read_text() == "x" and out.name == "evaluation-2"


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path):
    (tmp_path / ".evaluation-1-7").mkdir()
    (tmp_path / ".evaluation-1-7" / "half").write_text("x")
    (tmp_path / ".evaluation-1-x").mkdir()  # not one of ours
    (tmp_path / ".export-7").mkdir()  # left by another command
    with whole_folder(tmp_path / "evaluation-2", otherwise=Path) as living:
        assert sorted(p.name for p in tmp_path.iterdir()) == [".evaluation-1-x", living.name, ".export-7"]
        with whole_folder(tmp_path / "evaluation-2", otherwise=lambda: tmp_path / "evaluation-3") as other:
            assert living.is_dir() and other != living
    with whole_folder(tmp_path / "export"):
        assert not (tmp_path / ".export-7").exists()
    assert not list(tmp_path.glob(".evaluation-2*")) and (tmp_path / "export").is_dir()


def test_a_line_is_appended_below_a_cut_one_and_taken_back_where_it_does_not_fit(tmp_path, monkeypatch):
    path = tmp_path / "judged.jsonl"
    append_line(path, '{"a": 1}')
    with open(path, "ab") as file:
        file.write(b'{"a": ')
    append_line(path, '{"a": 2}')
    assert path.read_bytes() == b'{"a": 1}\n{"a": \n{"a": 2}\n'
    assert list(read_json_lines(path, cure="", skip_damaged=True)) == [{"a": 1}, {"a": 2}]
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal, so the write fails after 3 bytes of 9.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(NotWritten, match="judged.jsonl .File too large.; raise the limit"):
            append_line(path, '{"a": 3}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_lines_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / "judged.jsonl"
    line = json.dumps({"text": "x" * 3000})
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            for _ in range(50):
                append_line(path, line)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert path.read_text() == f"{line}\n" * 150


READ_ERRORS = {
    "missing": (lambda p: None, "does not exist"),
    "a folder": (lambda p: p.mkdir(), "cannot be read .Is a directory."),
    "a link in a circle": (lambda p: p.symlink_to(p), "cannot be read .Too many levels of symbolic links."),
    "no UTF-8": (lambda p: p.write_bytes(b'{"a": "\xff"}'), "not UTF-8 text .byte 7."),
    "cut": (lambda p: p.write_text('{"a": '), "not valid JSON .Expecting value"),
    "empty": (lambda p: p.write_text(""), "not valid JSON .Expecting value"),
    "too deep": (lambda p: p.write_text("[" * 100_000), "not valid JSON .nested too deep."),
    "a long number": (
        lambda p: p.write_text('{"a": ' + "7" * 5000 + "}"),
        "not valid JSON .a number of more than 4300 digits",
    ),
    "a key twice": (
        lambda p: p.write_text('{"a": 1, "b": {"c": 1, "c": 2}}'),
        "not valid JSON .the key 'c' stands twice",
    ),
    "a list": (lambda p: p.write_text("[1]"), "a JSON list, not an object"),
}


@pytest.mark.parametrize("case", READ_ERRORS)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, case):
    path = tmp_path / "a.json"
    make, says = READ_ERRORS[case]
    make(path)
    with pytest.raises(UserError, match=rf"a.json: {says}.*; fetch it again\.$") as caught:
        read_json(path, cure="fetch it again")
    assert "\n" not in str(caught.value)


def test_a_name_that_no_file_system_takes_is_one_short_line(tmp_path):
    for name, says in (("x" * 300, "File name too long"), ("line\nend", "does not exist")):
        with pytest.raises(UserError, match=says) as caught:
            read_json(tmp_path / name, cure="name another")
        assert "\n" not in str(caught.value)
        assert (
            not is_file(tmp_path / name) and not is_folder(tmp_path / name) and not is_there(tmp_path / name)
        )
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / ("x/" * 4000), cure="name another")
    assert len(str(caught.value)) < 500


WRITE_ERRORS = {
    "full": (errno.ENOSPC, "disk full while saving .*needs 0.0 MB, .*free.; free space", True),
    "quota": (errno.EDQUOT, "disk full while saving ", True),
    "size": (errno.EFBIG, "File too large.; raise the limit", True),
    "rights": (errno.EACCES, "Permission denied.; make it writable", True),
    "read-only": (errno.EROFS, "Read-only file system.; make it writable", True),
    "broken": (errno.EIO, "Input/output error.; look at that disk", True),
}


@pytest.mark.parametrize("case", WRITE_ERRORS)
@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, case, step):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    number, says, again = WRITE_ERRORS[case]

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open" if step == "open" else f"os.{step}", fail)
    with pytest.raises(NotWritten, match=says) as caught:
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert caught.value.again == again and "\n" not in str(caught.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]


PLACES = {
    "a folder stands there": (
        lambda p: (p / "below").mkdir(parents=True),
        "a",
        "move away what stands there",
    ),
    "below a file": (lambda p: p.write_text("x"), "a/b", "a file stands where a folder should be"),
    "in a folder that is missing": (lambda p: None, "a/b", "name a place in a folder that exists"),
    "a long name": (lambda p: None, "x" * 256, "File name too long.; choose a shorter name"),
    "behind a circle of links": (lambda p: p.symlink_to(p), "a/b", "links that lead in a circle"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_takes_no_file_is_one_line(tmp_path, case):
    make, name, says = PLACES[case]
    make(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NotWritten, match=says):
        write_json(tmp_path / name, {"a": 1})
    assert sorted(tmp_path.rglob("*")) == before


def test_files_come_into_a_folder_together_or_not_at_all(tmp_path):
    out = tmp_path / "head"
    names = ("a", "b")

    def write(text, error=None):
        with whole_files(out, names) as folder:
            for name in names:
                (folder / name).write_text(text)
                if error:
                    raise error

    with pytest.raises(KeyboardInterrupt):
        write("0", KeyboardInterrupt())
    assert not list(tmp_path.iterdir())
    write("1")
    (out / "mine").write_text("kept")
    (out / ".partial-7").mkdir()  # left by a killed process
    with pytest.raises(KeyboardInterrupt):
        write("2", KeyboardInterrupt())
    assert [(out / name).read_text() for name in names] == ["1", "1"]
    write("3")
    assert {p.name: p.read_text() for p in out.iterdir()} == {"a": "3", "b": "3", "mine": "kept"}


BAD_OUT = {
    "a file": (lambda p: p.write_text("x"), "out", "that is a file"),
    "below a file": (lambda p: p.write_text("x"), "out/a/b", "no folder can be made in .*out;"),
    "a link in a circle": (lambda p: p.symlink_to(p), "out", "that is no folder"),
    "a folder in place of a file": (lambda p: (p / "b").mkdir(parents=True), "out", "out/b is a folder"),
    "a long name": (lambda p: None, "x" * 256, "cannot be made .File name too long."),
}


@pytest.mark.parametrize("case", BAD_OUT)
def test_an_out_that_cannot_be_is_refused_before_the_work(tmp_path, case):
    make, name, says = BAD_OUT[case]
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"--out .*{says}"), whole_files(tmp_path / name, ("a", "b")):
        pytest.fail("the work was begun")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_rights_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args: False)  # root has every right
    with pytest.raises(UserError, match="no folder can be made in"), whole_files(tmp_path / "out", ("a",)):
        pytest.fail("the work was begun")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_rights_gets_one_line():
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "secret.json").write_text("{}")
    (folder / "secret.json").chmod(0)
    (folder / "closed").mkdir(0)

    def says(work, *words):
        try:
            work()
        except UserError as error:
            return all(word in str(error) for word in words)
        return False

    child = os.fork()
    if not child:
        os.setgid(65534)
        os.setuid(65534)
        unread = "cannot be read (Permission denied); c."
        right = [
            says(lambda: read_json(folder / "secret.json", cure="c"), unread),
            says(lambda: read_json(folder / "closed" / "a", cure="c"), unread),
            says(lambda: write_json(folder / "a.json", {}), "(Permission denied); make it writable"),
            says(lambda: append_line(folder / "secret.json", "x"), "(Permission denied); make it writable"),
            says(lambda: whole_folder(folder / "out").__enter__(), "cannot be made (Permission denied)"),
            says(lambda: whole_files(folder / "out", ("a",)).__enter__(), "no folder can be made in"),
        ]
        os._exit(0 if all(right) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(folder)
    assert code == 0
