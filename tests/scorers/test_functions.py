"""What Python functions may take besides prompts and responses, and async ones."""

import pytest

from engine.errors import UserError
from engine.scorers import guest
from engine.scorers.base import Sampled
from engine.scorers.find import find_scorer

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]
RESPONSES = ["a", "bb", "ccc"]
SAMPLED = Sampled(prompt_ids=[[1]] * 3, response_ids=[[2]] * 3, finished=[True, False, True])
MODULE = """
import asyncio
seen = {}
def messages(prompts, responses, messages):
    seen.update(prompts=prompts, messages=messages)
    messages[0][0]["content"] = "changed"
    return [float(len(m)) for m in messages]
def finished(prompts, responses, *, finished):
    return [float(f) for f in finished]
def both(prompts, responses, **more):
    return [float(sorted(more) == ["finished", "messages"])] * len(responses)
def graded(prompts, responses, row):
    found = [(one.pop("level") or 0) + len(r) / 10 for one, r in zip(row, responses)]
    return found
class Judge:
    async def __call__(self, prompts, responses, finished):
        return [float(len(responses[0])) if finished[0] else -1.0]
judge = Judge()
at_once = most = 0
async def slow(prompts, responses):
    global at_once, most
    at_once += 1
    most = max(most, at_once)
    await asyncio.sleep(0.001)
    at_once -= 1
    return [float(responses[0])]
async def fails(prompts, responses):
    if responses[0] == "bb":
        raise ValueError("\\n  no answer\\n")
    await asyncio.sleep(60)
    return [0.0]
async def text(prompts, responses):
    return ["a" if responses[0] == "bb" else 0.0]
async def two(prompts, responses):
    return [0.0, 1.0]
"""

RAISE = 1 + MODULE[: MODULE.index("raise")].count("\n")


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """Writes a module of scorers; returns it."""
    place = tmp_path_factory.mktemp("functions")
    (place / "asked_for_more.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        import asked_for_more

        yield asked_for_more


def score(name, responses=RESPONSES, sampled=SAMPLED):
    scorer = find_scorer(f"asked_for_more:{name}", None).load("x", None)
    return scorer([TALK] * len(responses), responses, sampled).tolist()


@pytest.fixture(autouse=True)
def no_heads(monkeypatch):
    monkeypatch.setattr("engine.scorers.find.find_head", lambda spec, folder: None)


def test_a_function_gets_the_messages_and_whether_responses_ended_where_it_takes_them(module):
    assert score("messages") == [3.0] * 3
    assert module.seen["prompts"] == ["user: Hi\n\nassistant: Yes?\n\nuser: Why?"] * 3
    assert TALK[0]["content"] == "Hi", "a function is given copies"
    assert score("finished") == [1.0, 0.0, 1.0]
    assert score("finished", sampled=None) == [1.0] * 3, "what is tried has ended"
    assert score("both") == [1.0] * 3


def test_an_async_function_is_awaited_for_each_response_and_a_bounded_number_at_once(module):
    assert score("slow", [str(i) for i in range(50)], None) == [float(i) for i in range(50)]
    assert module.most == guest.CALLS_AT_ONCE < 50
    assert score("judge") == [1.0, -1.0, 3.0]


@pytest.mark.parametrize(
    "name, said",
    [
        ("fails", rf"raised ValueError: no answer \(.*asked_for_more.py, line {RAISE}\)"),
        ("text", r"returned a str for response 1 \(counting from 0\)"),
        ("two", "returned 2 scores for 1 responses"),
    ],
)
def test_an_async_function_that_fails_ends_the_calls_beside_it(module, name, said):
    with pytest.raises(UserError, match=said):
        score(name)


def test_a_function_gets_the_rows_where_it_names_them(module):
    scorer = find_scorer("asked_for_more:graded", None).load("x", None)
    rows = ['{"level": 3, "tags": ["a"]}', '{"level": null, "tags": []}']
    assert scorer([TALK] * 2, ["a", "bb"], None, rows).tolist() == [3.1, 0.2]
    with pytest.raises(UserError, match="scorer graded: it takes row, and the rows of these"):
        scorer([TALK] * 2, ["a", "bb"])
    # **more takes what is there anyway; rows would have to be kept for it.
    assert find_scorer("asked_for_more:both", None).load("x", None).keywords == ("messages", "finished")
