"""Judges behind HTTP: what they are asked, what is read, how failures end, and what is asked only once."""

import json
import math
import threading

import pytest
from transformers import AutoTokenizer

from engine.command import run_command
from engine.data.prompts import TextLimits
from engine.errors import NotAnswered, UserError
from engine.scorers import remote
from engine.scorers.answers import Answers
from engine.scorers.base import Sampled
from engine.scorers.find import content, find_scorer
from engine.scorers.remote_forms import number_in
from tests.helpers.chat import chat_ids
from tests.helpers.judges import JudgeServer, away, reward, rewards, says

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]
LIMITS = TextLimits(system="Be brief.", max_positions=200, max_new_tokens=20, vocab_size=1000)
ASKED = ["one", "two", "three"]
DAY = "Wed, 21 Oct 2015"


@pytest.fixture(scope="module")
def one_server():
    server = JudgeServer()
    yield server
    server.close()


@pytest.fixture
def server(one_server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", remote.KEY):
        monkeypatch.delenv(name, raising=False)
    one_server.forget()
    return one_server


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


class Clock:
    """A clock that only sleeping moves on."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def judge(server, tokenizer):
    """Returns a function that loads a judge at the server, whose clock is `judge.clock`."""

    def load(rest="/score", answers=None):
        context = {"tokenizer": tokenizer, "limits": LIMITS, "answers": answers or Answers()}
        scorer = find_scorer(server.url + rest, None).load("x", None, **context)
        own = scorer.function.__self__
        own.clock, own.sleep = lambda: load.clock.now, load.clock.sleep
        return scorer

    load.clock = Clock()
    return load


def prompts(n):
    return [TALK] * n


def test_a_reward_server_gets_the_texts_of_the_policy(server, judge, tokenizer):
    sampled = Sampled(prompt_ids=[[5, 6], [7]], response_ids=[[8, 9], [10, 2]], finished=[False, True])
    found = judge()(prompts(2), ["a", "b"], sampled)
    query = [tokenizer.decode([5, 6, 8, 9]), tokenizer.decode([7, 10, 2])]
    (body,) = server.bodies
    assert body == {
        "query": query,
        "prompts": [tokenizer.decode([5, 6]), tokenizer.decode([7])],
        "labels": ["", ""],
    }
    assert tokenizer.decode([2]) in query[1], "special tokens are part of the text"
    assert found.tolist() == [reward(q) for q in query] and server.paths == ["/score"]
    # What is tried before a run was not sampled: prompts are written as the run writes them.
    judge()(prompts(1), ["Because."])
    ids = chat_ids(TALK, tokenizer, "Be brief.", "")
    assert server.bodies[-1]["prompts"] == [tokenizer.decode(ids)]
    assert server.bodies[-1]["query"][0] == tokenizer.decode(ids) + "Because."


def test_many_texts_go_in_bounded_requests_and_a_bounded_number_of_them_at_once(server, judge, tokenizer):
    together = threading.Barrier(remote.CALLS_AT_ONCE)

    def slow(body):
        together.wait(10)
        return rewards(body)

    server.answer = slow
    responses = [f"r{i}" for i in range(32 * remote.CALLS_AT_ONCE * 2)]
    ids = tokenizer(responses, add_special_tokens=False)["input_ids"]
    sampled = Sampled(prompt_ids=[[5]] * len(ids), response_ids=ids, finished=[False] * len(ids))
    found = judge()(prompts(len(ids)), responses, sampled)
    assert max(len(body["query"]) for body in server.bodies) == 32
    assert server.most == remote.CALLS_AT_ONCE and len(server.bodies) == 2 * remote.CALLS_AT_ONCE
    start = tokenizer.decode([5])
    assert found.tolist() == [reward(start + response) for response in responses]


def test_a_judge_that_fails_twice_is_asked_again(server, judge):
    server.first = [away, away]
    assert judge()(prompts(3), ASKED).tolist() == [reward(q) for q in server.bodies[-1]["query"]]
    assert judge.clock.slept == [1.0, 2.0] and len(server.bodies) == 3


@pytest.mark.parametrize(
    "status, headers, waits",
    [
        (429, {"retry-after": "7"}, [7.0]),
        (503, {"retry-after": f"{DAY} 07:28:09 GMT", "date": f"{DAY} 07:28:00 GMT"}, [9.0]),
        (500, {"retry-after": "soon"}, [1.0]),
        (408, {}, [1.0]),
    ],
)
def test_a_judge_says_how_long_to_wait(server, judge, status, headers, waits):
    server.first = [lambda body: (status, headers, b"")]
    judge()(prompts(1), ["one"])
    assert judge.clock.slept == pytest.approx(waits)


def test_a_judge_that_is_down_for_a_minute_costs_a_minute(server, judge):
    scorer = judge()
    scorer(prompts(1), ["first"])
    server.answer = lambda body: away(body) if judge.clock.now < 60 else rewards(body)
    scorer(prompts(1), ["one"])
    assert 60 <= judge.clock.now <= 60 + remote.LONGEST_WAIT_S


def test_a_judge_that_stays_down_is_given_up_and_what_it_answered_is_kept(server, judge, tmp_path):
    answers = Answers()
    answers.keep_in(tmp_path / "cache.jsonl")
    scorer = judge(answers=answers)
    before = scorer(prompts(3), ASKED).tolist()
    server.answer = away
    said = rf"^scorer {server.url}/score: it does not answer \(503 Service Unavailable: loading\), tried for"
    with pytest.raises(NotAnswered, match=said):
        scorer(prompts(4), [*ASKED, "four"])
    assert remote.PATIENCE_S - remote.LONGEST_WAIT_S <= judge.clock.now <= remote.PATIENCE_S
    again = Answers()
    again.keep_in(tmp_path / "cache.jsonl")
    assert judge(answers=again)(prompts(3), ASKED).tolist() == before


def test_an_address_where_nothing_ever_answered_is_given_up_soon(server, judge):
    server.answer = away
    with pytest.raises(NotAnswered, match="tried for 15 s; what it has answered is kept"):
        judge()(prompts(1), ["one"])
    free = JudgeServer()
    free.close()
    clock = Clock()
    scorer = find_scorer(f"{free.url}#m@number", None).load("x", None)
    scorer.function.__self__.sleep, scorer.function.__self__.clock = clock.sleep, lambda: clock.now
    with pytest.raises(NotAnswered, match="does not answer .ConnectError"):
        scorer(prompts(1), ["one"])
    assert clock.now < remote.PATIENCE_AT_FIRST_S


def test_a_wait_that_is_too_long_is_not_begun(server, judge):
    scorer = judge()
    scorer(prompts(1), ["first"])
    server.answer = lambda body: (429, {"retry-after": "3600"}, {"error": {"message": "quota"}})
    with pytest.raises(NotAnswered, match="Too Many Requests: quota.*asks to wait 3600 s"):
        scorer(prompts(1), ["one"])
    assert judge.clock.now == 0


def test_how_to_go_on_is_said_by_the_command(capsys):
    def work(argv, standing):
        standing.again = lambda: "go on with --resume R"
        raise NotAnswered("scorer s: it does not answer; see to that server")

    assert run_command(work, []) == 2
    assert capsys.readouterr().err == (
        "error: scorer s: it does not answer; see to that server and go on with --resume R\n"
    )


@pytest.mark.parametrize(
    "answer, said",
    [
        ({"rewards": [0.5, 1.0]}, "has answered 2 rewards for 3 texts"),
        ({"rewards": [0.5, 1.0, math.nan]}, "has answered the reward NaN for '.*three'"),
        ({"rewards": [0.5, math.inf, 1.0]}, "has answered the reward Infinity for '.*two'"),
        ({"rewards": [0.5, None, 1.0]}, "has answered the reward null for '.*two'"),
        ({"rewards": [True, 1.0, 1.0]}, "has answered the reward true for '.*one'"),
        ({"scores": [1.0] * 3}, "has answered no list of rewards in {.scores"),
        ([1.0] * 3, "has answered no list of rewards"),
        (b"<html>", "has answered no JSON .*is it the address of a judge"),
        ((404, {}, {"detail": "Not Found"}), r"it refuses \(404 Not Found: Not Found\); see to that server"),
        ((302, {"location": "http://other/"}, b""), r"it refuses \(302 Found: to http://other/\); give"),
        ((401, {}, {"error": {"message": "no\nkey"}}), r"401 Unauthorized: no\); set OPENAI_API_KEY"),
    ],
)
def test_a_bad_answer_is_refused_by_name_and_not_kept(server, judge, answer, said):
    server.first = [lambda body: answer]
    scorer = judge()
    with pytest.raises(UserError, match=f"^scorer {server.url}/score: .*{said}") as refused:
        scorer(prompts(3), ASKED)
    assert not isinstance(refused.value, NotAnswered) and judge.clock.slept == []
    assert scorer(prompts(3), ASKED).tolist() == [reward(q) for q in server.bodies[-1]["query"]]


def test_nothing_is_asked_twice(server, judge, tmp_path):
    file, answers = tmp_path / "cache.jsonl", Answers()
    scorer = judge(answers=answers)
    first = scorer(prompts(3), ["one", "two", "one"]).tolist()
    assert first[0] == first[2] and len(server.queries) == 2
    answers.keep_in(file)
    scorer(prompts(2), ["two", "three"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["score"] for row in rows] == list(map(reward, server.queries)) and len(server.queries) == 3
    # A torn line and lines of another kind are left out, and what is written next is a line of its own.
    whole = file.read_bytes()
    file.write_bytes(b'[]\n{"key": 1, "score": 1.0}\n{"key": "a", "score": NaN}\n' + whole[:-9])
    again = Answers()
    again.keep_in(file)
    resumed = judge(answers=again)
    assert resumed(prompts(3), ["one", "two", "one"]).tolist() == first and len(server.queries) == 3
    resumed(prompts(1), ["three"])
    assert len(server.queries) == 4 and file.read_bytes().endswith(whole[-9:])
    third = Answers()
    third.keep_in(file, read_only=True)
    judge(answers=third)(prompts(4), ["one", "two", "three", "new"])
    assert len(server.queries) == 5 and len(file.read_text().splitlines()) == 7


def test_answers_are_kept_in_the_order_of_the_texts(server, judge, tmp_path):
    responses = [f"{i:03d}" for i in range(100)]
    later = threading.Event()

    def answer(body):
        if "000" in body["query"][0]:
            later.wait(10)
        else:
            later.set()
        return rewards(body)

    server.answer = answer
    answers = Answers()
    answers.keep_in(tmp_path / "cache.jsonl")
    scores = judge(answers=answers)(prompts(100), responses).tolist()
    assert [json.loads(x)["score"] for x in (tmp_path / "cache.jsonl").read_text().splitlines()] == scores


def test_what_was_answered_beside_a_failure_is_kept(server, judge, tmp_path):
    responses = [f"{i:03d}" for i in range(96)]
    others = threading.Semaphore(0)

    def answer(body):
        if "000" in body["query"][0]:
            assert others.acquire(timeout=10) and others.acquire(timeout=10)
            return {"rewards": []}
        others.release()
        return rewards(body)

    server.answer = answer
    answers = Answers()
    answers.keep_in(tmp_path / "cache.jsonl")
    scorer = judge(answers=answers)
    with pytest.raises(UserError, match="0 rewards for 32 texts"):
        scorer(prompts(96), responses)
    kept = len((tmp_path / "cache.jsonl").read_text().splitlines())
    assert kept in (32, 64), "one answer may be on its way when the failure ends the others"
    server.forget()
    scorer(prompts(96), responses)
    assert len(server.queries) == 96 - kept


LIKELY = {"unsafe": -0.5, "safe": -1.0, " safe": -3.0, "uns": -4.0, "s": -6.0, "I": -7.0}


def test_a_guard_is_asked_by_its_recipe_and_read_by_log_odds(server, judge):
    server.answer = lambda body: says("\n\nunsafe\nS1", [("\n\n", {"\n\n": 0.0}), ("unsafe", LIKELY)])
    scorer = judge("/v1#meta-llama/Llama-Guard-3-8B")
    (score,) = scorer(prompts(1), ["Because."]).tolist()
    # "s" begins safe alone, "uns" unsafe alone.
    bad, good = (sum(map(math.exp, x)) for x in ((-0.5, -4.0), (-1.0, -3.0, -6.0)))
    assert score == pytest.approx(math.log(bad / good), abs=1e-12)
    assert server.paths == ["/v1/chat/completions"] and server.bodies == [
        {
            "model": "meta-llama/Llama-Guard-3-8B",
            "messages": [*TALK, {"role": "assistant", "content": "Because."}],
            "temperature": 0,
            "max_tokens": 48,
            "logprobs": True,
            "top_logprobs": 20,
            "add_generation_prompt": False,
        }
    ]
    assert (scorer.name, scorer.measures, scorer.warnings()) == ("Llama-Guard-3-8B", "cost", [])


def test_a_guard_is_read_behind_the_prefix_of_its_last_step(server, judge):
    tokens = ['{"', "User", " Safety", '":', ' "', "un", "safe"]
    tokens += ['",', ' "', "Response", " Safety", '":', ' "']
    safe = [(token, {token: 0.0}) for token in tokens]
    server.answer = lambda body: says("", [*safe, ("safe", {"safe": -0.1, "unsafe": -2.6, "x": -9.0})])
    scorer = judge("/v1#g@nemotron-guard")
    assert scorer(prompts(1), ["No."]).item() == pytest.approx(-2.5, abs=1e-12)
    (asked,) = server.bodies[0]["messages"]
    assert "user: user: Hi\n\nassistant: Yes?\n\nuser: Why?\nagent: No.\n<END" in asked["content"]
    thought = [("<think>", {}), ("</think>", {}), ("<score>", {"<score>": 0.0}), (" ", {})]
    server.answer = lambda body: says("", [*thought, ("yes", {" yes": -0.2, " no": -1.7})])
    scorer = judge("/v1#ibm-granite/granite-guardian-3.3-8b")
    assert scorer(prompts(1), ["No."]).item() == pytest.approx(1.5, abs=1e-12)
    options = {"guardian_config": {"risk_name": "harm"}, "think": False}
    assert server.bodies[-1]["chat_template_kwargs"] == options
    assert "add_generation_prompt" not in server.bodies[-1]


def test_an_answer_that_is_not_among_the_log_probs_is_bounded_and_counted(server, judge):
    server.answer = lambda body: says("safe", [("safe", {"safe": -0.01, "I": -8.0, "It": -9.0})])
    scorer = judge("/v1#g@llama-guard")
    assert scorer(prompts(2), ["a", "b"]).tolist() == pytest.approx([-9.0 + 0.01] * 2, abs=1e-12)
    (said,) = scorer.warnings()
    assert "in 2 of 2 answers only the good or only the bad one" in said and scorer.warnings() == []


@pytest.mark.parametrize(
    "rest, answer, said",
    [
        ("#g@llama-guard", says("hm", [("hm", {"hm": -0.1})]), "'hm', and none of unsafe, safe is likely"),
        ("#g@qwen3guard", says("No", [("No", {"No": -0.1})]), "'No', which is no answer of its recipe"),
        ("#g@llama-guard", says("safe"), "no log-probs beside the text 'safe'.*read by @number"),
        ("#g@number", says("I can't."), 'no single number on the last line that has one: "I can.t."'),
        ("#g@number", says("Let me think: 7", end="length"), "a text that was cut off at 'Let me think: 7'"),
        ("#g@number", says(None), "no single number"),
        ("#g@number", {"choices": []}, r"no choices\[0\].message.content in"),
    ],
)
def test_an_answer_that_holds_no_score_is_refused(server, judge, rest, answer, said):
    server.answer = lambda body: answer
    with pytest.raises(UserError, match=f"has answered {said}"):
        judge(f"/v1{rest}")(prompts(1), ["one"])


@pytest.mark.parametrize(
    "text, number",
    [
        ("Score: 7", 7.0),
        ("It has 3 errors, so 5 of 10.\n**Score: 7.5/10**\nThank you.", 7.5),
        ("I rate it 8 (out of 10).", 8.0),
        ("\\boxed{-1.5e1}", -15.0),
        ("[[9]]", 9.0),
        ("85%", 85.0),
        ("between 6 and 7", None),
        ("Score (1-10): 8", None),
        ("the 8th", None),
        ("1.5x", None),
        ("nan", None),
        ("1e999", None),
    ],
)
def test_the_number_in_a_text(text, number):
    assert number_in(text) == number


def test_a_judge_that_reasons_is_asked_by_a_text(server, judge, tmp_path):
    server.answer = lambda body: says("<think>6? 9?</think>\nScore: 7/10")
    scorer = judge("/v1#org/thinker@number")
    assert scorer(prompts(1), ["Because."]).item() == 7.0
    (body,) = server.bodies
    assert set(body) == {"model", "messages", "temperature"}, "a model that reasons takes the room it needs"
    assert "user: Why?" in body["messages"][0]["content"] and "\nBecause.\n" in body["messages"][0]["content"]
    file = tmp_path / "harm.jinja"
    file.write_text("How harmful is {{ response }} to {{ prompt }}?")
    assert judge(f"/v1#org/thinker@number:{file}")([TALK[:1]], ["this"]).item() == 7.0
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "How harmful is this to Hi?"}]
    file.write_text("How are you?")
    with pytest.raises(UserError, match="asks the same of all responses"):
        judge(f"/v1#m@number:{file}")
    file.write_text("{{ answer }}")
    with pytest.raises(UserError, match="its text cannot be written .*answer"):
        judge(f"/v1#m@number:{file}")
    with pytest.raises(UserError, match="missing: does not exist; give a jinja file"):
        judge(f"/v1#m@number:{tmp_path}/missing")


def test_a_key_goes_to_chat_models_alone_and_stands_in_no_message(server, judge, monkeypatch):
    monkeypatch.setenv(remote.KEY, "sk-secret")
    judge()(prompts(1), ["one"])
    server.answer = lambda body: (400, {}, {"error": {"message": "no such key sk-secret"}})
    with pytest.raises(UserError, match=r"400 Bad Request: no such key \*\*\*\)") as refused:
        judge("/v1#m@number")(prompts(1), ["one"])
    assert "secret" not in repr(refused.value)
    assert [headers.get("authorization") for headers in server.headers] == [None, "Bearer sk-secret"]
    far = find_scorer("http://example.org/v1#m@number", None).load("x", None)
    assert "OPENAI_API_KEY goes to example.org unencrypted" in far.notes[0]
    assert judge("/v1#m@number").notes == judge().notes == ()
    monkeypatch.setenv(remote.KEY, "sk-\u20ac")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters"):
        judge("/v1#m@number")


@pytest.mark.parametrize(
    "spec, said",
    [
        ("http://me:secret@host/score", "^scorer http://host: an address with @ or ."),
        ("https://host/score?key=secret", "^scorer https://host: an address with @ or ."),
        ("http:///score", "no address of a server"),
        ("http://host:99999/score", "no address of a server"),
        ("http://host/v1#", "no model behind #"),
        ("http://host/v1#@number", "no model behind #"),
        ("http://host/v1#gpt-5", "nothing says what is read; give http://host/v1#gpt-5@RECIPE, one of llama"),
        ("http://host/v1#allenai/wildguard", "the recipe wildguard is not for a server"),
        ("http://host/v1#m@nonsense", "the recipe nonsense is not for a server.* number and number:FILE"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_before_anything_is_asked(spec, said):
    with pytest.raises(UserError, match=said) as refused:
        find_scorer(f"harm=-{spec}", None)
    assert "secret" not in str(refused.value)


def test_how_judges_are_named():
    names = {
        "http://host/get_reward/": "get_reward",
        "http://host:5000": "host:5000",
        "https://host/v1#org/judge:8b@number": "judge:8b",
        "harm=-http://host/v1#org/Qwen3Guard-Gen-4B": "harm",
    }
    found = {spec: find_scorer(spec, None) for spec in names}
    assert {spec: scorer.name for spec, scorer in found.items()} == names
    assert found["harm=-http://host/v1#org/Qwen3Guard-Gen-4B"].sign == -1


def test_a_judge_is_known_by_address_model_recipe_and_its_file(tmp_path):
    file = tmp_path / "ask.jinja"
    file.write_text("{{ response }}")
    specs = [
        "http://a/v1#m@number",
        "http://b/v1#m@number",
        "http://a/v1#n@number",
        "http://a/v1#m@llama-guard",
    ]
    specs += [f"http://a/v1#m@number:{file}", "http://a/v1"]

    def digests():
        return [content(spec, [f"c={spec}"], [], folder=tmp_path) for spec in specs]

    before = digests()
    assert before[0]["reward"]["form"] == "judge" and before[0]["reward"]["source"] == "http://a/v1"
    assert all(found["reward"] == found["c"] for found in before)
    assert len({found["c"]["sha256"] for found in before}) == len(specs)
    file.write_text("{{ response }}?")
    assert [a == b for a, b in zip(before, digests(), strict=True)] == [True] * 4 + [False, True]


def test_length_and_refusal(tokenizer, tmp_path):
    length = find_scorer("length", tmp_path).load("x", None, tokenizer=tokenizer)
    sampled = Sampled(prompt_ids=[[1]] * 2, response_ids=[[5, 6, 2], [7]], finished=[True, False])
    assert length(prompts(2), ["a", "b"], sampled).tolist() == [3.0, 1.0]
    ids = tokenizer("Because.", add_special_tokens=False)["input_ids"]
    assert length(prompts(1), ["Because."]).item() == len(ids) + 1
    refusal = find_scorer("no=-refusal", tmp_path).load("x", None)
    assert refusal(["Hi"] * 2, ["I'm sorry, but no.", "Sure."]).tolist() == [1.0, 0.0] and refusal.sign == -1
    found = content("length", ["refusal"], [], folder=tmp_path)
    assert found["reward"]["form"] == "built-in" and found["reward"] != found["refusal"]
