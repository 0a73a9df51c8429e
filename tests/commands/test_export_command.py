"""`python -m engine.export`: the model card, and what may be published."""

import hashlib
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from engine import evaluate, export, train
from engine.run.contents import read_contents
from engine.run.folder import RunFolder
from engine.stages.smoke import smoke_folder
from tests.helpers.runs import SMOKE


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("export") / "run"
    flags = [
        "mocan",
        *SMOKE,
        "--cost",
        "harmful=harm",
        "harm-audit",
        "--threshold",
        "-9",
        "-9",
        "--eval-prompts",
        "24",
        "--system=-x",
    ]
    assert train.main([*flags, "--audit", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Puts a stand-in in place of the hub's client, which notes the calls and raises `refuses`."""
    calls = SimpleNamespace(made=[], refuses=None)

    class Api:
        def create_repo(self, name, exist_ok):
            calls.made.append(name)
            if calls.refuses:
                raise calls.refuses

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.made.append(sorted(path.name for path in folder_path.iterdir()))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return calls


def test_the_card_shows_the_verdict_and_how_to_repeat_the_run(run, tmp_path, capsys):
    assert export.main([str(run), str(tmp_path / "merged")]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers" and "mocan" in metadata["tags"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = {line.split(" | ")[0].strip("| "): line for line in card.splitlines() if line.startswith("| ")}
    for name, estimate, word in (
        ("harmful", evaluation["constraints"][0]["estimate"], "**met**"),
        ("harm-audit", evaluation["constraints"][1]["estimate"], "**met**"),
        ("reward", evaluation["reward"], "|"),
    ):
        numbers = [float(x) for x in re.findall(r"[+-]?\d+\.\d\d\b", rows[name])]
        assert numbers == [round(estimate[key], 2) for key in ("mean", "low", "high")]
        assert word in rows[name]
    assert "training prompts: 12 of 420 (the project's own), 4 responses each" in card
    assert "held-out prompts: 24 of 416 (the project's own)" in card
    (command,) = re.findall(r"```bash\n(.*)\n```", card)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "engine.train", "mocan"]
    again = train.parse("mocan", words[4:])
    written = read_contents(run).config
    assert {name: getattr(again, name) for name in written} == written and len(written) > 40


def test_the_certificate_goes_along_and_the_card_says_what_it_rests_on(run, tmp_path):
    assert export.main([str(run), str(tmp_path / "merged")]) == 0
    written, copy = run / "certificate.json", tmp_path / "merged" / "certificate.json"
    assert written.read_bytes() == copy.read_bytes()
    card, found = (tmp_path / "merged" / "README.md").read_text(), json.loads(copy.read_text())
    assert found["word"] == "met" and "All constraints together: **met**." in card
    assert all(line in card for line in (found["covers"], *found["assumptions"], found["sha256"]))


@pytest.mark.parametrize("verdict", ["not resolved", "not met", None])
def test_a_policy_that_is_not_met_is_exported_only_on_demand(
    run, tmp_path, capsys, hub, monkeypatch, verdict
):
    unmet = (
        None if verdict is None else {**json.loads((run / "certificate.json").read_text()), "word": verdict}
    )
    monkeypatch.setattr("engine.stages.export.read_verdict", lambda committed, folder: unmet)
    words, pushing = [str(run), str(tmp_path / "merged")], ["--push-to-hub", "me/mine"]
    for flags in (words, [*words, *pushing]):
        assert export.main(flags) == 4 and not hub.made and not (tmp_path / "merged").exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert ("has no verdict yet" if verdict is None else f"the verdict is {verdict} (") in line
        assert "--even-if" in line
    assert export.main([*words, *pushing, "--even-if"]) == 0
    name, files = hub.made
    assert name == "me/mine" and {"README.md", "config.json", "model.safetensors"} <= set(files)
    card = (tmp_path / "merged" / "README.md").read_text()
    told = "nothing is known of the constraints" if verdict is None else f"together: **{verdict}**"
    assert told in card and ("certificate.json" in files) == (verdict is not None)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_where_no_solution_was_found_the_reference_is_exported(run, tmp_path, capsys, monkeypatch):
    base = weights_of(smoke_folder())
    words = [str(run), "--or-reference"]
    # A policy that is met is exported all the same.
    assert export.main([words[0], str(tmp_path / "met"), words[1]]) == 0
    policy = weights_of(tmp_path / "met")
    assert any(not torch.equal(policy[name], base[name]) for name in base)
    assert "no solution" not in capsys.readouterr().out + (tmp_path / "met" / "README.md").read_text()
    unmet = {**json.loads((run / "certificate.json").read_text()), "word": "not resolved"}
    monkeypatch.setattr("engine.stages.export.read_verdict", lambda committed, folder: unmet)
    assert export.main([words[0], str(tmp_path / "unmet"), words[1]]) == 0
    assert "no solution found: the verdict is not resolved" in capsys.readouterr().out
    reference = weights_of(tmp_path / "unmet")
    assert reference.keys() == base.keys()
    assert all(torch.equal(reference[name], base[name]) for name in base)
    assert "# smoke: no solution found" in (tmp_path / "unmet" / "README.md").read_text()
    assert not (tmp_path / "unmet" / "certificate.json").exists()
    names = {path.name for path in (run / "model").iterdir()}
    assert names <= {path.name for path in (tmp_path / "unmet").iterdir()}
    # A run that has not ended has found nothing, and its end may.
    monkeypatch.setattr("engine.stages.export.read_verdict", lambda committed, folder: None)
    assert export.main([words[0], str(tmp_path / "none"), words[1]]) == 4


def test_a_later_verdict_may_be_named(run, tmp_path, capsys):
    few, many = tmp_path / "few", tmp_path / "many"
    own = shutil.copytree(run, tmp_path / "run")
    for out, prompts in ((few, "8"), (many, "24")):
        assert evaluate.main([str(own), "--n-prompts", prompts, "--out", str(out)]) == 0
    assert export.main([str(own), str(tmp_path / "a"), "--verdict", str(few)]) == 4
    assert "the verdict is not resolved" in capsys.readouterr().err
    assert export.main([str(own), str(tmp_path / "a"), "--verdict", str(many)]) == 0
    found = json.loads((tmp_path / "a" / "certificate.json").read_text())
    assert found["earlier_verdicts"] == 2 and found["refusals"]["look_alikes"]["policy"]["n"] == 76
    # One of other weights is about another policy.
    found["digests"]["policy"] = "0" * 64
    rest = {key: value for key, value in found.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    (many / "certificate.json").write_text(
        json.dumps({**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    )
    assert export.main([str(own), str(tmp_path / "b"), "--verdict", str(many)]) == 2
    assert "it is about other weights than those of iterate 1" in capsys.readouterr().err
    (many / "certificate.json").write_text(text)
    assert export.main([str(own), str(tmp_path / "b"), "--verdict", str(many)]) == 2
    assert "is not as it was written" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_a_met_policy_is_published_and_a_hub_that_fails_loses_nothing(run, tmp_path, capsys, hub):
    assert export.main([str(run), str(tmp_path / "a"), "--push-to-hub=me/mine"]) == 0
    assert hub.made[0] == "me/mine" and "uploaded to me/mine" in capsys.readouterr().out
    hub.refuses = OSError("401 Client Error\nwrong token")
    assert export.main([str(run), str(tmp_path / "b"), "--push-to-hub", "me/mine"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "OSError: 401 Client Error" in line and f"hf upload me/mine {tmp_path / 'b'}" in line
    assert (tmp_path / "b" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    {
        (): "the run and the new folder come first",
        ("run",): "the run and the new folder come first",
        ("run", "merged", "more"): "unexpected word 'more'",
        ("run", "merged", "--push-to-hub", "here"): "--push-to-hub here: no name of the form OWNER/NAME",
        ("run", "merged", "--even"): "unknown flag --even. Did you mean --even-if?",
        ("run", "merged", "--even-if", "--or-reference"): "ask for two policies; leave one of them out",
        ("run", "merged", "--verdict", "nowhere"): "certificate.json: does not exist; judge the run again",
    }.items(),
)
def test_commands_that_cannot_be_used_are_refused(run, tmp_path, capsys, words, said):
    words = [{"run": str(run), "merged": str(tmp_path / "merged")}.get(word, word) for word in words]
    assert export.main(words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_damaged_certificate_is_not_put_into_a_card(run, tmp_path, capsys, how):
    file = RunFolder(run).certificate
    whole = file.read_bytes()
    try:
        if how == "changed":
            file.write_bytes(whole.replace(b'"not resolved"', b'"met"').replace(b'"met"', b'"met" ', 1))
            assert file.read_bytes() != whole
        else:
            file.unlink()
        assert export.main([str(run), str(tmp_path / "merged")]) == 2
    finally:
        file.write_bytes(whole)
    (line,) = capsys.readouterr().err.splitlines()
    assert "certificate.json" in line and f"--resume {run} makes it again" in line
    assert not (tmp_path / "merged").exists()
