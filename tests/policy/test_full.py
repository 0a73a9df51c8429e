"""Full fine-tuning: gradients of all weights against transformers, float32 weights behind
16-bit products, whole runs."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from engine import export, model, train
from engine.config import CaidConfig, smoke
from engine.evaluate import main as evaluate
from engine.model import packing
from engine.model.names import to_hugging_face
from engine.policy.forward import frozen_forward, logprob_gap
from engine.policy.full import FullWeights
from engine.policy.pairs import within_prompts
from engine.policy.preference_loss import PreferenceLoss
from engine.policy.samples import Samples
from engine.policy.weights import copy_of
from engine.records import Prompts, Score, ScoredTarget, Scores
from engine.rollout.sampler import generate
from engine.run.rows import IterationRow, read_rows
from engine.run.run import Stage
from engine.run.store import load
from engine.stages.smoke import smoke_folder
from tests.helpers.architectures import write_model
from tests.helpers.runs import SMOKE, files
from tests.helpers.samples import samples_of

PROMPTS = Prompts(
    text=["a", "b"], kind=["", ""], token_ids=[[1, 70, 75, 80], [1, 90]], key_P=torch.tensor([11, 22])
)
FULL = ["--tune", "full", "--learning-rate", "1e-3"]


def sampled_from(network):
    """Samples responses and gives them random scores."""
    rollouts = generate(
        network,
        PROMPTS.token_ids,
        n=3,
        max_new_tokens=7,
        seed=0,
        stop_token_ids=(2, *range(60, 80)),
        temperature=0.8,
    )
    logprob = frozen_forward(
        network, packing.groups(PROMPTS, rollouts), [], temperature=0.8, memory_budget_bytes=2**20
    )[1]
    score = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = Scores(
        reward_PG=score,
        utility_PGJ=score[..., None],
        audit_PGA=score.new_zeros(2, 3, 0),
        ref_logprob_PG=logprob.view(2, 3),
    )
    return samples_of(PROMPTS, rollouts, scores)


def moved(network, seed=1, scale=0.05):
    """Makes the weights of a policy that is not the reference."""
    weights = FullWeights(network)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in weights.parameters():
            value.add_(scale * torch.randn(value.shape, generator=g))
    return weights


@pytest.mark.parametrize(
    "variant",
    ["llama, one head per query, own head", "qwen 3, biases, windows, one key head", "gemma 2", "gemma 3"],
)
@pytest.mark.parametrize(
    "dtype, checkpointed", [(torch.float64, False), (torch.float64, True), (torch.float32, False)]
)
def test_gradients_of_all_weights_equal_transformers(variant, dtype, checkpointed, tmp_path):
    """The update has an anchor, which is a policy of all weights too."""
    write_model(tmp_path / "base", variant)
    network = model.load(tmp_path / "base", dtype=dtype)
    samples, weights = sampled_from(network), moved(network)
    anchor = copy_of(weights, moved(network, seed=2).tensors())
    before = {name: value.clone() for name, value in network.named_parameters()}
    pairs = within_prompts(samples.scores.reward_PG, [1, 0], 3)
    config = smoke(
        CaidConfig(temperature=0.8, labels="soft", tune="full", activation_checkpointing=checkpointed)
    )
    target = ScoredTarget(
        score=Score.plain(samples.scores.reward_PG), coefficient=0.4, anchor="any", anchor_share=0.3
    )
    result = PreferenceLoss(
        config=config, model=network, weights=weights, samples=samples, target=target, anchor=anchor
    )(pairs, step=0)
    result.loss.backward()

    def transformers_of(policy_weights, folder):
        model.save(policy_weights.decoder(), folder)
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
        # Else the row of a padding token gets no gradient, also where a policy has drawn that token.
        network.get_input_embeddings().padding_idx = None
        return network

    def logprob_of(network, r):
        prompt, response = PROMPTS.token_ids[r // 3], samples.rollouts.tokens[r, : samples.rollouts.length[r]]
        logits = (
            network(torch.cat([torch.tensor(prompt), response])[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        )
        return torch.log_softmax(logits, -1)[range(len(response)), response].sum()

    oracle, still = transformers_of(weights, tmp_path / "moved"), transformers_of(anchor, tmp_path / "anchor")
    reference = samples.scores.ref_logprob_PG.flatten()
    own = {
        r: logprob_of(oracle, r) - 0.3 * logprob_of(still, r).detach() - 0.7 * reference[r]
        for r in set(pairs.row)
    }
    s, losses = samples.scores.reward_PG.flatten(), []
    for a, b in ((pairs.row[a], pairs.row[b]) for a, b in pairs.pairs.tolist()):
        margin, q = 0.4 * (own[a] - own[b]), torch.sigmoid(s[a] - s[b])
        losses.append(-q * F.logsigmoid(margin) - (1 - q) * F.logsigmoid(-margin))
    loss = torch.stack(losses).mean()
    loss.backward()
    tolerance = 1e-5 if dtype == torch.float64 else 1e-4
    assert float(result.loss.detach()) == pytest.approx(float(loss.detach()), rel=tolerance)
    # The gradients under the names of a checkpoint.
    moved_by = copy_of(weights, {name: value.grad for name, value in weights.named_parameters()}).decoder()
    gradients = to_hugging_face(moved_by.state_dict(), network.config)
    expected = {name: value.grad for name, value in oracle.named_parameters()}
    assert expected.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= tolerance * expected[name].abs().max() + 1e-12, name
    assert all(
        torch.equal(value, before[name]) and value.grad is None for name, value in network.named_parameters()
    )


def test_steps_that_16_bits_cannot_hold_add_up(tiny_folder):
    network = model.load(tiny_folder, dtype=torch.bfloat16)
    weights = FullWeights(network)
    first = weights.decoder().norm.clone()
    assert first.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in weights.parameters())
    optimizer = torch.optim.SGD(weights.parameters(), lr=1.0)
    for _ in range(16):
        hidden = weights.decoder()(torch.tensor([5, 6, 7]), torch.tensor([0, 3]))
        # A gradient that moves the norm's weights, which are about 1, by a sixteenth of their last place.
        (hidden.float().sum() * 0 + weights.decoder().norm.sum() * 2**-11).backward()
        optimizer.step()
        optimizer.zero_grad()
    step = first.float() - weights.masters["norm"]
    torch.testing.assert_close(step, torch.full_like(step, 2**-7), rtol=0.02, atol=0)
    assert (weights.decoder().norm != first).all() and torch.equal(network.norm, first)


def test_weights_are_rounded_once_a_step_and_gradients_added_in_float32(tiny_folder):
    """Two parts of a step use the same rounded weights; those of the next step are new.
    A gradient that is far smaller than the other part's is lost in 16 bits, but not here."""
    weights = FullWeights(model.load(tiny_folder, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        first = weights.decoder().norm
        for part in (1.0, 2.0**-12):
            assert weights.decoder().norm is first
            (weights.decoder().norm.float().sum() * part).backward()
        assert first.grad is None
        torch.testing.assert_close(
            weights.masters["norm"].grad,
            torch.full_like(weights.masters["norm"], 1 + 2.0**-12),
            rtol=0,
            atol=0,
        )
        optimizer.step()
        optimizer.zero_grad()
        assert weights.decoder().norm is not first
        assert torch.equal(weights.decoder().norm, weights.masters["norm"].bfloat16())
    weights.set_tensors({name: value + 1 for name, value in weights.tensors().items()})
    assert torch.equal(weights.decoder().norm, weights.masters["norm"].bfloat16())
    weights.take_back({name: value - 1 for name, value in weights.tensors().items()}, 0.5)
    assert torch.equal(weights.decoder().norm, weights.masters["norm"].bfloat16())


def test_what_is_sampled_is_what_is_trained(tiny_folder):
    network = model.load(tiny_folder)
    weights = moved(network)
    rollouts = generate(
        network, PROMPTS.token_ids, n=3, max_new_tokens=7, temperature=0.8, seed=1, adapter=weights
    )
    options = {"temperature": 0.8, "memory_budget_bytes": 2**20}
    assert (
        logprob_gap(network, packing.groups(PROMPTS, rollouts), rollouts, adapter=weights, **options).max
        < 1e-4
    )
    assert logprob_gap(network, packing.groups(PROMPTS, rollouts), rollouts, **options).max > 1e-2


def test_a_whole_run_can_be_resumed_judged_and_exported(tmp_path, cache):
    run = tmp_path / "run"
    assert train.main(["caid", *SMOKE, *FULL, "--iterations", "2", "--out", str(run)]) == 0
    whole = files(run)
    stages = sorted((run / "stages").iterdir())
    for path in [*stages[len(stages) // 2 :], run / "evaluation.json", run / "heldout.jsonl"]:
        path.unlink()
    assert train.main(["--resume", str(run)]) == 0
    again = files(run)
    assert whole.keys() == again.keys() and [name for name in whole if whole[name] != again[name]] == []
    rows = read_rows(run, IterationRow)
    assert len(rows) == 2 and rows[1].kl > 1e-3

    network = model.load(smoke_folder())
    weights = FullWeights(model.load(run / "adapters" / "iteration-2"))
    (record,) = (run / "stages").glob("*-heldout-policy.safetensors")
    judged = load(record, Samples)
    groups = packing.groups(judged.prompts, judged.rollouts)
    own, reference = (
        frozen_forward(network, groups, [], temperature=0.7, memory_budget_bytes=2**20, adapter=w)[1]
        for w in (weights, None)
    )
    torch.testing.assert_close(judged.kl_PG.flatten(), own - reference, rtol=0, atol=1e-4)

    assert export.main([str(run), str(tmp_path / "merged"), "--even-if"]) == 0
    tokens = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0))
    for folder in (run / "adapters" / "iteration-2", tmp_path / "merged"):
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            ours = weights.decoder().logits(weights.decoder()(tokens, torch.tensor([0, 40])))
            assert (theirs(tokens[None]).logits[0] - ours).abs().max() < 1e-4
    with torch.no_grad():
        assert (ours - network.logits(network(tokens, torch.tensor([0, 40])))).abs().max() > 1e-3

    assert evaluate([str(run), "--seed", "0", "--out", str(tmp_path / "again")]) == 0
    first, second = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (run, tmp_path / "again")
    )
    assert first["constraints"] == second["constraints"] and first["kl"] == second["kl"]


@pytest.mark.parametrize("algorithm", ["primal_dual", "sacpo"])
def test_policy_gradient_and_an_anchor(algorithm, tmp_path, cache):
    iterations = ["--iterations", "1"] if algorithm == "primal_dual" else []
    assert train.main([algorithm, *SMOKE, *FULL, *iterations, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["kl"]["mean"] > 0
    assert all(
        (folder / "model.safetensors").is_file() for folder in (tmp_path / "run" / "adapters").iterdir()
    )


def test_kills_between_steps_of_a_policy_change_nothing(tmp_path, cache, monkeypatch):
    assert train.main(["mocan", *SMOKE, *FULL, "--out", str(tmp_path / "whole")]) == 0
    calls = []
    take = Stage.save_partial

    def killed(stage, record):
        take(stage, record)
        calls.append(stage.name)
        if len(calls) in (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "save_partial", killed)
    assert train.main(["mocan", *SMOKE, *FULL, "--out", str(tmp_path / "killed")]) == 130
    assert train.main(["--resume", str(tmp_path / "killed")]) == 130
    assert train.main(["--resume", str(tmp_path / "killed")]) == 0
    assert len(calls) >= 2 and set(calls) == {"iteration-1/policy"}
    whole, again = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert whole.keys() == again.keys() and [name for name in whole if whole[name] != again[name]] == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["caid", "--tune", "all"], "--tune all: must be one of lora, full"),
        (
            ["caid", "--tune", "full"],
            "--learning-rate 0.0015, the default, is for adapters; give one of about 1e-5",
        ),
        (["pecan", *FULL], "use --tune lora"),
        (["caid", "--scores", "preference", *FULL], "use --tune lora"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys, cache):
    assert train.main([*flags, *SMOKE, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
