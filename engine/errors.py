"""The ways a program of this package stops early, and their exit codes."""


class UserError(ValueError):
    """The user's input cannot be used. The message is one line: the value, then the cure. Exit code 2."""

    exit_code = 2


class NotWritten(UserError):
    """A file or folder cannot be written. The message says what to do about the place.

    again: whether the same command can go on once that is done. How it goes on only the command knows, so
    `engine.command` adds it.
    """

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


class NotAnswered(UserError):
    """A server that the command needs does not answer.

    What was done is kept, and the same command can go on; how, `engine.command` adds.
    """

    again = True


class LostRank(NotAnswered):
    """Another process of the same run does not answer, as it has ended."""


class NotMet(UserError):
    """A policy is not shown to meet every constraint, where the command asks for that. Exit code 4."""

    exit_code = 4


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not finite; the batch has been saved for inspection. Exit code 3."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed and the current step has been finished and saved. Exit code 130."""

    exit_code = 130
