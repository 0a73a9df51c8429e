"""The default model, fetched on first use, and a tiny random model for the smoke preset and the tests.

Finding a folder that is complete loads neither torch nor a tokenizer:
what needs these imports them when it runs.
"""

from engine.quickstart.cache import cache_folder, cached
from engine.quickstart.default_model import model_folder
from engine.quickstart.llama_folder import add_to_manifest
from engine.quickstart.tiny import tiny_model_folder

__all__ = [
    "add_to_manifest",
    "cache_folder",
    "cached",
    "model_folder",
    "tiny_model_folder",
]
