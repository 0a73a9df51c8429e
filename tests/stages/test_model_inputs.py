"""A run says in one line, and of the model, what is wrong with the model's numbers."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine import train
from engine.model.folder import WEIGHTS
from engine.stages.smoke import write_random_heads
from tests.helpers.runs import SMOKE


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def started(folder: Path, change, capsys, *flags: str) -> tuple[int, str]:
    """Starts a run of a model with changed weights; returns its exit code and the last line of stderr."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    shutil.rmtree(folder / "heads")
    write_random_heads(folder)
    words = ["mocan", *SMOKE, "--model", str(folder), "--out", str(folder.parent / "run"), *flags]
    code = train.main(words)
    return code, capsys.readouterr().err.strip().splitlines()[-1]


def test_weights_that_are_not_finite_are_refused_before_there_is_a_run_folder(folder, capsys):
    def change(weights):
        weights["model.norm.weight"][3] = float("nan")

    code, said = started(folder, change, capsys)
    assert code == 2 and f"{WEIGHTS}: 1 of the 32 numbers of tensor model.norm.weight are not finite" in said
    assert not (folder.parent / "run").exists()


def test_a_reference_that_overflows_is_named_with_its_stage_and_layer(folder, capsys):
    def change(weights):
        weights["model.layers.1.mlp.down_proj.weight"].fill_(60_000.0)
        weights["model.layers.1.mlp.up_proj.weight"].fill_(60_000.0)

    code, said = started(folder, change, capsys, "--dtype", "float16")
    assert code == 3
    assert "reference: the reference computes numbers that are not finite, first in layer 2 of 4" in said
