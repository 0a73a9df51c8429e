"""The tiny random model of `--preset smoke`, with random heads beside it under
the names of the shipped ones."""

import sys
from pathlib import Path

import torch

from engine.model.folder import fingerprint, read_config
from engine.quickstart import add_to_manifest, cache_folder, cached, tiny_model_folder
from engine.scorers.base import Head

HEADS = ("helpfulness", "harm", "harm-audit")
SIZE = 1_000_000  # bytes that the model and its heads take, and more


def smoke_folder() -> Path:
    """Finds the folder in the user's cache, made on first use in a second; it appears whole or not at all.

    Raises: UserError where the disk is full or the cache cannot be written.
    """
    files = tuple(f"heads/{name}/head.safetensors" for name in HEADS)

    def make(partial: Path) -> None:
        folder = write_smoke_model(partial / "model")
        add_to_manifest(folder, files)

    return cached(cache_folder() / "smoke", make, _to_stderr, needed=files, size=SIZE)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_smoke_model(folder: Path) -> Path:
    """Writes the tiny model with its heads."""
    write_random_heads(tiny_model_folder(folder))
    return folder


def write_random_heads(folder: Path) -> None:
    """Writes heads named helpfulness, harm and harm-audit for the model in `folder`; reward and harm pull
    apart, the audit follows harm."""
    trunk, hidden = fingerprint(folder), read_config(folder)["hidden_size"]
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, hidden, generator=generator, dtype=torch.float64)
    for name, weight in zip(HEADS, (a, 0.5 * a + b, 0.5 * a + b + 0.3 * c), strict=True):
        Head(name=name, layer=2, weight_D=weight, bias=0.0, trunk=trunk).save(folder / "heads" / name)
