"""Checkpoints as other programs write them; transformers is the oracle for which weights count."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from engine import model as M
from engine.errors import UserError
from engine.model.checkpoint import examine
from engine.model.folder import INDEX, WEIGHTS, digests, lasting_name
from engine.policy.full import FullWeights
from engine.policy.lora import Adapter
from engine.policy.peft import load_peft, save_peft
from tests.helpers.architectures import VOCABULARY, write_model

TOKENS = torch.arange(5, 65)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def ours(folder, **options):
    network = M.load(folder, **options)
    with torch.no_grad():
        return network.logits(network(TOKENS, torch.tensor([0, len(TOKENS)])))


def theirs(folder):
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return network(TOKENS[None]).logits[0]


def write_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    """A tied Llama."""
    write_model(tmp_path / "model", "llama")
    return tmp_path / "model"


@pytest.fixture
def own_head(folder):
    """A Llama whose config.json ties the head, with a stored head of its own."""
    noise = torch.randn(VOCABULARY, 24, generator=torch.Generator().manual_seed(1))
    write_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING] + 0.3 * noise}))
    return folder


def test_a_head_of_its_own_is_used_whatever_the_flag_says(own_head):
    said, tied = [], examine(own_head)
    logits = ours(own_head, say=said.append)
    assert (logits - theirs(own_head)).abs().max() < 1e-4
    assert (logits - ours_with_the_embedding(own_head)).abs().max() > 0.1
    assert not tied.config.tied and tied.raw_config["tie_word_embeddings"] is False
    assert len(said) == 1 and "lm_head.weight is used" in said[0] and "\n" not in said[0]


def ours_with_the_embedding(folder):
    network = M.load(folder)
    with torch.no_grad():
        return network(TOKENS, torch.tensor([0, len(TOKENS)])) @ network.embed.t()


def test_a_saved_folder_keeps_that_head(own_head, tmp_path):
    network = M.load(own_head)
    M.save(network, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / WEIGHTS)
    assert torch.equal(saved[HEAD], load_file(own_head / WEIGHTS)[HEAD])
    said = []
    assert torch.equal(ours(tmp_path / "saved", say=said.append), ours(own_head)) and not said
    assert (theirs(tmp_path / "saved") - theirs(own_head)).abs().max() < 1e-5
    assert M.load(tmp_path / "saved").config == network.config
    assert FullWeights(network).decoder().head is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_head_that_equals_the_embedding_stays_tied(folder, tmp_path, dtype):
    write_tensors(folder, lambda t: t.update({key: value.to(dtype) for key, value in t.items()}))
    before, said = ours(folder), []
    write_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    assert torch.equal(ours(folder, say=said.append), before) and not said
    M.save(M.load(folder), tmp_path / "saved")
    assert HEAD not in load_file(tmp_path / "saved" / WEIGHTS)


def test_a_tied_matrix_may_stand_under_the_name_of_the_head(folder):
    before, digest = ours(folder), digests(folder)
    write_tensors(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    said = []
    assert torch.equal(ours(folder, say=said.append), before) and not said
    assert (theirs(folder) - before).abs().max() < 1e-4
    assert digests(folder)[WEIGHTS] != digest[WEIGHTS]


def test_one_file_counts_before_an_index_beside_it(folder):
    whole, said = ours(folder), []
    older = {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(older, folder / "part.safetensors", metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(older, "part.safetensors")}))
    assert torch.equal(ours(folder, say=said.append), whole)
    assert (theirs(folder) - whole).abs().max() < 1e-4
    assert len(said) == 1 and f"{INDEX} is not used" in said[0]
    assert not {INDEX, "part.safetensors"} & set(digests(folder))
    # A damaged index, or one whose parts are gone, does no more harm.
    (folder / "part.safetensors").unlink()
    assert torch.equal(ours(folder), whole)


@pytest.mark.parametrize("name", ["llama", "qwen 2", "qwen 3", "mistral", "gemma 2", "gemma 3"])
def test_the_type_says_what_architectures_would(tmp_path, name):
    write_model(tmp_path, name)
    file = tmp_path / "config.json"
    raw, before = json.loads(file.read_text()), ours(tmp_path)
    file.write_text(json.dumps({key: value for key, value in raw.items() if key != "architectures"}))
    assert torch.equal(ours(tmp_path), before)


def test_a_hubs_cache_keeps_files_as_links_to_blobs(folder):
    before = ours(folder)
    cache = folder.parent / "models--someone--tiny"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert torch.equal(ours(snapshot), before) and digests(snapshot) == digests(folder)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(UserError, match="config.json leads out of the folder"):
        M.load(snapshot)


def test_a_folder_may_itself_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert torch.equal(ours(tmp_path / "link"), ours(folder))


def tokenizer(tiny_folder):
    """The tiny tokenizer, with two chat templates."""
    made = AutoTokenizer.from_pretrained(tiny_folder)
    made.chat_template = {"default": made.chat_template, "rag": made.chat_template + "sources:"}
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_folders_keep_every_file_of_the_tokenizer(tiny_folder, tmp_path, dtype):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    (base / "tokenizer_config.json").unlink()
    made = tokenizer(tiny_folder)
    made.save_pretrained(base)
    for name in ("merges.txt", "spiece.model", "special_tokens_map.json"):
        (base / name).write_text("{}")
    (base / "secret.txt").symlink_to("/etc/hostname")
    (base / "README.md").write_text("about the base")
    network = M.load(base, dtype=dtype)
    M.save(network, tmp_path / "saved", tokenizer_from=base)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again.chat_template == made.chat_template and set(again.chat_template) == {"default", "rag"}
    kept = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*")}
    assert {"merges.txt", "spiece.model", "tokenizer.json", "generation_config.json"} < kept
    assert "additional_chat_templates/rag.jinja" in kept
    # Neither what a link leads to, nor checksums of other weights.
    assert not {"secret.txt", "SHA256SUMS.json", "heads"} & kept


def test_a_tokenizer_file_that_leads_out_is_not_copied(tiny_folder, tmp_path):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    network = M.load(base)
    (base / "merges.txt").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="merges.txt leads out of the folder"):
        M.save(network, tmp_path / "saved", tokenizer_from=base)
    assert not (tmp_path / "saved").exists()


def test_what_a_killed_save_left_is_removed_by_the_next_one(folder, tmp_path, monkeypatch):
    network, out = M.load(folder), tmp_path / "out" / "merged"
    child = os.fork()
    if not child:
        monkeypatch.setattr(
            "engine.model.folder.sync_files", lambda path: os.kill(os.getpid(), signal.SIGKILL)
        )
        M.save(network, out)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(out.parent.iterdir())) == 1 and not out.exists()
    M.save(network, out)
    assert list(out.parent.iterdir()) == [out] and torch.equal(ours(out), ours(folder))


def test_an_eva_adapter_is_plain_lora_on_disk(folder, tmp_path):
    peft = pytest.importorskip("peft")
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    wrapped = peft.get_peft_model(network, config)
    generator = torch.Generator().manual_seed(0)
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data.normal_(generator=generator)
    wrapped.save_pretrained(tmp_path / "eva")
    ours = M.load(folder)
    with torch.no_grad():
        hidden = ours(TOKENS, torch.tensor([0, len(TOKENS)]), adapter=load_peft(tmp_path / "eva", ours))
        found, theirs = ours.logits(hidden), wrapped(TOKENS[None]).logits[0]
        exact = wrapped.double()(TOKENS[None]).logits[0]
        # So large an adapter makes attention nearly a choice, which rounding sways: as it sways theirs.
        ours, theirs = ((x - exact).abs().max() for x in (found, theirs))
        assert ours < 1e-5 + 3 * theirs and theirs < 1e-3


@pytest.fixture
def adapter(folder, tmp_path):
    save_peft(Adapter.on(M.load(folder), rank=2, alpha=4.0, share=0.0, seed=0), tmp_path / "adapter", "")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1": 4.0}}, ""),
        ({"rank_pattern": {"q_proj": 3}}, r"rank_pattern \[3\] is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern \[2\] is not supported"),
        ({"rank_pattern": [2]}, r"rank_pattern \[2\] is not supported"),
        ({"r": 10**12}, "adapter_config.json says rank 1000000000000"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ],
)
def test_settings_of_adapters(folder, adapter, change, says):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    if not says:
        load_peft(adapter, M.load(folder))
        return
    with pytest.raises(UserError, match=says):
        load_peft(adapter, M.load(folder))


def test_an_adapter_that_is_not_finite_or_leads_out_is_refused(folder, adapter, tmp_path):
    network, file = M.load(folder), adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite"):
        load_peft(adapter, network)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="adapter_model.safetensors leads out of the folder"):
        load_peft(adapter, network)


def test_a_base_model_is_named_so_that_it_is_found_from_everywhere(folder, adapter, monkeypatch, tmp_path):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(folder.parent)
    assert lasting_name("model", Path("model")) == str(folder)
    assert lasting_name("", folder) == str(folder)
    assert lasting_name("someone/tiny", folder) == "someone/tiny"
    save_peft(load_peft(adapter, M.load(folder)), adapter, lasting_name("model", Path("model")))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert peft.AutoPeftModelForCausalLM.from_pretrained(adapter).peft_config["default"].r == 2
