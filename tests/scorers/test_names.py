"""Heads and names of scorers that cannot be are refused before anything is computed."""

import json

import pytest
import safetensors.torch
import torch

from engine import model, train
from engine.errors import UserError
from engine.run.folder import RunFolder
from engine.scorers.base import Head
from engine.scorers.find import content, find_scorer
from engine.scorers.names import is_name, stage_name
from engine.stages.smoke import smoke_folder
from tests.helpers.runs import SMOKE

CPU = torch.device("cpu")


def write_head(folder, weight=None, **fields):
    """Writes a head's file as it is asked for, however wrong."""
    folder.mkdir()
    about = {"name": "h", "layer": 1, "bias": 0.0, "trunk": "x"} | fields
    weight = torch.ones(32) if weight is None else weight
    safetensors.torch.save_file(
        {"weight": weight}, folder / "head.safetensors", metadata={"head": json.dumps(about)}
    )
    return folder


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("layer", "2", "layer is '2', not a whole number"),
        ("layer", True, "layer is True, not"),
        ("layer", -1, "layer is -1, not"),
        ("bias", "0", "bias is '0', not a number"),
        ("bias", None, "bias is None, not"),
        ("name", 7, "name is 7, not"),
        ("name", ["a"], r"name is \['a'\], not"),
        ("name", "", "name is '', not"),
        ("name", "two\nlines", "name is 'two"),
        ("name", "x" * 101, "name is 'xxx"),
        ("trunk", 3, "trunk is 3, not"),
        ("weight", torch.ones(32, 1), r"weight has shape \[32, 1\], not"),
    ],
)
def test_a_head_with_a_field_of_another_kind_is_refused(tmp_path, field, value, said):
    with pytest.raises(UserError, match=f"head.safetensors: its {said}.*make it again"):
        Head.load(write_head(tmp_path / "h", **{field: value}))


@pytest.mark.parametrize("fields", [{"weight": torch.ones(31)}, {"layer": 99}])
def test_a_head_of_other_states_than_its_models_is_refused(tmp_path, tiny_folder, fields):
    trunk = model.fingerprint(tiny_folder)
    folder = write_head(tmp_path / "h", trunk=trunk, **fields)
    with pytest.raises(UserError, match="head h: it reads 3. states after layer .*, its model has 32 after"):
        find_scorer(str(folder), tiny_folder).load(trunk, CPU)


@pytest.mark.parametrize("spec", ["a=b=harm", "a=-b=harm", "harm=harm=harm"])
def test_a_scorer_with_two_names_is_refused(tiny_folder, spec):
    with pytest.raises(UserError, match=rf"scorer {spec}: it has two names; give it one: \w+=harm\.$"):
        find_scorer(spec, tiny_folder)


@pytest.mark.parametrize("spec", ["a=--harm", "--harm"])
def test_two_minus_signs_are_refused(tiny_folder, spec):
    with pytest.raises(UserError, match=rf"scorer {spec}: two minus signs; one takes the negative"):
        find_scorer(spec, tiny_folder)
    assert find_scorer(spec.replace("--", "-"), tiny_folder).sign == -1


@pytest.mark.parametrize("spec", ["x" * 300, "a/" + "y" * 300, "m:" + "f" * 200, "nul\0byte", "/"])
def test_values_that_no_file_can_have_are_refused(tiny_folder, spec):
    with pytest.raises(UserError) as refused:
        content(spec, [], [], folder=tiny_folder)
    assert len(str(refused.value).splitlines()) == 1


def test_names_become_stages_of_their_own():
    names = ["harm", "harm.v2", "harm_v2", "a b", "scores", "é"]
    assert all(map(is_name, names))
    stages = [stage_name("preference", i, name) for i, name in enumerate(names)]
    assert stages == [
        "preference/harm", "preference/1/harm_v2", "preference/harm_v2", "preference/3/a_b",
        "preference/4/scores", "preference/é",
    ]  # fmt: skip


def test_a_head_with_a_dot_in_its_name_goes_through_pecan(tmp_path, cache):
    shipped = Head.load(smoke_folder() / "heads" / "harm")
    head = write_head(
        tmp_path / "h", shipped.weight_D, name="harm.v2", layer=shipped.layer, trunk=shipped.trunk
    )
    flags = ["--cost", str(head), "--force", "--steps", "1", "--preference-steps", "1", "--eval-prompts", "2"]
    assert train.main(["pecan", *SMOKE, *flags, "--out", str(tmp_path / "run")]) == 0
    assert list(RunFolder(tmp_path / "run").stages.glob("*-preference-1-harm_v2.safetensors"))
