"""The boundary to code of the user's: every Python scorer is imported and called through it.

A guest is given copies and returns real numbers. Whatever it does to the process is undone when it returns:
the working folder, stdout and stderr, torch's default dtype and device, gradient mode and threads, and the
random states of random, numpy and torch. What it raises becomes one line with the guest's file and line, also
what would end the process (SystemExit, os._exit). Only Ctrl-C passes through.
"""

import array
import asyncio
import inspect
import itertools
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError

T = TypeVar("T")
ENGINE = str(Path(__file__).parents[1])
CALLS_AT_ONCE = 16  # of an async scorer
ACCEPTED = "return a list, tuple, array, tensor or generator of one real number per response"


def scores(
    name: str,
    function: Callable,
    prompts: list[str],
    responses: list[str],
    more: Mapping[str, Any] | None = None,
) -> list[float]:
    """Asks a scorer of texts for its scores, one per response; they may be NaN or infinite.

    more: what the function takes by keyword. An async function is asked for each response alone,
    `CALLS_AT_ONCE` at a time.
    Raises: UserError where it fails, or returns anything else than so many real numbers.
    """
    more = dict(more or {})

    def call() -> list[float]:
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return asyncio.run(_each_alone(name, function, prompts, responses, more))
        return _numbers(name, function(list(prompts), list(responses), **more), len(responses))

    return visit(f"scorer {name} raised", call, lambda: _file_of(function))


async def _each_alone(
    name: str, function: Callable, prompts: list[str], responses: list[str], more: dict[str, list]
) -> list[float]:
    """Awaits an async scorer once per response, and a bounded number of these calls at once.

    The first that fails ends the others.
    """
    free = asyncio.Semaphore(CALLS_AT_ONCE)

    async def one(row: int) -> float:
        async with free:
            own = {key: [values[row]] for key, values in more.items()}
            returned = await function([prompts[row]], [responses[row]], **own)
        return _numbers(name, returned, 1, row)[0]

    tasks = [asyncio.ensure_future(one(row)) for row in range(len(responses))]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def visit(failed: str, call: Callable[[], T], file: Callable[[], str | None]) -> T:
    """Runs code of a guest's and leaves the process as it was.

    failed: how the message begins where the guest fails, such as "scorer judge raised". file: finds the
    guest's own source file, whose last line in the traceback is named.
    Raises: UserError for whatever the guest raises; KeyboardInterrupt.
    """
    process, error = os.getpid(), None
    try:
        with _as_before(), _exit_raises(process):
            return call()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as raised:
        error = raised
        text = f"{failed} {type(error).__name__}{_first_line(error)}{_place(error, file())}; mend the scorer."
        raise UserError(text) from error
    finally:
        if (
            os.getpid() != process
        ):  # a child that the guest forked and that came back: the run is its parent's
            _end_child(error)


def _end_child(error: BaseException | None) -> NoReturn:
    code = error.code if isinstance(error, SystemExit) else 1
    os._exit(code if isinstance(code, int) else 1 if code else 0)


@contextmanager
def _exit_raises(process: int) -> Iterator[None]:
    """Lets os._exit raise SystemExit in this process; a child that the guest forks still ends by it."""
    end = os._exit

    def exit_or_raise(code: int) -> NoReturn:
        if os.getpid() != process:
            end(code)
        raise SystemExit(code)

    os._exit = exit_or_raise
    try:
        yield
    finally:
        os._exit = end


@contextmanager
def _as_before() -> Iterator[None]:
    """Restores what a guest may have changed in the process.

    Raises: UserError where it has left torch's inference mode on or off, which cannot be undone.
    """
    inference = torch.is_inference_mode_enabled()
    before = [(restore, read()) for read, restore in STATES]
    try:
        yield
    finally:
        for restore, value in before:
            restore(value)
    if torch.is_inference_mode_enabled() != inference:
        raise UserError(
            f"a scorer has left torch.inference_mode {'off' if inference else 'on'}; "
            "let it use the mode in a with block."
        )


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it has been removed
        return None


def _restore_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _restore_threads(number: int) -> None:
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)


def _restore_device(device: torch.device) -> None:
    if torch.get_default_device() != device:
        torch.set_default_device(None if device.type == "cpu" else device)


def _gpu_random_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _restore_gpu_random_states(states: list[Tensor]) -> None:
    if states:
        torch.cuda.set_rng_state_all(states)


# How to read each part of the process that a guest may change, and how to restore it.
STATES: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (_folder, _restore_folder),
    (lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
    (lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _restore_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, _restore_threads),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (_gpu_random_states, _restore_gpu_random_states),
)


def _numbers(name: str, returned: Any, n: int, first: int = 0) -> list[float]:
    """Reads what a scorer returned for n responses, from number `first` on, as so many real numbers.

    A flag counts as 0 or 1.
    """
    kind = type(returned).__name__
    if isinstance(returned, Tensor | np.ndarray):
        if returned.ndim != 1:
            raise UserError(f"scorer {name} returned a {kind} of shape {list(returned.shape)}; {ACCEPTED}.")
        values = (returned.detach() if isinstance(returned, Tensor) else returned).tolist()
    elif isinstance(returned, list | tuple | array.array):
        values = list(returned)
    elif isinstance(returned, Iterator):
        values = list(itertools.islice(returned, n + 1))
        if len(values) > n:
            raise UserError(f"scorer {name} returned more than {n} scores for {n} responses; {ACCEPTED}.")
    else:
        if inspect.iscoroutine(returned):
            returned.close()  # Python would warn that it was never awaited
        raise UserError(f"scorer {name} returned a {kind}; {ACCEPTED}.")
    if len(values) != n:
        raise UserError(
            f"scorer {name} returned {len(values)} scores for {n} responses; return one per response."
        )
    return [_number(name, row, value) for row, value in enumerate(values, first)]


def _number(name: str, row: int, value: Any) -> float:
    """Reads one score."""
    number = value
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        number = value.item()
    if not isinstance(number, Real | Decimal):
        raise UserError(
            f"scorer {name} returned a {type(value).__name__} for response {row} (counting from 0); "
            f"{ACCEPTED}."
        )
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _file_of(function: Callable) -> str | None:
    """Finds the file in which a function of the user's stands; None where it has none."""
    inner = inspect.unwrap(getattr(function, "func", function))  # functools.partial has a func
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    return code.co_filename if code else None


def _first_line(error: BaseException) -> str:
    """Returns ": " and the first line of an error's message that has text, where there is one."""
    try:
        lines = str(error).splitlines()
    except Exception:  # a __str__ of the guest's
        lines = []
    return next((f": {line.strip()}" for line in lines if line.strip()), "")


def _place(error: BaseException, file: str | None) -> str:
    """Returns " (FILE, line N)" of the guest's own code, where the error has passed through any."""
    if isinstance(error, SyntaxError) and error.filename and os.path.isfile(error.filename):
        return f" ({error.filename}, line {error.lineno})"
    if file is not None and file.startswith(ENGINE):
        return ""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    foreign = [place for place in places if not place[0].startswith((ENGINE, "<"))]
    own = [place for place in places if place[0] == file] or foreign
    return f" ({own[-1][0]}, line {own[-1][1]})" if own else ""
