"""What ranks send one another, counted on two of them, and the prediction for many."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.run import floors, shapes
from bench.scale import __main__ as command
from bench.scale import counted, measured, predicted
from bench.scale.cards import CARDS, GIGA
from bench.scale.counted import Counted
from bench.scale.parts import Message
from bench.scale.picture import efficiencies
from bench.scale.predicted import MODELS, RUN, predict
from engine import model
from engine.model.architecture import ModelConfig
from engine.model.tokenizer import load_tokenizer
from engine.ranks import Ranks
from engine.run import plan
from engine.run.plan import Plan
from engine.stages.smoke import smoke_folder
from tests.helpers.ranks import on_ranks

H100 = CARDS["h100"]


@pytest.fixture(scope="module")
def counts(cache, tmp_path_factory) -> dict[str, list[Counted]]:
    """Counts runs with either --tune on two ranks, by its name."""
    counted.import_before_forks()
    load_tokenizer(smoke_folder())
    plan.matmul_rate(torch.float32, torch.device("cpu"))
    home = tmp_path_factory.mktemp("counted")
    one, other = on_ranks(2, lambda ranks: {tune: counted.count(ranks, tune, home / tune) for tune in TUNED})
    assert isinstance(one, dict), one
    # Both are in the same messages, but for those in which rank 0 collects what the shards' files are.
    assert one["lora"] == other["lora"] and one["full"][:3] == other["full"][:3]
    return one


TUNED = ("lora", "full")
# Weights of the tiny model: 4 layers of 32 states, 2 heads of 8 and one of keys, 64 inner states, 192 tokens.
ADAPTER = 2 * 64 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))


@pytest.mark.parametrize("tune", TUNED)
def test_ranks_send_little_more_than_they_must(counts, tune):
    for part in counts[tune]:
        assert part.least <= part.bytes <= part.most, (part.name, part.bytes, part.least, part.most)
        assert part.most <= 1.02 * part.least + part.padding + 128 * 1024
    reference, _, steps, _ = counts[tune]
    assert reference.words < 0.1 * reference.least and steps.words == steps.padding == 0


def test_a_policy_step_sends_the_adapters_gradients_once_and_six_numbers(counts):
    sums = [message for message in counts["lora"][2].messages if "reduce" in message.op]
    assert sums == 3 * [Message("allreduce", 6 * 8), Message("allreduce", 4 * ADAPTER)]


def test_a_pass_over_spread_weights_gathers_each_layer_twice_and_sums_its_gradients_once(counts):
    network = model.load(smoke_folder())
    layers = [sum(value.numel() for value in layer.parameters()) for layer in network.layers]
    outer = sum(value.numel() for value in network.parameters()) - sum(layers)
    found = {
        op: [message.bytes for message in counts["full"][2].messages if message.op == op]
        for op in ("allgather_base", "reduce_scatter_base", "allreduce")
    }
    assert found["allgather_base"] == 3 * [4 * outer, *(4 * size for size in layers + layers)]
    assert found["reduce_scatter_base"] == 3 * [*(4 * size for size in layers), 4 * outer]
    assert found["allreduce"] == 3 * [6 * 8]
    # Sampling, scoring and the comparison of the two gather all weights once each, and so does the iterate.
    for part, times in ((0, predicted.SAMPLING_GATHERS), (1, 0), (3, 1)):
        gathers = [m.bytes for m in counts["full"][part].messages if m.op == "allgather_base"]
        assert gathers == times * [4 * outer, *(4 * size for size in layers)]


def test_a_stage_sends_its_samples_twice_and_an_update_its_adapter_with_the_moments(counts):
    reference, _, _, iterate = counts["lora"]
    assert len(reference.messages) == predicted.SAMPLING_MESSAGES + predicted.STAGE_MESSAGES
    rows = counted.PROMPTS * counted.RESPONSES
    large = [message for message in reference.messages if message.bytes > 1000]
    assert [message.op for message in large] == ["allgather", "broadcast"]
    assert all(message.bytes > rows * (17 * counted.TOKENS + 49) for message in large)
    large = [message for message in iterate.messages if message.bytes > 1000]
    assert [message.op for message in large] == ["broadcast"]
    assert 12 * ADAPTER < large[0].bytes < 12 * ADAPTER + 4096


def by_hand(prompts: int, n: int) -> float:
    """Counts the bytes of samples with 256 tokens each."""
    return prompts * n * (256 * (17 + 4) + 49)


def test_what_is_sent_on_eight_ranks_by_hand():
    stages = predict("8b", "lora", H100, 8).stages
    names = ["reference", "policy step", "iterate", "slack", "held-out reference", "held-out policy"]
    assert [stage.name for stage in stages] == names
    reference, step, iterate, slack, *heldout = stages
    assert [stage.times for stage in stages] == [1, 100, 5, 5, 1, 1]
    adapter = 16 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    gradients = 2 * 7 / 8 * 4 * adapter
    assert step.sent_bytes == pytest.approx(gradients + 2 * 7 / 8 * 48)
    assert step.message_s == pytest.approx(gradients / (300 * GIGA) + 2 * 50e-6)
    # To all, and from rank 0 again as the stage's result.
    assert reference.sent_bytes == pytest.approx((7 / 8 + 1) * by_hand(8192, 8))
    assert slack.sent_bytes == pytest.approx(7 / 8 * by_hand(1024, 4))
    for side in heldout:
        assert side.message_s == pytest.approx((7 / 8 + 1) * by_hand(1024, 6) / (2 * GIGA) + 16 * 50e-6)
    assert iterate.sent_bytes == 12 * adapter


def test_what_shards_send_by_hand():
    found = predict("8b", "full", H100, 16)
    reference, step, iterate = found.stages[:3]
    assert found.shards == 8, "copies on two machines"
    weights, outer = MODELS["8b"].parameter_count(), 2 * 128256 * 4096 + 4096
    gathered = 2 * weights * 7 / 8
    assert reference.sent_bytes == pytest.approx((15 / 16 + 1) * by_hand(8192, 8) + 3 * gathered)
    assert iterate.sent_bytes == gathered and iterate.messages == 10 + 33
    passes = -(-16 * (128 + 512) // (2048 if "2048" in found.spared else 8192))
    within, beyond = 7 / 8 * (2 * (2 * weights - outer) + 4 * weights), 2 * 1 / 2 * 4 * weights / 8
    assert step.sent_bytes == pytest.approx(passes * (within + beyond) + 2 * 15 / 16 * 48)
    waits = passes * (within / (300 * GIGA) + beyond / (45 * GIGA))
    assert step.message_s == pytest.approx(waits + step.messages * 50e-6)
    # Three collectives of each layer, two of the rest, a sum between machines of each, six numbers, the
    # norm, and twice how many passes each rank has.
    assert step.messages == passes * (3 * 32 + 2 + 33) + 4


def test_a_step_is_computed_at_the_assumed_share_of_the_peak():
    step = predict("8b", "lora", H100, 8).stages[1]
    layers, head = floors.weights(MODELS["8b"])
    tokens, completions = 32 * (128 + 512), 32 * 512
    # Above forward and backward, and forward through the reference; below forward.
    flops = 2 * tokens * (3 * layers / 2 + layers / 2) + 3 * 2 * head * completions
    assert step.compute_s == pytest.approx(flops / (0.45 * 989e12))


def test_what_slices_send_by_hand():
    """Each of two machines holds 70B in eight slices, and half of the prompts; states of 8192 numbers in 16
    bits are summed twice in each of 80 layers."""
    found = predict("70b", "lora", H100, 16, 8)
    assert found.fits and found.spared == "--activation-checkpointing"
    reference, step = found.stages[:2]
    tokens, state = 128 * (128 + 512), 2 * 8192
    # Forward through all layers, and three times through the trained half, once of the reference.
    sums = 2 * 7 / 8 * 2 * (80 + 3 * 40) * tokens * state
    adapter = 40 * 8 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    gradients = 2 * 15 / 16 * 4 * adapter
    assert step.sent_bytes == pytest.approx(sums + gradients + 2 * 15 / 16 * 48)
    assert step.messages == 2 * (80 + 3 * 40) * -(-tokens // 8192) + 2
    assert step.message_s == pytest.approx(
        sums / (300 * GIGA) + gradients / (45 * GIGA) + step.messages * 50e-6
    )
    batches = -(-4096 // (found.rows // 8))
    assert reference.messages == 160 * batches * 256 + 16
    sums = 2 * 7 / 8 * 160 * 4096 * (128 + 8 * 255) * state
    assert reference.sent_bytes == pytest.approx(sums + (15 / 16 + 1) * by_hand(8192, 8))


def test_memory_is_that_of_the_runs_own_plan(monkeypatch):
    class Alike(Ranks):
        def gather(self, value):
            return [value] * self.size

    monkeypatch.setattr(plan, "matmul_rate", lambda dtype, device: 1e14)
    monkeypatch.setattr(plan, "available_memory", lambda device: 79 * GIGA)
    monkeypatch.setattr(plan, "device_name", lambda device: "H100")
    found = predict("8b", "lora", H100, 16)
    assert not found.spared
    lengths = [128] * RUN.n_prompts, [128] * RUN.eval_prompts
    device = torch.device("cuda")
    own = Plan.of(
        RUN, MODELS["8b"], torch.bfloat16, device, *lengths, fewer_rows=True, ranks=Alike(0, 16, 0, 8)
    )
    assert (own.needed_bytes, own.rows, own.shards) == (found.needed_bytes, found.rows, found.shards)


def test_more_ranks_are_used_less_well():
    curve = [predict("8b", "lora", H100, ranks) for ranks in (16, 32, 64)]
    shares = efficiencies(curve)
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and 0.5 < shares[-1] < 0.95
    times = [
        point.ranks * sum(s.times * (s.compute_s + s.message_s) for s in point.stages) for point in curve
    ]
    assert shares == pytest.approx([times[0] / time for time in times])


def command_on(tmp_path: Path, capsys, monkeypatch, *flags: str, over: float = 1.0) -> tuple[int, str, str]:
    """Runs the command without counting."""
    count = Counted(name="sampling", messages=[Message("allgather", int(over * 1000))], least=1000)
    monkeypatch.setattr(command, "count_on", lambda size, tune: [count])
    monkeypatch.setattr(command, "RANKS", (1, 8, 16))
    monkeypatch.setattr(command, "MODELS", ["8b"])
    monkeypatch.setenv("COLUMNS", "140")
    code = command.main([*flags, "--picture", str(tmp_path / "scale.png")])
    return code, *capsys.readouterr()


def test_the_command_says_that_it_predicts_and_what_it_assumes(tmp_path, capsys, monkeypatch):
    code, said, _ = command_on(tmp_path, capsys, monkeypatch, "--ranks", "16", "--tune", "full")
    assert code == 0 and said.startswith("A PREDICTION, not a measurement: CAID with --tune full on 8b")
    for assumed in ("989 Tflop/s", "45 % of the peak", "300 GB/s", "every response takes all", "no time"):
        assert assumed in said
    assert "policy step" in said and "does not fit" in said and "1020" in said
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_the_command_fails_where_too_much_is_sent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_print", lambda *words: None)
    monkeypatch.setattr(command, "_curves", lambda card: {"8b": [predict("8b", "lora", H100, 64)]})
    code, said, _ = command_on(tmp_path, capsys, monkeypatch, over=1.03)
    assert code == 1 and "1020, and is more" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--model", "70b"],
            "70b on 64 ranks needs 1[0-9.]+ GB on each and 79 GB are free; what would fit: --model-ranks 4",
        ),
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--ranks", "12", "--model-ranks", "8"], "--model-ranks 8 does not divide --ranks 12"),
        (["--tune", "full", "--model-ranks", "8"], "--model-ranks 8: slices are for adapters"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, monkeypatch, flags, words):
    code, _, said = command_on(tmp_path, capsys, monkeypatch, *flags)
    assert code == 2 and re.search(words, said) and said.count("\n") == 1


def test_rates_are_those_of_the_slowest_rank(monkeypatch):
    monkeypatch.setitem(floors.PROBED, "cpu", (2**16, 32))

    def work(ranks: Ranks):
        return measured.measured(H100, ranks, torch.device("cpu"), 2**16)

    one, other = on_ranks(2, work)
    assert one == other and one.name == "h100, measured"
    assert one.remote_bytes_per_s == H100.remote_bytes_per_s, "both are on one machine"
    rates = (one.flops_per_s, one.bytes_per_s, one.local_bytes_per_s, one.host_bytes_per_s, one.message_s)
    assert all(0 < rate < 1e15 for rate in rates) and one != replace(H100, name=one.name)


def test_a_run_is_measured_part_by_part_beside_its_prediction(cache, tmp_path, monkeypatch):
    """On processors, of a tiny model with random weights."""
    tiny = shapes.config_json(
        "Llama", shapes.Sizes(3, 32, 2, 1, 64, 384), 1e4, 512, tie_word_embeddings=False
    )
    short = {"n_prompts": 8, "n_responses": 2, "max_new_tokens": 4, "prompts_per_step": 4, "steps": 2}
    short |= {"slack_prompts": 3, "slack_responses": 2, "eval_prompts": 4, "eval_responses": 2, "threads": 1}
    monkeypatch.setitem(command.CONFIGS, "8b", tiny)
    monkeypatch.setitem(predicted.MODELS, "8b", ModelConfig.from_json(tiny, Path("config.json")))
    monkeypatch.setattr(command, "SHORT", command.SHORT | short)
    counted.import_before_forks()
    load_tokenizer(smoke_folder())
    plan.matmul_rate(torch.bfloat16, torch.device("cpu"))

    def work(ranks: Ranks):
        scratch = tmp_path / "scratch"
        return command.measured_run("8b", "lora", H100, ranks, torch.device("cpu"), scratch)

    one, other = on_ranks(2, work)
    assert isinstance(one, tuple), one
    (every, found), parts = one, [part.name for part in one[0][0]]
    assert parts == ["reference", "dual", "update", "slack"] and len(every) == 2
    assert [[part.messages for part in rank] for rank in every] == 2 * [[p.messages for p in other[0][1]]]
    assert all(part.seconds > 0 for part in every[0]) and found.ranks == 2
    assert not (tmp_path / "scratch").exists()
    console = Console(width=120)
    with console.capture() as said:
        console.print(command.measured_table(every, found))
    update = next(line for line in said.get().splitlines() if "update" in line).split("│")
    predicted_s = sum(s.seconds for s in found.stages if s.name in command.IN_UPDATE)
    assert update[3].strip() == f"{predicted_s:.3f}" and int(update[4]) == len(every[0][2].messages)
