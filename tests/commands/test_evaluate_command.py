"""Tests `python -m engine.evaluate` on smoke runs: the numbers of the verdict with the verdict's seed,
what is added to them, and what is refused."""

import json
import os
import re
import runpy
import shutil
import signal
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from engine import train
from engine.config import CaidConfig, EvaluateConfig, MocanConfig, smoke
from engine.data.prompts import load_prompts, lookalike_prompts, overlap, shipped_prompts
from engine.evaluate import main
from engine.intervals import betting, estimate
from engine.looks import share
from engine.quickstart import tiny_model_folder
from engine.records import Prompts
from engine.run.committed import read_committed
from engine.run.display import Progress
from engine.run.folder import RunFolder
from engine.run.rows import DualRow, IterationRow, ReferenceRow, SampledRow, read_rows
from engine.stages import evaluate, inputs
from engine.stages.evaluate import ask
from engine.stages.finished import iterates
from engine.stages.sampling import gap_text
from engine.verdict import evaluation
from engine.verdict.evaluation import Evaluation
from engine.verdict.sentences import sentences
from tests.helpers.rows import ITERATION, POLICY
from tests.helpers.runs import SMOKE, write_run
from tests.helpers.scorers import vowels

# What an evaluation writes.
FILES = {"evaluation.json", "heldout.jsonl", "certificate.json", "certificate.html"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert train.main([*SMOKE, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def judged(finished, tmp_path_factory):
    """Evaluates the finished run with a further audit, in a folder of its own."""
    out = tmp_path_factory.mktemp("judged") / "b"
    assert (
        main(
            [
                str(finished),
                "--audit",
                "tests.helpers.scorers:vowels",
                "--n-responses",
                "4",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]


def by_prompt(folder: Path, name: str, n: int) -> torch.Tensor:
    return torch.tensor([row[name] for row in rows(folder)], dtype=torch.float64).unflatten(0, (-1, n))


def found(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def prompts_file(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def test_the_seed_of_the_run_gives_its_verdict_again(finished, tmp_path, capsys):
    assert main([str(finished), "--seed", "0", "--out", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o" / "heldout.jsonl").read_bytes() == (finished / "heldout.jsonl").read_bytes()
    verdict, again = found(finished), found(tmp_path / "o")
    assert {name: again[name] for name in verdict} == verdict
    printed = capsys.readouterr().out
    for side in ("reference", "policy"):
        (row,) = (row for row in read_rows(finished, SampledRow) if row.stage == f"heldout/{side}")
        assert again["logprob_gap"][side] == row.logprob_gap and 0 <= row.logprob_gap["max"] < 1e-4
        assert printed.count(f"heldout/{side}: {gap_text(row)}\n") == 1
    assert "the random numbers are those of its verdict" in printed
    assert all(line in printed for line in sentences(Evaluation.from_dict(verdict)))


def test_a_run_on_preferences_is_judged_by_its_own_log_ratios(tmp_path):
    run = tmp_path / "run"
    assert train.main(["pecan", *SMOKE, "--force", "--out", str(run)]) == 0
    assert main([str(run), "--seed", "0", "--out", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o" / "heldout.jsonl").read_bytes() == (run / "heldout.jsonl").read_bytes()
    verdict, again = found(run), found(tmp_path / "o")
    assert {name: again[name] for name in verdict} == verdict
    more = [
        "--audit",
        "tests.helpers.scorers:vowels",
        "--best-feasible",
        "--prompts",
        str(tmp_path / "p.jsonl"),
    ]
    prompts_file(tmp_path / "p.jsonl", [f"Say {i}" for i in range(8)])
    assert main([str(run), *more, "--out", str(tmp_path / "m")]) == 0
    names = ["helpfulness (its scorer)", "harm (its scorer)", "harm-audit", "vowels"]
    assert [name for name, _ in found(tmp_path / "m")["audits"]] == names
    chosen = found(tmp_path / "m")["settings"]["selection"]
    assert [row["iterate"] for row in chosen] == [1] and len(chosen[0]["room"]) == 1


def test_two_evaluations_at_once_lose_nothing_and_a_cut_line_blocks_none(finished, capsys, monkeypatch):
    judged = finished / "judged.jsonl"
    before = judged.read_bytes() if judged.exists() else b""
    judged.write_bytes(before + b'{"prompts": 2, "sha')
    left = finished / ".evaluation-1-7"  # of a killed evaluation
    left.mkdir()
    theirs, mine = RunFolder(finished).next_evaluation(), []

    def meanwhile(judgement):
        theirs.mkdir()
        (theirs / "evaluation.json").write_text("{}")
        mine.append(RunFolder(finished).next_evaluation())
        return []

    monkeypatch.setattr(evaluate, "judgement_sentences", meanwhile)
    assert main([str(finished), "--n-prompts", "2", "--n-responses", "2"]) == 0
    assert (theirs / "evaluation.json").read_text() == "{}" and mine[0] != theirs and not left.exists()
    assert {p.name for p in mine[0].iterdir()} == FILES
    assert f"written: {mine[0] / 'evaluation.json'}" in capsys.readouterr().out
    lines = judged.read_bytes()[len(before) :].split(b"\n")
    assert lines[0] == b'{"prompts": 2, "sha' and lines[2:] == [b""]
    assert len(json.loads(lines[1])["prompts"]) == 2
    for folder in (theirs, mine[0]):
        shutil.rmtree(folder)
    judged.write_bytes(before)
    if not before:
        judged.unlink()


def test_other_responses_to_the_same_prompts_by_default_and_equal_ones_each_time(finished, capsys):
    kept = {p.name for p in finished.iterdir()}
    assert main([str(finished)]) == 0 and main([str(finished)]) == 0
    first, second = finished / "evaluation-1", finished / "evaluation-2"
    assert {p.name for p in finished.iterdir()} - kept - {"judged.jsonl"} == {first.name, second.name}
    assert {p.name for p in first.iterdir()} == FILES
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)
    assert [row["prompt"] for row in rows(first)] == [row["prompt"] for row in rows(finished)]
    for side in ("reference", "policy"):
        assert not {row[side] for row in rows(first)} & {row[side] for row in rows(finished)}
    printed = capsys.readouterr().out
    assert f"iterate 3 of {finished}: CAID on smoke" in printed and "no response was seen before" in printed
    assert "temperature 0.7, top_p 1, at most 8 new tokens, seed 1000 (the run's is 0" in printed
    assert "stage 4 of 4: lookalike/policy" in printed


def test_units_are_the_runs_and_a_new_audit_gets_its_own(finished, judged):
    row = read_rows(finished, ReferenceRow)[0]
    settings = found(judged)["settings"]
    units = settings["units"]
    assert (units["reward"], units["utility_J"]) == (row.reward_sd, row.utility_sd)
    assert units["audit_A"][:1] == row.audit_sd
    assert settings["audit"] == ["harm-audit", "tests.helpers.scorers:vowels"]
    raw = torch.tensor(vowels([], [r["reference"] for r in rows(judged)]), dtype=torch.float64).view(8, 4)
    assert units["audit_A"][1] == pytest.approx(raw.var(1).mean().sqrt().item())
    torch.testing.assert_close(by_prompt(judged, "reference_audit", 4)[..., 1], -raw / units["audit_A"][1])
    name, improvement = found(judged)["audits"][1]
    policy = torch.tensor(vowels([], [r["policy"] for r in rows(judged)]), dtype=torch.float64).view(8, 4)
    assert (name, improvement["mean"]) == (
        "vowels",
        pytest.approx((raw - policy).mean().item() / units["audit_A"][1]),
    )


def test_the_statistics_follow_from_the_samples(finished, judged):
    result = found(judged)
    gain = by_prompt(judged, "policy_utility", 4).mean(1) - by_prompt(judged, "reference_utility", 4).mean(1)
    share = result["looks"][0]["share"]
    expected = estimate(gain[:, 0], alpha=0.05 * share)
    # The run's own verdict was the first one.
    assert share <= 0.125
    b = result["constraints"][0]["threshold"]
    assert b == 0.3
    assert result["constraints"][0]["estimate"] == pytest.approx(vars(expected))
    assert result["slack"][0]["low"] == pytest.approx(expected.low - b)
    refusal, n = result["over_refusal"], result["over_refusal"]["policy"]["n"]
    assert n == len(Path(lookalike_prompts()).read_text().splitlines()) >= 60
    assert refusal["policy"]["low"] <= refusal["policy"]["mean"] <= refusal["policy"]["high"]


def test_pair_order_is_asked_of_the_policys_log_ratio_at_its_lambda(finished, tmp_path, monkeypatch):
    asked = []
    pair_order = evaluation.pair_order
    monkeypatch.setattr(evaluate, "pair_order", lambda *a: asked.append(a) or pair_order(*a))
    moved = []
    policy_logprob = evaluate.policy_logprob

    def both(subject, phase, samples, adapter):
        logprob = policy_logprob(subject, phase, samples, adapter)
        moved.append(logprob - samples.scores.ref_logprob_PG)
        # The reference is the policy with no adapter: its samples' own log-probs must come back.
        unmoved = policy_logprob(subject, phase, samples, None)
        torch.testing.assert_close(unmoved, samples.scores.ref_logprob_PG, rtol=0, atol=1e-4)
        return logprob

    monkeypatch.setattr(evaluate, "policy_logprob", both)
    assert main([str(finished), "--iterate", "2", "--confidence", "0.8", "--out", str(tmp_path / "o")]) == 0
    result, lam = found(tmp_path / "o"), read_rows(finished, IterationRow)[1].lam
    assert result["settings"]["iterate"] == 2 and result["settings"]["lam"] == lam
    assert [a[2] for a in asked] == [0.8, 0.8]
    for name, (log_ratio, score, _) in zip(("reference", "policy"), asked, strict=True):
        s = (
            by_prompt(tmp_path / "o", f"{name}_reward", 2)
            + lam[0] * by_prompt(tmp_path / "o", f"{name}_utility", 2)[..., 0]
        )
        torch.testing.assert_close(score, s)
        assert log_ratio.abs().max() > 1e-3, "the policy has moved"
    torch.testing.assert_close(asked[0][0], moved[0])
    assert asked[1][0].mean().item() == pytest.approx(result["kl"]["mean"])
    assert result["pair_order"] == [asdict(pair_order(*a)) for a in asked]
    assert result["confidence"] == 0.8


def test_dpo_on_safety_is_asked_for_the_order_of_g_and_a_second_look_is_told(tmp_path, monkeypatch, capsys):
    run, asked = tmp_path / "d", []
    assert train.main(["dpo", "--objective", "safety", *SMOKE, "--out", str(run)]) == 0
    # The run's own verdict was on its 8 held-out prompts; these are 3 of them.
    own, few = EvaluateConfig(), EvaluateConfig(n_prompts=3)
    assert (ask(run, own).earlier, ask(run, few).earlier) == (1, 1)
    pair_order = evaluation.pair_order
    monkeypatch.setattr(evaluate, "pair_order", lambda *a: asked.append(a) or pair_order(*a))
    assert main([str(run), "--n-prompts", "3", "--out", str(tmp_path / "o")]) == 0
    for name, (_, score, _) in zip(("reference", "policy"), asked, strict=True):
        torch.testing.assert_close(score, by_prompt(tmp_path / "o", f"{name}_utility", 2)[..., 0])
    printed = capsys.readouterr().out
    assert (
        "log-ratio orders like g: " in printed
        and "1 earlier verdict on this policy or on some of these prompts" in printed
        and found(tmp_path / "o")["pairs_like"] == "g"
    )
    # The same question again is the same verdict.
    assert [ask(run, flags).earlier for flags in (own, few, EvaluateConfig(n_prompts=4))] == [2, 1, 2]


def test_a_run_of_mocan_has_the_lambda_of_its_dual(tmp_path):
    assert train.main(["mocan", *SMOKE, "--out", str(tmp_path / "m")]) == 0
    assert main([str(tmp_path / "m"), "--n-prompts", "3", "--n-responses", "2"]) == 0
    result = found(tmp_path / "m" / "evaluation-1")
    assert result["settings"]["lam"] == read_rows(tmp_path / "m", DualRow)[0].lam
    assert (result["n_prompts"], result["n_responses"]) == (3, 2)
    assert [row["prompt"] for row in rows(tmp_path / "m")][:6] == [
        row["prompt"] for row in rows(tmp_path / "m" / "evaluation-1")
    ]


def test_own_prompts_and_what_overlaps_with_the_training_prompts(finished, tmp_path, capsys):
    with open(shipped_prompts("train")[0]) as file:
        seen = json.loads(file.readline())["prompt"]
    new = prompts_file(tmp_path / "new.jsonl", ["Why is moss soft?", "Where does glass come from?"])
    mixed = prompts_file(
        tmp_path / "mixed.jsonl", ["Why is moss soft?", f"  {seen.upper()} ", "Where does glass come from?"]
    )
    assert main([str(finished), "--prompts", new, "--out", str(tmp_path / "new")]) == 0
    assert found(tmp_path / "new")["n_prompts"] == 2
    assert f"prompts: 2 of 2 in {new}, and 7" in capsys.readouterr().out
    assert main([str(finished), "--prompts", mixed, "--out", str(tmp_path / "mixed")]) == 2
    error = capsys.readouterr().err
    assert (
        "1 of 3 prompts are among the run's training prompts" in error
        and seen.upper()[:40] in error
        and "--allow-overlap" in error
    )
    assert not (tmp_path / "mixed").exists()
    assert main([str(finished), "--prompts", mixed, "--allow-overlap", "--out", str(tmp_path / "mixed")]) == 0
    assert "warning: 1 of 3 prompts are among" in capsys.readouterr().out
    assert found(tmp_path / "mixed")["settings"]["overlap"].startswith("1 of 3 prompts")


def test_overlap_compares_whole_conversations(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path))

    def chats(*first: str) -> Prompts:
        turns = [
            [
                {"role": "user", "content": f},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "Why?"},
            ]
            for f in first
        ]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps({"prompt": turn}) + "\n" for turn in turns))
        return load_prompts(str(path), tokenizer, max_prompt_tokens=1000)

    train_on = chats("Is rain wet?", "Is snow cold?", "Is the file \ufb01ne?")
    assert overlap(chats("Is ice hard?", "Is  SNOW cold?", "Is the file fine?"), train_on) == [1, 2]


def test_look_alikes_are_many_distinct_and_not_among_the_shipped_prompts(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path))

    def load(source):
        return load_prompts(source, tokenizer, max_prompt_tokens=1000)

    lookalikes = load(lookalike_prompts())
    assert len(lookalikes) >= 60 and set(lookalikes.kind) == {"lookalike"}
    assert len({" ".join(re.findall(r"\w+", text.lower())) for text in lookalikes.text}) == len(lookalikes)
    assert all(overlap(lookalikes, load(shipped_prompts(part))) == [] for part in ("train", "heldout"))


def stopped_run(folder: Path, config, *, trained: list[int], past: tuple[int, ...] = ()) -> Path:
    """Makes a run folder with rows of the policies `trained`, and nothing else; those of `past` went past
    --max-kl."""
    algorithm = "caid" if isinstance(config, CaidConfig) else "mocan"
    stages = {f"iteration-{t}/policy": [replace(POLICY, iteration=t, lam=[float(t)])] for t in trained}
    stages |= {f"iteration-{t}/slack": [replace(ITERATION, iteration=t, kl=2.0)] for t in past}
    write_run(folder, algorithm, asdict(replace(config, threads=1)), stages)
    return folder


@pytest.mark.parametrize(
    ("trained", "past", "wanted", "chosen"),
    [
        ([1, 2, 10], (), 0, {10: [10.0]}),
        ([1, 2, 10], (), 2, {2: [2.0]}),
        ([1, 2, 3], (3,), 0, {2: [2.0]}),  # the run put 3 aside
        ([1, 2], (), 3, "--iterate 3: .* has 1, 2; give one of these"),
        ([1], (1,), 0, "has no iterate yet; go on with python -m engine.train --resume"),
        ([], (), 0, "has no iterate yet; go on with python -m engine.train --resume"),
    ],
)
def test_which_iterate_is_judged(tmp_path, trained, past, wanted, chosen):
    config = smoke(CaidConfig(max_kl=1.0))
    run = read_committed(stopped_run(tmp_path / "r", config, trained=trained, past=past))
    if isinstance(chosen, dict):
        assert iterates(run, wanted, every=False) == chosen
        kept = {i: [float(i)] for i in trained if i not in past}
        assert iterates(run, 0, every=True) == kept
    else:
        with pytest.raises(evaluate.UserError, match=chosen):
            iterates(run, wanted, every=False)


def one_error(capsys, argv: list[str], message: str) -> str:
    """Checks that there is one line on stderr; returns what was printed on stdout."""
    assert main(argv) == 2
    out, error = capsys.readouterr()
    assert re.match("error: .*" + message, error) and error.count("\n") == 1, error
    return out


def test_a_run_that_cannot_be_judged_is_one_line_and_exit_code_2(finished, tmp_path, capsys, monkeypatch):
    one_error(capsys, [str(tmp_path / "nowhere")], f"{tmp_path}/nowhere does not exist")
    (tmp_path / "empty").mkdir()
    one_error(capsys, [str(tmp_path / "empty")], "has no config.json")
    new = stopped_run(tmp_path / "new", smoke(MocanConfig()), trained=[])
    one_error(capsys, [str(new)], "has no iterate yet")
    gone = stopped_run(tmp_path / "gone", smoke(MocanConfig(model="/nowhere/at/all")), trained=[1])
    one_error(capsys, [str(gone)], "model /nowhere/at/all: no such folder")
    other = stopped_run(tmp_path / "other", smoke(MocanConfig()), trained=[1])
    one_error(capsys, [str(other)], f"{other} was trained from another model")
    assert not list(tmp_path.glob("*/*evaluation*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--iterate 7", "--iterate 7: .* has 1, 2, 3;"),
        ("--out .", r"--out \. exists"),
        ("--audit tests.helpers.scorers:not_a_number", "scorer not_a_number gave nan for response 0"),
        (
            "--audit tests.helpers.scorers:constant",
            "scorer constant gives all responses of a prompt one score",
        ),
        ("--audit nothing-like-this", "scorer nothing-like-this: not found"),
        ("--audit harm", "two scorers are named harm"),
        ("--prompts missing.jsonl", r"missing\.jsonl: no such file"),
        ("--n-responses 1", "--n-responses 1: must be at least 2"),
        ("--n-prompts -3", "--n-prompts -3: must lie in"),
        ("--confidence 95", r"--confidence 95\.0: must lie above 0\.5 and below 1"),
        ("--device tpu", "--device tpu: must be one of"),
        ("--iterat 1", r"unknown flag --iterat\. Did you mean --iterate\? See --help"),
        ("--preset smoke", "unknown flag --preset"),
        ("again", "unexpected word 'again'; the run folder comes first"),
        ("--seed x", "--seed x: must be a whole number"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(finished, capsys, flags, message):
    before = {p.name for p in finished.iterdir()}
    one_error(capsys, [str(finished), *flags.split()], message)
    assert {p.name for p in finished.iterdir()} == before


def test_too_few_prompts_or_responses(finished, tmp_path, capsys):
    one = prompts_file(tmp_path / "one.jsonl", ["Why is moss soft?"])
    one_error(capsys, [str(finished), "--prompts", one], r"1 prompt\(s\): a standard error needs at least 2")
    run = stopped_run(tmp_path / "r", smoke(MocanConfig(eval_responses=1)), trained=[1])
    one_error(capsys, [str(run)], "the run's verdict has 1 response per prompt.*give --n-responses")


def test_a_flag_without_a_run(capsys):
    one_error(capsys, [], "no run is named; usage: python -m engine.evaluate RUN")
    one_error(capsys, ["--seed", "3"], "no run is named")


@pytest.mark.parametrize("stage", ["heldout/reference", "lookalike/policy"])
def test_ctrl_c_leaves_nothing_and_exits_with_130(finished, tmp_path, capsys, monkeypatch, stage):
    init, advance, current = evaluate.Phase.__init__, Progress.advance, []

    def opened(self, display, number, name):
        current.append(name)
        init(self, display, number, name)

    def press(self, n=1):
        advance(self, n)
        if current and current[-1] == stage:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(evaluate.Phase, "__init__", opened)
    monkeypatch.setattr(Progress, "advance", press)
    # A shell that puts tests in the background makes them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([str(finished), "--out", str(tmp_path / "o")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted: start the command again, as nothing was written\n"
    assert list(tmp_path.iterdir()) == [] and current[-1] == stage


def test_a_folder_that_cannot_be_made_is_found_before_any_sampling(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    printed = one_error(
        capsys, [str(finished), "--out", str(tmp_path / "file" / "o")], "--out .*file/o: cannot be made"
    )
    assert "iterate 3" in printed and "stage 1" not in printed


def test_a_changed_model_is_refused(finished, capsys, monkeypatch):
    digests = inputs.digests
    changed = {"model.safetensors": "0" * 64}
    monkeypatch.setattr(inputs, "digests", lambda folder: digests(folder) | changed)
    one_error(
        capsys,
        [str(finished)],
        "was trained from another model: .*model.safetensors has changed since .SHA-256 [0-9a-f]{12}, here "
        "000000000000.; put the original back",
    )


@pytest.mark.filterwarnings("ignore:'engine.evaluate' found in sys.modules")
def test_help_shows_every_flag_and_the_command_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["engine.evaluate", "--help"])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("engine.evaluate", run_name="__main__")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: python -m engine.evaluate RUN [flags]" in printed
    flags = (
        "plan slack between cost-rate true-rate correlation iterate best-feasible prompts profile n-prompts "
        "n-responses seed audit confidence allow-overlap accept-changes require-met out device "
        "threads model-ranks".split()
    )
    assert [f.name.replace("_", "-") for f in fields(EvaluateConfig)] == flags
    assert all(f"--{flag} " in printed.replace(",", " ") for flag in flags)


def test_questions_take_the_runs_settings(finished):
    q = ask(finished, EvaluateConfig(threads=2, n_responses=3))
    assert (q.config.threads, q.config.eval_responses, q.config.seed, q.config.eval_prompts) == (2, 3, 0, 8)
    assert q.config.temperature == 0.7 and len(q.prompts) == 8 and q.pool == 416
    torch.set_num_threads(1)


def test_the_best_feasible_iterate_is_chosen_on_other_prompts(finished, tmp_path, capsys):
    test = prompts_file(tmp_path / "test.jsonl", [f"What is {i} plus one?" for i in range(6)])
    assert main([str(finished), "--best-feasible", "--prompts", test, "--out", str(tmp_path / "o")]) == 0
    settings, printed = found(tmp_path / "o")["settings"], capsys.readouterr().out
    tried = settings["selection"]
    assert [row["iterate"] for row in tried] == [1, 2, 3]
    assert settings["iterate"] == evaluate.best_feasible(tried)
    assert settings["lam"] == next(row["lam"] for row in tried if row["iterate"] == settings["iterate"])
    assert f"iterate {settings['iterate']} is judged: " in printed and "what follows is on others" in printed
    # The policy judged is the one chosen: with --iterate the same figures come out.
    again = [
        str(finished),
        "--iterate",
        str(settings["iterate"]),
        "--prompts",
        test,
        "--out",
        str(tmp_path / "p"),
    ]
    assert main(again) == 0
    assert (tmp_path / "o" / "heldout.jsonl").read_bytes() == (tmp_path / "p" / "heldout.jsonl").read_bytes()


def test_best_feasible_prefers_reward_among_those_that_meet_all():
    def chosen(*rows):
        return evaluate.best_feasible(
            [{"iterate": i, "reward": r, "room": list(room)} for i, (r, *room) in enumerate(rows, 1)]
        )

    assert chosen((0.9, -0.1, 0.5), (0.3, 0.0, 0.1), (0.4, 0.2, 0.2)) == 3
    assert chosen((0.9, -0.3, 0.5), (0.3, -0.1, 0.1), (0.4, 0.2, -0.2)) == 2


def test_best_feasible_needs_other_prompts(finished, tmp_path, capsys):
    assert main([str(finished), "--best-feasible"]) == 2 and "give other --prompts" in capsys.readouterr().err
    own = prompts_file(tmp_path / "own.jsonl", [rows(finished)[0]["prompt"], "And one more?"])
    assert main([str(finished), "--best-feasible", "--prompts", own]) == 2
    assert "is also a prompt on which the iterate is chosen" in capsys.readouterr().err


def test_a_plan_needs_no_run_and_follows_the_flags(capsys):
    assert main(["--plan", "--slack", "0.2", "--cost-rate", "0.1", "--correlation", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "improvement 0.2 beyond b" in printed
    assert "3.33 % are unsafe, with a correlation of 1" in printed
    assert "6 responses of policy and reference each, at the last of 3 looks" in printed
    fewest = betting.fewest(0.1, 0.05 * share(0, 2, 3))
    assert f"rate at most 10 %, where no response is unsafe {fewest} " in printed


def test_a_plan_of_a_run_takes_its_constraints_and_spreads(finished, capsys):
    before = sorted(path.name for path in finished.iterdir())
    assert main([str(finished), "--plan", "--slack", "0.4", "--n-responses", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "harm 0.4 beyond b, where responses spread by 1 within prompts" in printed
    assert "with 3 responses" in printed and "this run looks at 8 prompts x" in printed
    assert sorted(path.name for path in finished.iterdir()) == before


def test_a_plan_of_limits_on_costs_takes_the_references(tmp_path, capsys):
    flags = ["--cost-mean", "3", "--cost-range=-30:30", "--force"]
    assert train.main(["mocan", *SMOKE, *flags, "--out", str(tmp_path / "mean")]) == 0
    flags = ["--cost-rate", "0.5", "--unsafe-above", "3", "--force"]
    assert train.main(["mocan", *SMOKE, *flags, "--out", str(tmp_path / "rate")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "mean"), "--plan", "--slack", "0.5"]) == 0
    assert "below 3, where mean costs of prompts spread by " in " ".join(capsys.readouterr().out.split())
    assert main([str(tmp_path / "rate"), "--plan", "--true-rate", "0.2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "harm at most 50 %, where 20 % are unsafe" in printed and "no response is unsafe" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "--seed", "3"], "--seed: --plan has no use for it; leave it out"),
        (
            ["--plan", "--cost-rate", "0.1", "--true-rate", "0.1"],
            "--true-rate 0.1: must lie below the limit 0.1",
        ),
        (["--plan", "--slack", "0"], "--slack 0.0: must lie in"),
    ],
)
def test_plans_that_say_nothing_are_refused(arguments, message, capsys):
    one_error(capsys, arguments, message)


def test_flags_of_plans_are_refused_elsewhere(finished, capsys):
    one_error(capsys, [str(finished), "--slack", "0.3"], "--slack: --plan alone uses it; add that")
    one_error(
        capsys, [str(finished), "--plan", "--cost-rate", "0.1"], "--cost-rate: the run has its own limits"
    )
