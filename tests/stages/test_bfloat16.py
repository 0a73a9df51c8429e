"""Runs in bfloat16 on a CPU: what they sample, score and train in, and what they say of it."""

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

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


@dataclass(frozen=True)
class Plain:
    """A run of CAID without further flags."""

    folder: Path
    printed: str
    passed: list[bool]  # whether log-probs were asked for, for each samples that were scored


@pytest.fixture(scope="module")
def plain(tmp_path_factory, cache) -> Plain:
    folder, printed, passed = tmp_path_factory.mktemp("plain") / "a", StringIO(), []
    score = sampling.score
    note = lambda *given, **named: passed.append(given[5].logprob) or score(*given, **named)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr(sampling, "score", note)
        assert run(folder) == 0
    return Plain(folder, printed.getvalue(), passed)


@pytest.fixture(scope="module")
def ratios(tmp_path_factory, cache) -> Path:
    """Returns a run of PeCAN, whose scores are log-ratios."""
    folder = tmp_path_factory.mktemp("ratios") / "own"
    assert train.main(["pecan", "--dtype", "bfloat16", *SMOKE, "--out", str(folder)]) == 0
    return folder


def test_a_run_ends_and_an_equal_one_writes_equal_files(plain, tmp_path):
    assert "torch.bfloat16, cpu" in plain.printed
    assert "sampled and recomputed log-probs differ by" in plain.printed
    gaps = [row.logprob_gap["mean"] for row in read_rows(plain.folder, SampledRow)]
    assert gaps and all(gap < 0.05 for gap in gaps)
    trained = load_file(max((plain.folder / "adapters").rglob("*.safetensors")))
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert run(tmp_path / "b") == 0
    assert files(plain.folder) == files(tmp_path / "b")


def test_ratios_start_at_one_though_the_reference_is_scored_in_the_steps_alone(plain):
    """A step passes the reference as it passes the policy; the sampler's log-probs are not quite those."""
    first = next(row for row in read_rows(plain.folder, PairStepRow))
    assert first.margin == 0
    # The reference's samples, those of three iterates, and the two sides of the verdict.
    assert plain.passed == [False, True, True, True, False, True]
    samples = read_committed(plain.folder).load("reference", ReferenceSamples).samples
    network = model.load(smoke_folder(), dtype=torch.bfloat16)
    groups = packing.groups(samples.prompts, samples.rollouts)
    _, scored = frozen_forward(network, groups, [], temperature=0.7)
    apart = (scored.view_as(samples.scores.ref_logprob_PG) - samples.scores.ref_logprob_PG).abs()
    assert 0 < apart.max() < 0.5


def test_ratios_start_at_one_where_no_states_below_the_adapter_are_kept(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "kept_states_bytes", lambda *sizes: 0)
    assert run(tmp_path / "b", "--iterations", "1") == 0
    kept, computed = (read_rows(folder, PairStepRow)[:3] for folder in (plain.folder, tmp_path / "b"))
    assert read_committed(tmp_path / "b").load("reference", ReferenceSamples).lower_MD is None
    assert kept[0].margin == computed[0].margin == 0
    # The states are those of a decoding step in one, and of packed rows in the other.
    assert [row.loss for row in computed] == pytest.approx([row.loss for row in kept], rel=0.02)


def test_log_ratios_of_aligned_policies_are_taken_to_the_scored_reference(plain, ratios, tmp_path):
    """Of its own run or of another, whose samples came without."""
    other = ["--samples-of", str(plain.folder), "--out", str(tmp_path / "shared")]
    assert train.main(["pecan", "--dtype", "bfloat16", *SMOKE, *other]) == 0
    found = [
        read_committed(folder).load("reference", ReferenceSamples).samples.scores.ref_logprob_PG
        for folder in (plain.folder, ratios, tmp_path / "shared")
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


@pytest.mark.parametrize("full", [True, False], ids=["full", "ratios"])
def test_samples_of_a_run_that_has_scored_them_are_not_scored_again(full, request, tmp_path, monkeypatch):
    start, own = ["pecan", "--dtype", "bfloat16", *SMOKE], tmp_path / "own"
    if full:
        start = ["mocan", *start[1:], "--tune", "full", "--learning-rate", "1e-5"]
        assert train.main([*start, "--out", str(own)]) == 0
    else:
        own = request.getfixturevalue("ratios")
    monkeypatch.setattr(taken, "logprobs", lambda *given: pytest.fail("scored again"))
    shared = tmp_path / "b" / "shared"
    assert train.main([*start, "--samples-of", str(own), "--out", str(shared)]) == 0
    for name in ("evaluation.json", "heldout.jsonl"):
        assert (own / name).read_bytes() == (shared / name).read_bytes()


def test_a_processor_without_16_bit_products_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inputs, "has_16_bit_products", lambda: False)
    assert run(tmp_path / "c", "--iterations", "1", "--steps", "1", "--eval-prompts", "2") == 0
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
