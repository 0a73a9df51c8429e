"""The tiny random model of `--preset smoke`, with random heads beside it under
the names of the shipped ones."""

import os
import shutil
import tempfile
from pathlib import Path

import torch

from engine.model.folder import fingerprint, read_config
from engine.quickstart import cache_folder, is_complete, tiny_model_folder
from engine.scorers.base import Head


def smoke_folder() -> Path:
    """Finds the folder in the user's cache, made on first use in a second; it appears whole or not at all."""
    folder = cache_folder() / "smoke"
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".smoke-"))
    try:
        write_smoke_model(temporary / "model")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary / "model", folder)
    except OSError:
        # Another process may have made it meanwhile.
        if not is_complete(folder):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


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
    for name, weight in (("helpfulness", a), ("harm", 0.5 * a + b), ("harm-audit", 0.5 * a + b + 0.3 * c)):
        Head(name=name, layer=2, weight_D=weight, bias=0.0, trunk=trunk).save(folder / "heads" / name)
