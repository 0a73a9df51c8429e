"""The default model, made on first use, and a tiny random model for the smoke preset and tests."""

from engine.quickstart.default_model import cache_folder, is_complete, model_folder, tiny_model_folder

__all__ = [
    "cache_folder",
    "is_complete",
    "model_folder",
    "tiny_model_folder",
]
