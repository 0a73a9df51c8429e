"""`python -m engine.export`: the model card, and what may be published."""

import json
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from engine import export, train
from engine.run.contents import read_contents
from engine.run.folder import RunFolder
from engine.verdict.evaluation import Evaluation
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
    assert "held-out prompts: 8 of 416 (the project's own)" in card
    (command,) = re.findall(r"```bash\n(.*)\n```", card)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "engine.train", "mocan"]
    again = train.parse("mocan", words[4:])
    written = read_contents(run).config
    assert {name: getattr(again, name) for name in written} == written and len(written) > 40


def test_a_policy_that_is_not_met_is_published_only_on_demand(run, tmp_path, capsys, hub, monkeypatch):
    verdict = Evaluation.read(run / "evaluation.json", cure="")
    unmet = replace(verdict, constraints=(replace(verdict.constraints[0], word="not resolved"),))
    monkeypatch.setattr(export, "read_verdict", lambda committed: unmet)
    flags = [str(run), str(tmp_path / "merged"), "--push-to-hub", "me/mine"]
    assert export.main(flags) == 4 and not hub.made and not (tmp_path / "merged").exists()
    assert "is not resolved; train it further" in capsys.readouterr().err
    monkeypatch.setattr(export, "read_verdict", lambda committed: None)
    assert export.main(flags) == 4 and "has no verdict yet" in capsys.readouterr().err
    assert export.main([*flags, "--even-if"]) == 0
    name, files = hub.made
    assert name == "me/mine" and {"README.md", "config.json", "model.safetensors"} <= set(files)
    assert "nothing is known of the constraints" in (tmp_path / "merged" / "README.md").read_text()


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
    }.items(),
)
def test_commands_that_cannot_be_used_are_refused(run, tmp_path, capsys, words, said):
    words = [{"run": str(run), "merged": str(tmp_path / "merged")}.get(word, word) for word in words]
    assert export.main(words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_a_damaged_verdict_is_not_put_into_a_card(run, tmp_path, capsys):
    file = RunFolder(run).evaluation
    whole = file.read_bytes()
    try:
        file.write_bytes(whole.replace(b'"met"', b'"not met"'))
        assert export.main([str(run), str(tmp_path / "merged")]) == 2
    finally:
        file.write_bytes(whole)
    assert "is not as the run wrote it" in capsys.readouterr().err and not (tmp_path / "merged").exists()
