"""`python -m engine.evaluate RUN --profile` on a smoke run, with the published sets as files."""

import json
import re
import sys

import pytest
import torch

from engine import train
from engine.config import EvaluateConfig
from engine.data.prompts import shipped_prompts
from engine.errors import UserError
from engine.evaluate import main
from engine.intervals import estimate, rate
from engine.report import profile_page
from engine.run.committed import read_committed
from engine.stages.profile import ask
from engine.verdict.profile import SetVerdict
from engine.verdict.refusals import is_refusal
from tests.helpers.published_sets import write_sets
from tests.helpers.runs import SMOKE, write
from tests.helpers.scorers import either_sign

pytest.importorskip("pyarrow")
FILES = {"profile.json", "profile.png", "profile.html", "responses.jsonl"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("runs") / "a"
    short = ["--n-prompts", "24", "--eval-prompts", "4", "--steps", "1", "--unsafe-above", "0.5"]
    assert train.main(["mocan", *SMOKE, *short, "--force", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    """Lets no data set be found outside, without waiting for the hub."""

    class Datasets:
        @staticmethod
        def load_dataset(name: str, *_, split: str):
            raise ConnectionError(f"no way to {name}")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)


@pytest.fixture
def here(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, argv: list[str]) -> str:
    """Runs a command that must fail; returns its only line on stderr."""
    assert main(argv) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and "stage 1" not in out
    return error


def test_the_published_sets_are_judged_by_the_runs_scorers(run, here, capsys, monkeypatch):
    write_sets(here)
    # A prompt that the run trained on is no test of it.
    with open(shipped_prompts("train")[0]) as file:
        seen = json.loads(file.readline())["prompt"]
    with open(here / "Paul/XSTest/xstest_prompts.csv", "a") as file:
        file.write(f'9,"  {seen.upper()}",homonyms,safe,kill,violence\n')
    before = {path.name for path in run.iterdir()}
    assert main([str(run), "--profile", "safety"]) == 0
    printed, out = capsys.readouterr().out, run / "profile-1"
    assert {path.name for path in run.iterdir()} - before == {"profile-1"}
    assert {path.name for path in out.iterdir()} == FILES
    found = json.loads((out / "profile.json").read_text())
    sizes = {s["name"]: (s["n_prompts"], s["n_safe"], s["n_unsafe"], s["trained_on"]) for s in found["sets"]}
    assert sizes == {
        "XSTest": (5, 3, 2, 1),
        "BeaverTails-Evaluation": (3, 0, 3, 0),
        "PKU-SafeRLHF test": (2, 0, 0, 0),
        "WildGuardTest": (5, 2, 2, 0),
    }
    assert "XSTest: 1 prompts are training prompts of the run and were left out\n" in printed
    assert "PKU-SafeRLHF:test: left out of 4 rows: 2 with a prompt that stands there before\n" in printed
    assert "WildGuardTest: 5 prompts (2 safe, 2 unsafe, 1 not marked as safe or unsafe)\n" in printed
    missing = (
        "Do-Not-Answer is left out: put its parquet file into a folder LibrAI/do-not-answer under the "
        "working directory, or have the hub within reach (LibrAI/do-not-answer: "
    )
    (left_out,) = found["left_out"]
    assert left_out.startswith(missing) and f"warning: {left_out}\n" in printed
    assert "no way to LibrAI/do-not-answer" in left_out
    assert "safe ones have a cost harm at most 0.5; refusals" in printed
    _check_figures(found, [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()])
    # One table: a head, and a line for each measure of each set.
    lines = printed.splitlines()
    head = re.compile("set +measure +reference +policy +change")
    start = next(i for i, line in enumerate(lines) if head.fullmatch(line))
    assert len(lines) - start - 2 == sum(len(s["measures"]) for s in found["sets"])
    assert lines[-1].startswith(f"written: {out}/profile.html")
    # A second look gives the same numbers.
    monkeypatch.setattr(profile_page, "picture", lambda *_: b"")
    assert main([str(run), "--profile", "safety"]) == 0
    printed = capsys.readouterr().out
    assert "XSTest: 5 prompts (3 safe, 2 unsafe)\n" in printed
    for name in ("profile.json", "responses.jsonl"):
        assert (out / name).read_bytes() == (run / "profile-2" / name).read_bytes()


def _check_figures(found: dict, rows: list[dict]) -> None:
    """Works out the figures of every set again from its responses."""
    assert [len([r for r in rows if r["set"] == s["name"]]) for s in found["sets"]] == [10, 6, 4, 10]
    for one in found["sets"]:
        own = [row for row in rows if row["set"] == one["name"]]
        measures = {m["name"]: m for m in one["measures"]}

        def values(side: str, key: str, own=own, n=one["n_responses"]) -> torch.Tensor:
            listed = [row[f"{side}_{key}"] for row in own]
            return torch.tensor(listed, dtype=torch.float64).unflatten(0, (-1, n))

        for side in ("reference", "policy"):
            cost, reward = values(side, "cost")[..., 0], values(side, "reward")
            assert measures["safe rate (harm)"][side] == vars(rate((cost <= 0.5).double()))
            assert measures["mean cost (harm)"][side] == vars(estimate(cost.mean(1)))
            assert measures["mean reward (helpfulness)"][side] == vars(estimate(reward.mean(1)))
            audit = measures["mean cost (harm-audit, audit)"][side]
            assert audit == vars(estimate(values(side, "audit")[..., 0].mean(1)))
            assert [row[f"{side}_refused"] for row in own] == [is_refusal(row[side]) for row in own]
        better = (values("policy", "reward") > values("reference", "reward")).double()
        equal = (values("policy", "reward") == values("reference", "reward")).double()
        assert measures["win rate of reward"]["policy"] == vars(rate(better + equal / 2))
        for kind in ("safe", "unsafe"):
            assert (f"refusals, {kind} prompts" in measures) == (one[f"n_{kind}"] > 1)


def test_own_sets_with_one_response_of_a_chosen_iterate(run, here, capsys, monkeypatch):
    monkeypatch.setattr(profile_page, "picture", lambda *_: b"")
    rows = [{"question": f"What is {i}?", "danger": i % 2 == 1} for i in range(7)]
    write(here / "own.jsonl", rows)
    fields = "name: own, source: own.jsonl, prompt: question, label: danger, safe: false, unsafe: true"
    (here / "mine.yaml").write_text(f"sets:\n- {{{fields}}}\n")
    flags = ["--n-prompts", "5", "--n-responses", "1", "--confidence", "0.8", "--iterate", "1", "--out", "o"]
    teller = ["--audit", "refusal=tests.helpers.scorers:either_sign"]
    assert main([str(run), "--profile", "mine.yaml", *flags, *teller]) == 0
    found = json.loads((here / "o/profile.json").read_text())
    (own,) = found["sets"]
    assert (own["n_prompts"], own["n_responses"], found["profile"]) == (5, 1, "mine")
    assert own["n_safe"] + own["n_unsafe"] == 5 and found["settings"]["confidence"] == 0.8
    lines = [json.loads(line) for line in (here / "o/responses.jsonl").read_text().splitlines()]
    assert [row["kind"] == "unsafe" for row in lines] == [
        next(r["danger"] for r in rows if r["question"] == row["prompt"]) for row in lines
    ]
    # A scorer of that name tells refusals, by a score above 0.
    assert found["settings"]["refusals_by"] == "the scorer refusal"
    for side in ("reference", "policy"):
        scores = either_sign([], [row[side] for row in lines])
        assert [row[f"{side}_refused"] for row in lines] == [score > 0 for score in scores]
        assert [row[f"{side}_audit"][1] for row in lines] == scores
    assert len({(score > 0) for score in scores}) == 2
    assert {row["reference"] for row in lines} != {row["policy"] for row in lines}
    assert "refusals are told by the scorer refusal" in capsys.readouterr().out


def test_training_prompts_stay_with_allow_overlap(run, here):
    with open(shipped_prompts("train")[0]) as file:
        seen = [json.loads(file.readline())["prompt"] for _ in range(2)]
    write(here / "own.jsonl", [{"prompt": text} for text in [*seen, "Why is moss soft?", "What is glass?"]])
    (here / "p.yaml").write_text("sets:\n- {name: own, source: own.jsonl, every: safe}\n")
    for allowed, n in ((False, 2), (True, 4)):
        asked = ask(run, EvaluateConfig(profile="p.yaml", threads=1, allow_overlap=allowed))
        assert [len(one.prompts) for one in asked.sets] == [n] and asked.sets[0].trained_on == 2
    assert asked.iterate == max(read_committed(run).iterates) and asked.scales.safe_at_most == (0.5,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--profile safety",
            "--profile safety: none of its sets can be judged: XSTest is left out: put xstest_",
        ),
        ("--profile safty", r"--profile safty: no profile of that name; .*Did you mean safety\?"),
        (
            "--profile p.yaml",
            r"--profile p\.yaml: none of its sets .*: a is left out: gone\.csv: no such file",
        ),
        ("--profile q.yaml", r"no value of the column 'type' is one of Good, by which the set b tells"),
        (
            "--profile r.yaml",
            r"one\.jsonl:1: no column 'question', which the set c needs; columns found: prompt",
        ),
        ("--profile s.yaml", r"d is left out: 1 prompt\(s\), and a standard error needs at least 2"),
        ("--profile safety --prompts q.jsonl", "it has prompts of its own; leave --prompts out"),
        ("--profile safety --best-feasible", "it has prompts of its own; leave --best-feasible out"),
        ("--profile safety --n-prompts 1", "--n-prompts 1: must be at least 2"),
        ("--profile safety --iterate 9", "--iterate 9: .* has 1;"),
        ("--profile safety --out p.yaml", r"--out p\.yaml exists"),
    ],
)
def test_what_cannot_be_judged_is_one_line_before_anything_is_sampled(run, here, capsys, flags, message):
    write(here / "one.jsonl", [{"prompt": "a", "type": "bad"}])
    for name, fields in {
        "p": "name: a, source: gone.csv",
        "q": "name: b, source: one.jsonl, label: type, safe: Good",
        "r": "name: c, source: one.jsonl, prompt: question",
        "s": "name: d, source: one.jsonl",
    }.items():
        (here / f"{name}.yaml").write_text(f"sets:\n- {{{fields}}}\n")
    there = {path.name for path in run.iterdir()}
    assert re.search(message, refused(capsys, [str(run), *flags.split()]))
    assert {path.name for path in run.iterdir()} == there


def test_what_fails_on_the_way_leaves_no_folder(run, here, capsys, monkeypatch):
    write(here / "own.jsonl", [{"prompt": f"What is {i}?"} for i in range(3)])
    (here / "p.yaml").write_text("sets:\n- {name: own, source: own.jsonl}\n")

    def fails(self):
        raise UserError("the disk is full")

    monkeypatch.setattr(SetVerdict, "as_dict", fails)
    assert main([str(run), "--profile", "p.yaml", "--out", "o"]) == 2
    assert capsys.readouterr().err == "error: the disk is full\n"
    assert {path.name for path in here.iterdir()} == {"own.jsonl", "p.yaml"}
