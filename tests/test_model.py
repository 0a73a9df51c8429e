"""transformers is the oracle: logits, gradients, greedy decoding, saved folders, PEFT adapters."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine import model as M
from engine.errors import UserError
from engine.lora import Adapter, load_peft, save_peft
from engine.model import Layout


def llama(folder, **changes):
    """A random Llama in the published format; returns transformers' model."""
    torch.manual_seed(3)
    config = dict(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    network = LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()
    network.save_pretrained(folder)
    return network


VARIANTS = {
    "grouped queries, tied head": {},
    "one head per query, own head": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "head size of its own": {"head_dim": 10},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "llama 3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 500.0,
        }
    },
}  # fmt: skip


def ragged(lengths, vocabulary=97, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    return parts, torch.cat(parts), torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_on_ragged_batches(tmp_path, name):
    network = llama(tmp_path, **VARIANTS[name])
    ours = M.load(tmp_path)
    parts, tokens, cu = ragged([5, 1, 17, 60])
    with torch.no_grad():
        logits = ours(tokens, cu) @ ours.head_weight.t()
        oracle = torch.cat([network(p[None]).logits[0] for p in parts])
    assert (logits - oracle).abs().max() < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_folder_loads_in_transformers_with_equal_weights(tmp_path, name):
    network = llama(tmp_path / "a", **VARIANTS[name])
    M.save(M.load(tmp_path / "a"), tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    for (n1, w1), (n2, w2) in zip(network.state_dict().items(), again.state_dict().items(), strict=True):
        assert n1 == n2 and torch.equal(w1, w2)


def test_shared_prompt_layout_equals_separate_sequences(tmp_path):
    llama(tmp_path)
    ours = M.load(tmp_path)
    (p1, a, b, p2, c), _, _ = ragged([6, 4, 9, 3, 5])
    layout = Layout.shared_prompt([6, 3], [[4, 9], [5]])
    with torch.no_grad():
        together = ours.run(ours.embed_tokens(torch.cat([p1, a, b, p2, c])), layout, 0, 3)
        alone = [
            ours.run(ours.embed_tokens(x), Layout.packed(torch.tensor([0, len(x)])), 0, 3)
            for x in map(torch.cat, ([p1, a], [p1, b], [p2, c]))
        ]
    expected = torch.cat([alone[0], alone[1][6:], alone[2]])
    assert (together - expected).abs().max() < 1e-5


def test_adapter_starts_at_the_reference_and_matches_peft(tmp_path):
    peft = pytest.importorskip("peft")
    network = llama(tmp_path / "base")
    ours = M.load(tmp_path / "base")
    adapter = Adapter.on(ours, rank=3, alpha=6.0, share=0.4, seed=0)
    assert adapter.first_layer == 1
    _, tokens, cu = ragged([7, 12])
    with torch.no_grad():
        assert torch.equal(ours(tokens, cu, adapter=adapter), ours(tokens, cu))
        for value in adapter.up.values():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        changed = ours(tokens, cu, adapter=adapter) @ ours.head_weight.t()
    save_peft(adapter, tmp_path / "adapter", str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(network, tmp_path / "adapter").eval()
    with torch.no_grad():
        oracle = torch.cat([wrapped(tokens[None, :7]).logits[0], wrapped(tokens[None, 7:]).logits[0]])
    assert (changed - oracle).abs().max() < 1e-4
    back = load_peft(tmp_path / "adapter", ours)
    assert all(torch.equal(x, y) for x, y in zip(back.tensors().values(), adapter.tensors().values(), strict=True))
    M.save(ours, tmp_path / "merged", adapter=adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert (merged(tokens[None, :7]).logits[0] - changed[:7]).abs().max() < 1e-4


def test_adapter_gradients_equal_peft(tmp_path):
    peft = pytest.importorskip("peft")
    network = llama(tmp_path / "base")
    ours = M.load(tmp_path / "base")
    adapter = Adapter.on(ours, rank=2, alpha=4.0, share=0.0, seed=0)
    with torch.no_grad():
        for value in adapter.up.values():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    save_peft(adapter, tmp_path / "adapter", str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(network, tmp_path / "adapter", is_trainable=True)
    _, tokens, cu = ragged([9])
    (ours(tokens, cu, adapter=adapter) @ ours.head_weight.t()).square().mean().backward()
    wrapped(tokens[None]).logits.square().mean().backward()
    oracle = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    for kind, group in (("lora_A", adapter.down), ("lora_B", adapter.up)):
        for key, value in group.items():
            layer, *name = key.split("|")
            expected = oracle[f"base_model.model.model.layers.{layer}.{'.'.join(name)}.{kind}.default.weight"]
            assert (value.grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, (kind, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"hidden_size": 32}, "shape"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 2}, "unknown"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(tmp_path, change, message):
    llama(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        M.load(tmp_path)


def test_truncated_pickle_and_missing_folders_are_refused(tmp_path):
    llama(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="model.safetensors"):
        M.load(tmp_path / "a")
    file.rename(tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        M.load(tmp_path / "a")
    with pytest.raises(UserError, match="no such folder"):
        M.load(tmp_path / "nowhere")


def test_sharded_checkpoint_loads(tmp_path):
    network = llama(tmp_path / "a")
    network.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").is_file()
    first, second = M.load(tmp_path / "a"), M.load(tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_save_refuses_a_folder_in_use(tmp_path):
    llama(tmp_path / "a")
    with pytest.raises(UserError, match="not empty"):
        M.save(M.load(tmp_path / "a"), tmp_path / "a")


def test_hub_id_and_missing_folder(tmp_path, monkeypatch):
    import huggingface_hub

    network, asked = llama(tmp_path / "snapshot"), []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = M.load("someone/tiny-llama")
    assert asked[0][0] == "someone/tiny-llama" and "*.safetensors" in asked[0][1] and not any("bin" in p for p in asked[0][1])
    assert torch.equal(loaded.embed, network.model.embed_tokens.weight)

    def offline(name, allow_patterns):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"someone/tiny-llama: not a local folder, and the hub did not give it \(no route\); give a local"):
        M.load("someone/tiny-llama")
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        M.load(tmp_path / "nowhere")
