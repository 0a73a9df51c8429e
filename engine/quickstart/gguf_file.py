"""Converts the GGUF file of a Llama model to a Hugging Face folder in float32."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.quickstart.llama_folder import Llama, Vocabulary, write_folder

if TYPE_CHECKING:
    import numpy as np

CONTROL = 3  # GGUF token type of special tokens


def convert(gguf: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Writes the GGUF file of a Llama as a Hugging Face folder in float32.

    gguf: of any quantisation that the package gguf knows. folder: exists and is empty.
    """
    from gguf import GGUFReader

    from engine.model.names import from_gguf

    progress("reading the tokenizer")
    reader = GGUFReader(gguf)
    field = {name: value.contents() for name, value in reader.fields.items()}
    shapes = {from_gguf(t.name): tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    llama = Llama(
        vocab=len(field["tokenizer.ggml.tokens"]),
        hidden=field["llama.embedding_length"],
        layers=field["llama.block_count"],
        heads=field["llama.attention.head_count"],
        kv_heads=field["llama.attention.head_count_kv"],
        head_dim=field["llama.rope.dimension_count"],
        intermediate=field["llama.feed_forward_length"],
        context=field["llama.context_length"],
        theta=field["llama.rope.freq_base"],
        # It is stored as float32: 9.99999975e-06 is 1e-05.
        epsilon=float(f"{field['llama.attention.layer_norm_rms_epsilon']:.6g}"),
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
                value = undo_permutation(value, llama.heads)
            elif t.name.endswith("attn_k.weight"):
                value = undo_permutation(value, llama.kv_heads)
            yield value

    vocabulary = Vocabulary(
        tokens=field["tokenizer.ggml.tokens"],
        merges=[tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]],
        special=[i for i, kind in enumerate(field["tokenizer.ggml.token_type"]) if kind == CONTROL],
        unknown=field["tokenizer.ggml.unknown_token_id"],
        template=field["tokenizer.chat_template"],
    )
    write_folder(folder, llama, vocabulary, shapes, tensors(), progress)


def undo_permutation(weight: "np.ndarray", heads: int) -> "np.ndarray":
    """Brings rows of a query or key weight [heads * head_dim, D] from GGUF's order to Hugging Face's.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face the halves (i, i + head_dim / 2), so its converter
    interleaves the rows of each head.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
