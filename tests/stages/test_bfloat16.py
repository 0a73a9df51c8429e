"""Runs in bfloat16 on a CPU: what they sample, score and train in, and what they say of it."""

import pytest
import torch
from safetensors.torch import load_file

from engine import model, train
from engine.model import packing
from engine.policy.forward import frozen_forward, states_and_head
from engine.policy.lora import Adapter
from engine.policy.samples import Samples
from engine.records import Prompts
from engine.rollout.sampler import generate
from engine.run.committed import read_committed
from engine.run.rows import PairStepRow, SampledRow, read_rows
from engine.stages import inputs, sampling, taken
from engine.stages.reference import ReferenceSamples
from engine.stages.smoke import smoke_folder
from kernels import compiled, sequence_logprob
from tests.helpers.runs import SMOKE, files, write

TOKENS = [[1, 70, 75, 80], [1, 90], [1, 66, 67, 68, 69]]


def run(folder, *flags: str) -> int:
    return train.main(["caid", *SMOKE, "--dtype", "bfloat16", "--out", str(folder), *flags])


def test_a_run_ends_and_an_equal_one_writes_equal_files(tmp_path, capsys):
    assert run(tmp_path / "a") == 0
    printed = capsys.readouterr()
    assert "torch.bfloat16, cpu" in printed.out + printed.err
    assert "sampled and recomputed log-probs differ by" in printed.out + printed.err
    gaps = [row.logprob_gap["mean"] for row in read_rows(tmp_path / "a", SampledRow)]
    assert gaps and all(gap < 0.05 for gap in gaps)
    trained = load_file(max((tmp_path / "a" / "adapters").rglob("*.safetensors")))
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert run(tmp_path / "b") == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_ratios_start_at_one_though_the_reference_is_scored_in_the_steps_alone(tmp_path, monkeypatch):
    """A step passes the reference as it passes the policy; the sampler's log-probs are not quite those."""
    passed, score = [], sampling.score
    note = lambda *given, **named: passed.append(given[5].logprob) or score(*given, **named)  # noqa: E731
    monkeypatch.setattr(sampling, "score", note)
    assert run(tmp_path / "a") == 0
    first = next(row for row in read_rows(tmp_path / "a", PairStepRow))
    assert first.margin == 0
    # The reference's samples, those of three iterates, and the two sides of the verdict.
    assert passed == [False, True, True, True, False, True]
    samples = read_committed(tmp_path / "a").load("reference", ReferenceSamples).samples
    network = model.load(smoke_folder(), dtype=torch.bfloat16)
    groups = packing.groups(samples.prompts, samples.rollouts)
    _, scored = frozen_forward(network, groups, [], temperature=0.7)
    apart = (scored.view_as(samples.scores.ref_logprob_PG) - samples.scores.ref_logprob_PG).abs()
    assert 0 < apart.max() < 0.5


def test_ratios_start_at_one_where_no_states_below_the_adapter_are_kept(tmp_path, monkeypatch):
    assert run(tmp_path / "a") == 0
    monkeypatch.setattr(sampling, "kept_states_bytes", lambda *sizes: 0)
    assert run(tmp_path / "0" / "b") == 0
    kept, computed = (read_rows(tmp_path / name, PairStepRow) for name in ("a", "0/b"))
    assert read_committed(tmp_path / "0" / "b").load("reference", ReferenceSamples).lower_MD is None
    assert kept[0].margin == computed[0].margin == 0
    # The states are those of a decoding step in one, and of packed rows in the other.
    assert [row.loss for row in computed] == pytest.approx([row.loss for row in kept], rel=0.02)


def test_log_ratios_of_aligned_policies_are_taken_to_the_scored_reference(tmp_path):
    """Of its own run or of another, whose samples came without."""
    short = ["--dtype", "bfloat16", *SMOKE]
    assert run(tmp_path / "a") == 0
    assert train.main(["pecan", *short, "--out", str(tmp_path / "b" / "own")]) == 0
    other = ["--samples-of", str(tmp_path / "a"), "--out", str(tmp_path / "c" / "shared")]
    assert train.main(["pecan", *short, *other]) == 0
    found = [
        read_committed(tmp_path / name).load("reference", ReferenceSamples).samples.scores.ref_logprob_PG
        for name in ("a", "b/own", "c/shared")
    ]
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def test_pairs_of_a_file_have_the_references_log_probs_where_these_are_compared_with(tmp_path):
    rows = [{"prompt": f"Say {i}.", "response_0": "aa" * (i + 1), "response_1": "bbb"} for i in range(8)]
    pairs = ["--pairs", write(tmp_path / "pairs.jsonl", rows), "--iterations", "1"]

    def logprobs(name: str, *flags: str) -> torch.Tensor:
        assert run(tmp_path / name, *pairs, *flags) == 0
        return read_committed(tmp_path / name).load("pairs", Samples).scores.ref_logprob_PG

    # A step on an adapter passes the reference beside the policy.
    assert not logprobs("adapter").any()
    assert read_rows(tmp_path / "adapter", PairStepRow)[0].margin == 0
    assert (logprobs("float32", "--dtype", "float32") < 0).all()
    assert (logprobs("ratios", "--scores", "preference") < 0).all()


@pytest.mark.parametrize(
    "flags", [("mocan", "--tune", "full", "--learning-rate", "1e-5"), ("pecan",)], ids=["full", "ratios"]
)
def test_samples_of_a_run_that_has_scored_them_are_not_scored_again(flags, tmp_path, monkeypatch):
    algorithm, *how = flags
    start = [algorithm, "--dtype", "bfloat16", *SMOKE, *how]
    assert train.main([*start, "--out", str(tmp_path / "a" / "own")]) == 0
    monkeypatch.setattr(taken, "logprobs", lambda *given: pytest.fail("scored again"))
    shared = ["--samples-of", str(tmp_path / "a" / "own"), "--out", str(tmp_path / "b" / "shared")]
    assert train.main([*start, *shared]) == 0
    for name in ("evaluation.json", "heldout.jsonl"):
        assert (tmp_path / "a/own" / name).read_bytes() == (tmp_path / "b/shared" / name).read_bytes()


def test_a_processor_without_16_bit_products_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inputs, "has_16_bit_products", lambda: False)
    assert run(tmp_path / "c") == 0
    printed = capsys.readouterr()
    assert "this processor has neither AVX512-BF16 nor AMX" in printed.out + printed.err


@pytest.mark.skipif(not compiled.instructions, reason="no compiled kernels")
def test_a_policy_starts_with_the_log_probs_that_the_reference_was_scored_with(tiny_folder):
    """They are equal bit for bit, though one pass asks for a gradient and the other does not."""
    network = model.load(tiny_folder, dtype=torch.bfloat16)
    prompts = Prompts(text=["a", "b", "c"], kind=[""] * 3, token_ids=TOKENS, key_P=torch.tensor([1, 2, 3]))
    rollouts = generate(network, TOKENS, n=8, max_new_tokens=40, seed=0, stop_token_ids=(2, 60))
    groups = packing.groups(prompts, rollouts)
    _, reference = frozen_forward(network, groups, [], temperature=0.7)
    policy = Adapter.on(network, rank=2, alpha=4.0, share=0.5, seed=0)
    packed = packing.pack(groups, network.device)
    states, head = states_and_head(network, policy, packed)
    assert states.requires_grad and states.dtype == torch.bfloat16
    logprob = sequence_logprob(states, head, packed.target_T, packed.cu_seqlens, temperature=0.7)
    assert torch.equal(logprob.detach().double(), reference)
