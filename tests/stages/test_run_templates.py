"""Runs of a model without a chat template: --template, its variables, and --top-k, from prompts to export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import train
from engine.config import ExportConfig, MocanConfig, smoke
from engine.evaluate import main as evaluate_main
from engine.run.committed import read_committed
from engine.stages import evaluate
from engine.stages.export import export
from engine.stages.inputs import read_inputs
from engine.stages.reference import ReferenceSamples
from engine.stages.run_inputs import owned_inputs
from engine.stages.smoke import write_random_heads
from tests.helpers.published import write_llama1
from tests.helpers.runs import SMOKE, files, write

TEMPLATE = (
    "{{ bos_token }}BEGINNING OF CONVERSATION: {% for m in messages %}{% if m.role == 'user' %}"
    "{{ 'USER: ' + m.content }}{% if polite %}{{ ', please' }}{% endif %}{{ ' ASSISTANT:' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
FLAGS = ["--model", "model", "--prompts", "prompts.jsonl", "--template", "own.jinja", "--top-k", "2"]
FLAGS += ["--chat-template-kwargs", '{"polite": true}', "--system", "Be brief.", "--force"]


def text_of(asked: str) -> str:
    return f"BEGINNING OF CONVERSATION: USER: Be brief.\n\n{asked}, please ASSISTANT:"


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """Returns a folder with a finished run and all that it was made from."""
    folder = tmp_path_factory.mktemp("place")
    write_random_heads(write_llama1(folder / "model"))
    write(folder / "prompts.jsonl", [{"prompt": f"hello {i}"} for i in range(30)])
    (folder / "own.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["mocan", *SMOKE, *FLAGS, "--out", "run"]) == 0
    shutil.copytree(folder, folder.with_name(f"{folder.name}-kept"))
    return folder


@pytest.fixture
def here(place, monkeypatch):
    """Returns that folder as it was; the process works in it."""
    shutil.rmtree(place)
    shutil.copytree(place.with_name(f"{place.name}-kept"), place)
    monkeypatch.chdir(place)
    return place


def test_prompts_and_export_have_the_runs_template(here):
    published = Tokenizer.from_file("model/tokenizer.json")
    prompts = owned_inputs(Path("run")).record.train
    for asked, ids in zip(prompts.text, prompts.token_ids, strict=True):
        assert ids == published.encode(text_of(asked)).ids
    export("run", "merged", ExportConfig(even_if=True))
    messages = [{"role": "user", "content": "Be brief.\n\nhello 7"}]
    for folder in ("run/model", "merged"):
        assert Path(folder, "chat_template.jinja").read_text() == TEMPLATE
        written = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, polite=True
        )
        assert written == "<s>" + text_of("hello 7")


def test_samples_are_among_the_k_most_likely_tokens(here):
    network = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32, attn_implementation="eager")
    samples = read_committed(Path("run")).load("reference", ReferenceSamples).samples
    rows, seen = samples.rollouts, set()
    for row in range(12):
        prompt = samples.prompts.token_ids[row // rows.n]
        response = rows.tokens[row, : rows.length[row]].tolist()
        with torch.no_grad():
            logits_TV = network(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        above_T = (logits_TV > logits_TV.gather(1, torch.tensor(response)[:, None]) + 1e-4).sum(dim=1)
        seen |= set(above_T.tolist())
    assert seen == {0, 1}
    assert json.loads(Path("run/evaluation.json").read_text())["truncated"] is True


def test_a_resumed_run_goes_on_with_its_template(here, capsys):
    whole = files(here / "run")
    for path in [*sorted((here / "run" / "stages").iterdir())[1:], here / "run" / "evaluation.json"]:
        path.unlink()
    shutil.rmtree(here / "run" / "adapters")
    (here / "own.jinja").write_text("{{ messages }}")
    (here / "run" / "model" / "chat_template.jinja").write_text("{{ messages")
    assert train.main(["--resume", "run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--template own.jinja has changed since the run began; the run goes on with what it read" in said
    assert "run/model/chat_template.jinja was damaged: restored from what --template gave" in said
    assert files(here / "run") == whole


def test_an_evaluation_writes_and_samples_as_the_run_did(here, capsys, monkeypatch):
    shown, generate = [], evaluate.sample

    def sample(subject, phase, prompts, *rest, **options):
        shown.append(subject.tokenizer.decode(prompts.token_ids[0]))
        assert subject.settings.top_k == 2
        return generate(subject, phase, prompts, *rest, **options)

    monkeypatch.setattr(evaluate, "sample", sample)
    (here / "own.jinja").unlink()
    config = smoke(MocanConfig(model="model", template="own.jinja", threads=1))
    assert read_inputs(config, owned_inputs(Path("run"))).template == TEMPLATE, "as for --samples-of"
    write(here / "new.jsonl", [{"prompt": "Something else"}, {"prompt": "Another thing"}])
    assert evaluate_main(["run", "--prompts", "new.jsonl", "--out", "new"]) == 0
    assert shown and {text.removeprefix("<s>").lstrip() for text in shown} <= {
        text_of("Something else"),
        text_of("Another thing"),
    }
    assert json.loads((here / "new" / "evaluation.json").read_text())["settings"]["top_k"] == 2
    assert "temperature 0.7, top_p 1, top_k 2, at most 8 new" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--top-k", "3"], "it has --top-k 2, this run has 3"),
        (["--template", "safe-rlhf"], "it has --template own.jinja, this run has safe-rlhf"),
        (["--chat-template-kwargs", "polite=false"], "it has --chat-template-kwargs ('{"),
    ],
)
def test_samples_of_another_template_or_k_are_refused(here, capsys, change, said):
    flags = [*FLAGS, *change] if change[0] != "--chat-template-kwargs" else [*FLAGS[:8], *change, *FLAGS[10:]]
    assert train.main(["mocan", *SMOKE, *flags, "--samples-of", "run", "--out", "other"]) == 2
    assert said in capsys.readouterr().err and not Path("other").exists()


def test_whole_checkpoints_have_the_template(here):
    flags = [*FLAGS, "--tune", "full", "--learning-rate", "1e-4", "--steps", "1"]
    flags += ["--n-prompts", "4", "--eval-prompts", "2"]
    assert train.main(["mocan", *SMOKE, *flags, "--out", "full"]) == 0
    assert Path("full/adapters/iteration-1/chat_template.jinja").read_text() == TEMPLATE


def test_what_is_unexpected_in_prompts_is_said(here):
    base = smoke(MocanConfig(model="model", prompts="prompts.jsonl", threads=1))
    (said,) = read_inputs(base).notes
    assert "the tokenizer has no chat template, so prompts go in as they are, without the system line" in said
    assert '"<s> hello ' in said
    assert read_inputs(replace(base, template="safe-rlhf")).notes == [
        "the chat template takes no system line, so it begins the first user turn"
    ]
    assert read_inputs(replace(base, template="plain", system="")).notes == []
    own = read_inputs(smoke(MocanConfig(threads=1, template="chatml")))
    assert own.notes == ["--template chatml replaces the chat template that the tokenizer has"]
    assert train.main(["mocan", *SMOKE, "--template", "nothing", "--out", "none"]) == 2
    assert train.main(["mocan", *SMOKE, "--chat-template-kwargs", "x=1", "--out", "none"]) == 2
    assert not Path("none").exists()
