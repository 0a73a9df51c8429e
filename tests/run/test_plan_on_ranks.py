"""The predicted time and memory of each of several ranks, on fake process groups as large as clusters."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine import caid, model, train
from engine.config import CaidConfig
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.decoder import Decoder
from engine.model.tokenizer import load_tokenizer
from engine.ranks import Ranks
from engine.run import needs
from engine.run import plan as plan_module
from engine.run.needs import ScorerSize
from engine.run.plan import Plan
from engine.run.spread import pieces, shard_size, spread_bytes, step_bytes
from engine.stages.smoke import smoke_folder
from tests.helpers.plans import SHAPE
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import SMOKE

GB = 10**9
GPU, HALF = torch.device("cuda"), torch.bfloat16


def published(family: str, layers: int, hidden: int, inner: int, heads: int, vocabulary: int, **more):
    """Returns the sizes of a published model with 8 heads of keys, as its config.json has them."""
    raw = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **more,
    }
    return ModelConfig.from_json(raw, Path("config.json"))


MODELS = {
    "Llama 3 8B": published("Llama", 32, 4096, 14336, 32, 128256),
    "Qwen 32B": published("Qwen2", 64, 5120, 27648, 40, 152064),
    "Llama 3 70B": published("Llama", 80, 8192, 28672, 64, 128256),
}
UNEVEN = replace(SHAPE, vocab_size=1003, num_layers=2)


@contextmanager
def fake_mesh(*sizes: int, rank: int = 0) -> Iterator[DeviceMesh]:
    """Pretends to be one of so many ranks, whose messages go nowhere."""
    world = torch.Size(sizes).numel()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
    finally:
        dist.destroy_process_group()


def spread(shape: ModelConfig, mesh: DeviceMesh) -> Decoder:
    """Spreads a model without memory over a mesh, as FSDP2 does it with each layer and the rest."""
    network = Decoder(shape, {}, torch.float32, torch.device("meta"))
    for part in (*network.layers, network):
        fully_shard(part, mesh=mesh)
    return network


def held_bytes(network: Decoder) -> int:
    return sum(weight.to_local().untyped_storage().nbytes() for weight in network.parameters())


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("name", MODELS)
def test_predicted_shards_are_those_of_fsdp(name, size):
    shape = MODELS[name]
    with fake_mesh(size, rank=size - 1) as mesh:
        network = spread(shape, mesh)
        assert held_bytes(network) == 4 * shard_size(shape, size) == 4 * shape.parameter_count() // size
        assert sum(weight.to_local().nbytes for weight in network.parameters()) == held_bytes(network)
    layer, outer = pieces(shape, size)
    assert outer == (2 * shape.vocab_size * shape.hidden_size + shape.hidden_size) // size
    assert shape.num_layers * layer + outer == shape.parameter_count() // size


@pytest.mark.parametrize("rank", [0, 47])
def test_shards_of_sizes_that_no_number_divides_count_their_padding(rank):
    with fake_mesh(48, rank=rank) as mesh:
        assert held_bytes(spread(UNEVEN, mesh)) == 4 * shard_size(UNEVEN, 48)
    assert shard_size(UNEVEN, 48) > UNEVEN.parameter_count() / 48


def test_shards_of_one_machine_are_copied_to_the_others():
    with fake_mesh(4, 8) as mesh:
        assert held_bytes(spread(UNEVEN, mesh)) == 4 * shard_size(UNEVEN, 8)


@dataclass(frozen=True)
class Pretended(Ranks):
    """One of many ranks, of which each says how many bytes are free, how fast it multiplies and on what;
    without a word the others are as this one."""

    others: tuple[tuple[int, float, str], ...] = field(default=())

    def gather(self, value):
        return [(*other, self.local_size) for other in self.others] or [value] * self.size


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "matmul_rate", lambda dtype, device: 1e14)
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 79 * GB)
    monkeypatch.setattr(plan_module, "device_name", lambda device: CARD)


CARD = "NVIDIA H100 80GB HBM3"
PROMPTS = {"n_prompts": 8192, "n_responses": 8, "prompts_per_step": 256, "max_new_tokens": 256}
PROMPTS |= {"slack_prompts": 1024, "slack_responses": 4, "eval_prompts": 1024, "memory_budget_mb": 1024}
PROMPTS |= {"tokens_per_forward": 4096}


def planned(shape: ModelConfig, ranks: Ranks, *, dtype=HALF, device=GPU, scorers=(), **settings) -> Plan:
    fewer_rows = "rollout_rows" not in settings
    config = CaidConfig(**PROMPTS | {"learning_rate": 1e-5, "weight_average": 0.0} | settings)
    lengths = [100] * config.n_prompts, [100] * config.eval_prompts
    return Plan.of(
        config, shape, dtype, device, *lengths, fewer_rows=fewer_rows, ranks=ranks, scorers=scorers
    )


def peak(counted: float) -> int:
    return int(1.15 * counted) + 600 * 2**20


SAMPLES = 32 * 256 * (8192 * 8 + 2 * 1024 * 6 + 1024 * 4)
GATHERED = 32 * 256 * 8192 * 8
CACHE = 2 * 8 * 128 * 2  # bytes of a token's keys and values in a layer


def passed(shape: ModelConfig, slices: int = 1) -> int:
    """Counts the bytes of a token in a pass without a gradient."""
    inside = 2 * (shape.num_heads + 8) * 128 + 3 * shape.intermediate_size
    return 2 * (10 * shape.hidden_size + inside // slices)


@pytest.mark.parametrize("rows", [384, 8])
@pytest.mark.parametrize("size", [8, 64, 128])
def test_a_rank_of_adapters_has_the_whole_model_and_its_share_of_the_prompts(size, rows):
    shape = MODELS["Llama 3 8B"]
    found = planned(shape, Pretended(0, size, 0, 8), rollout_rows=rows)
    # Most prompts stand beside the rows that measure slacks, 4 of each prompt, where a rank has so many of
    # these, else beside those of the reference. 100 tokens of cache for a prompt and 256 for a row, in 32
    # layers; each row's token in its pass, and its logits.
    prompts = rows // (4 if 1024 // size * 4 >= rows else 8)
    sampling = (prompts * 100 + rows * 256) * CACHE * 32 + rows * (passed(shape) + 128256 * 4 * 3)
    states = (8192 // size) * (100 + 8 * 256) * 4096 * 2
    assert (states > 2 * 2**30) == (size < 128), "too many to be kept"
    states = states if size == 128 else 0
    # A batch's states are kept where those of its whole set are.
    sampling += rows * 256 * 4096 * 2 if states or 1024 // size * 4 >= rows else 0
    scoring = 32768 * passed(shape) + 2**30 + states
    # In each of 16 layers an input and an output of each linear: 10 D + 4 I numbers of 2 bytes for a token.
    group = 100 + 2 * 256
    tokens = min(256 // size * group, max(4096, group))
    step = 2 * 16 * (10 * 4096 + 4 * 14336) * tokens + 256 * 128 + 2**30
    linears = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert linears * 32 + 2 * 128256 * 4096 + 65 * 4096 == shape.parameter_count()
    sizes = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    training = step + 28 * 16 * 8 * sizes
    sampling += states
    assert (sampling > training) == (rows == 384)
    weights = 2 * shape.parameter_count()
    assert found.needed_bytes == peak(weights + SAMPLES + GATHERED + max(sampling, training, scoring))
    assert (found.rows, found.shards, found.ranks) == (rows, 1, size)
    assert 20 * GB < found.needed_bytes < 79 * GB
    found.check()


def test_a_mean_over_steps_takes_memory_too():
    """Of each weight itself in float32; of an adapter's also the last weights at the start and in a
    checkpoint."""
    shape, ranks = MODELS["Llama 3 8B"], Pretended(0, 8, 0, 8)
    sizes = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    spread = {"tune": "full", "activation_checkpointing": True}
    for settings, more in (({}, 12 * 16 * 8 * sizes), (spread, 4 * shape.parameter_count() // 8)):
        last, mean = (
            planned(shape, ranks, rollout_rows=8, weight_average=share, **settings).needed_bytes
            for share in (0.0, 0.8)
        )
        assert mean - last == pytest.approx(1.15 * more, rel=1e-6)


@pytest.mark.parametrize("rows", [384, 8])
def test_a_rank_with_a_slice_has_the_whole_adapter_and_its_models_share_of_the_prompts(rows):
    """Llama 3 70B on 16 ranks that hold two models: in each slice 8 heads, one of them of keys."""
    shape = MODELS["Llama 3 70B"]
    found = planned(shape, Pretended(0, 16, 0, 8, model=Ranks(0, 8)), rollout_rows=rows)
    linears = 2 * 8192 * 1024 + 2 * 8192 * 128 + 3 * 8192 * 3584
    weights = 2 * (80 * (linears + 2 * 8192) + 8192 + 2 * 128256 * 8192)
    prompts = rows // 4  # whose slacks are measured
    sampling = (prompts * 100 + rows * 256) * (CACHE // 8) * 80 + rows * (passed(shape, 8) + 128256 * 4 * 3)
    scoring = 32768 * passed(shape, 8) + 2**30
    step = 2 * 40 * (10 * 8192 + 4 * 3584) * 4096 + 256 * 128 + 2**30
    sizes = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    training = step + 28 * 40 * 8 * sizes
    assert found.needed_bytes == peak(weights + SAMPLES + GATHERED + max(sampling, training, scoring))
    assert 21 * GB < weights < 22 * GB
    found.check()


def test_a_slice_takes_its_part_of_the_time():
    """All but the head, which is whole, takes an eighth; and two models have half of the prompts each."""
    shape = replace(MODELS["Llama 3 70B"], vocab_size=8)

    def seconds(size: int, together: int) -> float:
        return planned(shape, Pretended(0, size, 0, 8, model=Ranks(0, together))).seconds

    # But for the prompts that measure the gap of log-probs, which each model passes.
    assert seconds(16, 8) == pytest.approx(seconds(8, 8) / 2, rel=0.002)
    assert seconds(8, 8) == pytest.approx(seconds(8, 1), rel=0.01), "eight models share out the prompts"


@pytest.mark.parametrize(("name", "size"), [("Llama 3 8B", 8), ("Llama 3 8B", 64), ("Qwen 32B", 64)])
def test_a_rank_of_shards_gathers_the_weights_of_one_model_at_a_time(monkeypatch, name, size):
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 141 * GB)
    shape, settings = MODELS[name], {"tune": "full", "activation_checkpointing": True}
    found = planned(shape, Pretended(0, size, 0, size), **settings)
    weights, D, layers, V = shape.parameter_count(), shape.hidden_size, shape.num_layers, shape.vocab_size
    # Float32 with gradient and two moments, the start and the iterate; the reference in 16 bits.
    resident = (24 + 2) * weights // size
    assert resident == spread_bytes(shape, HALF, size, on_cpu=False, averaged=False)
    # The prompts' keys and values stand twice while a cache is made of them, or there is a step.
    prompts, token = 96 if size == 8 else 48, CACHE * layers
    beside = max(prompts * 100 * token, 384 * (passed(shape) + V * 4 * 3))
    sampling = 2 * weights + (prompts * 100 + 384 * 256) * token + beside
    scoring = 2 * weights + 32768 * passed(shape) + 2**30
    outer = 2 * V * D + D
    gathered = (2 + 2 + 4) * outer + (3 * 2 + 2 + 4) * (weights - outer) // layers
    assert gathered == step_bytes(shape, HALF)
    group = 100 + 2 * 256
    tokens = min(256 // size * group, max(4096, group))
    activations = 2 * (10 * D + 4 * shape.intermediate_size + layers * D) * tokens
    training = gathered + activations + 256 * 128 + 2**30
    assert found.needed_bytes == peak(resident + SAMPLES + GATHERED + max(sampling, training, scoring))
    assert found.shards == size
    found.check()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 65, 1001])
def test_the_largest_share_is_that_of_some_rank(n, size):
    assert needs.largest_share(n, size) == max(len(Ranks(rank, size).share(n)) for rank in range(size))


def test_the_rank_with_least_memory_and_the_slowest_one_decide():
    shape, free, rates = MODELS["Llama 3 8B"], (79, 35, 79, 79), (1e14, 1e14, 5e13, 1e14)
    found = [(GB * some, rate, CARD) for some, rate in zip(free, rates, strict=True)]
    even = planned(shape, Pretended(0, 4, 0, 4))
    plans = [planned(shape, Pretended(rank, 4, rank, 4, others=tuple(found))) for rank in range(4)]
    assert plans == [plans[0]] * 4
    assert (plans[0].available_bytes, plans[0].tightest) == (35 * GB, 1)
    assert plans[0].rows < even.rows and plans[0].seconds == pytest.approx(2 * even.seconds)


def test_time_is_that_of_the_rank_with_most_prompts():
    def seconds(size: int, **settings) -> float:
        return planned(SHAPE, Pretended(0, size, 0, size), n_responses=4, **settings).seconds

    few = {"n_prompts": 16, "eval_prompts": 8, "slack_prompts": 8, "slack_responses": 2, "steps": 10}
    # But for the prompts that measure the gap of log-probs, which each rank passes.
    two, four, eight = (seconds(size, prompts_per_step=8, **few) for size in (2, 4, 8))
    assert two - four == pytest.approx(2 * (four - eight)) and 1.6 * four < two < 2 * four
    # On 8 ranks 4 prompts keep 4 of them busy in a step; all else is halved again.
    idle = seconds(4, prompts_per_step=4, **few) - seconds(8, prompts_per_step=4, **few)
    busy = seconds(4, prompts_per_step=4, **few | {"steps": 1}) - seconds(
        8, prompts_per_step=4, **few | {"steps": 1}
    )
    assert idle == pytest.approx(busy)
    # A step of nine prompts on 8 ranks takes as long as one of 16.
    more = few | {"n_prompts": 32}
    assert seconds(8, prompts_per_step=9, **more) == pytest.approx(seconds(8, prompts_per_step=16, **more))
    # Nine prompts on 8 ranks take as long as 16.
    assert seconds(8, prompts_per_step=8, **few | {"eval_prompts": 9}) == pytest.approx(
        seconds(8, prompts_per_step=8, **few | {"eval_prompts": 16})
    )


def test_several_ranks_compute_the_states_below_the_adapter_in_each_step():
    def of_a_step(size: int) -> float:
        # As many samples as one rank keeps the states of.
        settings = {"n_prompts": 4096, "n_responses": 4, "prompts_per_step": 8, "dtype": torch.float32}
        more, fewer = (
            planned(SHAPE, Pretended(0, size, 0, size), steps=steps, **settings).seconds for steps in (11, 1)
        )
        return (more - fewer) / 50  # steps of 5 iterations

    body, answer = SHAPE.parameter_count() - SHAPE.hidden_size * SHAPE.vocab_size, needs.ANSWER_SHARE * 256
    attention = needs.attention_products(SHAPE, 50) * 100
    attention += needs.attention_products(SHAPE, 100 + answer / 2) * 2 * answer
    below = 2 * 8 * ((100 + 2 * answer) * body + attention) / 2 / (needs.EFFICIENCY[4] * 1e14)
    assert 2 * of_a_step(2) - of_a_step(1) == pytest.approx(below, rel=1e-6)


def test_the_ranks_of_a_machine_share_its_main_memory():
    cpu = torch.device("cpu")
    assert planned(SHAPE, Pretended(0, 8, 0, 4), device=cpu).available_bytes == 79 * GB // 4
    assert planned(SHAPE, Pretended(0, 8, 0, 4), device=GPU).available_bytes == 79 * GB


def test_weights_lie_on_one_machine_where_they_fit_there():
    shape, ranks = MODELS["Llama 3 8B"], Pretended(0, 64, 0, 8)
    assert planned(shape, ranks, tune="full").shards == 8
    tight = Pretended(0, 64, 0, 8, others=((45 * GB, 1e14, CARD),) * 64)
    plan = planned(shape, tight, tune="full")
    assert plan.shards == 64
    plan.check()


def test_on_machines_with_unlike_numbers_of_ranks_weights_are_spread_over_all_ranks():
    class Uneven(Pretended):
        def gather(self, value):
            return [(*value[:3], 4)] * 4 + [(*value[:3], 2)] * 2

    plans = [planned(SHAPE, Uneven(rank, 6, 0, local), tune="full") for rank, local in ((0, 4), (5, 2))]
    assert plans[0] == plans[1] and plans[0].shards == 6
    assert planned(SHAPE, Pretended(0, 12, 0, 8), tune="full").shards == 12


REFUSED = [
    (
        "Llama 3 8B",
        Pretended(0, 2, 0, 2),
        {"tune": "full"},
        r"this run needs about 1\d\d\.\d GB of memory on each of its 2 ranks and 79\.0 GB are free on rank "
        r"0; what would fit: 8 ranks with as much memory, or --tune lora, or a smaller model\.",
    ),
    (
        "Llama 3 8B",
        Pretended(0, 2, 0, 2),
        {"tune": "full", "rollout_rows": 2000},
        r"8 ranks with as much memory, or --tune lora, or a smaller model \(beside --rollout-rows 8\)\.",
    ),
    ("Llama 3 8B", Pretended(0, 8, 0, 8), {"rollout_rows": 10000}, r"; with --rollout-rows \d+ it would fit"),
    ("Llama 3 70B", Pretended(0, 8, 0, 8), {}, r"what would fit: --model-ranks 8, or a smaller model\."),
    (
        "Llama 3 70B",
        Pretended(0, 7, 0, 7),
        {},
        r"its weights alone take 141\.1 GB, which each rank holds while it samples: use a smaller model, or "
        r"ranks with more memory\.",
    ),
    (
        "Llama 3 70B",
        Pretended(0, 64, 0, 8),
        {"tune": "full"},
        r"about \d+\.\d GB .* 64 ranks and 79\.0 GB are free on rank 0; its weights alone take 141\.1 GB",
    ),
    (
        "Llama 3 8B",
        Pretended(0, 8, 0, 8, others=tuple((n * GB, 1.0, CARD) for n in (79, 79, 79, 79, 79, 45, 79, 79))),
        {"tune": "full"},
        r"45\.0 GB are free on rank 5; what would fit: 64 ranks",
    ),
    (
        "Llama 3 8B",
        Pretended(0, 8, 0, 8),
        {"dtype": torch.float32, "tokens_per_forward": 8192},
        r"fit: .*--tokens-per-forward 4096, or --activation-checkpointing, or --dtype bfloat16, or a smaller",
    ),
    (
        "Llama 3 8B",
        Pretended(0, 8, 0, 8),
        {"scorers": (ScorerSize(weight_bytes=45 * GB, working_bytes=GB, products=1, shares_prompts=True),)},
        r"what would fit: .*, or --offload-scorers, or a smaller model\.",
    ),
    (
        "Llama 3 8B",
        Pretended(0, 8, 0, 8),
        {"max_new_tokens": 10**6, "n_prompts": 64, "slack_prompts": 16, "eval_prompts": 4},
        r"lower --prompts-per-step, --tokens-per-forward, --n-responses, --eval-responses, --max-new-tokens",
    ),
    (
        "Llama 3 8B",
        Pretended(0, 8, 0, 8),
        {"device": torch.device("cpu"), "dtype": HALF},
        r"9\.9 GB are free on rank 0; what would fit: 2 of 8 ranks on a machine, or a smaller model\.",
    ),
]


@pytest.mark.parametrize(("name", "ranks", "settings", "said"), REFUSED)
def test_what_does_not_fit_is_refused_with_what_would(name, ranks, settings, said):
    plan = planned(MODELS[name], ranks, **settings)
    with pytest.raises(UserError, match=said) as refused:
        plan.check()
    assert "\n" not in str(refused.value)


def test_what_is_said_to_fit_does_fit():
    shape = MODELS["Llama 3 8B"]
    planned(shape, Pretended(0, 8, 0, 8), tune="full").check()
    planned(shape, Pretended(0, 2, 0, 2)).check()
    planned(MODELS["Llama 3 70B"], Pretended(0, 8, 0, 8, model=Ranks(0, 8))).check()
    with pytest.raises(UserError, match="with --rollout-rows"):
        planned(shape, Pretended(0, 8, 0, 8), rollout_rows=10000).check()
    rows = int(planned(shape, Pretended(0, 8, 0, 8), rollout_rows=10000).cure.split()[2])
    planned(shape, Pretended(0, 8, 0, 8), rollout_rows=rows).check()
    with pytest.raises(UserError):
        planned(shape, Pretended(0, 8, 0, 8), rollout_rows=rows + 8).check()


@pytest.mark.parametrize("odd", ["NVIDIA A100-SXM4-80GB", "cpu"])
def test_ranks_on_unlike_devices_are_refused_with_the_rank(odd):
    found = tuple((79 * GB, 1e14, odd if rank == 2 else CARD) for rank in range(4))
    with pytest.raises(UserError, match=f"^rank 2 computes on {odd} and rank 0 on {CARD}: .* equal devices"):
        planned(SHAPE, Pretended(0, 4, 0, 4, others=found))


def test_one_process_says_what_it_has_said():
    alone = planned(MODELS["Llama 3 8B"], Ranks())
    assert "ranks" not in alone.sentence() and (alone.ranks, alone.shards) == (1, 1)
    with pytest.raises(UserError, match=r"and 1\.0 GB are free; lower --rollout-rows \(here"):
        replace(alone, available_bytes=GB).check()
    several = planned(MODELS["Llama 3 8B"], Pretended(0, 8, 0, 8)).sentence()
    assert several.endswith(" GB of memory on each of 8 ranks (79.0 GB free)")


def test_a_run_that_does_not_fit_one_rank_is_refused_on_all_before_weights_are_read(tmp_path, cache):
    out = tmp_path / "run"
    config = train.parse("caid", [*SMOKE, "--out", str(out)])
    load_tokenizer(smoke_folder())  # before the forks

    def refused(ranks: Ranks) -> None:
        plan_module.available_memory = lambda device: GB if ranks.rank == 1 else 100 * GB
        model.load = None  # in the rank's own process
        caid.train(config, ranks=ranks)

    for error in on_ranks(2, refused):
        assert isinstance(error, UserError), error
        assert "on each of its 2 ranks and 0.5 GB are free on rank 1" in str(error)
    assert not out.exists()


def test_an_evaluation_on_slices_holds_one(monkeypatch):
    shape, ranks = MODELS["Llama 3 70B"], Pretended(0, 8, 0, 8, model=Ranks(0, 8))
    asked = [CaidConfig(**PROMPTS), shape, HALF, GPU, [100] * 64, 64, ()]
    assert plan_module.evaluation_rows(*asked, ranks) == 384
    with pytest.raises(UserError, match="this evaluation needs about 18"):
        plan_module.evaluation_rows(*asked, replace(ranks, model=None))


def test_an_evaluation_on_ranks_holds_rows_of_all_weights_and_gathers_one_model(monkeypatch):
    shape, ranks = MODELS["Qwen 32B"], Pretended(0, 8, 0, 8)
    config = CaidConfig(
        **PROMPTS | {"tune": "full", "rollout_rows": 8, "n_responses": 8, "eval_responses": 8}
    )
    weights = shape.parameter_count()
    # Rows of the reference in 16 bits and of the iterate in float32, of one of them all, a pass of scoring,
    # and the loss head; no states, as there is no adapter below which they would be the same.
    needed = peak(2 * weights + 6 * weights / 8 + 32768 * passed(shape) + 2**30)
    for free, fits in ((needed, True), (needed - 2, False)):
        monkeypatch.setattr(plan_module, "available_memory", lambda device, free=free: free)
        asked = [config, shape, HALF, GPU, [100] * 64, 64, (), ranks]
        if fits:
            assert plan_module.evaluation_rows(*asked) == 8
        else:
            with pytest.raises(UserError, match="this evaluation needs about"):
                plan_module.evaluation_rows(*asked)
