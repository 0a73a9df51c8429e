"""What bench.run compares with: floors on hand-computed numbers, models of random weights, the training step against plain torch."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.gpu import __main__ as gpu
from bench.run import __main__ as run
from bench.run import floors, iteration, shapes, train_step
from engine.architecture import ModelConfig, Rope
from engine.model import load
from engine.smoke import smoke_folder

# 120 weights in the products of each layer, 40 in the head, 300 in all; in 2 bytes a token's keys and values take 8 in each layer.
CONFIG = ModelConfig(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, max_positions=64,
    rms_eps=1e-5, tied=True, rope=Rope(theta=1e4), window=3, window_layers=(1,),
)  # fmt: skip
TINY = shapes._shape("Qwen2", 2, 32, 4, 2, 48, 384, theta=1e4, context=256)
# Of the published models: parameters, and the floor of a decode step in ms for 32 prompts of 256 tokens x 8 responses of 512, bfloat16,
# 3.0 TB/s: weights, keys and values alone.
PUBLISHED = {
    "smollm2-135m": (134_515_008, 0.66), "qwen2.5-0.5b": (494_032_768, 0.63), "qwen3-0.6b": (596_049_920, 3.22),
    "llama-3.2-1b": (1_235_814_400, 1.63), "qwen2.5-1.5b": (1_543_714_304, 1.73), "llama-3.1-8b": (8_030_261_248, 8.22),
}  # fmt: skip


def test_floor_of_sampling_by_hand():
    # Two responses to prompts of 5 and 2 tokens; 4, 3 and 1 rows draw a token, the first ones from 2 rows of logits.
    parts = floors.sampling(CONFIG, 2, [5, 2], 2, [3, 1, 2, 2])
    steps = [(p.name, p.bytes, p.flops) for p in parts]
    assert steps == [
        ("prefill", 240 * 2 + 2 * 7 * 8, 2 * 240 * 7),
        ("head", 80, 2 * 40 * 2), ("logits", 80, 0),
        ("head", 80, 2 * 40 * 3), ("logits", 120, 0), ("layers", 480, 2 * 240 * 3),
        # All 7 tokens of the prompts and 3 own ones; in the window 2 + 2 of the prompts and 3 own ones.
        ("keys and values", (10 + 7) * 8, 0),
        ("head", 80, 2 * 40), ("logits", 40, 0), ("layers", 480, 2 * 240),
        # One row is left: 5 and 2 own ones; in the window 1 and 2 own ones.
        ("keys and values", (7 + 3) * 8, 0),
    ]  # fmt: skip
    least = floors.seconds(parts, floors.Rates(bytes_per_s=1, flops_per_s=2))
    assert least == {"prefill": 1680, "head": 80 + 120 + 80, "logits": 240, "layers": 720 + 480, "keys and values": 216}


def test_floor_of_a_training_step_by_hand():
    rates = floors.Rates(bytes_per_s=1, flops_per_s=2)
    lora, full = (floors.training(CONFIG, 2, 7, 3, full=full) for full in (False, True))
    assert floors.seconds(lora, rates) == {"layers": 2 * 1680, "head": 2 * 120}
    assert floors.seconds(full, rates) == {"layers": 3 * 1680, "head": 3 * 120, "optimizer": 28 * 300}
    assert sum(p.flops for p in lora) == 4 * (240 * 7 + 40 * 3) and sum(p.flops for p in full) == 6 * (240 * 7 + 40 * 3)


def test_rates_are_those_of_the_fastest_probe():
    found = {"copy": floors.Probe(print, bytes=12), "read": floors.Probe(print, bytes=8), "product": floors.Probe(print, flops=30)}
    times = {name: {"median": s} for name, s in {"copy": 4, "read": 2, "product": 3, "dualign": 1}.items()}
    assert floors.rates(found, times) == floors.Rates(bytes_per_s=4, flops_per_s=10)
    for probe in floors.probes(torch.bfloat16, torch.device("cpu")).values():
        probe.step()


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name, tmp_path):
    config = ModelConfig.from_json(shapes.SHAPES[name], tmp_path)
    parameters, floor_ms = PUBLISHED[name]
    assert config.parameter_count() == parameters
    parts = floors.sampling(config, 2, [256] * 32, 8, [512] * 256)
    least = floors.seconds(parts, floors.Rates(bytes_per_s=3.0e12, flops_per_s=790e12))
    step_ms = 1000 / 512 * (least["layers"] + least["head"] + least["keys and values"])
    assert step_ms == pytest.approx(floor_ms, rel=0.012)


def test_a_shape_is_a_model_that_transformers_loads(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    with shapes.opened("", "tiny", torch.float32, torch.device("cpu")) as (name, folder, model):
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert name == "tiny, random weights" and not folder.exists()
    assert model.layers[1].down.std() == pytest.approx(0.02, rel=0.1) and not model.layers[1].qkv_bias.any()
    tokens = torch.arange(20) * 7
    with torch.no_grad():
        expected = stock(tokens[None]).logits[0]
        assert torch.allclose(model.logits(model(tokens, torch.tensor([0, 20]))), expected, atol=1e-5)
    with pytest.raises(SystemExit, match="qwen2.5-0.5b"), shapes.opened("", "qwen", torch.float32, torch.device("cpu")):
        pass
    with pytest.raises(SystemExit, match="--model left out"), shapes.opened("smoke", "tiny", torch.float32, torch.device("cpu")):
        pass


def test_training_step_is_dpo():
    folder = smoke_folder()
    model = load(folder)
    groups = train_step.batch(model.config.vocab_size, 3, 9, 12)
    step = train_step.ours(model, groups, train_step.reference_logprob(model, groups), full=True)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=train_step.RATE)

    def logprob() -> torch.Tensor:
        whole = torch.tensor([g.prompt + r for g in groups for r in g.responses])
        token = policy(whole).logits[:, :-1].log_softmax(2).gather(2, whole[:, 1:, None])[..., 0]
        return token[:, 8:].sum(1).view(-1, 2)

    reference = logprob().detach()
    for number in range(3):
        margin = train_step.BETA * (logprob() - reference) @ torch.tensor([1.0, -1.0])
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        assert step() == pytest.approx(loss.item(), abs=2e-6), number
    assert loss < math.log(2) - 0.05


def _one_row(line: dict) -> tuple[dict, str, list[str], list[str]]:
    """The row of ours, and title, header and row of the table, after a round through json."""
    title, header, ((*shown,),) = run.table_of(json.loads(json.dumps(line)))
    (row,) = line["candidates"]
    return row, title, header, shown


def test_line_of_a_rollout(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    line = run.run_rollout(run.Rollout(shape="tiny", rows=16, prompt=8, new=4, repeats=1, rivals=False))
    row, title, header, shown = _one_row(line)
    assert row["step_s"] == row["median_s"] / 4 and shown[header.index("ms per step")] == f"{250 * row['median_s']:.2f}"
    assert line["computed_s"] == pytest.approx(sum(line["computed_parts_s"].values()))
    assert row["computed_share"] == pytest.approx(line["computed_s"] / row["median_s"])
    assert "tiny, random weights" in title and "floor by bytes and flops" in title and "of that by bytes and flops" in header
    computed, gap = run.notes_of(line)
    assert "keys and values" in computed and "GB/s" in computed and "log-probs differ" in gap


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_line_of_a_training_step(monkeypatch, tune):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    options = {"pairs": 2, "prompt": 8, "response": 6, "repeats": 1, "rivals": False}
    line = run.run_train_step(run.TrainStep(shape="tiny", tune=tune, dtype="bfloat16", **options))
    row, title, header, shown = _one_row(line)
    per_token = 2 * (32 * 2 * (32 + 16) + 3 * 32 * 48)
    assert line["flops"] == (6 if tune == "full" else 4) * (per_token * 2 * (8 + 12) + 384 * 32 * 24)
    assert row["rate_share"] == pytest.approx(line["flops"] / row["median_s"] / line["flops_per_s"])
    assert row["tokens_per_s"] == pytest.approx(56 / row["median_s"]) and shown[header.index("tokens/s")] == f"{row['tokens_per_s']:.0f}"
    assert "of the rate of products" in header and ("full fine-tuning" in title) == (tune == "full")
    assert ("optimizer" in line["computed_parts_s"]) == (tune == "full")
    assert ("head, gradient of weights" in line["floor_layouts"]) == (tune == "full")


def test_lines_written_before_there_were_more_columns(tmp_path, monkeypatch):
    text = (run.HERE / "results.jsonl").read_text(encoding="utf-8")
    written = (run.HERE / "RESULTS.md").read_text(encoding="utf-8")
    monkeypatch.setattr(run, "HERE", tmp_path)
    run.write_results([json.loads(line) for line in text.splitlines()])
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == written


def test_a_rival_that_does_not_run_is_named():
    def broken():
        raise RuntimeError("out of memory\nand more")

    steps = {"dualign": lambda: 1}
    makers = {"made": lambda: lambda: 2, "not made": broken, "not called": lambda: broken}
    answers, not_run = run._add_rivals(steps, makers)
    assert list(steps) == ["dualign", "made"] and answers == {"made": 2}
    assert not_run == {"not made": "RuntimeError: out of memory", "not called": "RuntimeError: out of memory"}
    assert run.notes_of({"case": "loss_head", "not_run": not_run})[1] == "not called did not run: RuntimeError: out of memory"


def test_line_of_an_iteration():
    line = run.run_iteration(run.Iteration(model="smoke", steps=2, prompts=2, new=4, repeats=1, rivals=False))
    *stages, whole = line["candidates"]
    assert line["tokens"] == 2 * 2 * iteration.N * 4
    assert sum(row["median_s"] for row in stages) == pytest.approx(whole["median_s"])
    assert [row["name"] for row in stages if row["computed_share"] is None] == ["slack: rest"]
    assert whole["time_share"] == 1 and whole["computed_share"] == pytest.approx(sum(line["least_s"].values()) / whole["median_s"])
    title, header, rows = run.table_of(json.loads(json.dumps(line)))
    assert "2 policy steps of 4 responses" in title and len(rows) == 7 and {len(row) for row in rows} == {len(header)}


def test_floor_of_an_iteration_by_hand():
    """Half of the layers hold the adapter: 60 of 240 weights' products a layer and pass."""
    rates = floors.Rates(bytes_per_s=1e30, flops_per_s=1.0)
    size = iteration.Size(steps=3, prompts=2, new=9)
    least = iteration.least(CONFIG, 2, size, prompt=5, response=4.0, on=rates)
    head, layer, made = 2 * 40, 2 * 120, 2 * 4
    own = 6  # prompts in an iteration; 2 more measure the slack
    assert least["scoring"] == own * (layer * (5 + made) + head * made) == 3 * least["slack: scoring"]
    assert least["policy steps"] == 2 * least["scoring"]
    # The first token of both responses comes from the prompt's logits; the last one passes no layer.
    assert least["rollout"] == own * (2 * layer * (5 + 2 * 3) + head * (1 + 2 * 3)) == 3 * least["slack: rollout"]


@pytest.fixture
def once(monkeypatch):
    """Nothing is timed: every call is made once, and takes a millisecond."""
    monkeypatch.setattr(gpu, "per_call", lambda call, calls, device: (call(calls - 1), 1e-3)[1])
    return torch.device("cpu")


def test_steps_for_a_gpu_on_small_shapes(once):
    (line,) = gpu.ceilings(once, rows=32, width=16, vocabulary=50, side=8)
    title, header, rows = run.table_of(line)
    assert "32 rows x 16 x 50" in title and rows[-1][0] == "the three, bfloat16 output, Tflop/s"
    assert float(rows[-1][2]) == pytest.approx(6 * 32 * 16 * 50 / 3e-3 / 1e12, rel=1e-3)
    (line,) = gpu.decode(once, prompts=2, longest=20, room=8, layers=2)
    # Keys and values of 2 prompts of 20 tokens and of 16 rows of 8: 2 heads of 64 in 2 bytes.
    assert line["table"][2][:2] == ["qwen2.5-0.5b", 8] and line["table"][2][3] == pytest.approx(2 * 2 * 64 * 2 * (40 + 128) / 1e-3 / 1e9)
    (line,) = gpu.sampling(once, rows=2)
    assert len(line["table"]) == 16 and line["table"][0][2] == pytest.approx(2 * 49152 * 4 / 1e-3 / 1e9)
    (line,) = gpu.attention_kernels(once, groups=2, prompt=9, response=4)
    assert all(max(row[1:5]) < 0.03 for row in line["table"])


def test_a_small_kernel_is_timed_by_call():
    (line,) = gpu.launches(torch.device("cpu"), calls=3)
    assert all(0 < us < 1e5 for _, us in line["table"])


def test_parts_for_a_gpu_fit_their_time():
    assert all(len({s.name for s in steps}) == len(steps) for _, steps in gpu.PARTS.values())
    seconds = [sum(s.seconds for s in steps) for _, steps in gpu.PARTS.values()]
    assert max(seconds) < gpu.LIMIT_S and sum(seconds) < 25 * 60


def test_a_part_goes_on_where_it_was_cut_off(tmp_path, capsys):
    path, made, device = tmp_path / "part-1.jsonl", [], torch.device("cpu")

    def good(name, value=0):
        return gpu.Step(name, 1, lambda device: made.append(name) or [gpu.table(f"{name} {value}", ["x"], [[1.5]], device=device)])

    def bad(device):
        made.append("b")
        raise ValueError("no such luck")

    steps = [good("a"), gpu.Step("b", 1, bad), gpu.Step("late", 1e9, bad), good("c")]
    assert gpu.go_on(steps, path, device, limit_s=1e-9) == 3 and made == ["a"], "what does not fit is left"
    assert gpu.go_on(steps[:2] + steps[3:], path, device) == 1 and made == ["a", "b", "c"]
    assert "ValueError: no such luck" in gpu._records(path)[1]["failed"] and "no such luck" in capsys.readouterr().out
    assert gpu.go_on([steps[1], good("d")], path, device) == 1 and made[-2:] == ["d", "b"], "what failed comes last"
    assert gpu.go_on([good("b"), good("d")], path, device) == 0 and made[-1] == "b"


def test_figures_of_a_gpu_are_added_once(tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_text("")
    monkeypatch.setattr(run, "HERE", tmp_path)
    step = gpu.Step("s", 1, lambda device: [gpu.table("Name", ["x", "y"], [["one", 2.34567]], ("a note",), device=device)])
    gpu.go_on([step], tmp_path / "part-3.jsonl", torch.device("cpu"))
    assert gpu.main(["--out", str(tmp_path)]) == 0 and gpu.collect(tmp_path) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("## Name") == 1 and "| one | 2.346 |" in text and "a note" in text


@pytest.mark.parametrize("arguments,message", [(["--part", "7"], "--part 7: must be 1 to 6, or 0"), (["--part", "1"], "needs a GPU")])
def test_parts_that_cannot_run_say_why(tmp_path, arguments, message):
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match=message):
        gpu.main([*arguments, "--out", str(tmp_path)])


def test_tests_are_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="m" name="a"/><testcase classname="m" name="b"><failure message="x is 3&#10;more"/>'
        '</testcase><testcase classname="m" name="c"><skipped message="needs a GPU"/></testcase></testsuite></testsuites>'
    )
    counts, notes = gpu.counted(report)
    assert counts == [1, 1, 1] and "m::b" in notes[0] and "x is 3" in notes[0] and notes[1] == "1 skipped: needs a GPU"
