"""Models with random weights in the sizes of published ones, for figures that do not depend on what a model says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engine.architecture import ModelConfig
from engine.model import Decoder, load, save
from engine.smoke import smoke_folder
from engine.stages import model_folder


def _shape(
    family: str, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, *, theta: float, context: int,
    tied: bool = True, epsilon: float = 1e-5, **more,
) -> dict:  # fmt: skip
    return {
        "architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
        "max_position_embeddings": context, "rope_theta": theta, "rms_norm_eps": epsilon, "tie_word_embeddings": tied,
        "hidden_act": "silu", **more,
    }  # fmt: skip


def _llama3_rope(factor: float) -> dict:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    }  # fmt: skip


# What the published config.json says.
SHAPES = {
    "smollm2-135m": _shape("Llama", 30, 576, 9, 3, 1536, 49152, theta=1e5, context=8192),
    "qwen2.5-0.5b": _shape("Qwen2", 24, 896, 14, 2, 4864, 151936, theta=1e6, context=32768, epsilon=1e-6),
    "qwen3-0.6b": _shape("Qwen3", 28, 1024, 16, 8, 3072, 151936, theta=1e6, context=40960, epsilon=1e-6, head_dim=128),
    "llama-3.2-1b": _shape(
        "Llama", 16, 2048, 32, 8, 8192, 128256, theta=5e5, context=131072, head_dim=64, rope_scaling=_llama3_rope(32.0)
    ),
    "qwen2.5-1.5b": _shape("Qwen2", 28, 1536, 12, 2, 8960, 151936, theta=1e6, context=32768, epsilon=1e-6),
    "llama-3.1-8b": _shape(
        "Llama", 32, 4096, 32, 8, 14336, 128256, theta=5e5, context=131072, tied=False, rope_scaling=_llama3_rope(8.0)
    ),
}  # fmt: skip


@contextmanager
def opened(model: str, shape: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Path, Decoder]]:
    """(name, Hugging Face folder, decoder) of --model, or of random weights of --shape, whose folder is there meanwhile.

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
        # Any tokenizer will do: token ids are drawn.
        save(decoder, folder := Path(scratch) / "model", tokenizer_from=smoke_folder())
        yield f"{shape}, random weights", folder, decoder


@torch.no_grad()
def random_model(config: dict, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Matrices from N(0, 0.02^2), norms 1, biases 0, made on the device; config: as config.json has it."""
    model = Decoder(ModelConfig.from_json(config, Path("config.json")), config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0.0, 0.02, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
