"""Whole smoke runs through the command line: equal runs are bitwise equal, killed ones too,
bad input ends before any compute."""

import json
import os
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from engine import caid, export, model, train
from engine.config import CaidConfig, MocanConfig, shown_name, smoke
from engine.errors import UserError
from engine.model.tokenizer import load_tokenizer
from engine.report.panels import picture
from engine.report.run_files import read
from engine.run import rows as run_rows
from engine.run.rows import (
    DualRow,
    IterationRow,
    PolicyRow,
    PreferenceRow,
    ReferenceRow,
    Row,
    SampledRow,
    StepRow,
    raw_rows,
    read_rows,
)
from engine.run.run import Run, Stage
from engine.stages.sampling import gap_text
from tests.helpers.killed_run import whole_and_killed
from tests.helpers.pictures import in_pixels
from tests.helpers.runs import SMOKE, files, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("runs") / "a"
    with in_pixels():
        assert train.main([*SMOKE, "--out", str(folder)]) == 0
    return folder


def test_equal_runs_are_bitwise_equal(finished, tmp_path):
    with in_pixels():
        assert train.main([*SMOKE, "--out", str(tmp_path / "b")]) == 0
    first, second = files(finished), files(tmp_path / "b")
    assert first.keys() == second.keys() and len(first) > 15
    assert [name for name in first if first[name] != second[name]] == []


def test_another_seed_gives_another_run(finished, tmp_path):
    assert train.main([*SMOKE, "--seed", "1", "--out", str(tmp_path / "b")]) == 0
    assert files(finished)["metrics.jsonl"] != files(tmp_path / "b")["metrics.jsonl"]


def test_a_run_killed_in_every_stage_ends_bitwise_equal(tmp_path):
    killed = whole_and_killed(tmp_path, 5)
    assert len(killed) == 8 and {kind for _, kind in killed} == {"progress", "write"}
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []


def test_what_a_run_writes(finished):
    kinds = [row["kind"] for row in raw_rows(finished)]
    assert kinds.count("reference") == 1 and kinds.count("dual") == 1 and kinds.count("iteration") == 3
    steps = [(row.iteration, row.step) for row in read_rows(finished, StepRow)]
    assert steps == [(t, s) for t in (1, 2, 3) for s in (1, 2, 3)]
    for row in read_rows(finished, IterationRow):
        assert row.slack[0] == pytest.approx(row.improvement[0] - row.aim[0])
        assert 0 < row.kl_se < 10
    (dual,) = read_rows(finished, DualRow)
    assert dual.lam_low[0] <= dual.lam_corrected[0] <= dual.lam_high[0]
    assert dual.lam_se[0] > 0 and dual.predicted_improvement_se[0] > 0
    config = json.loads((finished / "config.json").read_text())
    assert config["algorithm"] == "caid" and config["config"]["seed"] == 0 and "commit" in config["versions"]
    assert len((finished / "heldout.jsonl").read_text().splitlines()) == 8 * 2
    assert {p.name for p in (finished / "adapters").iterdir()} == {
        "iteration-1",
        "iteration-2",
        "iteration-3",
    }
    (reference,), report = read_rows(finished, ReferenceRow), (finished / "report.html").read_text()
    assert (finished / "report.png").stat().st_size > 10_000 and "constraint harm:" in report
    # The report takes this number from a row that the engine wrote; tests/report/test_report.py checks
    # the rest of it.
    assert f"effective sample size {dual.ess:.1f} of {reference.responses}." in report


def have_the_fields_of_their_classes(rows: list[dict]) -> bool:
    """Tells whether each row, as it was written, has the fields of a class of its kind and no others."""
    classes = [cls for cls in vars(run_rows).values() if isinstance(cls, type) and issubclass(cls, Row)]
    whole = [cls for cls in classes if cls not in (Row, StepRow)]
    known = {(cls.KIND, frozenset(f.name for f in fields(cls))) for cls in whole}
    return all((row["kind"], frozenset(row) - {"kind"}) in known for row in rows)


def test_every_row_has_the_fields_of_its_class_and_no_others(finished):
    timing = [json.loads(line) for line in (finished / "timing.jsonl").read_text().splitlines()]
    for rows in (raw_rows(finished), timing):
        assert len(rows) > 10 and have_the_fields_of_their_classes(rows)
        more, fewer = rows[-1] | {"invented": 1}, {name: x for name, x in rows[-1].items() if name != "stage"}
        assert not have_the_fields_of_their_classes([more]) and not have_the_fields_of_their_classes([fewer])


def test_the_lambda_of_each_row_follows_from_the_row_before(finished):
    from engine.dual.steps import step

    config = smoke(CaidConfig())
    dual = read_rows(finished, DualRow)[0]
    iterations = read_rows(finished, IterationRow)
    assert iterations[0].lam == dual.lam
    for row, following in zip(iterations, iterations[1:], strict=False):
        change = torch.tensor(following.lam) / torch.tensor(row.lam)
        assert torch.all(
            (change <= config.lam_max_change + 1e-9) & (change >= 1 / config.lam_max_change - 1e-9)
        )
        assert (following.lam[0] - row.lam[0]) * row.slack[0] <= 0
        assert step(torch.tensor(row.lam), torch.tensor(row.slack), 0.0).tolist() == pytest.approx(row.lam)


def test_mocan_runs_on_the_same_stages(tmp_path):
    assert train.main(["mocan", *SMOKE, "--out", str(tmp_path / "m")]) == 0
    assert [row.iteration for row in read_rows(tmp_path / "m", StepRow)] == [1, 1, 1]
    assert json.loads((tmp_path / "m" / "evaluation.json").read_text())["n_prompts"] == 8
    assert smoke(MocanConfig()).steps == 3


SCORERS = "tests.helpers.scorers"
# The runs below take the first J of these costs.
COSTS = ("harm", f"codes={SCORERS}:codes", f"letters=-{SCORERS}:letters")


@pytest.mark.parametrize(
    "algorithm, J, own, iterates, slacks",
    [
        ("caid", 3, ["--dual-rule", "secant"], [1, 2], [1, 2]),
        ("mocan", 3, [], [1], []),
        ("pecan", 2, [], [1], []),
        ("dpo", 1, ["--objective", "safety"], [1], []),
        ("sacpo", 2, ["--lam", "1", "0.5"], [1, 2], []),
        ("safe_dpo", 3, ["--unsafe-above", "0", "20", "0"], [1], []),
        ("cdpo", 3, [], [1, 2], [1, 2]),
        ("pd_dpo", 2, [], [0, 1, 2], [1, 2]),
        ("opd", 1, [], [1, 2, 3, 4], [1, 3, 4]),
        ("primal_dual", 2, [], [1, 2], [1, 2]),
        ("repo", 3, [], [1, 2], [1, 2]),
    ],
)
def test_every_algorithm_trains_and_judges(tmp_path, capsys, algorithm, J, own, iterates, slacks):
    flags = ["--cost", *COSTS[:J], "--threshold", *["0.05"] * J, "--force", *own]
    flags += ["--iterations", "2"] if slacks else []
    assert train.main([algorithm, *SMOKE, *flags, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"\n{shown_name(algorithm)} on smoke (" in out
    assert sorted(p.name for p in (tmp_path / "run" / "adapters").iterdir()) == [
        f"iteration-{i}" for i in iterates
    ]
    measured = read_rows(tmp_path / "run", IterationRow)
    assert [row.iteration for row in measured] == slacks
    assert have_the_fields_of_their_classes(raw_rows(tmp_path / "run"))
    assert all(len(x) == J for row in measured for x in (row.lam, row.slack, row.slack_se, row.aim))
    assert all(len(row.lam) == J for row in read_rows(tmp_path / "run", PolicyRow))
    trained = {row.iteration for row in read_rows(tmp_path / "run", StepRow)}
    assert len(trained - {0}) == len(set(iterates) - {0})
    # Every sampling is run through the training forward of its own weights, and has a row.
    sampled = read_rows(tmp_path / "run", SampledRow)
    where = ["policy", "slack"] if algorithm in ("primal_dual", "repo") else ["slack"]
    expected = [
        "reference",
        *(f"iteration-{i}/{name}" for i in slacks for name in where),
        "heldout/reference",
        "heldout/policy",
    ]
    assert [row.stage for row in sampled] == expected
    for row in sampled:
        # 0 where compiled code sums alike in sampling and in the training forward.
        gap = row.logprob_gap
        assert 0 <= gap["mean"] <= gap["max"] < 1e-4 and 0 <= gap["kl"] < 1e-8 and row.prompts == 4
        opening = "tokens; " if row.stage == "reference" else f"{row.stage}: "
        assert out.count(f"{opening}{gap_text(row)}\n") == 1
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [c["name"] for c in evaluation["constraints"]] == ["harm", "codes", "letters"][:J]
    # What the picture shows; of a run of CAID `finished` has the pixels.
    assert b"multiplier lambda" in picture(read(tmp_path / "run"))
    # The files that a kill after half of the stages leaves are enough to end equal.
    whole = files(tmp_path / "run")
    stages = sorted((tmp_path / "run" / "stages").iterdir())
    for path in [
        *stages[len(stages) // 2 :],
        tmp_path / "run" / "evaluation.json",
        tmp_path / "run" / "heldout.jsonl",
    ]:
        path.unlink()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    again = files(tmp_path / "run")
    assert whole.keys() == again.keys() and [name for name in whole if whole[name] != again[name]] == []


@pytest.mark.parametrize(
    ("max_kl", "kept"), [("1e-12", ["iteration-0", "rejected-1"]), ("inf", ["iteration-0", "iteration-1"])]
)
def test_pd_dpo_at_lambda_0_has_its_iterate(tmp_path, max_kl, kept):
    """Iterate t is then the reward's policy. No step comes before the slack, and the iterate can
    be put aside as others can."""
    flags = [
        "--iterations",
        "1",
        "--lam-init",
        "0",
        "--max-kl",
        max_kl,
        "--max-new-tokens",
        "4",
        "--steps",
        "1",
        "--eval-prompts",
        "2",
    ]
    # With this seed the measured KL is above 0.
    flags += ["--seed", "3"]
    assert train.main(["pd_dpo", *SMOKE, *flags, "--out", str(tmp_path / "run")]) == 0
    assert sorted(p.name for p in (tmp_path / "run" / "adapters").iterdir()) == kept
    folders = [tmp_path / "run" / "adapters" / name for name in kept]
    assert files(folders[0]) == files(folders[1])
    assert [row.iteration for row in read_rows(tmp_path / "run", PolicyRow)] == [0, 1]
    assert [row.lam for row in read_rows(tmp_path / "run", IterationRow)] == [[0.0]]
    first = files(tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    (tmp_path / "run" / "heldout.jsonl").unlink()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert files(tmp_path / "run") == first


def test_the_last_iterate_of_opd_has_its_slack_and_can_be_refused(tmp_path):
    flags = ["opd", *SMOKE, "--iterations", "1", "--eval-prompts", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    policies, slacks = (read_rows(tmp_path / "run", cls) for cls in (PolicyRow, IterationRow))
    assert [(row.iteration, row.lam) for row in slacks] == [(row.iteration, row.lam) for row in policies]
    kl = [row.kl for row in slacks]
    assert kl[1] > 1.01 * kl[0], "else no --max-kl lies between them"
    assert train.main([*flags, "--max-kl", str((kl[0] + kl[1]) / 2), "--out", str(tmp_path / "stopped")]) == 0
    assert sorted(p.name for p in (tmp_path / "stopped" / "adapters").iterdir()) == [
        "iteration-1",
        "rejected-2",
    ]
    kept = json.loads((tmp_path / "stopped" / "evaluation.json").read_text())
    assert kept["kl"]["mean"] != 0, "the prediction is kept, not the reference"


@pytest.mark.parametrize("algorithm", ["cdpo", "pd_dpo", "opd", "primal_dual", "repo"])
def test_thresholds_beyond_the_samples_are_refused_before_training(tmp_path, capsys, algorithm):
    assert train.main([algorithm, *SMOKE, "--threshold", "9", "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert (
        "--threshold 9" in err
        and "support b up to" in err
        and err.count("\n") == 1
        and "iteration" not in out
    )
    assert not (tmp_path / "run" / "adapters").exists()


def test_a_multiplier_held_by_lam_max_is_warned_of(tmp_path, capsys):
    flags = ["--iterations", "1", "--eval-prompts", "2", "--lam-max", "0.01", "--threshold", "0.4"]
    assert train.main([*SMOKE, *flags, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    (found,), (iteration,) = (read_rows(tmp_path / "run", cls) for cls in (DualRow, IterationRow))
    missed = iteration.slack[0] < 0
    assert out.count("lambda of harm is held by --lam-max 0.01") == 1 + missed
    assert found.lam == [0.01] and found.lam_low is None and found.lam_se is None


def test_each_kind_of_preference_has_its_own_draws(tmp_path):
    """A cost that says what the reward says still gets labels that are other draws of it."""
    flags = ["--cost", "same=-helpfulness", "--threshold", "0.05", "--force"]
    assert train.main(["pecan", *SMOKE, *flags, "--out", str(tmp_path / "run")]) == 0
    steps = read_rows(tmp_path / "run", StepRow)
    stages = [f"preference/{name}" for name in ("reward", "same")]
    reward, same = ([row.loss for row in steps if row.stage == stage] for stage in stages)
    # The first loss is ln 2 for any label.
    assert len(reward) == len(same) == 3 and all(a != b for a, b in zip(reward[1:], same[1:], strict=True))


def test_preferences_of_a_file_are_learned(tmp_path, capsys):
    """The policy aligned to a file's reward labels prefers the file's better answers,
    and PeCAID runs on such scores."""
    rows = [
        {"prompt": f"Say {i}.", "response_0": "aaaa", "response_1": "bbbb", "reward": i % 2, "harm": 1}
        for i in range(8)
    ]
    file = write(tmp_path / "preferences.jsonl", rows)
    flags = ["--scores", "preference", "--preferences", file, "--preference-steps", "4", "--iterations", "1"]
    assert train.main(["caid", *SMOKE, *flags, "--out", str(tmp_path / "run")]) == 0
    row = read_rows(tmp_path / "run", PreferenceRow)[0]
    assert row.names == ["reward", "harm"] and all(sd > 0 for sd in row.log_ratio_sd)
    steps = [step for step in read_rows(tmp_path / "run", StepRow) if step.stage == "preference/harm"]
    assert len(steps) == 4 and steps[-1].loss < steps[0].loss
    for change, message in (({"harm": 2}, "harm is 2; give 0 or 1"), ({"reward": None}, "reward is None")):
        file = write(tmp_path / "bad.jsonl", [rows[0] | change])
        assert train.main(["pecan", *SMOKE, "--preferences", file, "--out", str(tmp_path / message[:4])]) == 2
        assert message in capsys.readouterr().err


def test_from_python_and_max_kl_keeps_the_iterate_before(tmp_path):
    config = smoke(CaidConfig(out=str(tmp_path / "k"), max_kl=1e-9, learning_rate=0.05, threads=1))
    result = caid.train(config)
    assert len(read_rows(result.folder, IterationRow)) == 1
    assert [p.name for p in (result.folder / "adapters").iterdir()] == ["rejected-1"]
    assert result.evaluation.kl.mean == pytest.approx(0, abs=1e-4), "the kept iterate is the reference"
    found = json.loads((result.folder / "certificate.json").read_text())
    assert found["run"]["iterate"] == 0 and found["digests"]["policy"] == ""
    assert export.main([str(result.folder), str(tmp_path / "merged"), "--or-reference"]) == 0


def test_a_finished_run_exports_a_merged_folder(finished, tmp_path):
    assert export.main([str(finished), str(tmp_path / "merged"), "--even-if"]) == 0
    from transformers import AutoModelForCausalLM

    from engine.policy.peft import load_peft
    from engine.rollout.sampler import generate
    from engine.stages.smoke import smoke_folder

    base = model.load(smoke_folder())
    prompt = AutoTokenizer.from_pretrained(tmp_path / "merged").encode("hello")
    adapter = load_peft(finished / "adapters" / "iteration-3", base)
    ours = generate(base, [prompt], n=1, max_new_tokens=10, temperature=0, seed=0, adapter=adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    theirs = merged.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours.tokens[0].tolist() == theirs[0, len(prompt) :].tolist()
    assert export.main([str(finished), str(tmp_path / "merged"), "--even-if"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", f"{SCORERS}:not_a_number"], "not_a_number gave nan"),
        (["--reward", f"{SCORERS}:only_one"], "returned 1 scores for"),
        (["--reward", f"{SCORERS}:away"], "the judge is away"),
        (["--reward", f"{SCORERS}:constant"], "constant gave 1 for every response"),
        (["--reward", "nothing-like-this"], "not found"),
        (["--reward", f"{SCORERS}:missing"], "missing"),
        (["--threshold", "9"], "support b up to"),
        (["--cost", "harm", "--audit", "harm"], "named harm"),
        (["--audit", "reward=harm"], "reward is what the reward is called"),
        (["--cost", "harm", "harm-audit"], "one threshold per cost"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--n-prompts", "2"], "--slack-prompts 6"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--device", "cuda"], "cuda"),
        (["--rollout-rows", "100000000", "--n-prompts", "260", "--n-responses", "200000"], "memory"),
        (["--temperature", "0"], "--temperature"),
        (["--learning-rat", "1"], "--learning-rate"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, flags, message):
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert train.main([*SMOKE, "--out", str(tmp_path / "r"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    # A mistake that only the samples show is found after the folder is there.
    assert (tmp_path / "r").exists() == (message.endswith(("every response", "up to")))


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_weights(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), name: value}
    save_file(
        {key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors"
    )


def with_vocabulary(folder: Path, size: int) -> None:
    """Changes a model so that it knows fewer tokens than its tokenizer has."""
    rewrite(folder / "config.json", vocab_size=size)
    with_weights(folder, "model.embed_tokens.weight", torch.ones(size, 32))


def with_text(folder: Path, text: str) -> None:
    """Adds an ordinary word to the tokenizer, as one token more than the model knows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([text])
    tokenizer.save_pretrained(folder)


BIAS = "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: with_weights(f, "model.norm.weight", None), "lacks tensor model.norm.weight"),
        (lambda f: with_weights(f, BIAS, torch.ones(32)), f"has unknown tensor {BIAS}"),
        (
            lambda f: with_weights(f, "model.norm.weight", torch.ones(31)),
            "model.norm.weight has shape (31,), config.json wants (32,)",
        ),
        (
            lambda f: with_weights(f, "model.norm.weight", torch.ones(32, dtype=torch.int8)),
            "model.norm.weight is stored as I8",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
            "not a whole safetensors file",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin, a pickle"),
        (
            lambda f: rewrite(f / "config.json", is_causal=False),
            "config.json: is_causal False is not supported",
        ),
        (lambda f: rewrite(f / "config.json", hidden_size="32"), "hidden_size is '32'"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: a JSON list"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer could be loaded"),
        (lambda f: with_vocabulary(f, 300), "the tokenizer has 384 tokens, vocab_size in config.json is 300"),
        (
            lambda f: with_text(f, "unheard-of"),
            "the tokenizer has 385 tokens, vocab_size in config.json is 384",
        ),
        (
            lambda f: rewrite(f / "config.json", eos_token_id=384),
            "end-of-sequence token 384 is not among the 384",
        ),
        (
            lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["x"]}'),
            "generation_config.json: eos_token_id is ['x']",
        ),
        (lambda f: (f / "generation_config.json").write_text("["), "generation_config.json: not valid JSON"),
    ],
)
def test_a_model_that_cannot_be_used_leaves_no_run_folder(tmp_path, tiny_folder, capsys, damage, message):
    shutil.copytree(tiny_folder, tmp_path / "model")
    damage(tmp_path / "model")
    assert train.main([*SMOKE, "--out", str(tmp_path / "r"), "--model", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and str(tmp_path / "model") in error and len(error.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_special_tokens_beyond_the_vocabulary_are_refused_only_where_they_occur(
    tmp_path, tiny_folder, capsys
):
    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").encode("<image>") == [384]
    rows = [{"prompt": f"What is {i} + {i}?"} for i in range(40)]
    flags = [*SMOKE, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "r"), "--force"]
    answers = [{**row, "chosen": "Two <image>", "rejected": "Three"} for row in rows]
    for extra, place in (
        (
            ["--prompts", write(tmp_path / "p.jsonl", [*rows, {"prompt": "Look: <image>"}])],
            "prompt 'Look: <image>'",
        ),
        (["--pairs", write(tmp_path / "a.jsonl", answers)], "a.jsonl:1"),
    ):
        command = ["mocan"] if extra[0] == "--pairs" else []
        assert train.main([*command, *flags, *extra]) == 2
        assert f"{place}: it has token id 384, the model knows 384 tokens" in capsys.readouterr().err
        assert not (tmp_path / "r").exists()


def test_scorers_in_python_several_costs_and_own_prompts(tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"question": f"What is {i} + {i}?"} for i in range(40)])
    flags = ["--prompts", prompts, "--prompt-column", "question", "--force"]
    flags += ["--reward", f"{SCORERS}:letters"]
    flags += ["--cost", "harm", "harm-audit", "--audit", "--threshold", "0.1", "0.1"]
    assert train.main([*SMOKE, "--out", str(tmp_path / "r"), *flags]) == 0
    evaluation = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert [c["name"] for c in evaluation["constraints"]] == ["harm", "harm-audit"] and evaluation[
        "audits"
    ] == []


def test_few_prompts_lower_the_numbers_of_prompts_and_say_so(tmp_path, capsys):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"What is {i} + {i}?"} for i in range(10)])
    assert train.main([*SMOKE, "--out", str(tmp_path / "r"), "--prompts", prompts, "--force"]) == 0
    said = "8 training and 2 held-out prompts are there, so --n-prompts is 8, --eval-prompts is 2"
    assert said in capsys.readouterr().out
    saved = json.loads((tmp_path / "r" / "config.json").read_text())
    assert json.dumps(saved).count('"n_prompts": 8') == 1
    assert json.loads((tmp_path / "r" / "evaluation.json").read_text())["n_prompts"] == 2


def test_too_few_prompts_for_a_verdict_are_refused_before_any_compute(tmp_path, capsys):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"What is {i} + {i}?"} for i in range(5)])
    assert train.main(["mocan", *SMOKE, "--out", str(tmp_path / "r"), "--prompts", prompts]) == 2
    assert "--eval-prompts 1: must be at least 2" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "fp8"), ("device", "tpu"), ("threshold", (float("nan"),))]
)
def test_settings_from_python_are_checked_before_they_are_used(tmp_path, field, value):
    with pytest.raises(UserError, match=f"--{field}"):
        caid.train(smoke(CaidConfig(out=str(tmp_path / "r"), **{field: value})))
    assert not (tmp_path / "r").exists()


def test_an_existing_folder_and_another_model_are_refused(finished, capsys):
    assert train.main([*SMOKE, "--out", str(finished)]) == 2
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(UserError, match="another model"):
        Run.resume(finished, fingerprint="0" * 16)


def test_a_non_finite_loss_stops_with_the_batch_saved(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.policy.steps.learning_rate_factor", lambda *a: float("inf"))
    assert train.main([*SMOKE, "--out", str(tmp_path / "r")]) == 3
    assert "nonfinite.safetensors" in capsys.readouterr().err
    assert (tmp_path / "r" / "nonfinite.safetensors").is_file()


def test_ctrl_c_finishes_the_step_and_says_how_to_resume(tmp_path, finished, capsys, monkeypatch):
    log = Stage.log

    def press(self, row):
        log(self, row)
        if isinstance(row, StepRow) and row.iteration == 2 and row.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Stage, "log", press)
    assert train.main([*SMOKE, "--out", str(tmp_path / "r")]) == 130
    assert f"--resume {tmp_path / 'r'}" in capsys.readouterr().err
    assert read_rows(tmp_path / "r", StepRow)[-1].step == 2
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "r")]) == 0
    # The resumed command has no --threads flag of its own: it comes from the run's config.
    assert files(tmp_path / "r")["metrics.jsonl"] == files(finished)["metrics.jsonl"]
