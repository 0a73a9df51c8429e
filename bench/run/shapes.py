"""Models with random weights in the sizes of published ones, for figures that do not
depend on what a model says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from engine.model.architecture import ModelConfig
from engine.model.decoder import Decoder
from engine.model.folder import load, save
from engine.stages.inputs import model_folder
from engine.stages.smoke import smoke_folder


class Sizes(NamedTuple):
    """The sizes of a published model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


def config_json(family: str, sizes: Sizes, theta: float, context: int, **more) -> dict:
    """Returns the contents of config.json; `more` adds to them or replaces them."""
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.intermediate,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        **more,
    }


def _llama3_rope(factor: float) -> dict:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# These are the numbers of the published config.json files.
SHAPES = {
    "smollm2-135m": config_json("Llama", Sizes(30, 576, 9, 3, 1536, 49152), 1e5, 8192),
    "qwen2.5-0.5b": config_json("Qwen2", Sizes(24, 896, 14, 2, 4864, 151936), 1e6, 32768, rms_norm_eps=1e-6),
    "qwen3-0.6b": config_json(
        "Qwen3", Sizes(28, 1024, 16, 8, 3072, 151936), 1e6, 40960, rms_norm_eps=1e-6, head_dim=128
    ),
    "llama-3.2-1b": config_json(
        "Llama",
        Sizes(16, 2048, 32, 8, 8192, 128256),
        5e5,
        131072,
        head_dim=64,
        rope_scaling=_llama3_rope(32.0),
    ),
    "qwen2.5-1.5b": config_json("Qwen2", Sizes(28, 1536, 12, 2, 8960, 151936), 1e6, 32768, rms_norm_eps=1e-6),
    "llama-3.1-8b": config_json(
        "Llama",
        Sizes(32, 4096, 32, 8, 14336, 128256),
        5e5,
        131072,
        tie_word_embeddings=False,
        rope_scaling=_llama3_rope(8.0),
    ),
}


@contextmanager
def opened(
    model: str, shape: str, dtype: torch.dtype, device: torch.device, *, saved: bool = True
) -> Iterator[tuple[str, Path, Decoder]]:
    """Yields (name, Hugging Face folder, decoder) of --model, or of random weights of --shape,
    whose folder exists meanwhile if `saved`.

    Raises: SystemExit where the shape is unknown or both are given.
    """
    if not shape:
        folder = model_folder(model)
        yield folder.name, folder, load(folder, dtype=dtype, device=device)
        return
    if model or shape not in SHAPES:
        raise SystemExit(f"--shape {shape}: must be one of {', '.join(SHAPES)}, and --model left out.")
    with TemporaryDirectory() as scratch:
        decoder = random_model(SHAPES[shape], dtype, device)
        folder = Path(scratch) / "model"
        if saved:
            # Token ids are drawn, so any tokenizer will do.
            save(decoder, folder, tokenizer_from=smoke_folder())
        yield f"{shape}, random weights", folder, decoder


@torch.no_grad()
def random_model(config: dict, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Makes a decoder on the device with matrices from N(0, 0.02^2), norms 1 and biases 0;
    config is that of config.json."""
    model = Decoder(ModelConfig.from_json(config, Path("config.json")), config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0.0, 0.02, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
