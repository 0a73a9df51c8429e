"""Writes the Hugging Face folder of a Llama in float32, tokenizer and manifest included."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from engine.files import sync_folder

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "SHA256SUMS.json"


@dataclass(frozen=True, kw_only=True)
class Llama:
    """Sizes of a Llama, and its special tokens."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    theta: float
    epsilon: float
    tied: bool
    bos: int
    eos: int
    pad: int

    def config_json(self) -> dict:
        """Returns the contents of config.json.

        transformers 5 reads dtype and rope_parameters, version 4 torch_dtype and rope_theta.
        """
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
            "pad_token_id": self.pad,
            "dtype": "float32",
            "torch_dtype": "float32",
            "use_cache": True,
        }


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A byte-level BPE tokenizer."""

    tokens: list[str]
    merges: list[tuple[str, ...]]
    special: list[int]  # numbers of special tokens
    unknown: int  # number of the token for what is unknown
    template: str  # of chats


def faults(folder: Path, needed: tuple[str, ...] = ()) -> list[str]:
    """Compares the files of a folder with the manifest, by size and SHA-256.

    needed: files that the manifest has to list, beside config.json and the weights.

    Returns: the names of those that are missing or differ; the manifest's own where it is none.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return [MANIFEST]
    if not {"config.json", "model.safetensors", *needed} <= set(expected):
        return [MANIFEST]

    def fits(name: str) -> bool:
        try:
            with open(folder / name, "rb", buffering=0) as file:
                return os.fstat(file.fileno()).st_size == expected[name][0] and (
                    hashlib.file_digest(file, "sha256", _bufsize=1 << 22).hexdigest() == expected[name][1]
                )
        except OSError:
            return False

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return [name for name, fit in zip(expected, threads.map(fits, expected), strict=True) if not fit]


def write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    """Writes the manifest, which comes last, and waits until all is on the disk.

    entries: sha256 and bytes of each file.
    """
    _write(folder / MANIFEST, iter([json.dumps(entries, indent=2).encode()]))
    sync_folder(folder)


def add_to_manifest(folder: Path, names: Iterable[str]) -> None:
    """Lists more files of the folder in its manifest."""
    entries = json.loads((folder / MANIFEST).read_text())
    for name in names:
        data = (folder / name).read_bytes()
        entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_manifest(folder, entries)


def write_folder(
    folder: Path,
    llama: Llama,
    vocabulary: Vocabulary,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator["np.ndarray"],
    progress: Callable[[str], None],
) -> None:
    """Writes every file of a Hugging Face folder, the manifest last.

    shapes, tensors: the weights, in the same order.
    """
    ends = {"bos_token_id": llama.bos, "eos_token_id": llama.eos, "pad_token_id": llama.pad}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.tokens[llama.bos],
        "eos_token": vocabulary.tokens[llama.eos],
        "pad_token": vocabulary.tokens[llama.pad],
        "unk_token": vocabulary.tokens[vocabulary.unknown],
        "model_max_length": llama.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": vocabulary.template,
    }
    texts = {
        "config.json": json.dumps(llama.config_json(), indent=2),
        "generation_config.json": json.dumps(ends, indent=2),
        "tokenizer.json": _tokenizer_json(vocabulary),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
    }
    manifest = {name: _write(folder / name, iter([text.encode()])) for name, text in texts.items()}
    manifest["model.safetensors"] = _write(
        folder / "model.safetensors", _safetensors(shapes, tensors, progress)
    )
    write_manifest(folder, manifest)


def _tokenizer_json(vocabulary: Vocabulary) -> str:
    """Returns SmolLM's tokenizer: byte-level BPE after GPT-2's split, with every digit a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = vocabulary.tokens
    numbers = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=vocabulary.merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i in vocabulary.special]
    )
    return tokenizer.to_str()


def _safetensors(
    shapes: dict[str, tuple[int, ...]], tensors: Iterator["np.ndarray"], progress: Callable[[str], None]
) -> Iterator[bytes]:
    """Yields the bytes of a safetensors file in float32: length of the header, header, then tensor by tensor.

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
    """Writes and syncs one file; returns its line of the manifest."""
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
