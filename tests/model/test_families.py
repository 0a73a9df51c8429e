"""A whole run on models that are not Llama: sampled, trained, judged, exported and loaded by transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import caid, model
from engine.config import CaidConfig, ExportConfig, smoke
from engine.policy.peft import load_peft
from engine.quickstart import tiny_model_folder
from engine.rollout import decoding
from engine.run.rows import SampledRow, read_rows
from engine.run.store import load
from engine.stages.export import export
from engine.stages.reference import ReferenceSamples
from engine.stages.smoke import write_random_heads
from tests.helpers.architectures import write_model


@pytest.mark.parametrize("name", ["qwen 3, biases, windows, one key head", "mistral", "gemma 2", "gemma 3"])
def test_a_run_on_another_architecture(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoding, "NEAR_TIE", 0.1)
    folder = tiny_model_folder(tmp_path / "model")
    write_model(folder, name, vocab_size=384, max_position_embeddings=2048)
    write_random_heads(folder)
    run = tmp_path / "run"
    caid.train(smoke(CaidConfig(out=str(run), model=str(folder), threads=1, force=True, iterations=2)))
    # Training takes what was sampled.
    rows = read_rows(run, SampledRow)
    assert len(rows) == 5 and max(row.logprob_gap["max"] for row in rows) < 1e-4
    made = load(run / "stages" / "01-reference.safetensors", ReferenceSamples).samples.rollouts
    assert rows[0].near_ties == int(made.near_tie.sum()) > 0 and rows[0].draws == int(made.length.sum())
    said = f"two best within 0.0001 in {rows[0].near_ties} of {rows[0].draws} draws"
    assert said in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text())["constraints"][0]["name"] == "harm"
    export(run, tmp_path / "merged", ExportConfig(even_if=True))
    network = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", dtype=torch.float32
    ).eval()
    own = model.load(folder)
    adapter = load_peft(run / "adapters" / "iteration-2", own)
    tokens = torch.randint(3, 259, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, reference = (own.logits(own(tokens, torch.tensor([0, 40]), adapter=a)) for a in (adapter, None))
        torch.testing.assert_close(network(tokens[None]).logits[0], ours, rtol=0, atol=1e-4)
    assert (ours - reference).abs().max() > 1e-3
