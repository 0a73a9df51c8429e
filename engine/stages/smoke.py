"""The tiny random model of `--preset smoke`, with random heads beside it under
the names of the shipped ones."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from engine.errors import UserError
from engine.files import one_line, shown, whole_folder
from engine.model.folder import fingerprint, read_config
from engine.quickstart import cache_folder, is_complete, tiny_model_folder
from engine.scorers.base import Head


def smoke_folder() -> Path:
    """Finds the folder in the user's cache, made on first use in a second; it appears whole or not at all."""
    folder = cache_folder() / "smoke"
    if is_complete(folder):
        return folder
    try:
        shutil.rmtree(folder, ignore_errors=True)
        with whole_folder(folder) as partial:
            write_smoke_model(partial)
    except (OSError, SafetensorError, UserError) as error:
        # Another process may have made it meanwhile.
        if not is_complete(folder):
            raise UserError(
                f"{shown(folder)}: the tiny model cannot be written there ({one_line(error)}); "
                "set XDG_CACHE_HOME to a folder that you can write."
            ) from error
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
