"""engine.command: however a command ends, it says one line and has the right exit code; output that nobody
reads any more does not stop it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.command import run_command
from engine.errors import Interrupted, NonFiniteError, NotWritten, UserError

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "start the command again"


def system_error(number: int, *place: str) -> OSError:
    return OSError(number, os.strerror(number), *place)


ENDINGS = {
    "user": (UserError("--out x: bad."), 2, "error: --out x: bad."),
    "two lines": (UserError("a\n\n  b"), 2, "error: a b"),
    "an escape": (UserError("a\x1b[2Jb"), 2, "error: a\\x1b[2Jb"),
    "full": (
        NotWritten("disk full while saving a; free space", again=True),
        2,
        f"error: disk full while saving a; free space and {AGAIN}",
    ),
    "name": (
        NotWritten("cannot write a; name another", again=False),
        2,
        "error: cannot write a; name another.",
    ),
    "not finite": (NonFiniteError("loss is nan."), 3, "error: loss is nan."),
    "Ctrl-C": (KeyboardInterrupt(), 130, f"interrupted: {AGAIN}"),
    "Ctrl-C in a run": (Interrupted("stopped; go on with x"), 130, "stopped; go on with x"),
    "full elsewhere": (
        system_error(errno.ENOSPC, "f"),
        2,
        f"error: f: No space left on device; see to that and {AGAIN}",
    ),
    "no place named": (system_error(errno.EIO), 2, f"error: Input/output error; see to that and {AGAIN}"),
    "rights": (
        system_error(errno.EACCES, "f"),
        2,
        f"error: f: Permission denied; make it writable and {AGAIN}",
    ),
    "long": (
        system_error(errno.ENAMETOOLONG, "f"),
        2,
        "error: f: File name too long; choose a shorter name.",
    ),
    "loop": (
        system_error(errno.ELOOP, "f"),
        2,
        "error: f: Too many levels of symbolic links; name a place without links that lead in a circle.",
    ),
    "files": (system_error(errno.EMFILE, "f"), 2, f"error: f: Too many open files; see to that and {AGAIN}"),
    "pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, f"error: Broken pipe; see to that and {AGAIN}"),
    "no temporary folder": (
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
        2,
        "error: No usable temporary directory found in ['/tmp']; free space there, or set TMPDIR to a folder "
        f"with room and {AGAIN}",
    ),
    "exit 0": (SystemExit(0), 1, "ended the process (SystemExit: 0), so it has no result"),
    "exit with a text": (SystemExit("bye"), 1, "ended the process (SystemExit: bye), so it has no result"),
    "exit without": (SystemExit(), 1, "ended the process (SystemExit: None), so it has no result"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_every_ending_is_one_line_and_an_exit_code(capsys, case):
    stop, code, says = ENDINGS[case]

    def work(argv, standing):
        raise stop

    assert run_command(work, []) == code
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    if code != 1:
        assert err == f"{says}\n"


MISTAKES = [
    RuntimeError("a bug"),
    AssertionError(),
    KeyError("x"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "f"),
    RecursionError("too deep"),
    type("PanicException", (BaseException,), {})("a library in Rust"),
    UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: type(mistake).__name__)
def test_our_mistakes_keep_their_traceback_and_end_with_how_to_go_on(capsys, tmp_path, mistake):
    def work(argv, standing):
        standing.resumable("python -m engine.train", tmp_path, "config.json")
        raise mistake

    for begun, again in ((False, AGAIN), (True, f"go on with python -m engine.train --resume {tmp_path}")):
        if begun:
            (tmp_path / "config.json").write_text("{}")
        assert run_command(work, []) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback") and sum("Traceback" in line for line in lines) == 1
        assert lines[-1].startswith(
            f"error: {type(mistake).__name__} is a mistake of this program, not yours"
        )
        assert lines[-1].endswith(again)


def test_words_that_are_no_text_are_refused_and_all_others_are_handed_on(capsys):
    got = []
    work = lambda argv, standing: got.append(argv)  # noqa: E731
    for argv, says in (
        (["--system", "\udcff"], "error: --system \\udcff: holds bytes that are no UTF-8 text;"),
        (["a\ud83d"], "error: a\\ud83d: holds"),
        (["--name=\udcff"], "error: --name=\\udcff: holds"),
        (["a\0b"], "error: a\\x00b: holds"),
    ):
        assert run_command(work, argv) == 2
        err = capsys.readouterr().err
        assert err.startswith(says) and err.count("\n") == 1
    assert not got
    words = ["ein Wort", "\u00e9", "\U0001f600", "a\nb", ""]
    assert run_command(work, words) == 0 and got == [words]


def test_the_exit_code_of_the_work_is_kept_and_streams_come_back(capsys):
    before = sys.stdout, sys.stderr
    assert run_command(lambda argv, standing: 2, []) == 2
    assert (sys.stdout, sys.stderr) == before


PROGRAM = r"""
import os, sys
from engine.command import run_command
from engine.run.display import Display

def work(argv, standing):
    with Display() as display:
        for i in range(300):
            display.line(f"line {i} \u00e9\u2026 \udcff")
            display.warn("a warning")
        display.table([["a", 1.0]], ["name", "number"])
        display.notice("a notice")
    print("last", flush=True)
    print("to stderr", file=sys.stderr)
    os.write(1, b"past Python\n")
    with open(sys.argv[1], "w") as file:
        file.write("done")

sys.exit(run_command(work, []))
"""
# How a shell starts the program; {} stands for the command.
STREAMS = {
    "a reader that goes away": "{} | head -1",
    "stdout closed": "{} >&-",
    "all closed": "{} <&- >&- 2>&-",
    "a full disk for both": "{} >/dev/full 2>&1",
    "a reader of both that goes away": "{} 2>&1 | head -1",
    "unbuffered": "PYTHONUNBUFFERED=1 {} | head -1",
    "ASCII in one column": "PYTHONIOENCODING=ascii PYTHONUTF8=0 COLUMNS=1 LINES=1 {} >/dev/null",
    "no environment": "env -i LC_ALL=C {} >/dev/null",
}


@pytest.mark.parametrize("case", STREAMS)
def test_the_work_is_done_whatever_happens_to_its_output(tmp_path, case):
    program, done = tmp_path / "program.py", tmp_path / "done"
    program.write_text(PROGRAM)
    command = f"{sys.executable} {program} {done}"
    shell = f"set -o pipefail; cd {ROOT}; {STREAMS[case].format(command)}"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and done.read_text() == "done"
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
    closed = "2>" in STREAMS[case]
    assert ended.stderr == ("" if closed else "\na notice\nto stderr\n")


STOPS = {
    "raise KeyboardInterrupt": (130, f"interrupted: {AGAIN}"),
    "raise FileNotFoundError(2, \"No usable temporary directory found in ['/tmp']\")": (
        2,
        "error: No usable temporary directory found in ['/tmp']; free space there, or set TMPDIR to a folder "
        f"with room and {AGAIN}",
    ),
}
# Commands that import torch once they have read their flags, and how each goes on.
STOPPED = {
    "evaluate run": ", as nothing was written",
    "export run folder": ", as nothing was written",
    "dual s.jsonl --threshold 0.3": "",
    "sweep": "",
    "train": "",
}


@pytest.mark.parametrize("command", STOPPED)
@pytest.mark.parametrize("stop", STOPS, ids=["Ctrl-C", "no temporary folder"])
def test_a_command_that_is_stopped_while_torch_is_imported_ends_in_one_line(tmp_path, command, stop):
    (tmp_path / "torch.py").write_text(stop)
    name, *words = command.split()
    ended = subprocess.run(
        [sys.executable, "-m", f"engine.{name}", *words],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    code, said = STOPS[stop]
    assert (ended.returncode, ended.stderr) == (code, f"{said}{STOPPED[command]}\n")


def test_another_programs_import_of_the_engine_leaves_its_own_ending(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import engine\n")
    (tmp_path / "other" / "__main__.py").write_text("import sys; print(sys.excepthook is sys.__excepthook__)")
    ended = subprocess.run(
        [sys.executable, "-m", "other"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.stdout == "True\n"


def test_help_ends_in_a_terminal_of_one_column(monkeypatch, capsys):
    from engine import train

    monkeypatch.setenv("COLUMNS", "1")
    assert train.main(["--help"]) == 0
    assert "--resume RUN" in capsys.readouterr().out and os.environ["COLUMNS"] == "1"
