"""The predicted time and memory of a run."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from engine import train
from engine.config import CaidConfig, MocanConfig, PrimalDualConfig
from engine.errors import UserError
from engine.evaluate import main as evaluate
from engine.run import needs
from engine.run import plan as plan_module
from engine.run.contents import read_contents
from engine.run.machine import available_memory
from engine.run.needs import KEPT_STATES_BYTES, ScorerSize, kept_states_bytes, scorer_bytes
from engine.run.plan import Plan, evaluation_rows, rows_that_fit
from tests.helpers.plans import SHAPE


@pytest.fixture(autouse=True)
def fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "matmul_rate", lambda dtype, device: 1e11)


def plan(prompts: int = 100, length: int = 20, dtype: torch.dtype = torch.float32, **changes) -> Plan:
    return Plan.of(
        replace(CaidConfig(), **changes), SHAPE, dtype, torch.device("cpu"), [length] * prompts, [length] * 10
    )


def test_kept_states_are_counted_up_to_their_limit():
    assert kept_states_bytes([10, 20], 30, 8, torch.bfloat16) == (10 + 20 + 2 * 30) * 8 * 2
    tokens = KEPT_STATES_BYTES // (4 * 8)
    assert kept_states_bytes([tokens], 0, 8, torch.float32) == KEPT_STATES_BYTES
    assert kept_states_bytes([tokens], 1, 8, torch.float32) == 0


def test_more_work_takes_longer_and_more_rows_more_memory():
    base = plan()
    for more in ({"steps": 50}, {"iterations": 9}, {"eval_responses": 60}, {"max_new_tokens": 200}):
        assert plan(**more).seconds > 1.05 * base.seconds
    assert plan(rollout_rows=2000, n_responses=40).needed_bytes > base.needed_bytes
    # In 16 bits the reference's own log-probs take a pass of their own.
    assert plan(dtype=torch.bfloat16).seconds > base.seconds


@pytest.mark.parametrize(
    "change",
    [
        {"n_responses": 10**9},
        {"eval_responses": 10**9},
        {"slack_prompts": 64, "slack_responses": 10**9, "n_responses": 10**9},
        {"lora_rank": 65536, "lora_from": 0.0},
        {"max_new_tokens": 10**9},
        {"rollout_rows": 10**9, "n_responses": 2, "eval_responses": 10**8},
    ],
)
def test_absurd_counts_are_refused_by_the_plan_at_once(monkeypatch, change):
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 16 * 10**9)
    shape = {"hidden_size": 4096, "intermediate_size": 11008} if "lora_rank" in change else {}
    start = time.perf_counter()
    for fewer_rows in (False, True):
        config = replace(CaidConfig(), **change)
        found = Plan.of(
            config,
            replace(SHAPE, **shape),
            torch.float32,
            torch.device("cpu"),
            [20] * 400,
            [20] * 96,
            fewer_rows=fewer_rows,
        )
        with pytest.raises(UserError, match="--eval-responses, --max-new-tokens or --lora-rank"):
            found.check()
    assert time.perf_counter() - start < 10


def test_an_adapter_of_a_larger_rank_takes_longer_and_more_memory():
    base, wide = plan(), plan(lora_rank=800)
    weights = 2 * 792 * (3 * (64 + 128) + 2 * (64 + 64) + 2 * (64 + 32))  # two of the four layers are adapted
    assert wide.needed_bytes - base.needed_bytes == pytest.approx(
        1.15 * (needs.ADAPTER_BYTES + needs.ADAPTER_MEAN_BYTES) * weights, abs=2
    )
    assert wide.seconds > base.seconds


def test_rows_that_fit_are_the_most_of_whole_prompts_less():
    for rows, n in ((384, 8), (203, 8), (17, 17), (18, 17), (5, 8), (100, 1)):
        for room in range(0, rows + 2):
            slow = rows
            while slow > n and slow > room:
                slow = max(n, slow - n)
            assert rows_that_fit(rows, n, lambda x: x, room) == slow
    assert rows_that_fit(10**9, 2, lambda x: x, 10) == 10


def test_a_policy_step_is_counted_with_the_responses_that_it_trains_on():
    two = plan().seconds
    assert plan(responses_per_prompt=0).seconds == plan(responses_per_prompt=8).seconds > 1.05 * two
    # A file has two, and each step passes the layers below the adapter too.
    file = plan(pairs="mine.jsonl", responses_per_prompt=0).seconds
    assert file == plan(pairs="mine.jsonl").seconds > two
    gradient = [
        Plan.of(c, SHAPE, torch.float32, torch.device("cpu"), [20] * 100, [20] * 10).seconds
        for c in (PrimalDualConfig(), PrimalDualConfig(responses_per_prompt=0))
    ]
    assert gradient[0] == gradient[1]


def test_the_loss_head_counts_with_the_default_of_its_device(monkeypatch):
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 10**12)
    monkeypatch.setattr(plan_module, "matmul_rate", lambda dtype, device: 1e12)

    def needed(device, **changes):
        return Plan.of(
            replace(CaidConfig(), **changes),
            SHAPE,
            torch.float32,
            torch.device(device),
            [20] * 100,
            [20] * 10,
        ).needed_bytes

    assert needed("cpu") == needed("cpu", memory_budget_mb=256) == needed("cuda", memory_budget_mb=256)
    assert needed("cuda") == needed("cuda", memory_budget_mb=4096) > needed("cpu") + 2**31


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_one_process_keeps_counts_while_it_samples_too(tune):
    shape, lengths = replace(SHAPE, vocab_size=100_000), ([20] * 400, [20] * 10)
    few = {"learning_rate": 1e-5, "memory_budget_mb": 1, "max_new_tokens": 20, "n_prompts": 400}
    config = replace(CaidConfig(), tune=tune, **few)

    def needed(**changes) -> int:
        changed = replace(config, **changes)
        return Plan.of(changed, shape, torch.float32, torch.device("cpu"), *lengths).needed_bytes

    assert needed(rollout_rows=384) > needed(rollout_rows=352), "sampling needs most"
    adapter = needs.adapter_parameters(config, shape)
    size = 12 * (adapter if tune == "lora" else shape.parameter_count())
    mean = needed(weight_average=0.8) - needed(weight_average=0.0)
    assert mean == pytest.approx(1.15 * size, abs=2)


def test_too_little_memory_names_both_sizes_and_the_cure():
    with pytest.raises(
        UserError, match=r"needs about \d+\.\d GB of memory and 0\.1 GB are free; lower --rollout-rows"
    ):
        replace(plan(), available_bytes=10**8).check()


def test_rows_are_lowered_by_whole_prompts_to_what_fits(monkeypatch):
    def with_room(available, rows=384, fewer_rows=True):
        monkeypatch.setattr(plan_module, "available_memory", lambda device: available)
        config = replace(
            CaidConfig(), n_responses=8, max_new_tokens=200, memory_budget_mb=1, rollout_rows=rows
        )
        shape, lengths = replace(SHAPE, vocab_size=100_000), ([20] * 400, [20] * 10)
        return Plan.of(config, shape, torch.float32, torch.device("cpu"), *lengths, fewer_rows=fewer_rows)

    whole, half = with_room(10**12), with_room(10**12, rows=192)
    assert whole.needed_bytes > half.needed_bytes + 10**8 and (whole.rows, half.rows) == (384, 192)
    for available in (whole.needed_bytes, 10 * whole.needed_bytes):
        assert with_room(available) == replace(whole, available_bytes=available)
    short = with_room(half.needed_bytes)
    assert short.rows == 192 and short.needed_bytes == half.needed_bytes
    short.check()
    assert with_room(half.needed_bytes - 1).rows == 184
    # A batch of at most 195 rows has 192, as whole prompts have.
    assert with_room(half.needed_bytes, rows=203).rows == 195
    asked = with_room(half.needed_bytes, fewer_rows=False)
    assert asked.rows == 384
    with pytest.raises(UserError, match=r"lower --rollout-rows \(here 384\)"):
        asked.check()
    # Less than the responses of one prompt are never decoded, in the verdict neither.
    with pytest.raises(
        UserError, match=r"lower --rollout-rows \(here 8\), --prompts-per-step, --n-responses"
    ):
        with_room(10**8).check()
    assert (
        rows_that_fit(384, 6, lambda rows: rows, 3) == 6
        and rows_that_fit(384, 6, lambda rows: rows, 30) == 30
    )


def test_an_evaluation_is_given_the_rows_that_fit_or_refused(monkeypatch):
    config = replace(CaidConfig(), eval_responses=6, max_new_tokens=200, memory_budget_mb=1)

    def rows(available, **changes):
        monkeypatch.setattr(plan_module, "available_memory", lambda device: available)
        shape, device = replace(SHAPE, vocab_size=100_000), torch.device("cpu")
        return evaluation_rows(replace(config, **changes), shape, torch.float32, device, [20] * 100, 96)

    assert rows(10**11) == 384
    per_row = 1.15 * (220 * 2 * 2 * 16 * 4 * 4 + 100_000 * 12)
    fewer = rows(12 * 10**8)
    assert 6 < fewer < 384 and fewer % 6 == 0
    assert fewer - rows(12 * 10**8 - int(60 * per_row)) == 60
    assert fewer - rows(12 * 10**8, tune="full") >= 6, "a policy with weights of its own needs room for them"
    with pytest.raises(
        UserError,
        match=r"this evaluation needs about 0\.\d GB of memory and 0\.1 GB are free; lower --n-prompts",
    ):
        rows(10**8)


def write_groups(root, entry, files, meminfo_kb=1000):
    """Writes files as a kernel shows them; `files` maps paths below /sys/fs/cgroup to texts."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9999 kB\nMemAvailable:    {meminfo_kb} kB\n")
    (root / "proc/self/cgroup").write_text(entry)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def version_2(folder, limit, used, inactive=0):
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": used,
        f"{folder}memory.stat": f"anon 5\ninactive_file {inactive}",
    }


def version_1(folder, limit, used, inactive=0):
    names = (
        ("limit_in_bytes", limit),
        ("usage_in_bytes", used),
        ("stat", f"inactive_file 1\ntotal_inactive_file {inactive}"),
    )
    return {f"memory/{folder}memory.{name}": text for name, text in names}


V1 = "9:name=systemd:/x\n4:cpu,memory:/box/a\n0::/\n"


@pytest.mark.parametrize(
    ("entry", "files", "expected"),
    [
        ("0::/box/a\n", version_2("box/a/", 900_000, 300_000, 50_000), 650_000),
        ("0::/box/a\n", version_2("box/a/", "max", 10) | version_2("box/", 700_000, 300_000), 400_000),
        ("0::/box/a\n", version_2("box/a/", 500_000, 0) | version_2("box/", 400_000, 0), 400_000),
        ("0::/\n", version_2("", 300_000, 100_000), 200_000),
        ("0::/elsewhere/host\n", version_2("", 300_000, 100_000), 200_000),
        ("0::/box/a\n", version_2("box/a/", 300_000, 400_000), 0),
        ("0::/box/a\n", version_2("box/a/", "max", 10), 1_024_000),
        ("0::/box/a\n", version_2("box/a/", 10**12, 10), 1_024_000),
        ("0::/box/a\n", {}, 1_024_000),
        (V1, version_1("box/a/", 900_000, 300_000, 50_000), 650_000),
        (V1, version_1("box/a/", 2**63 - 4096, 10) | version_1("box/", 600_000, 100_000), 500_000),
        (V1, version_1("", 300_000, 100_000), 200_000),
        (V1, version_1("box/a/", 2**63 - 4096, 10), 1_024_000),
    ],
)
def test_the_limits_of_control_groups_bound_the_free_memory(tmp_path, entry, files, expected):
    write_groups(tmp_path, entry, files)
    assert available_memory(torch.device("cpu"), tmp_path) == expected


def test_free_memory_without_control_groups(tmp_path):
    write_groups(tmp_path, "", {})
    (tmp_path / "proc/self/cgroup").unlink()
    assert available_memory(torch.device("cpu"), tmp_path) == 1_024_000
    assert 0 < available_memory(torch.device("cpu")) < 10**15


def test_a_run_and_its_evaluation_go_on_with_fewer_rows_and_the_same_samples(
    tmp_path, cache, capsys, monkeypatch
):
    flags = ["mocan", "--preset", "smoke", "--threads", "1", "--steps", "1", "--force"]
    assert train.main([*flags, "--out", str(tmp_path / "free")]) == 0

    def of_rows(config, shape, dtype, device, lengths, rows, sets) -> int:
        return min(rows, 48) * 10**8  # a rank samples no more

    monkeypatch.setattr(plan_module, "sampling_bytes", of_rows)
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 3 * 10**9)
    assert train.main([*flags, "--out", str(tmp_path / "asked")]) == 2
    assert (
        "needs about 4.3 GB of memory and 3.0 GB are free; lower --rollout-rows (here 32)"
        in capsys.readouterr().err
    )
    assert train.main([*flags, "--rollout-rows", "384", "--out", str(tmp_path / "short")]) == 0
    assert "memory is short, so --rollout-rows is 20\n" in capsys.readouterr().out
    assert read_contents(tmp_path / "short").config["rollout_rows"] == 20
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "heldout.jsonl").open()]
        for name in ("free", "short")
    )
    assert [(row["reference"], row["policy"]) for row in first] == [
        (row["reference"], row["policy"]) for row in second
    ]
    # The run that goes on has no flags.
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 2 * 10**9)
    (tmp_path / "short" / "evaluation.json").unlink()
    assert train.main(["--resume", str(tmp_path / "short")]) == 0
    assert "memory is short, so --rollout-rows is 8\n" in capsys.readouterr().out
    assert evaluate([str(tmp_path / "short"), "--out", str(tmp_path / "judged")]) == 0
    assert "memory is short, so 10 responses are decoded side by side\n" in capsys.readouterr().out
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 8 * 10**8)
    assert evaluate([str(tmp_path / "short"), "--out", str(tmp_path / "judged-2")]) == 2
    assert "this evaluation needs about 0.9 GB" in capsys.readouterr().err


def test_sentence():
    assert (
        Plan(2 * 10**9, 10**10, 150.0, 384).sentence()
        == "predicted: about 2 min, 2.0 GB of memory (10.0 GB free)"
    )


GB = 10**9
TWO_SCORERS = (
    ScorerSize(weight_bytes=14 * GB, working_bytes=3 * GB, products=7 * GB, shares_prompts=True),
    ScorerSize(weight_bytes=12 * GB, working_bytes=4 * GB, products=6 * GB, shares_prompts=False),
)


def test_scorers_weights_and_passes_are_counted():
    def planned(scorers):
        config, cpu = replace(CaidConfig(), max_new_tokens=100), torch.device("cpu")
        return Plan.of(config, SHAPE, torch.float32, cpu, [20] * 400, [20] * 96, scorers=scorers)

    base, both = planned(()), planned(TWO_SCORERS)
    assert both.needed_bytes - base.needed_bytes >= 1.15 * 26 * GB
    c = CaidConfig()
    sets = [(1, c.n_prompts, c.n_responses), (2, c.eval_prompts, c.eval_responses), *c.fresh_samples]
    answers = sum(times * prompts * n * 70 for times, prompts, n in sets)
    once = sum(times * prompts * 20 for times, prompts, n in sets)
    each = sum(times * prompts * n * 20 for times, prompts, n in sets)
    products = (answers + once) * 7 * GB + (answers + each) * 6 * GB
    assert both.seconds - base.seconds == pytest.approx(2 * products / (needs.EFFICIENCY[4] * 1e11), rel=1e-6)


HEAD = 64 * SHAPE.vocab_size  # which is the embedding
BODY = SHAPE.parameter_count() - HEAD
ADAPTER = needs.adapter_parameters(CaidConfig(), SHAPE)


def passed(n: int, layers: float = 1.0, adapter: int = 0) -> float:
    """Counts a pass of a prompt of 20 tokens and n responses: 4 layers, 4 heads of 16 elements, whose scores
    and sums of values are of the tokens before."""
    answer = needs.ANSWER_SHARE * CaidConfig().max_new_tokens
    seen = 20 * 20 / 2 + n * answer * (20 + answer / 2)
    within = (20 + n * answer) * BODY + 2 * seen * 4 * 4 * 16
    return layers * within + (20 + n * answer) * adapter + n * answer * HEAD


def in_seconds(products: float) -> float:
    """Returns the time of so many multiplications, each with its addition."""
    return 2 * products / (needs.EFFICIENCY[4] * 1e11)


def test_every_pass_of_a_run_is_counted():
    c = CaidConfig()
    reference, slack, heldout = c.n_responses, c.slack_responses, c.eval_responses
    products = (c.n_prompts + 4) * passed(reference) + (c.eval_prompts + 4) * passed(heldout)
    for times, prompts, n in ((c.iterations, c.slack_prompts, slack), (1, c.eval_prompts, heldout)):
        # Of the policy: sampled, four prompts again, and the reference from the adapter's layers on.
        products += times * ((prompts + 4) * passed(n, adapter=ADAPTER) + prompts * passed(n, layers=0.5))
    # Forward and backward to the states.
    products += c.iterations * c.steps * c.prompts_per_step * 2 * passed(2, layers=0.5, adapter=ADAPTER)
    assert plan().seconds == pytest.approx(in_seconds(products), rel=1e-6)


def test_a_step_passes_layers_again_that_are_not_kept(monkeypatch):
    c, base = CaidConfig(), plan().seconds
    half = in_seconds(
        c.iterations * c.steps * c.prompts_per_step * (passed(2, layers=0.5) - passed(2, layers=0))
    )
    assert plan(activation_checkpointing=True).seconds - base == pytest.approx(half, rel=1e-6)
    assert plan(pairs="mine.jsonl").seconds - base == pytest.approx(half, rel=1e-6)
    monkeypatch.setattr(needs, "KEPT_STATES_BYTES", 0)
    assert plan().seconds - base == pytest.approx(half, rel=1e-6)


def test_the_kl_of_a_policy_without_a_slack_is_counted():
    def seconds(**changes) -> float:
        config = replace(MocanConfig(), **changes)
        return Plan.of(config, SHAPE, torch.float32, torch.device("cpu"), [20] * 100, [20] * 10).seconds

    one = passed(1, adapter=ADAPTER) + passed(1)
    for flags, prompts in (({}, 64), ({"n_prompts": 40}, 40)):
        measured = seconds(**flags) - seconds(max_kl_ratio=math.inf, **flags)
        assert measured == pytest.approx(in_seconds(prompts * one), rel=1e-6)
    assert plan().seconds == plan(max_kl_ratio=math.inf).seconds, "the answers that measure a slack tell it"


def test_log_ratios_of_aligned_policies_are_counted():
    c, two = CaidConfig(), {"scores": "preference", "preference_steps": 2}
    steps = 2 * (plan(**two | {"preference_steps": 3}).seconds - plan(**two).seconds)
    sets = ((c.n_prompts, c.n_responses), (2 * c.eval_prompts, c.eval_responses))
    sets += ((c.iterations * c.slack_prompts, c.slack_responses),)
    products = 2 * sum(prompts * passed(n, adapter=ADAPTER) for prompts, n in sets)  # of reward and one cost
    assert plan(**two).seconds - plan().seconds - steps == pytest.approx(in_seconds(products), rel=1e-6)


def test_attention_reaches_as_far_as_a_window():
    windows = replace(SHAPE, window=8, window_layers=(0, 2))
    assert needs.attention_products(SHAPE, 20) == 2 * 4 * 16 * 4 * 20
    assert needs.attention_products(windows, 20) == 2 * 4 * 16 * (2 * 20 + 2 * 8)
    assert needs.attention_products(windows, 5) == needs.attention_products(SHAPE, 5)


def test_nothing_is_counted_of_responses_that_are_not_sampled():
    c = CaidConfig()
    # Four prompts of each sampling pass the model again.
    products = (c.n_prompts + 4) * passed(c.n_responses) + (c.eval_prompts + 4) * passed(c.eval_responses)
    spared = plan().seconds - plan(samples_of="run").seconds
    assert spared == pytest.approx(in_seconds(products), rel=1e-6)
    # A file's responses pass the model once, at the price of sampling. In 16 bits samples are scored again
    # where all weights are trained, and a file's are not; steps on an adapter pass the reference instead.
    assert plan(samples="file").seconds == plan().seconds
    half = {"dtype": torch.bfloat16}
    assert plan(samples="file", **half).seconds == plan(**half).seconds
    whole = {"tune": "full", "learning_rate": 1e-5}
    assert plan(samples="file", **half, **whole).seconds < plan(**half, **whole).seconds
    # The share of the bare products' speed that is reached is another one in 16 bits.
    slower = needs.EFFICIENCY[4] / needs.EFFICIENCY[2]
    taken = {"samples_of": "run"}
    assert plan(**taken, **half, **whole).seconds == pytest.approx(slower * plan(**taken, **whole).seconds)
    again = plan(**taken, **half).seconds / slower - plan(**taken).seconds
    expected = c.iterations * c.steps * c.prompts_per_step * passed(2, layers=0.5, adapter=ADAPTER)
    assert again == pytest.approx(in_seconds(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "heldout"), [({"samples": "file"}, 2), ({"samples_of": "run"}, 1), ({"samples_of": "run"}, 2)]
)
def test_scores_that_are_there_already_are_not_counted(given, heldout):
    c, cpu = replace(CaidConfig(), max_new_tokens=100, **given), torch.device("cpu")
    scorer = replace(TWO_SCORERS[0], spared="samples" in given or heldout == 1)

    def seconds(scorers) -> float:
        return Plan.of(c, SHAPE, torch.float32, cpu, [20] * 400, [20] * 96, scorers=scorers).seconds

    sets = [] if scorer.spared else [(1, c.n_prompts, c.n_responses)]
    sets += [(heldout, c.eval_prompts, c.eval_responses), *c.fresh_samples]
    tokens = sum(times * prompts * (20 + n * 70) for times, prompts, n in sets)
    expected = 2 * tokens * 7 * GB / (needs.EFFICIENCY[4] * 1e11)
    assert seconds((scorer,)) - seconds(()) == pytest.approx(expected, rel=1e-6)


def test_scorers_that_are_put_aside_need_the_gpu_one_at_a_time():
    gpu, cpu, aside = torch.device("cuda"), torch.device("cpu"), replace(CaidConfig(), offload_scorers=True)
    assert scorer_bytes(CaidConfig(), gpu, TWO_SCORERS) == (26 * GB, 4 * GB)
    assert scorer_bytes(aside, gpu, TWO_SCORERS) == (0, 17 * GB)
    assert scorer_bytes(aside, cpu, TWO_SCORERS) == (26 * GB, 4 * GB), "there it is the same memory"
    assert scorer_bytes(aside, gpu, ()) == (0, 0)


def test_an_evaluation_leaves_room_for_its_scorers(monkeypatch):
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 20 * GB)
    settings = CaidConfig(), SHAPE, torch.float32, torch.device("cpu"), [20] * 10, 10
    assert evaluation_rows(*settings) > 0
    with pytest.raises(UserError, match="this evaluation needs about 3[0-9].* GB"):
        evaluation_rows(*settings, TWO_SCORERS)
