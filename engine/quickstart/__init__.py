"""The default model, fetched on first use, and a tiny random model for the smoke preset and the tests.

Finding a folder that is complete loads neither torch nor a tokenizer:
what needs these imports them when it runs.
"""

from engine.quickstart.default_model import cache_folder, model_folder
from engine.quickstart.llama_folder import is_complete
from engine.quickstart.tiny import tiny_model_folder

__all__ = [
    "cache_folder",
    "is_complete",
    "model_folder",
    "tiny_model_folder",
]
