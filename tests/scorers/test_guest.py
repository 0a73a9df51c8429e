"""Python scorers as guests: what they may return, what they cannot change, and how their errors are told."""

import array
import os
import random
import re
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.scorers.base import TextScorer
from engine.scorers.functions import python_function

PROMPTS, RESPONSES = ["p", "q", "r"], ["a", "b", "c"]


def scored(function):
    """Scores the three responses."""
    return TextScorer(name="judge", function=function)(PROMPTS, RESPONSES).tolist()


def refusal(function):
    """Returns the one line with which a function is refused."""
    with pytest.raises(UserError) as refused:
        scored(function)
    (line,) = str(refused.value).splitlines()
    return line


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, -3],
        (1.0, 2.5, -3.0),
        (x for x in (1, 2.5, -3)),
        map(float, ("1", "2.5", "-3")),
        array.array("d", [1, 2.5, -3]),
        np.array([1, 2.5, -3], dtype=np.float32),
        [np.float16(1), Fraction(5, 2), Decimal(-3)],
        torch.tensor([1, 2.5, -3], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1), np.array(2.5), torch.tensor(-3.0)],
    ],
)
def test_real_numbers_in_any_usual_form_are_scores(returned):
    assert scored(lambda p, r: returned) == [1.0, 2.5, -3.0]


def test_flags_count_as_0_and_1():
    assert scored(lambda p, r: [x == "b" for x in r]) == [0.0, 1.0, 0.0]
    assert scored(lambda p, r: np.array(r) == "b") == [0.0, 1.0, 0.0]


async def streamed(prompts, responses):
    yield 0.0


async def later(prompts, responses):
    return [0.0] * len(responses)


def endless(prompts, responses):
    while True:
        yield 0.5


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda p, r: {1.0, 2.0, 3.0}, "returned a set;"),
        (lambda p, r: {"a": 1, "b": 2, "c": 3}, "returned a dict;"),
        (lambda p, r: b"abc", "returned a bytes;"),
        (lambda p, r: "123", "returned a str;"),
        (lambda p, r: None, "returned a NoneType;"),
        (lambda p, r: 1.0, "returned a float;"),
        (lambda p, r: later(p, r), "returned a coroutine;"),
        (lambda p, r: ["1", "2", "3"], "returned a str for response 0"),
        (lambda p, r: [1.0, 2.0, None], "returned a NoneType for response 2"),
        (lambda p, r: [1.0, 2j, 3.0], "returned a complex for response 1"),
        (lambda p, r: [[1.0], [2.0], [3.0]], "returned a list for response 0"),
        (lambda p, r: torch.ones(3, 1), r"returned a Tensor of shape \[3, 1\]"),
        (lambda p, r: np.float64(3.0), "returned a float64;"),
        (lambda p, r: np.array(3.0), r"returned a ndarray of shape \[\]"),
        (lambda p, r: torch.ones(3, dtype=torch.complex64), "returned a complex for response 0"),
        (lambda p, r: [1.0, 2.0], "returned 2 scores for 3 responses"),
        (endless, "returned more than 3 scores for 3 responses"),
    ],
)
def test_nothing_else_is_a_score(function, said):
    assert re.match(f"scorer judge {said}", refusal(function))


def test_numbers_beyond_float64_are_infinite():
    assert scored(lambda p, r: [10**400, -(10**400), Decimal("1e999")]) == [np.inf, -np.inf, np.inf]


def test_a_guest_gets_copies():
    prompts, responses = list(PROMPTS), list(RESPONSES)

    def greedy(p, r):
        p.reverse()
        r[0] = "changed"
        return [0.0, 1.0, 2.0]

    TextScorer(name="greedy", function=greedy)(prompts, responses)
    assert (prompts, responses) == (PROMPTS, RESPONSES)


def meddle(folder):
    """Changes all that a guest may change in the process."""
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, a guest leaves it open
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)


def state():
    """Reads the same of the process."""
    of_random = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    threads, device = torch.get_num_threads(), torch.get_default_device()
    streams = sys.stdout, sys.stderr
    return (
        os.getcwd(), torch.get_default_dtype(), device, torch.is_grad_enabled(), threads, streams, of_random
    )  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
def test_a_guest_leaves_nothing_behind(tmp_path, fails):
    before = state()

    def meddling(p, r):
        meddle(tmp_path)
        assert not fails, "as asked"
        return [0.0] * 3

    assert "as asked" in refusal(meddling) if fails else scored(meddling) == [0.0] * 3
    assert state() == before


def test_inference_mode_that_stays_on_is_refused():
    mode = torch.inference_mode()

    def dreaming(p, r):
        mode.__enter__()
        return [0.0] * 3

    try:
        assert "left torch.inference_mode on" in refusal(dreaming)
    finally:
        mode.__exit__(None, None, None)


MODULES = {
    "syntax": ("x = 1\nif x\n    pass\n", "SyntaxError: .*", 2),
    "value": ("y = 1\n\nraise ValueError('\\n \\n first words\\nsecond')\n", "ValueError: first words", 3),
    "exits": ("import sys\nsys.exit(0)\n", "SystemExit: 0", 2),
    "ends": ("import os\nos._exit(0)\n", "SystemExit: 0", 2),
    "needs": ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all'", 1),
    "silent": ("raise KeyError\n", "KeyError", 1),
}


@pytest.mark.parametrize("name", MODULES)
def test_errors_of_an_import_name_the_users_line(tmp_path, monkeypatch, name):
    text, said, line = MODULES[name]
    file = tmp_path / f"guest_{name}.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as refused:
        python_function(f"guest_{name}:f")
    expected = (
        f"scorer guest_{name}:f: importing it raised {said} \\({file}, line {line}\\); mend the scorer."
    )
    assert re.fullmatch(expected, str(refused.value))


@pytest.mark.parametrize(
    "body, said, line",
    [
        ("return {}[responses[0]]", "KeyError: 'a'", 2),
        ("return [1 / 0\n        for _ in responses]", "ZeroDivisionError: division by zero", 2),
        ("for _ in responses:\n        yield int('x')", "ValueError: invalid literal .*", 3),
        ("import json\n    return json.loads('{')", "JSONDecodeError: .*", 3),
        ("import os\n    os._exit(0)", "SystemExit: 0", 3),
        ("raise SystemExit", "SystemExit", 2),
        ("class Odd(Exception):\n        def __str__(self): raise self\n    raise Odd()", "Odd", 4),
    ],
)
def test_errors_of_a_call_name_the_users_line(tmp_path, monkeypatch, body, said, line):
    file = tmp_path / "called_guest.py"
    file.write_text(f"def f(prompts, responses):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "called_guest", raising=False)
    told = refusal(python_function("called_guest:f").function)
    assert re.fullmatch(f"scorer judge raised {said} \\({file}, line {line}\\); mend the scorer.", told)


@pytest.mark.parametrize(
    "spec, said",
    [
        (":f", "no module:function"),
        (".a:f", "no module:function"),
        ("os:", "no module:function"),
        ("nowhere_at_all:f", "No module named 'nowhere_at_all'"),
        ("json.nowhere:f", "No module named 'json.nowhere'"),
        ("json:nothing", "has no nothing"),
        ("json:__doc__", "a str, not a function"),
        ("tests.scorers.test_guest:streamed", "an async generator"),
    ],
)
def test_what_is_no_function_is_refused_before_it_is_called(spec, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "tests.scorers.test_guest", sys.modules[__name__])
    with pytest.raises(UserError, match=re.escape(said)):
        python_function(spec)


def test_a_child_may_end_itself_and_never_comes_back():
    def forking(p, r):
        ended = [os.fork() for _ in range(1)]
        if not ended[0]:
            os._exit(7)
        back = os.fork()
        if back:
            status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (ended[0], back)]
            return [*map(float, status), 0.0]
        return [0.0] * 3  # in the second child: it would go on with the run

    assert scored(forking) == [7.0, 1.0, 0.0]


def test_ctrl_c_interrupts_a_guest():
    def stopped(p, r):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(stopped)
