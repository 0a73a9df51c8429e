"""transformers is the oracle: logits, gradients, saved folders, PEFT adapters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import model as M
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.attention import Layout
from engine.model.decoder import Decoder
from engine.model.families import HARMLESS
from engine.model.names import from_gguf, to_gguf, to_hugging_face
from engine.policy.lora import Adapter
from engine.policy.peft import load_peft, save_peft
from tests.helpers.architectures import VARIANTS, VOCABULARY, write_model


def ragged(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]
    return parts, torch.cat(parts), torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_on_ragged_batches(tmp_path, name):
    network = write_model(tmp_path, name)
    ours = M.load(tmp_path)
    parts, tokens, cu = ragged([5, 1, 17, 60])
    with torch.no_grad():
        logits = ours.logits(ours(tokens, cu))
        oracle = torch.cat([network(p[None]).logits[0] for p in parts])
    assert oracle.std() > 0.2, "logits too small to tell anything"
    assert (logits - oracle).abs().max() < 1e-4


@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_texts_about_as_long_as_the_window(tmp_path, length):
    network = write_model(tmp_path, "mistral")
    ours, (_, tokens, cu) = M.load(tmp_path), ragged([length])
    with torch.no_grad():
        assert (ours.logits(ours(tokens, cu)) - network(tokens[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_every_weight_equal_transformers(tmp_path, name):
    network = write_model(tmp_path, name)
    ours = M.load(tmp_path).requires_grad_(True)
    parts, tokens, cu = ragged([5, 1, 31])
    ours.logits(ours(tokens, cu)).square().sum().backward()
    sum(network(p[None]).logits.square().sum() for p in parts).backward()
    # The names that stand for views of our weights now stand for views of their gradients.
    for weight in ours.parameters():
        weight.data = weight.grad
    gradients, oracle = (
        to_hugging_face(ours.state_dict(), ours.config),
        {n: p.grad for n, p in network.named_parameters()},
    )
    assert gradients.keys() == oracle.keys()
    for key, expected in oracle.items():
        assert (gradients[key] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-5, key


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_folder_loads_in_transformers_with_equal_weights(tmp_path, name):
    network = write_model(tmp_path / "a", name)
    M.save(M.load(tmp_path / "a"), tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert type(again) is type(network)
    for (n1, w1), (n2, w2) in zip(network.state_dict().items(), again.state_dict().items(), strict=True):
        assert n1 == n2 and torch.equal(w1, w2)
    assert M.load(tmp_path / "a").config.parameter_count() == sum(w.numel() for w in network.parameters())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_read_into_the_wanted_dtype(tmp_path, stored, wanted):
    network = write_model(tmp_path, "qwen 2").to(stored)
    network.save_pretrained(tmp_path)
    ours = M.load(tmp_path, dtype=wanted)
    for name, weight in to_hugging_face(ours.state_dict(), ours.config).items():
        assert weight.dtype == wanted and torch.equal(weight, network.get_parameter(name).to(wanted)), name


PEAK = """
import sys, threading
from engine import model

def anonymous():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while not ended.wait(0.001):
        peak = max(peak, anonymous())

model.load(sys.argv[1])
before = peak = anonymous()
ended, watcher = threading.Event(), threading.Thread(target=watch)
watcher.start()
network = model.load(sys.argv[2], dtype=sys.argv[3])
ended.set()
watcher.join()
print(max(peak, anonymous()) - before, sum(w.numel() * w.element_size() for w in network.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
@pytest.mark.parametrize(("stored", "wanted"), [(torch.float32, "float32"), (torch.bfloat16, "float32")])
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, stored, wanted):
    write_model(tmp_path / "small", "llama")
    sizes = {"vocab_size": 20_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    raw = {**json.loads((tmp_path / "small" / "config.json").read_text()), **sizes, "head_dim": 128}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_json(raw, tmp_path)
    shapes = to_hugging_face(Decoder(config, raw, stored, torch.device("meta")).state_dict(), config)
    save_file(
        {name: torch.ones_like(t, device="cpu") for name, t in shapes.items()},
        tmp_path / "large" / "model.safetensors",
    )
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large"), wanted]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    peak, weights = map(int, ended.stdout.split())
    assert weights > 100e6 and 0.9 * weights < peak < 1.1 * weights


def test_the_decoder_loads_without_what_stands_above_it():
    code = "import sys, engine.model; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(ended.stdout.split())
    assert "engine.model.decoder" in loaded
    packages = {name.partition(".")[0] for name in loaded}
    assert not packages & {"rich", "matplotlib", "transformers", "tokenizers", "gguf"}
    parts = {name.split(".")[1] for name in loaded if name.startswith("engine.")}
    assert parts <= {"errors", "records", "files", "ranks", "model"}


@pytest.mark.parametrize("name", ["llama", "gemma 3"])
def test_a_pass_can_begin_and_end_at_any_layer_and_shows_the_states_between(tmp_path, name):
    write_model(tmp_path, name)
    ours, (_, tokens, cu) = M.load(tmp_path), ragged([5, 9])
    adapter, seen = Adapter.on(ours, rank=2, alpha=4.0, share=0.4, seed=0), {}
    with torch.no_grad():
        for value in adapter.up.values():
            value.normal_(generator=torch.Generator().manual_seed(0))
        whole = ours(tokens, cu, adapter=adapter, tap=seen.__setitem__)
        assert sorted(seen) == [0, 1, 2, 3]
        for layer, states in seen.items():
            assert torch.equal(ours(tokens, cu, adapter=adapter, stop=layer), states)
            assert torch.equal(ours(tokens, cu, adapter=adapter, lower=(layer, states)), whole)
        assert torch.equal(ours(tokens, cu, stop=1), seen[1]) and not torch.equal(
            ours(tokens, cu, stop=2), seen[2]
        )


def test_names_of_a_llama_in_gguf_and_hugging_face(tmp_path):
    write_model(tmp_path, "llama, one head per query, own head")
    names = load_file(tmp_path / "model.safetensors").keys()
    assert len(names) == 3 + 3 * 9 and all(from_gguf(to_gguf(name)) == name for name in names)
    assert to_gguf("model.layers.2.mlp.up_proj.weight") == "blk.2.ffn_up.weight"


@pytest.mark.parametrize("name", ["llama", "qwen 3", "gemma 2", "gemma 3"])
def test_bfloat16_is_as_near_to_float32_as_transformers(tmp_path, name):
    exact = write_model(tmp_path, name)
    tokens, cu = ragged([40])[1:]
    with torch.no_grad():
        wanted = exact(tokens[None]).logits[0]
        rounded = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
        )(tokens[None]).logits[0]
        ours = M.load(tmp_path, dtype=torch.bfloat16)
        logits = ours.logits(ours(tokens, cu))
    assert (logits - wanted).square().mean() < 1.5 * (rounded - wanted).square().mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma 2", "gemma 3"])
def test_shared_prompt_layout_equals_separate_sequences(tmp_path, name, dtype):
    write_model(tmp_path, name)
    ours = M.load(tmp_path, dtype=dtype)
    (p1, a, b, p2, c), _, _ = ragged([6, 4, 9, 3, 5])
    layout = Layout.shared_prompt([6, 3], [[4, 9], [5]])
    with torch.no_grad():
        together = ours(torch.cat([p1, a, b, p2, c]), layout, stop=3)
        alone = [
            ours(x, torch.tensor([0, len(x)]), stop=3) for x in map(torch.cat, ([p1, a], [p1, b], [p2, c]))
        ]
    expected = torch.cat([alone[0], alone[1][6:], alone[2]])
    # A product of 27 rows may add its terms in another order than one of 15: a few roundings of the largest
    # state in each sub-layer.
    tolerance = 6 * 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert (together - expected).abs().max() < tolerance


@pytest.mark.parametrize("name", ["llama", "qwen 2", "gemma 2"])
def test_adapter_starts_at_the_reference_and_matches_peft(tmp_path, name):
    peft = pytest.importorskip("peft")
    network = write_model(tmp_path / "base", name)
    ours = M.load(tmp_path / "base")
    adapter = Adapter.on(ours, rank=3, alpha=6.0, share=0.4, seed=0)
    assert adapter.first_layer == 1
    _, tokens, cu = ragged([7, 12])
    with torch.no_grad():
        assert torch.equal(ours(tokens, cu, adapter=adapter), ours(tokens, cu))
        for value in adapter.up.values():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        changed = ours.logits(ours(tokens, cu, adapter=adapter))
    save_peft(adapter, tmp_path / "adapter", str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(network, tmp_path / "adapter").eval()
    with torch.no_grad():
        oracle = torch.cat([wrapped(tokens[None, :7]).logits[0], wrapped(tokens[None, 7:]).logits[0]])
    assert (changed - oracle).abs().max() < 1e-4
    back = load_peft(tmp_path / "adapter", ours)
    assert all(
        torch.equal(x, y) for x, y in zip(back.tensors().values(), adapter.tensors().values(), strict=True)
    )
    M.save(ours, tmp_path / "merged", adapter=adapter)
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        assert (merged(tokens[None, :7]).logits[0] - changed[:7]).abs().max() < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_adapter_gradients_equal_peft(tmp_path, name):
    peft = pytest.importorskip("peft")
    network = write_model(tmp_path / "base", name)
    ours = M.load(tmp_path / "base")
    adapter = Adapter.on(ours, rank=2, alpha=4.0, share=0.0, seed=0)
    with torch.no_grad():
        for value in adapter.up.values():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    save_peft(adapter, tmp_path / "adapter", str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(network, tmp_path / "adapter", is_trainable=True)
    _, tokens, cu = ragged([9])
    ours.logits(ours(tokens, cu, adapter=adapter)).square().mean().backward()
    wrapped(tokens[None]).logits.square().mean().backward()
    oracle = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    for kind, group in (("lora_A", adapter.down), ("lora_B", adapter.up)):
        for key, value in group.items():
            layer, *name = key.split("|")
            expected = oracle[f"base_model.model.model.layers.{layer}.{'.'.join(name)}.{kind}.default.weight"]
            assert (value.grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, (kind, key)


@pytest.mark.parametrize(
    ("linears", "by_root"),
    [
        (["q_proj", "v_proj"], False),
        (["k_proj", "down_proj"], False),
        (["o_proj", "up_proj"], False),
        (["q_proj", "up_proj"], True),
    ],
)
def test_adapters_of_peft_on_some_linears_and_layers(tmp_path, linears, by_root):
    peft = pytest.importorskip("peft")
    network = write_model(tmp_path / "base", "qwen 2")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        network,
        peft.LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=linears,
            layers_to_transform=[1],
            init_lora_weights=False,
            use_rslora=by_root,
        ),
    ).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    ours = M.load(tmp_path / "base")
    adapter = load_peft(tmp_path / "adapter", ours)
    assert adapter.first_layer == 1 and len(adapter.down) == 2
    _, tokens, cu = ragged([11])
    with torch.no_grad():
        assert (
            ours.logits(ours(tokens, cu, adapter=adapter)) - wrapped(tokens[None]).logits[0]
        ).abs().max() < 1e-4
        assert (ours.logits(ours(tokens, cu)) - wrapped(tokens[None]).logits[0]).abs().max() > 0.1
    save_peft(adapter, tmp_path / "again", str(tmp_path / "base"))
    back = load_peft(tmp_path / "again", ours).tensors()
    assert all(torch.equal(value, back[name]) for name, value in adapter.tensors().items()) and len(back) == 4
    again = peft.PeftModel.from_pretrained(write_model(tmp_path / "base", "qwen 2"), tmp_path / "again")
    with torch.no_grad():
        assert (again(tokens[None]).logits - wrapped(tokens[None]).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": "yes"}, "use_rslora yes"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"alora_invocation_tokens": [1, 2]}, r"adapter_config.json: alora_invocation_tokens \[1, 2\]"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"monteclora_config": {"n": 2}}, "monteclora_config"),
        ({"a_switch_of_tomorrow": 1}, "a_switch_of_tomorrow 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"r": None}, "adapter_config.json: r is None"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_adapters_that_compute_something_else_are_refused_by_name(tmp_path, change, message):
    write_model(tmp_path / "base", "llama")
    ours = M.load(tmp_path / "base")
    save_peft(Adapter.on(ours, rank=2, alpha=4.0, share=0.0, seed=0), tmp_path / "adapter", "")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_peft(tmp_path / "adapter", ours)


ONE = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 24)},
            "an adapter with lm_head.lora_A is not supported",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 97)},
            "model.embed_tokens.lora_embedding_A is not",
        ),
        (
            {ONE.replace("lora_A", "lora_magnitude_vector"): torch.ones(24)},
            "layers.1.self_attn.q_proj.lora_magnitude_vector is not",
        ),
        ({ONE.replace("1", "8"): torch.ones(2, 24)}, "layers 0 and 8 without layer 3"),
        ({ONE: None}, "self_attn.q_proj.lora_A.weight is not in both of layers 0 and 1"),
        (
            {ONE: torch.ones(3, 24)},
            r"layers.1.self_attn.q_proj.lora_A.weight has shape \(3, 24\), not \(2, 24\)",
        ),
        ({ONE: torch.ones(2, 24, dtype=torch.int8)}, "stored as torch.int8"),
        (
            {ONE.replace("1", str(i)): None for i in range(3)},
            "self_attn.q_proj has only one of lora_A and lora_B",
        ),
    ],
)
def test_adapters_on_something_else_are_refused_with_its_name(tmp_path, change, message):
    write_model(tmp_path / "base", "llama")
    ours = M.load(tmp_path / "base")
    save_peft(Adapter.on(ours, rank=2, alpha=4.0, share=0.0, seed=0), tmp_path / "adapter", "")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: value for name, value in {**load_file(file), **change}.items() if value is not None}
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        load_peft(tmp_path / "adapter", ours)


def test_broken_adapter_files_are_refused_by_name(tmp_path):
    write_model(tmp_path / "base", "llama")
    ours, folder = M.load(tmp_path / "base"), tmp_path / "adapter"
    save_peft(Adapter.on(ours, rank=2, alpha=4.0, share=0.0, seed=0), folder, "")
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, settings = file.read_bytes(), config.read_text()
    for length in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="adapter_model.safetensors: not a whole safetensors file"):
            load_peft(folder, ours)
    for text in ("", "[]", settings[:-10]):
        config.write_text(text)
        with pytest.raises(UserError, match="adapter"):
            load_peft(folder, ours)
    config.write_text(settings)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin, a pickle"):
        load_peft(folder, ours)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_settings_that_peft_writes_are_known_and_starts_that_leave_the_base_alone(tmp_path, start):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    peft.get_peft_model(write_model(tmp_path / "base", "llama"), settings).save_pretrained(tmp_path / "a")
    wrapped = peft.PeftModel.from_pretrained(write_model(tmp_path / "base", "llama"), tmp_path / "a")
    ours, (_, tokens, cu) = M.load(tmp_path / "base"), ragged([11])
    with torch.no_grad():
        logits = ours.logits(ours(tokens, cu, adapter=load_peft(tmp_path / "a", ours)))
        assert (logits - wrapped(tokens[None]).logits[0]).abs().max() < 1e-4


def test_adapters_of_another_model_are_refused(tmp_path):
    write_model(tmp_path / "deep", "llama", num_hidden_layers=4)
    write_model(tmp_path / "flat", "llama")
    write_model(tmp_path / "wide", "llama", intermediate_size=50)
    save_peft(
        Adapter.on(M.load(tmp_path / "deep"), rank=2, alpha=4.0, share=0.0, seed=0), tmp_path / "adapter", ""
    )
    with pytest.raises(UserError, match="does not fit"):
        load_peft(tmp_path / "adapter", M.load(tmp_path / "flat"))
    save_peft(
        Adapter.on(M.load(tmp_path / "flat"), rank=2, alpha=4.0, share=0.0, seed=0), tmp_path / "other", ""
    )
    with pytest.raises(UserError, match="does not fit"):
        load_peft(tmp_path / "other", M.load(tmp_path / "wide"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ({"clip_qkv": 8}, "clip_qkv 8"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 8}, "sliding_window 8"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, "3 key heads"),
        ({"head_dim": 7}, "size 7"),
        ({"hidden_act": "relu"}, "relu"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "attention_factor": 3.0}},
            "attention_factor",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"hidden_size": 32}, "shape"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 2}, "unknown"),
        ({"is_causal": False}, "is_causal False"),
        ({"use_qk_norm": False}, "use_qk_norm False"),
        ({"foo_switch": False}, "foo_switch False"),
        ({"foo_zero": 0}, "foo_zero 0"),
        ({"foo_list": []}, r"foo_list \[\]"),
        ({"foo_text": ""}, "foo_text  is not supported"),
        ({"attention_bias": "false"}, "attention_bias is 'false'"),
        ({"repetition_penalty": 1.2}, "repetition_penalty 1.2"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "attention_factor": 0}},
            "attention_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}},
            "factor of rope type linear is '2'",
        ),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta of rope type default is -1"),
        ({"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 97.0}, "vocab_size is 97.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"architectures": "MambaForCausalLM"}, "MambaForCausalLM"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(tmp_path, change, message):
    write_model(tmp_path, "llama")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        M.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma 3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma 3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            "gemma 3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters rope_theta",
        ),
        ("gemma 3", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("gemma 2", {"sliding_window": None}, "sliding_window"),
        ("gemma 2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma 2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is missing"),
        ("qwen 3", {"head_dim": None}, "head_dim is missing"),
        ("qwen 2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ("qwen 2", {"mlp_bias": True}, "mlp_bias"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("mistral", {"use_sliding_window": False}, "use_sliding_window False"),
        ("qwen 2", {"max_window_layers": "1"}, "max_window_layers is '1'"),
        ("gemma 2", {"layer_types": 3}, "layer_types"),
        ("gemma 2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gemma 3", {"rope_parameters": {"full_attention": 3}}, "rope_parameters full_attention is 3"),
    ],
)
def test_switches_of_one_architecture_are_refused_by_name(tmp_path, name, change, message):
    write_model(tmp_path, name)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        M.load(tmp_path)


# These are the published config.json files, as written for older versions of transformers.
PUBLISHED = {
    "llama": {
        "rope_theta": 50.0,
        "rope_scaling": {"type": "linear", "factor": 3.0},
        "rope_interleaved": False,
        "pretraining_tp": 1,
    },
    "qwen 2": {"rope_theta": 50.0, "use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1},
    "qwen 3": {
        "rope_theta": 50.0,
        "rope_scaling": None,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "mistral": {"rope_theta": 50.0, "sliding_window": 4, "attention_dropout": 0.0},
    "gemma 2": {
        "rope_theta": 50.0,
        "hidden_act": "gelu_pytorch_tanh",
        "cache_implementation": "hybrid",
        "sliding_window": 4,
    },
    "gemma 3": {
        "rope_theta": 50.0,
        "rope_local_base_freq": 7.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "use_cache": True,
    },
}
NEWER = ("rope_parameters", "layer_types", "tie_word_embeddings")


@pytest.mark.parametrize("name", PUBLISHED)
def test_older_config_files_mean_the_same_here_and_in_transformers(tmp_path, name):
    # With its class's default for the head, as some published files leave that out.
    write_model(tmp_path, name, tie_word_embeddings=name.startswith("gemma"))
    file = tmp_path / "config.json"
    raw = {key: value for key, value in json.loads(file.read_text()).items() if key not in NEWER}
    file.write_text(json.dumps({**raw, **PUBLISHED[name]}))
    ours, network = (
        M.load(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager"),
    )
    _, tokens, cu = ragged([30])
    with torch.no_grad():
        assert (ours.logits(ours(tokens, cu)) - network(tokens[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", PUBLISHED)
def test_harmless_settings_change_nothing_in_transformers_either(tmp_path, name):
    network = write_model(tmp_path, name)
    file = tmp_path / "config.json"
    # Those of the family itself are switches of it.
    extra = {key: value for key, value in HARMLESS.items() if key not in json.loads(file.read_text())}
    file.write_text(json.dumps({**json.loads(file.read_text()), **extra}))
    ours = M.load(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    _, tokens, cu = ragged([30])
    with torch.no_grad():
        assert torch.equal(network(tokens[None]).logits, again(tokens[None]).logits)
        assert (ours.logits(ours(tokens, cu)) - again(tokens[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_configs_of_transformers_are_known(tmp_path, name):
    network = write_model(tmp_path, name)
    file = tmp_path / "config.json"
    whole = {**network.config.to_dict(), **json.loads(file.read_text())}
    assert ModelConfig.from_json(whole, file) == M.load(tmp_path).config


def test_truncated_pickle_and_missing_folders_are_refused(tmp_path):
    write_model(tmp_path / "a", "llama")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="model.safetensors"):
        M.load(tmp_path / "a")
    file.rename(tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        M.load(tmp_path / "a")
    with pytest.raises(UserError, match="no such folder"):
        M.load(tmp_path / "nowhere")


def test_a_missing_shard_is_refused_by_name(tmp_path):
    write_model(tmp_path, "llama").save_pretrained(tmp_path / "b", max_shard_size="10KB")
    gone = sorted((tmp_path / "b").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        M.load(tmp_path / "b")


@pytest.fixture
def shards(tmp_path):
    """Returns the folder of a model in several files, its index, and the second of the files."""
    write_model(tmp_path / "whole", "llama").save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    folder = tmp_path / "shards"
    return folder, folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))[1]


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_shard_is_refused_by_name(shards, length):
    folder, _, file = shards
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{file.name}: not a whole safetensors file"):
        M.load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"model.norm.weight": 3}}'],
)
def test_an_index_that_is_none_is_refused_by_name(shards, text):
    folder, index, _ = shards
    index.write_text(text)
    with pytest.raises(UserError, match=index.name):
        M.load(folder)


def test_shards_that_the_index_says_otherwise_of_are_refused(shards):
    folder, index, file = shards
    whole = json.loads(index.read_text())
    here = sorted(name for name, place in whole["weight_map"].items() if place == file.name)
    index.write_text(
        json.dumps({"weight_map": {k: v for k, v in whole["weight_map"].items() if k != here[0]}})
    )
    with pytest.raises(UserError, match=f"{file.name}: it has unknown tensor {here[0]}"):
        M.load(folder)
    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "model.more.weight": file.name}}))
    with pytest.raises(UserError, match=f"{file.name}: it lacks tensor model.more.weight"):
        M.load(folder)
    index.write_text(json.dumps(whole))
    save_file({**load_file(file), "model.more.weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match=f"{file.name}: it has unknown tensor model.more.weight"):
        M.load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_weights_that_are_no_floats_are_refused_by_name(tmp_path, dtype):
    write_model(tmp_path, "llama")
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(dtype)}, file)
    stored = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.bool: "BOOL"}[dtype]
    with pytest.raises(UserError, match=f"model.safetensors: tensor {name} is stored as {stored}"):
        M.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_a_config_that_is_no_object_is_refused_by_name(tmp_path, text):
    write_model(tmp_path, "llama")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: "):
        M.load(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", torch.int8, None])
def test_other_dtypes_are_refused(tmp_path, dtype):
    write_model(tmp_path, "llama")
    with pytest.raises(UserError, match=f"dtype {dtype}: must be one of float32"):
        M.load(tmp_path, dtype=dtype)


def test_sharded_checkpoint_loads(tmp_path):
    network = write_model(tmp_path / "a", "llama")
    network.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").is_file()
    first, second = M.load(tmp_path / "a"), M.load(tmp_path / "b")
    assert all(
        torch.equal(x, y)
        for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_save_refuses_a_folder_in_use(tmp_path):
    write_model(tmp_path / "a", "llama")
    with pytest.raises(UserError, match="not empty"):
        M.save(M.load(tmp_path / "a"), tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        M.save(M.load(tmp_path / "a"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bfloat16_checkpoint_is_saved_bit_for_bit(tmp_path):
    write_model(tmp_path / "a", "llama").to(torch.bfloat16).save_pretrained(tmp_path / "a")
    M.save(M.load(tmp_path / "a", dtype=torch.bfloat16), tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(t.dtype == torch.bfloat16 for t in after.values())
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_hub_id_and_missing_folder(tmp_path, monkeypatch):
    import huggingface_hub

    network, asked = write_model(tmp_path / "snapshot", "llama"), []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = M.load("someone/tiny-llama")
    assert (
        asked[0][0] == "someone/tiny-llama"
        and "*.safetensors" in asked[0][1]
        and not any("bin" in p for p in asked[0][1])
    )
    assert torch.equal(loaded.embed, network.model.embed_tokens.weight)

    def offline(name, allow_patterns):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        UserError,
        match=r"someone/tiny-llama: not a local folder, and the "
        r"hub did not give it \(no route\); give a local",
    ):
        M.load("someone/tiny-llama")
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        M.load(tmp_path / "nowhere")
