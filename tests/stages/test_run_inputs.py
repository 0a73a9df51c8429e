"""A run owns what it was made from and what it wrote: changes outside and damage inside do not change it."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine import evaluate, export, train
from engine.model.tokenizer import load_tokenizer
from engine.stages import evaluate as judging
from engine.stages import inputs, sampling
from engine.stages.smoke import write_smoke_model
from tests.helpers.runs import SMOKE, files, write

DATED = (
    "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}."
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, EOS = 0, 2  # what this template ends a turn with, and the only token that the model's files name
SCORER = "def brevity(prompts, responses):\n    return [-len(text) / 10 for text in responses]\n"


class Later(datetime):
    """A clock that goes days ahead."""

    days = 0

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1 + cls.days, 12, 0, 0)


def in_place(folder: Path) -> None:
    """Writes a model whose template writes the date, prompts, pairs and a scorer into a folder."""
    write_smoke_model(folder / "model")
    config = folder / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": DATED}))
    write(folder / "prompts.jsonl", [{"prompt": f"Say {i}"} for i in range(30)])
    rows = [{"prompt": f"Say it {i}", "chosen": "yes" * (i % 3 + 1), "rejected": "no"} for i in range(12)]
    write(folder / "pairs.jsonl", rows)
    (folder / "short.py").write_text(SCORER)


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """Returns a folder with a finished run and all that it was made from."""
    folder = tmp_path_factory.mktemp("place")
    in_place(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(inputs, "datetime", Later)
        flags = ["--model", "model", "--prompts", "prompts.jsonl", "--pairs", "pairs.jsonl", "--force"]
        flags += ["--audit", "short:brevity", "--out", "run"]
        assert train.main(["mocan", *SMOKE, *flags]) == 0
    shutil.copytree(folder, folder.with_name(f"{folder.name}-kept"))
    return folder


@pytest.fixture
def here(place, monkeypatch):
    """Returns that folder as it was, three days later; the process works in it.

    It is always the same folder, since adapters name their base model by its place.
    """
    shutil.rmtree(place)
    shutil.copytree(place.with_name(f"{place.name}-kept"), place)
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(Later, "days", 3)
    monkeypatch.setattr(inputs, "datetime", Later)
    return place


def cut_short(run: Path, after: int) -> None:
    """Leaves of a run what a kill after that many stages leaves."""
    for path in [*sorted((run / "stages").iterdir())[after:], run / "evaluation.json", run / "heldout.jsonl"]:
        path.unlink()
    shutil.rmtree(run / "adapters")


def oneline(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def change_all(here: Path) -> None:
    """Changes everything outside the run but its model and its scorers."""
    lines = (here / "prompts.jsonl").read_text().splitlines(keepends=True)
    (here / "prompts.jsonl").write_text("".join(lines[3:]).replace("Say 5", "Tell 5"))
    lines = sorted((here / "pairs.jsonl").read_text().splitlines(keepends=True), reverse=True)
    (here / "pairs.jsonl").write_text("".join(lines))
    config = here / "model" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("Today is", "Now it is"))
    (here / "model" / "chat_template.jinja").write_text("{{ 'another' }}")


def test_a_resumed_run_goes_on_with_what_it_began_with(here, capsys):
    whole = files(here / "run")
    assert json.loads((here / "run" / "config.json").read_text())["inputs"]
    for after in (1, 3):
        cut_short(here / "run", after)
        change_all(here)
        assert train.main(["--resume", "run"]) == 0
        again = files(here / "run")
        assert whole.keys() == again.keys() and [name for name in whole if whole[name] != again[name]] == []
        said = oneline(capsys)
        for file in ("--prompts prompts.jsonl", "--pairs pairs.jsonl", "model/tokenizer_config.json"):
            assert f"{file} has changed since the run began; the run goes on" in said
        assert "model/chat_template.jinja is new since the run began" in said


def test_answers_stop_where_the_template_ends_a_turn_as_the_runs_copy_of_it_does(here, monkeypatch):
    stops, generate = [], sampling.generate

    def listening(*given, stop_token_ids, **options):
        stops.append(stop_token_ids)
        return generate(*given, stop_token_ids=stop_token_ids, **options)

    monkeypatch.setattr(sampling, "generate", listening)
    assert inputs.stop_tokens(here / "model", load_tokenizer(here / "model")) == (END, EOS)
    cut_short(here / "run", 3)
    change_all(here)
    assert inputs.stop_tokens(here / "model", load_tokenizer(here / "model")) == (EOS,)
    assert train.main(["--resume", "run"]) == 0
    assert evaluate.main(["run", "--out", "judged"]) == 0
    assert len(stops) >= 3 and set(stops) == {(END, EOS)}


def test_an_evaluation_judges_on_the_prompts_that_the_run_held_out(here, capsys):
    held = {json.loads(line)["prompt"] for line in (here / "run" / "heldout.jsonl").open()}
    out = ["--seed", "0", "--out"]
    assert evaluate.main(["run", *out, "before"]) == 0
    change_all(here)
    shutil.rmtree(here / "run" / "adapters")
    assert evaluate.main(["run", *out, "after"]) == 0
    before, after = ((here / name / "heldout.jsonl").read_bytes() for name in ("before", "after"))
    assert before == after and {json.loads(line)["prompt"] for line in after.splitlines()} == held
    assert "prompts.jsonl has changed since the run began" in oneline(capsys)
    # New prompts are told the run's date, not today's.
    write(here / "new.jsonl", [{"prompt": "Something else"}, {"prompt": "Another thing"}])
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        generate = judging.sample

        def sample(subject, phase, prompts, *rest, **options):
            shown.append(subject.tokenizer.decode(prompts.token_ids[0]))
            return generate(subject, phase, prompts, *rest, **options)

        patch.setattr(judging, "sample", sample)
        assert evaluate.main(["run", "--prompts", "new.jsonl", "--out", "new"]) == 0
    assert all("Today is 01 Jan 2026." in text for text in shown) and shown


def test_changed_scorers_are_refused_until_they_are_accepted(here, capsys):
    cut_short(here / "run", 3)
    (here / "short.py").write_text(SCORER.replace("10", "3"))
    assert train.main(["--resume", "run"]) == 2
    said = capsys.readouterr().err
    assert "scorer brevity (" in said and "short.py) has changed since run began" in said
    assert "--accept-changes" in said and said.count("\n") == 1
    assert evaluate.main(["run", "--out", "x"]) == 2 and not (here / "x").exists()
    assert train.main(["--resume", "run", "--accept-changes"]) == 0
    assert "--accept-changes: scores from here on" in oneline(capsys)
    # What was accepted once is not asked again; a further change is.
    assert train.main(["--resume", "run"]) == 0
    assert evaluate.main(["run", "--out", "y", "--n-prompts", "2"]) == 0
    (here / "short.py").write_text(SCORER.replace("10", "4"))
    assert train.main(["--resume", "run"]) == 2
    # The original needs no leave, but a run with scores of both says so, once.
    (here / "short.py").write_text(SCORER)
    for said in (True, False):
        capsys.readouterr()
        assert train.main(["--resume", "run"]) == 0
        assert said == ("short.py) is again as it was when run began: scores" in oneline(capsys))


def test_another_model_is_refused_by_file(here, capsys):
    weights = here / "model" / "model.safetensors"
    tensors = load_file(weights)
    # One bit, at a place that the short fingerprint need not see.
    tensors["model.norm.weight"].view(dtype=tensors["model.norm.weight"].dtype)[3] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    judge, give = (evaluate.main, ["run", "--out", "x"]), (export.main, ["run", "x"])
    for main, argv in ((train.main, ["--resume", "run"]), judge, give):
        assert main(argv) == 2 and not (here / "x").exists()
        said = capsys.readouterr().err
        assert "model.safetensors has changed since" in said and "put the original back" in said


def damage(path: Path, how: str) -> None:
    """Damages a file of a run in one of five ways."""
    data = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
        (path / "note.txt").write_text("mine")
    elif how != "deleted":
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"emptied": b"", "cut": data[:middle], "flipped": flipped}[how])


OUTSIDE_STAGES = (
    "adapters/iteration-1/adapter_model.safetensors",
    "adapters/iteration-1/adapter_config.json",
    "metrics.jsonl",
    "evaluation.json",
    "heldout.jsonl",
    "certificate.json",
    "certificate.html",
    "report.html",
    "report.png",
    "config.json",
    "inputs.safetensors",
    "outputs.json",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
)


@pytest.mark.parametrize("how", ["cut", "flipped", "deleted", "a folder"])
def test_a_resumed_run_restores_what_is_damaged_outside_its_stages(here, capsys, monkeypatch, how):
    # inputs.safetensors holds the date, so that it can be made anew on that day only.
    monkeypatch.setattr(Later, "days", 0)
    run = here / "run"
    whole = files(run)
    # Without outputs.json nothing tells that others of these files are damaged; they are made again anyway.
    some, alone = ["config.json", "report.png"], ["outputs.json"]
    for chosen in (some, alone, [name for name in OUTSIDE_STAGES if name not in some + alone]):
        for name in chosen:
            damage(run / name, how)
        assert train.main(["--resume", "run"]) == 0
        out, err = capsys.readouterr()
        again = {name: data for name, data in files(run).items() if "moved-aside" not in name}
        assert whole.keys() == again.keys() and [name for name in whole if whole[name] != again[name]] == []
        said = " ".join((out + err).split())
        assert chosen is alone or ("restored" in said and "made again" in said)
    notes = list(run.rglob("note.txt"))
    assert (how != "a folder") or all(note.read_text() == "mine" for note in notes)


def test_names_that_were_changed_in_the_record_of_outputs_are_noted_again(here):
    run, name = here / "run", "adapters/iteration-1/adapter_config.json"
    whole = files(run)
    for other in ("adapters/iteration-2/adapter_config.json", "evaluation.json"):
        text = (run / "outputs.json").read_text()
        assert name in text
        (run / "outputs.json").write_text(text.replace(name, other))
        assert train.main(["--resume", "run"]) == 0
        assert {n: data for n, data in files(run).items() if "moved-aside" not in n} == whole


def test_a_damaged_stage_is_named_and_computed_again(here, capsys):
    run = here / "run"
    whole = files(run)
    stage = run / "stages" / "04-iteration-1-policy.safetensors"
    assert stage.is_file(), sorted(path.name for path in (run / "stages").iterdir())
    damage(stage, "flipped")
    for main, argv in ((evaluate.main, ["run", "--out", "x"]), (export.main, ["run", "x"])):
        assert main(argv) == 2 and not (here / "x").exists()
        said = capsys.readouterr().err
        assert stage.name in said and "--resume run" in said and said.count("\n") == 1
    assert train.main(["--resume", "run"]) == 0
    assert files(run) == whole
    assert export.main(["run", "merged", "--even-if"]) == 0
    # The adapter's folder is for others: what is exported comes from the stages.
    for how in ("flipped", "deleted"):
        damage(run / "adapters" / "iteration-1" / "adapter_model.safetensors", how)
        assert export.main(["run", f"merged-{how}", "--even-if"]) == 0
        assert files(here / "merged") == files(here / f"merged-{how}")
        assert train.main(["--resume", "run"]) == 0


def test_an_iterate_whose_stage_is_gone_is_not_judged_past(here, capsys):
    for path in sorted((here / "run" / "stages").iterdir())[3:]:
        path.unlink()
    for main, argv in ((evaluate.main, ["run", "--out", "x"]), (export.main, ["run", "x"])):
        assert main(argv) == 2 and not (here / "x").exists()
        assert "the stage that made iterate 1 is gone; go on with" in capsys.readouterr().err


def test_samples_come_with_the_prompts_that_they_answer(here, capsys):
    own = ["--model", "model", "--prompts", "prompts.jsonl", "--audit", "short:brevity", "--force"]
    whole = ["mocan", *SMOKE, *own]
    assert train.main([*whole, "--samples-of", "run", "--out", "a"]) == 0
    change_all(here)
    assert train.main([*whole, "--samples-of", "run", "--out", "b"]) == 0
    a, b = files(here / "a"), files(here / "b")
    kept = [name for name in a if not name.startswith(("inputs", "config", "report"))]
    first = "stages/01-reference.safetensors"
    assert load_file(here / "a" / first).keys() == load_file(here / "b" / first).keys()
    assert a["evaluation.json"] == b["evaluation.json"] and a["heldout.jsonl"] == b["heldout.jsonl"]
    assert kept and "the run goes on" in oneline(capsys)
    (here / "short.py").write_text(SCORER.replace("10", "3"))
    assert train.main([*whole, "--samples-of", "run", "--out", "c"]) == 2
    assert "has changed since run began" in capsys.readouterr().err
    damage(here / "run" / "stages" / "01-reference.safetensors", "flipped")
    (here / "short.py").write_text(SCORER)
    assert train.main([*whole, "--samples-of", "run", "--out", "d"]) == 2
    assert "01-reference.safetensors does not match its checksum" in capsys.readouterr().err
