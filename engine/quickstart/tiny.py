"""Writes a tiny Llama with random weights: the model of `--preset smoke` and of the tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.quickstart.llama_folder import Llama, Vocabulary, write_folder

if TYPE_CHECKING:
    import numpy as np

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny test model<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_model_folder(folder: Path, vocab: int = 384, seed: int = 0) -> Path:
    """Writes a tiny Llama with random weights in the default model's format.

    It is 32 wide and has 4 layers with about 40 000 weights. Equal seeds give equal files. Its tokens are
    `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, the 256 bytes and reserved tokens up to `vocab` (at least
    259), so it takes any text.
    """
    import numpy as np
    from tokenizers import pre_tokenizers

    from engine.model.architecture import ModelConfig
    from engine.model.names import LAYER, linear_shapes

    assert vocab >= 259, f"vocab {vocab} is below 3 special tokens and 256 bytes"
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<|reserved_{i}|>" for i in range(len(tokens), vocab)]
    llama = Llama(
        vocab=vocab,
        hidden=32,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate=64,
        context=2048,
        theta=10_000.0,
        epsilon=1e-5,
        tied=True,
        bos=1,
        eos=2,
        pad=2,
    )
    linears = linear_shapes(ModelConfig.from_json(llama.config_json(), Path(folder) / "config.json"))
    shapes = {"model.embed_tokens.weight": (vocab, llama.hidden), "model.norm.weight": (llama.hidden,)}
    for layer in range(llama.layers):
        for weight in LAYER:
            shapes[f"model.layers.{layer}.{weight.name}.weight"] = linears.get(weight.name, (llama.hidden,))
    rng = np.random.default_rng(seed)

    def tensors() -> Iterator["np.ndarray"]:
        for shape in shapes.values():
            if len(shape) == 1:
                yield np.ones(shape, np.float32)
            else:
                # 1 / sqrt(fan in) keeps the residual stream near unit size,
                # so that logits differ between contexts.
                yield rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = [0, 1, 2, *range(259, vocab)]
    vocabulary = Vocabulary(tokens=tokens, merges=[], special=special, unknown=0, template=TEMPLATE)
    write_folder(folder, llama, vocabulary, shapes, tensors(), lambda text: None)
    return folder
