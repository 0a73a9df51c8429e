"""The decoder, read from and written to Hugging Face folders."""

from engine.model.decoder import Decoder
from engine.model.folder import fingerprint, load, save

__all__ = [
    "Decoder",
    "fingerprint",
    "load",
    "save",
]
