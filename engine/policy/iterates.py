"""Iterates on disk: a PEFT folder, or a Hugging Face folder of all weights."""

from pathlib import Path

from engine import model
from engine.errors import UserError
from engine.model.decoder import Decoder
from engine.policy.full import FullWeights
from engine.policy.lora import Adapter
from engine.policy.peft import load_peft, save_peft
from engine.policy.weights import Weights


def save_weights(weights: Weights, folder: Path, base_model: str, tokenizer_from: Path) -> None:
    """Writes an iterate: an adapter as PEFT's folder, all weights as a Hugging Face folder.

    Raises: UserError on a full or closed disk.
    """
    if isinstance(weights, Adapter):
        save_peft(weights, folder, base_model)
    else:
        model.save(weights.decoder(), folder, tokenizer_from=tokenizer_from)


def load_weights(folder: Path, network: Decoder) -> Weights:
    """Reads an iterate of the model `network`. Raises: UserError where they do not belong together."""
    if (folder / "adapter_config.json").is_file():
        return load_peft(folder, network)
    trained = model.load(folder, dtype=network.dtype, device=network.device)
    if trained.config != network.config:
        raise UserError(
            f"{folder}: these weights are of another model; give the model they were trained from."
        )
    return FullWeights(trained)


def is_saved(folder: Path) -> bool:
    """Tells whether `folder` holds an iterate."""
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
