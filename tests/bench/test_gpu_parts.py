"""The parts of bench.gpu, as far as a CPU can run them."""

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import kernels, steps
from bench.gpu.parts import PARTS
from bench.gpu.steps import LIMIT_S, Step, go_on, table
from bench.gpu.suite import counted
from bench.run import results
from bench.run.results import table_of


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
    go_on([step], tmp_path / "part-3.jsonl", torch.device("cpu"))
    assert command.main(["--out", str(tmp_path)]) == 0 and command.collect(tmp_path) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("## Name") == 1 and "| one | 2.346 |" in text and "a note" in text


def test_a_small_kernel_is_timed_by_call():
    (line,) = kernels.launches(torch.device("cpu"), calls=3)
    assert all(0 < us < 1e5 for _, us in line["table"])


def test_parts_for_a_gpu_fit_their_time():
    assert all(len({s.name for s in steps}) == len(steps) for _, steps in PARTS.values())
    seconds = [sum(s.seconds for s in steps) for _, steps in PARTS.values()]
    assert max(seconds) < LIMIT_S and sum(seconds) < 25 * 60


def test_a_part_goes_on_where_it_was_cut_off(tmp_path, capsys):
    path, called, device = tmp_path / "part-1.jsonl", [], torch.device("cpu")

    def good(name):
        def lines(device):
            called.append(name)
            return [table(name, ["x"], [[1.5]], device=device)]

        return Step(name, 1, lines)

    def bad(device):
        called.append("b")
        raise ValueError("no such luck")

    todo = [good("a"), Step("b", 1, bad), Step("late", 1e9, bad), good("c")]
    assert go_on(todo, path, device, limit_s=1e-9) == 3 and called == ["a"], "what does not fit is left"
    assert go_on(todo[:2] + todo[3:], path, device) == 1 and called == ["a", "b", "c"]
    assert "ValueError: no such luck" in steps.read(path)[1]["failed"]
    assert "no such luck" in capsys.readouterr().out
    assert go_on([todo[1], good("d")], path, device) == 1
    assert called[-2:] == ["d", "b"], "what failed comes last"
    assert go_on([good("b"), good("d")], path, device) == 0 and called[-1] == "b"


@pytest.mark.parametrize(
    "arguments,message",
    [(["--part", "7"], "--part 7: must be 1 to 6, or 0"), (["--part", "1"], "needs a GPU")],
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
