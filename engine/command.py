"""Does what all commands share: they end early with one line and an exit code, and their output survives a
reader who goes away.

Exit codes: 0 done, 1 a mistake of the program, 2 user's error, 3 non-finite stop, 4 a constraint
is not met, 130 Ctrl-C.
"""

import atexit
import errno
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TextIO, TypeVar

from engine.errors import Interrupted, LostRank, NonFiniteError, NotAnswered, NotWritten, UserError
from engine.files import ADVICE, FORBIDDEN, FULL, escaped, reason, shown

if TYPE_CHECKING:
    from engine.ranks import Ranks  # which loads torch

T = TypeVar("T")
# What the machine refuses, wherever it happens; other errors of the system are the program's mistakes.
REFUSED = (
    *FULL,
    *FORBIDDEN,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EPIPE,
    errno.ESTALE,
)


@dataclass
class Standing:
    """Where a command stands; it changes this as soon as it knows better."""

    again: Callable[[], str] = lambda: "start the command again"  # how to go on, said where it stops early
    ranks: "Ranks | None" = None  # where torchrun has started several

    def resumable(self, command: str, folder: str | Path, mark: str) -> None:
        """Says that `command --resume FOLDER` goes on once the file `mark` stands in the folder."""
        begun = Path(folder) / mark
        restart = self.again

        def again() -> str:
            return f"go on with {command} --resume {shown(folder)}" if os.path.isfile(begun) else restart()

        self.again = again

    def first(self, function: Callable[[], T]) -> T:
        """Returns what `function` returns, which of several ranks rank 0 alone calls."""
        return function() if self.ranks is None else self.ranks.first(function)


def run_command(
    work: Callable[[list[str], Standing], int | None], argv: list[str] | None, *, on_ranks: bool = False
) -> int:
    """Does the work of a command and returns its exit code, whatever the work raises.

    work: gets the words of the command line and says in `Standing` how to go on; it may return another exit
    code than 0. argv: those words; None for the process's own. on_ranks: the work can be shared out where
    torchrun has started several processes; other commands are refused there.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    standing = Standing()
    with _surviving_output():
        try:
            join_ranks(standing, on_ranks, argv)
            _check_text(argv)
            code = work(argv, standing) or 0
        except BaseException as error:  # a panic of a library in Rust is no Exception
            code = _ended(error, standing)
        finally:
            if standing.ranks is not None:
                standing.ranks.leave()
    if standing.ranks is not None:
        _end_rank(code)
    return code


def _end_rank(code: int) -> NoReturn:
    """Ends a process that torchrun has started. On the interpreter's own way out threads of torch.distributed
    may still run, and now and then abort a rank that has done its work."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def join_ranks(standing: Standing, on_ranks: bool, argv: list[str]) -> None:
    """Joins the processes that torchrun has started. Raises: UserError where the command is for one, or they
    were started with other words than rank 0."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    # Imported here, as it loads torch.
    from engine.ranks import Ranks

    ranks = Ranks.start()
    if ranks.size == 1:
        return
    standing.ranks = ranks
    if not on_ranks:
        raise UserError(
            f"torchrun has started {ranks.size} processes, and this command is for one; start it without "
            "torchrun."
        )
    # First of all: with other words they would do other things, and mistake what they tell one another.
    ranks.check_alike({f"word {n} of the command line": word for n, word in enumerate(argv, 1)})


def end_imports(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
    """Ends a command that is stopped while its modules are imported, before `run_command` begins.

    It stands for `sys.excepthook`, from which SystemExit sets the exit code.
    """
    with _surviving_output():
        code = _ended(error, Standing())
    sys.exit(code)


def _ended(error: BaseException, standing: Standing) -> int:
    """Says in one line what ended a command; returns its exit code. Of several ranks one says it for all."""
    ranks = standing.ranks
    if ranks is not None and isinstance(error, LostRank):
        error = LostRank(ranks.missed(error))
    if ranks is not None and not ranks.says():
        return getattr(error, "exit_code", 1)
    if ranks is None and isinstance(error, KeyboardInterrupt) and _of_others():
        return Interrupted.exit_code

    def say(text: str) -> None:
        _say(text if ranks is None or ranks.is_first else f"rank {ranks.rank}: {text}")

    if isinstance(error, NotWritten | NotAnswered):
        say(f"error: {error}{f' and {standing.again()}' if error.again else '.'}")
        return error.exit_code
    if isinstance(error, UserError | NonFiniteError):
        say(f"error: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        # An Interrupted says itself how to go on.
        say(str(error) if isinstance(error, Interrupted) else f"interrupted: {standing.again()}")
        return Interrupted.exit_code
    if isinstance(error, SystemExit):
        say(
            f"error: something that this command called ended the process (SystemExit: {error.code}), so "
            f"it has no result; take that call out, then {standing.again()}"
        )
        return 1
    if isinstance(error, OSError) and (error.errno in REFUSED or _no_temporary_folder(error)):
        place = f"{shown(error.filename)}: " if error.filename else ""
        advice, again = ADVICE.get(error.errno, ("see to that", True))
        if _no_temporary_folder(error):
            advice, again = "free space there, or set TMPDIR to a folder with room", True
        say(f"error: {place}{reason(error)}; {advice}{f' and {standing.again()}' if again else '.'}")
        return UserError.exit_code
    traceback.print_exception(error)
    say(
        f"error: {type(error).__name__} is a mistake of this program, not yours: please report the "
        f"lines above; to try once more, {standing.again()}"
    )
    return 1


def _of_others() -> bool:
    """Tells whether torchrun has started this process as another than rank 0.

    Until the ranks have joined none can know what another one says; rank 0 is stopped too, or misses those
    that are.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def _no_temporary_folder(error: OSError) -> bool:
    """Tells whether Python found no folder for temporary files, as on a full disk."""
    return error.errno == errno.ENOENT and error.filename is None


def _say(text: str) -> None:
    """Prints one line to stderr, whatever the text holds; words without end, such as a path, are cut."""
    text = escaped(" ".join(line.strip() for line in text.splitlines() if line.strip()))
    print(re.sub(r"\S{301,}", lambda word: shown(word[0]), text), file=sys.stderr)


def _check_text(argv: list[str]) -> None:
    """Refuses words with bytes that are no text, which no file of a run could hold."""
    for before, word in zip(["", *argv], argv, strict=False):
        if any("\ud800" <= c <= "\udfff" or c == "\0" for c in word):
            flag = f"{shown(before)} " if before.startswith("--") else ""
            raise UserError(f"{flag}{shown(word)}: holds bytes that are no UTF-8 text; write it otherwise.")


class _Pipe(io.RawIOBase):
    """A handle of this process that takes bytes until its reader goes away or its disk is full; from then on
    they are dropped, and the work goes on."""

    def __init__(self, handle: int) -> None:
        super().__init__()
        self._handle = handle

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return os.isatty(self._handle)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self._handle, data)
            except BlockingIOError:
                select.select([], [self._handle], [])
            except OSError:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._handle)
                os.close(null)
                return len(data)


@contextmanager
def _surviving_output() -> Iterator[None]:
    """Puts streams in place of the process's stdout and stderr that no closed pipe, full disk or narrow
    encoding breaks. Streams that were put there by somebody else stay."""
    # A closed handle would go to the next file that is opened, and output would be written into that.
    for handle in range(3):
        if not _is_open(handle):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _surviving(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _surviving(sys.stderr, 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # somebody's own stream may be closed
                stream.flush()
        sys.stdout, sys.stderr = before


def _is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


def _surviving(stream: TextIO | None, handle: int) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    with suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(handle)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
