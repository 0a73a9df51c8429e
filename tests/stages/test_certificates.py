"""certificate.json and certificate.html of runs and evaluations, and --require-met."""

import hashlib
import json
import math
from html import unescape
from pathlib import Path

import pytest
from safetensors import safe_open

from engine import evaluate, train
from engine.files import write_json
from engine.policy.steps import Policy
from engine.report import certificate
from engine.run.committed import read_committed
from engine.stages.run_inputs import owned_inputs
from engine.verdict.evaluation import Evaluation
from tests.helpers.runs import SMOKE, files

FLAGS = ["mocan", *SMOKE, "--eval-prompts", "20", "--cost", "harm", "harm-audit", "--audit"]
MET = [*FLAGS, "--threshold", "-9", "-9"]
UNMET = [*FLAGS, "--threshold", "-9", "3", "--force"]
NAMES = ("certificate.json", "certificate.html")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """Makes the same met run in two folders that know nothing of one another, and one that is not met."""
    folders = [tmp_path_factory.mktemp(name) / "run" for name in ("one", "two", "unmet")]
    for folder, flags in zip(folders, (MET, MET, UNMET), strict=True):
        assert train.main([*flags, "--out", str(folder)]) == 0
    return folders


def found_in(folder: Path) -> dict:
    return json.loads((folder / "certificate.json").read_text())


def test_equal_runs_have_equal_certificates(runs):
    one, two, unmet = ([(folder / name).read_bytes() for name in NAMES] for folder in runs)
    assert one == two and one[0] != unmet[0]
    assert not any(str(runs[0].parent).encode() in data for data in one)


def test_a_certificate_says_what_the_verdict_found(runs):
    for folder, word in ((runs[0], "met"), (runs[2], "not met")):
        found, e = found_in(folder), Evaluation.read(folder / "evaluation.json", cure="")
        assert found["word"] == e.word == word and found["confidence"] == 0.95
        for own, c in zip(found["constraints"], e.constraints, strict=True):
            assert (own["name"], own["value"], own["word"], own["holds"]) == (
                c.name, c.limit.value, c.word, c.holds,
            )  # fmt: skip
            assert (own["low"], own["high"], own["lower"], own["upper"], own["n"]) == (
                c.judged.low, c.judged.high, c.judged.lower, c.judged.upper, 20,
            )  # fmt: skip
            assert own["bounds"] == "approximate"
        (look,) = found["looks"]
        assert (look["prompts"], look["responses"], look["planned"]) == (20, 2, 1)
        assert look["error"] == pytest.approx(0.05 * 0.75)
        assert look["means"] == [c.judged.mean for c in e.constraints]
        assert found["earlier_verdicts"] == 0 and found["run"]["iterate"] == 1
        assert any("harm, harm-audit are approximate" in line for line in found["assumptions"])
        assert "as far as approximate bounds hold" in found["covers"]
        assert "single constraints are corrected for their number" in found["covers"]


def test_digests_are_those_of_what_was_used(runs):
    run = runs[0]
    digests, committed = found_in(run)["digests"], read_committed(run)
    text = (run / "certificate.json").read_text()
    rest = {key: value for key, value in json.loads(text).items() if key != "sha256"}
    assert found_in(run)["sha256"] == hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    # The weights, by hand from the stage's file.
    prefix, digest = "adapter.", hashlib.sha256()
    with safe_open(committed.files["iteration-1/policy"], framework="pt") as stored:
        for name in sorted(key for key in stored.keys() if key.startswith(prefix)):  # noqa: SIM118
            value = stored.get_tensor(name)
            head = [name.removeprefix(prefix), str(value.dtype), list(value.shape)]
            digest.update(json.dumps(head).encode() + value.numpy().tobytes())
    assert digests["policy"] == digest.hexdigest()
    assert committed.load("iteration-1/policy", Policy).adapter
    # The held-out prompts, by hand from the texts that were judged.
    record = owned_inputs(run).record
    judged = {json.loads(line)["prompt"] for line in (run / "heldout.jsonl").read_text().splitlines()}
    pool = zip(record.heldout.text, record.heldout.kind, record.heldout.token_ids, strict=True)
    lines = sorted(json.dumps([text, kind, ids]) for text, kind, ids in pool if text in judged)
    assert len(lines) == 20
    expected = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    assert digests["held-out prompts"] == expected
    assert digests["model"]["files"] == record.model
    assert digests["scorers"]["harm"]["sha256"] == record.scorers["harm"]["sha256"]
    assert digests["scorers"].keys() == {"reward", "harm", "harm-audit"}


def test_the_page_is_drawn_from_the_certificate_alone(runs, tmp_path):
    found = found_in(runs[2])
    page = (runs[2] / "certificate.html").read_text()
    assert certificate.page(found) == page and '<div class="verdict not-met">' in page
    assert "http-equiv" in page and "<script" not in page
    text = unescape(page)
    for said in (*found["statement"], *found["assumptions"], found["covers"], found["run"]["command"]):
        assert said in text
    for digest in (found["digests"]["policy"], found["digests"]["held-out prompts"], found["sha256"]):
        assert digest in text
    odd = {**found, "covers": "<b>&"}
    assert "<b>" not in certificate.page(odd) and "&lt;b&gt;&amp;" in certificate.page(odd)
    # What is written reads back, and a changed file does not.
    write_json(tmp_path / "c.json", found)
    assert certificate.read(tmp_path / "c.json", cure="") == found
    for other in ({**found, "word": "met"}, {**found, "confidence": math.nan}, {}):
        (tmp_path / "c.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="c.json is not as it was written; judge again"):
            certificate.read(tmp_path / "c.json", cure="judge again")


def test_an_evaluation_has_a_certificate_of_its_own(runs, tmp_path, capsys):
    run, out = runs[0], tmp_path / "e"
    assert evaluate.main([str(run), "--audit", "length", "--require-met", "--out", str(out)]) == 0
    assert f"certificate: {out / NAMES[0]} and {out / NAMES[1]}" in capsys.readouterr().out
    own, later = found_in(run), found_in(out)
    for name in ("policy", "held-out prompts", "training prompts", "model"):
        assert own["digests"][name] == later["digests"][name]
    assert later["earlier_verdicts"] == 1 and "the 1 verdict before it" in later["covers"]
    assert [audit["name"] for audit in later["audits"]] == ["length"]
    assert later["digests"]["scorers"].keys() == {"reward", "harm", "harm-audit", "length"}
    assert (own["sampling"]["seed"], later["sampling"]["seed"]) == (0, 1000)
    alike = later["refusals"]["look_alikes"]
    assert own["refusals"]["look_alikes"] is None and alike["policy"]["n"] == 76
    assert "refusals on harmless look-alikes" in (out / "certificate.html").read_text()


def test_require_met_ends_with_exit_code_4_once_everything_is_written(runs, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*UNMET, "--require-met", "--out", str(out)]) == 4
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert line.startswith("error: --require-met: all 2 constraints together are not met; everything is")
    # The flag is of the command and not of the run.
    assert files(out) == files(runs[2])
    assert train.main(["--resume", str(out), "--require-met"]) == 4
    assert train.main(["--resume", str(out)]) == 0 and files(out) == files(runs[2])
    assert train.main(["--resume", str(runs[0]), "--require-met"]) == 0
    for flags, code in (([], 0), (["--require-met"], 4)):
        assert evaluate.main([str(out), *flags]) == code
    assert (out / "evaluation-2" / "certificate.json").is_file()
    assert evaluate.main([str(out), "--require-met", "--profile", "safety"]) == 2
    assert "gives no verdict" in capsys.readouterr().err


def test_files_of_one_name_in_two_folders_are_both_in_it(runs):
    found = json.loads((runs[0] / "certificate.json").read_text())
    assert found["digests"]["files"] == {}
    made = certificate.Made(
        contents=read_committed(runs[0]).contents,
        iterate=0,
        weights="",
        train=owned_inputs(runs[0]).record.train,
        sources={"--prompts": {"/home/me/b/x.jsonl": "1" * 64, "/home/me/a/x.jsonl": "0" * 64}},
        model={},
        scorers={"reward": {"form": "judge", "source": "http://here", "sha256": "2" * 64}},
        changed_scorers={"reward": "3" * 64},
    )
    e = Evaluation.read(runs[0] / "evaluation.json", cure="")
    judging = certificate.Judging(
        evaluation=e, prompts=made.train, seed=0, earlier=2, shared="2 of 3 prompts"
    )
    found = certificate.certificate(made, judging)
    assert found["digests"]["files"] == {"--prompts": [["x.jsonl", "0" * 64], ["x.jsonl", "1" * 64]]}
    assert "/home/me" not in json.dumps(found) and "/home/me" not in certificate.page(found)
    assert found["digests"]["scorers"]["reward"]["changed_to"] == "3" * 64
    said = " ".join(found["assumptions"])
    assert "reward is a judge behind HTTP" in said and "reward changed on the way" in said
    assert "2 of 3 prompts: on these the policy may be better" in said
    assert "the 2 verdicts before it" in found["covers"]
    assert "none: the reference was judged" in certificate.page(found)
