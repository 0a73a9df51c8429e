"""The cases of bench.run: their lines and tables, and the training step against plain torch."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.run import attention, floors, iteration, results, rollout, scoring, shapes, train_step
from bench.run.candidates import add_rivals
from bench.run.results import notes_of, table_of
from engine.model.folder import load
from engine.stages.smoke import smoke_folder
from tests.helpers.tiny_shape import TINY


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    """Products of 16 bits take a minute on processors without instructions for them."""
    monkeypatch.setitem(floors.PROBED, "cpu", (2**20, 64))


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
    """Returns our row, and title, header and row of the table, after a round through json."""
    title, header, ((*shown,),) = table_of(json.loads(json.dumps(line)))
    (row,) = line["candidates"]
    return row, title, header, shown


def test_line_of_scoring(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    case = scoring.Scoring(shape="tiny", prompts=2, responses=3, prompt=5, response=2, repeats=1)
    line = json.loads(json.dumps(scoring.run(case)))
    assert line["difference"] < 1e-5 and line["packed_tokens"] < line["tokens"]
    title, header, rows = table_of(line)
    assert "6 responses of 2 words to prompts of 5" in title and [row[0] for row in rows] == [
        "dualign",
        "transformers",
    ]
    ours, theirs = (row["median_s"] for row in line["candidates"])
    assert rows[1][header.index("time / ours")] == f"{theirs / ours:.2f}"


@pytest.mark.parametrize("gradient", [False, True])
def test_line_of_attention(gradient):
    case = attention.Attention(prompts=2, responses=3, prompt=5, response=2, repeats=1, gradient=gradient)
    line = json.loads(json.dumps(attention.run(case)))
    title, _, rows = table_of(line)
    assert line["tokens"] == 22 and ("with gradients" in title) == gradient
    assert [row[0] for row in rows] == ["dualign", "torch on a grid"]


def test_attention_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(attention, "on_grid", lambda layout, query, key, value: query)
    with pytest.raises(SystemExit, match="results differ by"):
        attention.run(attention.Attention(prompts=1, responses=1, repeats=1))


def test_line_of_a_rollout(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    line = rollout.run(rollout.Rollout(shape="tiny", rows=16, prompt=8, new=4, repeats=1, rivals=False))
    row, title, header, shown = _one_row(line)
    assert row["step_s"] == row["median_s"] / 4
    assert shown[header.index("ms per step")] == f"{250 * row['median_s']:.2f}"
    assert line["computed_s"] == pytest.approx(sum(line["computed_parts_s"].values()))
    assert row["computed_share"] == pytest.approx(line["computed_s"] / row["median_s"])
    assert "tiny, random weights" in title and "floor by bytes and flops" in title
    assert "of that by bytes and flops" in header
    computed, gap = notes_of(line)
    assert "keys and values" in computed and "GB/s" in computed and "log-probs differ" in gap


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_line_of_a_training_step(monkeypatch, tune):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    options = {"pairs": 2, "prompt": 8, "response": 6, "repeats": 1, "rivals": False}
    line = train_step.run(train_step.TrainStep(shape="tiny", tune=tune, dtype="bfloat16", **options))
    row, title, header, shown = _one_row(line)
    per_token = 2 * (32 * 2 * (32 + 16) + 3 * 32 * 48)
    assert line["flops"] == (6 if tune == "full" else 4) * (per_token * 2 * (8 + 12) + 384 * 32 * 24)
    assert row["rate_share"] == pytest.approx(line["flops"] / row["median_s"] / line["flops_per_s"])
    assert row["tokens_per_s"] == pytest.approx(56 / row["median_s"])
    assert shown[header.index("tokens/s")] == f"{row['tokens_per_s']:.0f}"
    assert "of the rate of products" in header and ("full fine-tuning" in title) == (tune == "full")
    assert ("optimizer" in line["computed_parts_s"]) == (tune == "full")
    assert ("head, gradient of weights" in line["floor_layouts"]) == (tune == "full")


def test_lines_written_before_there_were_more_columns(tmp_path, monkeypatch):
    text = (results.HERE / "results.jsonl").read_text(encoding="utf-8")
    written = (results.HERE / "RESULTS.md").read_text(encoding="utf-8")
    monkeypatch.setattr(results, "HERE", tmp_path)
    results.write_results([json.loads(line) for line in text.splitlines()])
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == written


def test_a_rival_that_does_not_run_is_named():
    def broken():
        raise RuntimeError("out of memory\nand more")

    steps = {"dualign": lambda: 1}
    makers = {"made": lambda: lambda: 2, "not made": broken, "not called": lambda: broken}
    answers, not_run = add_rivals(steps, makers)
    assert list(steps) == ["dualign", "made"] and answers == {"made": 2}
    error = "RuntimeError: out of memory"
    assert not_run == {"not made": error, "not called": error}
    assert notes_of({"case": "loss_head", "not_run": not_run})[1] == f"not called did not run: {error}"


def test_line_of_an_iteration(monkeypatch):
    # A run takes as many threads as it may use cores; here the other cores belong to other tests.
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    options = {"steps": 2, "prompts": 2, "new": 4, "repeats": 1, "rivals": False}
    line = iteration.run(iteration.Iteration(model="smoke", **options))
    *stages, whole = line["candidates"]
    assert line["tokens"] == 2 * 2 * iteration.N * 4
    assert sum(row["median_s"] for row in stages) == pytest.approx(whole["median_s"])
    assert [row["name"] for row in stages if row["computed_share"] is None] == ["slack: rest"]
    least_s = sum(line["least_s"].values())
    assert whole["time_share"] == 1
    assert whole["computed_share"] == pytest.approx(least_s / whole["median_s"])
    title, header, rows = table_of(json.loads(json.dumps(line)))
    assert "2 policy steps of 4 responses" in title
    assert len(rows) == 7 and {len(row) for row in rows} == {len(header)}
