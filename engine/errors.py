"""The three ways a program of this package stops early, and their exit codes."""


class UserError(ValueError):
    """The user's input cannot be used. The message is one line: the value, then the cure. Exit code 2."""

    exit_code = 2


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not finite; the batch has been saved for inspection. Exit code 3."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed and the current step has been finished and saved. Exit code 130."""

    exit_code = 130
