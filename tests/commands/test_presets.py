"""The papers' protocols on tiny checkpoints and data in the published formats, from these files to the
verdict."""

import gzip
import json
import lzma
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from engine import train
from engine.config import ALGORITHMS, PRESETS
from engine.errors import UserError
from engine.policy.preference_loss import PreferenceLoss
from engine.run.committed import read_committed
from engine.run.contents import read_contents
from engine.run.rows import (
    AscentStepRow,
    DualRow,
    IterationRow,
    PairStepRow,
    PolicyRow,
    ReferenceRow,
    read_rows,
)
from engine.stages.reference import ReferenceSamples
from engine.stages.run_inputs import owned_inputs
from engine.sweep.plans import SweepConfig, configs_of
from tests.helpers.published import (
    edit_config,
    vocabulary_size,
    write_beaver,
    write_byte_tokenizer,
    write_llama1_tokenizer,
    write_network,
)

N_ROWS, N_PROMPTS = 17, 12  # of the training data of PKU-SafeRLHF; prompts stand in several rows
# What makes a run small; all else is the preset's.
SMALL = {
    "n_prompts": 6, "n_responses": 4, "max_new_tokens": 5, "eval_prompts": 4, "eval_budget": 8,
    "prompts_per_step": 4, "warmup_steps": 1, "threads": 1,
}  # fmt: skip
SLACK = {"iterations": 2, "slack_prompts": 6, "slack_responses": 2}
ASKED = "\n\nAssistant:"


def write_policy(folder: Path) -> None:
    write_llama1_tokenizer(folder)
    sizes = {"vocab_size": vocabulary_size(folder), "num_key_value_heads": 4}
    numbers = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": sizes["vocab_size"] - 1}
    write_network(folder, "Llama", "ForCausalLM", **sizes, **numbers)


def write_classifier(folder: Path, network, **config) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    network.eval().save_pretrained(folder)
    write_byte_tokenizer(folder, None, pad="<pad>")
    edit_config(folder, **config)


def pku(prompt: int, row: int) -> dict:
    return {
        "prompt": f"How do I {prompt}?",
        "response_0": "Sure" if row % 2 else "No, I will not",
        "response_1": f"It is {row}",
        "is_response_0_safe": row % 2 == 0,
        "is_response_1_safe": True,
        "better_response_id": row % 2,
        "safer_response_id": 1 - row % 2,
    }


def asked(number: int) -> str:
    return f"\n\nHuman: I am {number}.\n\nAssistant: Hello.\n\nHuman: What is it?{ASKED}"


def hh(number: int) -> dict:
    return {"chosen": f"{asked(number)} A cat, {number} of it.", "rejected": f"{asked(number)} No."}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Writes what the presets name, in folders of the hub's names."""
    here = tmp_path_factory.mktemp("shelf")
    write_policy(here / "PKU-Alignment/alpaca-7b-reproduced")
    for name, config in {
        "beaver-7b-v1.0-reward": {},
        "beaver-7b-v1.0-cost": {"score_type": "cost"},
        "beaver-7b-v3.0-cost": {"score_type": "cost", "later": True, "bias": 0.5},
    }.items():
        write_beaver(here / "PKU-Alignment" / name, **config)
    data = here / "PKU-Alignment/PKU-SafeRLHF-30K/round0"
    data.mkdir(parents=True)
    rows = {"train": [(i % N_PROMPTS, i) for i in range(N_ROWS)], "test": [(i, i) for i in range(20, 25)]}
    for split, numbers in rows.items():
        lines = "".join(json.dumps(pku(*each)) + "\n" for each in numbers)
        (data / f"{split}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    for seed, kind in enumerate(("helpful", "harmless")):
        torch.manual_seed(seed)
        network = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=270, n_embd=32, n_layer=2, n_head=4, num_labels=1)
        )
        folder = here / f"Ray2333/gpt2-large-{kind}-reward_model"
        write_classifier(folder, network, num_labels=None, id2label=None, label2id=None, pad_token_id=None)
    names = {0: "NO_HUMOR", 1: "HUMOR"}
    config = DistilBertConfig(vocab_size=270, dim=32, hidden_dim=48, n_layers=2, n_heads=4, id2label=names)
    write_classifier(here / "mohameddhiab/humor-no-humor", DistilBertForSequenceClassification(config))
    for part, numbers in {"helpful-base": range(8), "harmless-base": range(8, 14)}.items():
        folder = here / "Anthropic/hh-rlhf" / part
        folder.mkdir(parents=True)
        for split, some in {"train": numbers, "test": [n + 100 for n in list(numbers)[:3]]}.items():
            lines = "".join(json.dumps(hh(number)) + "\n" for number in some)
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_policy(here / "sft")
    return here


@pytest.fixture(scope="module", autouse=True)
def beside_the_files(shelf, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def command_line(algorithm: str, preset: str, *words: str, **settings) -> list[str]:
    """Writes the command line of a preset that is made small, by default in the folder PRESET-ALGORITHM."""
    small = {**SMALL, "out": f"{preset}-{algorithm}", **settings}
    flags = [word for name, value in small.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [algorithm, "--preset", preset, *flags, *words, "--force"]


def ran(algorithm: str, preset: str, *words: str, **settings) -> Path:
    """Runs a preset that is made small; returns the run's folder, checked by `check_run`."""
    flags = command_line(algorithm, preset, *words, **settings)
    assert train.main(flags) == 0
    run = Path(settings.get("out", f"{preset}-{algorithm}"))
    check_run(run, algorithm, preset, {word[2:].replace("-", "_") for word in flags if word[:2] == "--"})
    return run


def check_run(run: Path, algorithm: str, preset: str, given: set[str]) -> None:
    """Every setting that no flag gave is the preset's in what the run has kept, and there is a verdict. The
    run keeps the data type that auto stood for, and the rows that the memory holds."""
    wanted = PRESETS[preset].apply(ALGORITHMS[algorithm].config_class())
    kept = type(wanted)(**read_contents(run).config)
    for field in fields(wanted):
        if field.name not in given | {"steps", "rollout_rows", "dtype"}:
            assert getattr(kept, field.name) == getattr(wanted, field.name), field.name
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["units"] == "raw" and evaluation["n_prompts"] == 4
    (row,) = read_rows(run, ReferenceRow)
    assert row.audit_names == [Path(audit).name for audit in wanted.audit]


@pytest.fixture(scope="module")
def mocan(beside_the_files) -> Path:
    return ran("mocan", "safe-rlhf", threshold=0.2)


def test_mocan_learns_from_published_pairs_by_the_template_of_the_model(mocan):
    assert len(read_rows(mocan, PairStepRow)) == math.ceil(3 * N_ROWS / 4)
    (row,) = read_rows(mocan, DualRow)
    assert row.threshold == [0.2]
    record = owned_inputs(mocan).record
    # The published tokenizer's own ids: <s> in front, and no space before an answer.
    raw = Tokenizer.from_file("PKU-Alignment/alpaca-7b-reproduced/tokenizer.json")
    for text, ids in zip(record.train.text, record.train.token_ids, strict=True):
        assert ids == raw.encode(f"BEGINNING OF CONVERSATION: USER: {text} ASSISTANT:").ids
    assert sorted(record.train.text) == sorted(f"How do I {i}?" for i in range(N_PROMPTS))
    assert len(record.pairs.prompts) == N_ROWS
    first = {raw.id_to_token(int(row[0])) for row in record.pairs.rollouts.tokens}
    assert first == {"S", "N", "I"}


@pytest.mark.parametrize(
    ("algorithm", "settings", "steps"),
    [("dpo", {"objective": "safety"}, 5), ("sacpo", {"lam": 2.0}, 10), ("safe_dpo", {"offset": 3.0}, 5)],
)
def test_baselines_that_align_once_share_its_samples(mocan, algorithm, settings, steps):
    run = ran(algorithm, "safe-rlhf", "--samples-of", str(mocan), epochs=1, threshold=0.2, **settings)
    assert len(read_rows(run, PairStepRow)) == steps
    lam = {"dpo": 1.0, "sacpo": 2.0, "safe_dpo": 0.0}  # of the last policy
    assert read_rows(run, PolicyRow)[-1].lam == [lam[algorithm]]


def test_a_stopped_run_goes_on_with_the_same_dropout_and_labels(mocan, monkeypatch):
    new = {"lora_dropout": 0.2, "checkpoint_every": 2, "epochs": 1, "threshold": 0.2}
    words = ("--samples-of", str(mocan), "--lora-targets", "q", "k", "v")
    whole = ran("mocan", "safe-rlhf", *words, **new, out="whole")
    loss_of = PreferenceLoss.__call__

    def stop(self, pairs, step, first=0):
        if step == 3:
            raise KeyboardInterrupt
        return loss_of(self, pairs, step, first)

    flags = command_line("mocan", "safe-rlhf", *words, **new, out="stopped")
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceLoss, "__call__", stop)
        assert train.main(flags) == 130
    assert train.main(["--resume", "stopped"]) == 0
    for file in ("adapters/iteration-1/adapter_model.safetensors", "metrics.jsonl"):
        assert (whole / file).read_bytes() == Path("stopped", file).read_bytes()
    card = json.loads((whole / "adapters/iteration-1/adapter_config.json").read_text())
    assert (card["target_modules"], card["lora_dropout"]) == (["k_proj", "q_proj", "v_proj"], 0.2)


def test_caid_measures_its_slack_on_prompts_outside_the_pairs(mocan):
    run = ran("caid", "safe-rlhf", "--samples-of", str(mocan), threshold=0.2, **SLACK)
    rows = read_rows(run, IterationRow)
    assert [row.prompts for row in rows] == [6, 6]
    # A pass over all rows, of which those of the prompts that measure the slack are left out.
    steps = read_rows(run, PairStepRow)
    assert len(steps) == 2 * math.ceil(N_ROWS / 4)
    prompts = owned_inputs(run).record.pairs.prompts.text
    measured = set(read_committed(run).load("reference", ReferenceSamples).samples.prompts.text)
    assert 0 < sum(text not in measured for text in prompts) < N_ROWS


def test_pecan_learns_from_peoples_labels(mocan):
    run = ran("pecan", "safe-rlhf", "--samples-of", str(mocan), epochs=1, preference_steps=2, threshold=1e-3)
    label_PGO = owned_inputs(run).record.preferences.label_PGO
    better = torch.tensor([i % 2 == 1 for i in range(N_ROWS)])
    assert ((label_PGO[:, 1, 0] > 0) == better).all() and ((label_PGO[:, 1, 1] > 0) == ~better).all()


def test_primal_dual_is_about_the_mean_of_the_cost_itself(capsys):
    run = ran("primal_dual", "safe-rlhf", ascent_prompts=4, steps=1, **{**SLACK, "slack_prompts": 2})
    rows = read_rows(run, IterationRow)
    assert rows[0].lam == [1.0] and len(read_rows(run, AscentStepRow)) == 2
    # The improvement that is needed for a mean cost of 0 is the reference's mean cost.
    scores = read_committed(run).load("reference", ReferenceSamples).samples.scores
    reward, cost = float(scores.reward_PG.mean()), -float(scores.utility_PGJ.mean())
    assert rows[0].threshold[0] == pytest.approx(cost, rel=1e-9)
    means = f"reference means: reward {reward:.2f}, beaver-7b-v1.0-cost {cost:.2f} (costs: smaller is better)"
    assert means in capsys.readouterr().out


def test_hh_rlhf_goes_from_transcripts_to_two_constraints():
    run = ran("caid", "hh-rlhf", model="sft", **{**SLACK, "iterations": 1})
    record = owned_inputs(run).record
    assert len(record.pairs.prompts) == 14 and len(record.heldout) == 6
    raw = Tokenizer.from_file("sft/tokenizer.json")
    # The break before the answer that is asked for has a space in front.
    written = [f"{asked(n).removesuffix(ASKED)} {ASKED}" for n in range(14)]
    assert sorted(record.train.token_ids) == sorted(raw.encode(text).ids for text in written)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert [c["name"] for c in evaluation["constraints"]] == ["harmless", "humor"]
    once = ran("mocan", "hh-rlhf", "--samples-of", str(run), model="sft", epochs=2)
    assert len(read_rows(once, PairStepRow)) == 7


def test_a_sweep_takes_a_preset():
    asked = SweepConfig(algorithms=("mocan", "sacpo:steps=7"), thresholds=("1.2", "2"))
    of_mocan, of_sacpo = (
        [plan.config for plan in configs_of(asked, "safe-rlhf") if plan.algorithm == name]
        for name in ("mocan", "sacpo")
    )
    assert [(c.threshold, c.epochs, c.n_responses) for c in of_mocan] == [((1.2,), 3, 128), ((2.0,), 3, 128)]
    assert {(c.epochs, c.steps) for c in of_sacpo} == {(0, 7)}
    with pytest.raises(UserError, match="--preset safe-rlhf: opd has none"):
        configs_of(replace(asked, algorithms=("opd",)), "safe-rlhf")


@pytest.mark.parametrize(
    ("line", "says"),
    {
        "opd --preset safe-rlhf": "--preset safe-rlhf: opd has none; caid, mocan, pecan, primal_dual, ",
        "mocan --preset safe_rlhf": "--preset safe_rlhf: there is none. Did you mean safe-rlhf? There are "
        "smoke, safe-rlhf, hh-rlhf.",
        "mocan --preset hh-rlhf": "name its folder with --model",
        "mocan --preset hh-rlhf --model sft --epochs 2 --steps 3": "--steps and --epochs: both count",
        "mocan --preset safe-rlhf --reward gone/reward --pairs reference": "--epochs 3: it counts passes",
    }.items(),
)
def test_presets_that_cannot_be_are_one_line(line, says, capsys):
    assert train.main(line.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert says in error


def test_all_that_is_missing_is_listed_with_its_flag(shelf, tmp_path, monkeypatch, capsys):
    (tmp_path / "PKU-Alignment").mkdir()
    (tmp_path / "PKU-Alignment/beaver-7b-v1.0-reward").symlink_to(
        shelf / "PKU-Alignment/beaver-7b-v1.0-reward"
    )
    monkeypatch.chdir(tmp_path)
    assert train.main(["mocan", "--preset", "safe-rlhf", "--cost", "harm", "--out", "r"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    pku_data = "PKU-Alignment/PKU-SafeRLHF-30K"
    listed = ", ".join(
        [
            "--model PKU-Alignment/alpaca-7b-reproduced", "--audit PKU-Alignment/beaver-7b-v3.0-cost",
            f"--prompts {pku_data}", f"--heldout {pku_data}:test", f"--pairs {pku_data}",
        ]
    )  # fmt: skip
    assert f"--preset safe-rlhf: not found: {listed} (model PKU-Alignment/alpaca-7b-reproduced: " in error
    assert "Hugging Face hub" in error and not Path("r").exists()
