"""Malformed model folders: each is refused with one line that names what is wrong, before any compute."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import model as M
from engine.errors import UserError
from engine.model.folder import INDEX, WEIGHTS, digests, fingerprint, resolve
from engine.model.tokenizer import load_tokenizer

Damage = Callable[[Path], object]
DEEP = 100_000
UP = "model.layers.1.mlp.up_proj.weight"


def config(**changes: object) -> Damage:
    """Changes keys of config.json; None takes a key away."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        raw = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))

    return damage


def rope(**changes: object) -> Damage:
    """Gives config.json rotary positions as newer versions write them, and no older ones."""
    return config(rope_parameters=changes, rope_theta=None)


def llama3(**changes: object) -> Damage:
    sizes = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    sizes |= {"rope_theta": 1e4, "original_max_position_embeddings": 32}
    return rope(rope_type="llama3", **{**sizes, **changes})


def contents(name: str, data: str | bytes) -> Damage:
    """Puts other contents into a file."""
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def cut(name: str, length: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def instead(name: str, put: Callable[[Path], object]) -> Damage:
    """Puts something that is no file in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        put(folder / name)

    return damage


def moved_out(name: str) -> Damage:
    """Moves a file out of the folder and leaves a link to it."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return damage


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def tensors(change: Callable[[dict], object]) -> Damage:
    """Changes the weights by name."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return damage


def number(name: str, value: float, dtype: torch.dtype = torch.float32) -> Damage:
    """Puts one number into a weight."""

    def change(weights: dict) -> None:
        weights[name] = weights[name].to(dtype)
        weights[name].view(-1)[7] = value

    return tensors(change)


def index(place: Callable[[str], object]) -> Damage:
    """Gives the weights another name, and an index that says by tensor where they are."""

    def damage(folder: Path) -> None:
        names = load_file(folder / WEIGHTS).keys()
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {name: place(name) for name in names}}))

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


# Name -> (what is done to the folder, what the line says).
FOLDERS: dict[str, tuple[Damage, str]] = {
    "layers 1e8": (config(num_hidden_layers=10**8), r"num_hidden_layers is 100000000; .* at most 10000"),
    "layers 1e30": (config(num_hidden_layers=10**30), "num_hidden_layers is 1000"),
    "layers 10000": (config(num_hidden_layers=10_000), r"lacks tensor model.layers.4.* wants 10000"),
    "layers 0": (config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "layers 4.0": (config(num_hidden_layers=4.0), r"num_hidden_layers is 4\.0"),
    "layers true": (config(num_hidden_layers=True), "num_hidden_layers is True"),
    "layers as text": (config(num_hidden_layers="4"), "num_hidden_layers is '4'"),
    "no layers": (config(num_hidden_layers=None), "num_hidden_layers is missing"),
    "one layer less": (config(num_hidden_layers=3), "has unknown tensor model.layers.3"),
    "one layer more": (config(num_hidden_layers=5), r"lacks tensor model.layers.4.\*"),
    "vocabulary 2**62": (config(vocab_size=2**62), "vocab_size is 4611686018427387904"),
    "vocabulary one more": (config(vocab_size=385), "shape"),
    "width 2**60": (config(hidden_size=2**60), "hidden_size is 1152921504606846976"),
    "width 64": (config(hidden_size=64), "shape"),
    "width list": (config(hidden_size=[32]), r"hidden_size is \[32\]"),
    "inner width 1e18": (config(intermediate_size=10**18), "intermediate_size is 1000"),
    "heads 1e9": (config(num_attention_heads=10**9), "num_attention_heads is 1000000000"),
    "key heads 1e9": (config(num_key_value_heads=10**9), "num_key_value_heads is 1000000000"),
    "key heads 3": (config(num_key_value_heads=3), "3 key heads do not fit"),
    "head size 1e12": (config(head_dim=10**12), "head_dim is 1000000000000"),
    "head size 7": (config(head_dim=7), "of size 7"),
    "more heads than width": (config(num_attention_heads=64, head_dim=None), "64 heads of size 0"),
    "positions 1e20": (config(max_position_embeddings=10**20), "max_position_embeddings is 1000"),
    "epsilon 10**400": (config(rms_norm_eps=10**400), "rms_norm_eps is 1000"),
    "epsilon 1e308": (config(rms_norm_eps=1e308), r"rms_norm_eps is 1e\+308"),
    "epsilon NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "epsilon infinite": (config(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    "epsilon negative": (config(rms_norm_eps=-1e-5), "rms_norm_eps is -1e-05"),
    "base 10**400": (config(rope_theta=10**400), "rope_theta is 1000"),
    "base list": (config(rope_theta=[1]), r"rope_theta is \[1\]"),
    "rope list": (config(rope_parameters=[1]), r"rope_parameters is \[1\]"),
    "rope type list": (rope(rope_type=[1]), r"rope type \[1\] is not supported"),
    "rope type object": (rope(rope_type={"a": 1}), "rope type {'a': 1} is not supported"),
    "rope type with a line end": (rope(rope_type="a\nb"), r"rope type a\\nb is not supported"),
    "rope factor 0": (rope(rope_type="linear", factor=0), "factor of rope type linear is 0"),
    "rope factor 10**400": (rope(rope_type="linear", factor=10**400), "factor of rope type linear is 1000"),
    "rope factors alike": (llama3(low_freq_factor=4.0), "high_freq_factor .* must be above low"),
    "rope lacks a factor": (llama3(factor=None), "rope type llama3 lacks factor"),
    "architecture of another kind": (config(architectures=["MambaForCausalLM"]), "MambaForCausalLM is not"),
    "architecture 3": (config(architectures=3), "architecture 3 is not supported"),
    "architecture object": (config(architectures=[{"a": 1}]), "architecture {'a': 1} is not supported"),
    "unknown type": (config(architectures=None, model_type="foo"), "model_type foo is not supported"),
    "type list": (config(architectures=None, model_type=[1]), r"model_type \[1\] is not supported"),
    "no type at all": (config(architectures=None, model_type=None), "model_type None is not supported"),
    "type of another family": (config(model_type="mistral"), "LlamaForCausalLM, model_type says 'mistral'"),
    "activation list": (config(hidden_act=["silu"]), r"activation \['silu'\] is not supported"),
    "activation relu": (config(hidden_act="relu"), "activation relu is not supported"),
    "quantised": (config(quantization_config={"bits": 4}), "quantization_config"),
    "unknown switch with a line end": (config(**{"a\nb": 1}), r"a\\nb 1 is not supported"),
    "tied as text": (config(tie_word_embeddings="true"), "tie_word_embeddings is 'true'"),
    "not tied, no head": (config(tie_word_embeddings=False), "lacks tensor lm_head.weight"),
    "biases that are not there": (config(attention_bias=True), "lacks tensor .*bias"),
    "config empty": (contents("config.json", ""), "config.json: not valid JSON"),
    "config list": (contents("config.json", "[]"), "config.json: a JSON list"),
    "config null": (contents("config.json", "null"), "config.json: a JSON NoneType"),
    "config cut": (cut("config.json", 50), "config.json: not valid JSON"),
    "config deep lists": (contents("config.json", "[" * DEEP + "]" * DEEP), "config.json: not valid JSON"),
    "config deep objects": (
        contents("config.json", '{"a":' * DEEP + "1" + "}" * DEEP),
        "config.json: not valid JSON",
    ),
    "config of 5000 digits": (contents("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "config.json: "),
    "config no UTF-8": (contents("config.json", b'{"a": "\xff"}'), "config.json: not UTF-8"),
    "config UTF-16": (contents("config.json", "{}".encode("utf-16")), "config.json: not UTF-8"),
    "config key twice": (contents("config.json", '{"a": 1, "a": 2}'), "config.json: .*'a' stands twice"),
    "config gone": (gone("config.json"), "no config.json; give a Hugging Face model folder"),
    "config a folder": (instead("config.json", Path.mkdir), "config.json: not a file"),
    "config a pipe": (instead("config.json", os.mkfifo), "config.json: not a file"),
    "config a circle of links": (instead("config.json", circle), "config.json: "),
    "config outside": (moved_out("config.json"), "config.json leads out of the folder; put a copy"),
    "weights gone": (gone(WEIGHTS), "no model.safetensors"),
    "weights a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "only pytorch_model.bin, a pickle",
    ),
    "weights empty": (contents(WEIGHTS, b""), "model.safetensors: not a whole safetensors file"),
    "weights cut": (cut(WEIGHTS, -1), "model.safetensors: not a whole safetensors file"),
    "weights cut in the header": (cut(WEIGHTS, 100), "model.safetensors: not a whole safetensors file"),
    "weights with a header of 2**63": (
        contents(WEIGHTS, (2**63).to_bytes(8, "little") + b"{}"),
        "model.safetensors: not a whole safetensors file",
    ),
    "weights with a header that is no JSON": (
        contents(WEIGHTS, (4).to_bytes(8, "little") + b"nope"),
        "model.safetensors: not a whole safetensors file",
    ),
    "weights a folder": (instead(WEIGHTS, Path.mkdir), "no model.safetensors"),
    "weights a pipe": (instead(WEIGHTS, os.mkfifo), "no model.safetensors"),
    "weights a circle of links": (instead(WEIGHTS, circle), "model.safetensors: no file can be there"),
    "weights outside": (moved_out(WEIGHTS), "model.safetensors leads out of the folder"),
    "a tensor is missing": (tensors(lambda t: t.pop(UP)), f"lacks tensor {UP}"),
    "a layer is missing": (
        tensors(lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name]),
        r"lacks tensor model.layers.2.\*",
    ),
    "an unknown tensor": (tensors(lambda t: t.update({"a\nb": torch.ones(1)})), r"unknown tensor a\\nb"),
    "a tensor turned": (tensors(lambda t: t.update({UP: t[UP].t().contiguous()})), f"{UP} has shape"),
    "a tensor flat": (tensors(lambda t: t.update({UP: t[UP].reshape(-1)})), f"{UP} has shape"),
    "a tensor of no dimension": (
        tensors(lambda t: t.update({"model.norm.weight": torch.tensor(1.0)})),
        "model.norm.weight has shape",
    ),
    "a tensor of bytes": (tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), f"{UP} is stored as I8"),
    "a tensor of float8": (
        tensors(lambda t: t.update({UP: t[UP].to(torch.float8_e5m2)})),
        f"{UP} is stored as F8_E5M2",
    ),
    "a NaN": (number(UP, float("nan")), rf"model.safetensors: 1 of the 2048 numbers of tensor {UP}"),
    "a NaN in bfloat16": (number(UP, float("nan"), torch.bfloat16), f"numbers of tensor {UP} are not"),
    "an infinity in a norm": (number("model.norm.weight", float("inf")), r"model.norm.weight .*\(inf\)"),
    "a minus infinity": (number("model.norm.weight", -float("inf")), r"model.norm.weight .*\(-inf\)"),
    "a number beyond float32": (number(UP, 1e300, torch.float64), rf"{UP} holds 1e\+300, which float32"),
    "index with a file above": (index(lambda name: "../part.safetensors"), "part.safetensors leads out"),
    "index with an absolute file": (index(lambda name: "/part.safetensors"), "part.safetensors leads out"),
    "index with a long name": (index(lambda name: "x" * 300), "xxx is missing, model.safetensors.index.json"),
    "index with a NUL": (index(lambda name: "a\0b"), r"a\\x00b: no file can be there"),
    "index with an empty name": (index(lambda name: ""), "is missing, model.safetensors.index.json names it"),
    "index with a missing file": (index(lambda name: "other.safetensors"), "other.safetensors is missing"),
    "index with a number": (index(lambda name: 3), "no weight_map that names the file of each tensor"),
    "index without a map": (both(gone(WEIGHTS), contents(INDEX, "{}")), "no weight_map"),
    "index deep": (both(gone(WEIGHTS), contents(INDEX, "[" * DEEP)), "index.json: not valid JSON"),
    "index with a file outside": (
        both(index(lambda name: "part.safetensors"), moved_out("part.safetensors")),
        "part.safetensors leads out of the folder",
    ),
    "index with a circle of links": (
        both(index(lambda name: "part.safetensors"), instead("part.safetensors", circle)),
        "part.safetensors: no file can be there",
    ),
    "an adapter beside the model": (
        contents("adapter_config.json", "{}"),
        "an adapter and a model in one folder; merge the adapter",
    ),
    "an adapter alone": (
        both(gone("config.json"), contents("adapter_config.json", "{}")),
        "an adapter, not a model; merge it into its model",
    ),
}  # fmt: skip
TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "code": (config(auto_map={"AutoModel": "evil.Model"}), "auto_map names code"),
    "cut": (cut("tokenizer.json", 1000), "no tokenizer could be loaded"),
    "empty": (contents("tokenizer.json", ""), "no tokenizer could be loaded"),
    "list": (contents("tokenizer.json", "[]"), "no tokenizer could be loaded"),
    "deep": (contents("tokenizer.json", "[" * DEEP), "no tokenizer could be loaded"),
    "no UTF-8": (contents("tokenizer.json", b"\xff\xfe\x00"), "no tokenizer could be loaded"),
    "config list": (contents("tokenizer_config.json", "[]"), "tokenizer_config.json: a JSON list"),
    "config deep": (contents("tokenizer_config.json", "[" * DEEP), "tokenizer_config.json: not valid JSON"),
    "config outside": (moved_out("tokenizer_config.json"), "tokenizer_config.json leads out of the folder"),
    "outside": (moved_out("tokenizer.json"), "tokenizer.json leads out of the folder"),
    "template outside": (
        lambda folder: (folder / "chat_template.jinja").symlink_to("/etc/hostname"),
        "chat_template.jinja leads out of the folder",
    ),
    "end of turn a folder": (
        instead("generation_config.json", Path.mkdir),
        "generation_config.json: not a file that can be read; fetch the file again",
    ),
    "end of turn a pipe": (instead("generation_config.json", os.mkfifo), "config.json: not a file"),
    "a folder": (instead("tokenizer.json", Path.mkdir), "tokenizer.json: not a file that can be read"),
    "template a folder": (instead("chat_template.jinja", Path.mkdir), "chat_template.jinja: not a file"),
    "template gone behind its link": (
        instead("chat_template.jinja", lambda path: path.symlink_to("nowhere")),
        "chat_template.jinja: not a file",
    ),
    "further template gone behind its link": (
        instead("other.jinja", lambda path: path.symlink_to("nowhere")),
        "other.jinja: not a file",
    ),
    "more tokens than the model": (config(vocab_size=300), "384 tokens, vocab_size in config.json is 300"),
}  # fmt: skip


def refused(call: Callable[[], object], says: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert time.monotonic() - start < 30, "this is no refusal before compute"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(folder, name):
    damage, says = FOLDERS[name]
    damage(folder)
    refused(lambda: M.load(folder), says)
    for read in (digests, fingerprint):
        try:
            read(folder)
        except UserError as error:
            assert "\n" not in str(error)


def test_a_folder_that_is_called_like_a_file_of_the_tokenizer(folder):
    (folder / "tokenizer.parts").mkdir()
    assert len(load_tokenizer(folder)) == 384


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(folder, name):
    damage, says = TOKENIZERS[name]
    damage(folder)
    refused(lambda: load_tokenizer(folder), says)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "no such folder"),
        ("a/" + "x" * 300, "no such folder"),
        ("a\0b", r"model a\\x00b: no such folder"),
        ("a\nb", r"model a\\nb: no such folder"),
        ("~/model", "no such folder"),
        ("one/two/three", "no such folder"),
        ("../model", "no such folder"),
        (__file__, "a file; give the folder that it is in"),
    ],
)
def test_names_of_models(name, says):
    refused(lambda: resolve(name), says)


def test_the_current_folder_without_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: M.load("."), r"\.: no config.json; give a Hugging Face model folder")
