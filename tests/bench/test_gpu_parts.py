"""The parts of bench.gpu, as far as a CPU can run them."""

import os
import pickle
import signal
import subprocess
import time

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import first, kernels, steps, suite
from bench.gpu.parts import PARTS
from bench.gpu.steps import LIMIT_S, PATIENCE, Figure, Step, go_on, table, tried
from bench.gpu.suite import counted
from bench.gpu.worker import Worker
from bench.run import results
from bench.run.origin import ROOT
from bench.run.results import table_of
from bench.run.states import entries_above
from tests.helpers import gpu_steps

CPU = torch.device("cpu")


@pytest.fixture
def once(monkeypatch):
    """Calls everything once instead of timing it, and says that it took a millisecond."""

    def per_call(call, calls, device):
        call(calls - 1)
        return 1e-3

    for module in (kernels, steps):
        monkeypatch.setattr(module, "per_call", per_call)
    return torch.device("cpu")


def test_steps_for_a_gpu_on_small_shapes(once):
    (line,) = kernels.ceilings(once, rows=32, width=16, vocabulary=50, side=8)
    title, header, rows = table_of(line)
    assert "32 rows x 16 x 50" in title and rows[-1][0] == "the three, bfloat16 output, Tflop/s"
    assert float(rows[-1][2]) == pytest.approx(6 * 32 * 16 * 50 / 3e-3 / 1e12, rel=1e-3)
    (line,) = kernels.decode(once, kernels.Cache(prompts=2, longest=20, room=8, layers=2))
    # Keys and values of 2 prompts of 20 tokens and of 16 rows of 8: 2 heads of 64 in 2 bytes.
    assert line["table"][2][:2] == ["qwen2.5-0.5b", 8]
    assert line["table"][2][3] == pytest.approx(2 * 2 * 64 * 2 * (40 + 128) / 1e-3 / 1e9)
    (line,) = kernels.sampling(once, rows=2)
    assert len(line["table"]) == 16 and line["table"][0][2] == pytest.approx(2 * 49152 * 4 / 1e-3 / 1e9)
    (line,) = kernels.attention_kernels(once, groups=2, prompt=9, response=4)
    assert all(max(row[1:5]) < 0.03 for row in line["table"])


def test_figures_of_a_gpu_are_added_once(tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_text("")
    monkeypatch.setattr(results, "HERE", tmp_path)

    def lines(device):
        return [table("Name", ["x", "y"], [["one", 2.34567]], ("a note",), device=device)]

    step = Step("s", 1, lines)
    go_on([step], tmp_path / "part-3.jsonl", Attempts().attempt, end=9.0, clock=lambda: 0.0)
    assert command.main(["--out", str(tmp_path)]) == 0 and command.collect(tmp_path) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("## Name") == 1 and "| one | 2.346 |" in text and "a note" in text


def test_a_small_kernel_is_timed_by_call():
    (line,) = kernels.launches(torch.device("cpu"), calls=3)
    assert all(0 < us < 1e5 for _, us in line["table"])


def test_parts_for_a_gpu_fit_their_time():
    for of_part, limit_s in (*((s, LIMIT_S) for _, s in PARTS.values()), (first.steps("any"), 360)):
        assert len({s.name for s in of_part}) == len(of_part)
        assert sum(s.seconds for s in of_part) < limit_s
    assert sum(s.seconds for _, of_part in PARTS.values() for s in of_part) < 25 * 60
    assert first.LIMIT_S == 390, "half a minute more than the steps, for the start"


class Attempts:
    """Attempts in this process, by a clock that goes on by what each step takes."""

    def __init__(self, takes: dict[str, float] | None = None) -> None:
        self.takes, self.now, self.calls = takes or {}, 0.0, []

    def attempt(self, step: Step, until: float) -> dict:
        self.calls.append((step.name, until))
        self.now = min(self.now + self.takes.get(step.name, step.seconds), until)
        return tried(step, CPU) if self.now < until else {"failed": "too long"}

    def run(self, of_part: list[Step], path, limit_s: float = 100.0) -> int:
        self.calls = []
        return go_on(of_part, path, self.attempt, self.now + limit_s, clock=lambda: self.now)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def _fails(device: torch.device) -> list[dict]:
    raise ValueError("no such luck")


def test_a_part_goes_on_where_it_was_cut_off(tmp_path, capsys):
    path, go = tmp_path / "part-0.jsonl", Attempts()
    a, b, c, d = (
        Step("a", 1, gpu_steps.line),
        Step("b", 1, _fails),
        *(Step(n, 1, gpu_steps.line) for n in "cd"),
    )
    assert go.run([a, b, c], path) == 1 and go.names == ["a", "b", "c"], "what fails stops nothing"
    assert "ValueError: no such luck" in steps.read(path)[1]["failed"]
    assert "b, 1 s: ValueError: no such luck" in capsys.readouterr().out
    assert go.run([a, b, d], path) == 1 and go.names == ["d", "b"], "what failed comes last"
    text = path.read_text()
    path.write_text(text[: text.index('"c"') + 40])
    assert go.run([a, c], path) == 0 and go.names == ["c"], "a line that was cut off is no line"
    assert [r["step"] for r in steps.read(path)] == ["a", "b", "c"]
    assert go.run([a, Step("b", 1, gpu_steps.line), c], path) == 0 and go.names == ["b"]


def test_each_line_is_there_before_the_next_step_begins(tmp_path, capsys):
    path, seen = tmp_path / "part-0.jsonl", []

    def look(device: torch.device) -> list[dict]:
        seen.append(([r["step"] for r in steps.read(path)], capsys.readouterr().out))
        return gpu_steps.line(device)

    found = Step("found", 1, look, lambda lines: [Figure("time", "ms", 3.0, 2.0, "at most 2.5")])
    Attempts().run([found, Step("then", 1, look)], path)
    told = "time 3 ms (predicted 2, measured / predicted 1.50, target at most 2.5)"
    assert seen == [([], ""), (["found"], f"found, 1 s: {told}\n")]
    figure = {"name": "time", "unit": "ms", "measured": 3.0, "predicted": 2.0, "ratio": 1.5}
    assert steps.read(path)[0]["figures"] == [figure | {"target": "at most 2.5"}]


def test_time_is_kept(tmp_path, capsys):
    path, go = tmp_path / "part-0.jsonl", Attempts({"slow": 50, "hangs": 1e9})
    of_part = [Step(name, 10, gpu_steps.line) for name in ("slow", "quick", "hangs", "late", "small")]
    of_part[4] = Step("small", 3, gpu_steps.line)
    assert go.run(of_part, path, limit_s=58) == 3
    assert go.calls == [("slow", 20), ("quick", 40), ("hangs", 50), ("small", 56)] and PATIENCE == 2
    assert "not done, as no time is left: late;" in capsys.readouterr().out
    assert go.run(of_part, path, limit_s=15) == 2 and go.calls == [("late", 68)]


def test_the_command_runs_all_steps_of_part_0(tmp_path, monkeypatch, capsys):
    class InThisProcess(Worker):
        def __init__(self, steps, device: str) -> None:
            # Another process does not import the __main__ of a package that `python -m` runs.
            assert device == "cuda" and b"__main__" not in pickle.dumps(steps)
            super().__init__(steps, device)

        def attempt(self, step: Step, until: float) -> dict:
            return {"lines": [{"of": step.name}], "figures": []}

    monkeypatch.setattr(command, "Worker", InThisProcess)
    monkeypatch.setattr(command, "BEGUN", time.monotonic())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["--part", "0", "--out", str(tmp_path)]) == 0
    assert len(steps.read(tmp_path / "part-0.jsonl")) == 10
    said = capsys.readouterr().out
    assert "entries: skipped, as no checkpoint is named" in said and "10 of 10 steps done" in said


def test_a_step_that_hangs_or_dies_stops_no_other(tmp_path):
    steps_of = {step.name: step for step in gpu_steps.wrong()}
    with Worker(gpu_steps.wrong, "cpu") as worker:
        good = worker.attempt(steps_of["good"], time.monotonic() + 300)
        assert good["figures"] == [Figure("y", "s", 2.5, 2.0)] and good["lines"][0]["table"] == [["one", 2.5]]
        process = worker.process.pid
        died = worker.attempt(steps_of["dies"], time.monotonic() + 300)
        assert died == {"failed": "its process ended with code 3"}
        assert "lines" in worker.attempt(steps_of["good"], time.monotonic() + 300)
        assert worker.process.pid != process
        process = worker.process.pid
        hung = worker.attempt(steps_of["hangs"], time.monotonic() + 0.2)
        assert "too long" in hung["failed"] and worker.process is None
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_steps_of_part_0_in_small_sizes(tmp_path, monkeypatch, tiny_folder):
    """The last two launch kernels, so that tests/test_gpu.py runs them."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    *of_part, by_rows, forward = gpu_steps.small(tiny_folder, monkeypatch)
    assert (by_rows.name, forward.name) == ("row kernel, four tiles", "forward, one head")
    path = tmp_path / "part-0.jsonl"
    left = Attempts().run(of_part, path, limit_s=1000)
    assert left == 0, [r.get("failed") for r in steps.read(path)]
    figures = {r["step"]: r["figures"] for r in steps.read(path)}
    assert list(figures) == [
        "ceilings",
        "loss_head qwen3-8b 128",
        "loss_head qwen3-8b 128 frozen",
        "rollout qwen2.5-1.5b",
        "rollout qwen2.5-0.5b",
        "train_step qwen2.5-1.5b full",
        "iteration qwen2.5-0.5b",
        "entries",
    ]
    measured = {f"{step}, {f['name']}": f["measured"] for step, found in figures.items() for f in found}
    assert not {name: value for name, value in measured.items() if not value >= 0}
    predicted = [f["predicted"] for found in figures.values() for f in found if f["predicted"]]
    assert predicted == [4300, 790, 0.93 * 790, 1.07, 44.5, 1.10, 30.5, 0.45, 3.4, 0.35, 1.63, 0.62, 440]
    lines = {r["step"]: r["lines"][0] for r in steps.read(path)}
    names = [c["name"] for c in lines["loss_head qwen3-8b 128"]["candidates"]]
    assert all(name.startswith("dualign") for name in names), "without rivals"
    assert lines["rollout qwen2.5-0.5b"]["parting"] is None
    rows = lines["entries"]["table"]
    assert [row[:2] for row in rows[:2]] == [[0.7, "2^-12"], [0.7, "2^-16"]] and len(rows) == 12


def test_entries_are_those_of_softmax():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=g) for n in (300, 40))
    target = torch.randint(40, (300,), generator=g)
    counts, left_out = entries_above(hidden, weight, target, 0.7, (0.05, 2.0**-30))
    exact = (hidden.double() @ weight.double().t() / 0.7).softmax(1)
    exact = (exact - torch.nn.functional.one_hot(target, 40)).abs()
    for place, bound in enumerate((0.05, 2.0**-30)):
        assert torch.equal(counts[:, place], (exact >= bound).sum(1))
        rest = (exact * (exact < bound)).sum(1)
        torch.testing.assert_close(left_out[:, place], rest, rtol=1e-5, atol=1e-6)


def test_the_chosen_tests_of_the_kernels_are_there(monkeypatch):
    """Pytest itself reads the choice. One of its words is in the names of two tests."""
    monkeypatch.chdir(ROOT)
    found: list[str] = []

    class Seen:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            found.extend(item.name for item in session.items)

    assert pytest.main([*first.CHOSEN, "--collect-only", "-qq", "-p", "no:cacheprovider"], [Seen()]) == 0
    tests = {name.split("[")[0] for name in found}
    assert len(tests) == len(first.KERNELS) + 1 and len(found) < 20


def test_tests_that_take_too_long_are_stopped_and_counted(tmp_path, monkeypatch):
    """Also where this process ignores Ctrl-C, as one in the background of a shell does."""
    begun = tmp_path / "begun"
    file = tmp_path / "test_slow.py"
    file.write_text(
        "import pathlib, time\n\ndef test_quick():\n    pass\n\n"
        f"def test_slow():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(3600)\n"
    )

    class Popen(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 7:
                while not begun.exists() and self.poll() is None:
                    time.sleep(0.05)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(suite.subprocess, "Popen", Popen)
    arguments = ["-o", "addopts=", "-p", "no:cacheprovider", str(file)]
    step = suite.tests("slow ones", 9, arguments, limit_s=7, figures=first.test_counts)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (line,) = step.lines(CPU, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    passed, failed = step.figures([line])
    assert line["table"][0][:5] == ["slow ones", 2, 1, 0, 0]
    assert line["notes"] == ["stopped after 7 s"]
    assert (passed.measured, failed.measured, failed.target) == (1, 0, "0")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--part", "7"], "--part 7: must be 0 to 6"),
        (["--part", "0", "--model", "nowhere"], "--model nowhere: must be a folder"),
        (["--part", "0"], "needs a GPU"),
    ],
)
def test_parts_that_cannot_run_say_why(tmp_path, capsys, arguments, message):
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("there is one")
    assert command.main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_tests_are_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="m" name="a"/><testcase classname="m" name="b">'
        '<failure message="x is 3&#10;more"/></testcase><testcase classname="m" name="c">'
        '<skipped message="needs a GPU"/></testcase></testsuite></testsuites>'
    )
    *counts, (failure, skipped) = counted(report)
    assert counts == [1, 1, 1] and "m::b" in failure and "x is 3" in failure
    assert skipped == "1 skipped: needs a GPU"
