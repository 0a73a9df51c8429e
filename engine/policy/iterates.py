"""Writes iterates as others read them: a PEFT folder, or a Hugging Face folder of all weights."""

from pathlib import Path

from engine import model
from engine.policy.lora import Adapter
from engine.policy.peft import save_peft
from engine.policy.weights import Weights


def save_weights(
    weights: Weights, folder: Path, base_model: str, tokenizer_from: Path, dropout: float
) -> None:
    """Writes an iterate: an adapter as PEFT's folder, all weights as a Hugging Face folder.

    dropout: of the adapter's training. Raises: UserError on a full or closed disk.
    """
    if isinstance(weights, Adapter):
        save_peft(weights, folder, base_model, dropout)
    else:
        model.save(weights.decoder(), folder, tokenizer_from=tokenizer_from)


def files_of(weights: Weights) -> tuple[str, str]:
    """Returns the names of the files without which an iterate's folder is not whole."""
    if isinstance(weights, Adapter):
        return "adapter_config.json", "adapter_model.safetensors"
    return "config.json", "model.safetensors"
