"""The paths of a run folder."""

from pathlib import Path

import pytest

from engine.run.folder import RunFolder
from engine.run.run import Run


def test_iterates_are_sorted_by_number_and_rejected_ones_are_none(tmp_path: Path) -> None:
    paths = RunFolder(tmp_path)
    assert paths.iterates() == {}, "a run that has just begun has no folder adapters"
    for t in (10, 2, 1):
        paths.iterate(t).mkdir(parents=True)
    paths.rejected(11).mkdir()
    (paths.adapters / ".iteration-12.tmp").mkdir()
    assert list(paths.iterates()) == [1, 2, 10]
    assert paths.iterates() == {t: tmp_path / "adapters" / f"iteration-{t}" for t in (1, 2, 10)}
    assert paths.rejected(11) == tmp_path / "adapters" / "rejected-11"


def test_the_file_of_a_stage_is_known_by_the_name_of_the_stage(tmp_path: Path) -> None:
    paths = RunFolder(tmp_path)
    assert paths.stage_file("reference") is None, "the folder stages does not exist yet"
    paths.stages.mkdir()
    aligned = ["preference/reward", "preference/harm", "preference/scores"]
    names = ["reference", *aligned, "dual", "iteration-1/policy", "iteration-11/policy"]
    for number, name in enumerate(names, 9):
        (paths.stages / f"{paths.stage_stem(number, name)}.safetensors").write_bytes(b"")
    assert paths.stage_file("preference/harm") == tmp_path / "stages" / "11-preference-harm.safetensors"
    assert paths.stage_file("reference") == tmp_path / "stages" / "09-reference.safetensors"
    assert paths.stage_file("iteration-1/policy") == tmp_path / "stages" / "14-iteration-1-policy.safetensors"
    # The end of a name is not the name.
    for name in ("harm", "scores", "policy", "1/policy", "heldout/policy"):
        assert paths.stage_file(name) is None
    # A state inside a stage is no result of it.
    (paths.stages / f"{paths.stage_stem(16, 'heldout/policy')}.partial.safetensors").write_bytes(b"")
    (paths.stages / f"{paths.stage_stem(16, 'heldout/policy')}.partial.previous.safetensors").write_bytes(b"")
    assert paths.stage_file("heldout/policy") is None


def test_the_next_evaluation_is_the_first_folder_that_does_not_exist(tmp_path: Path) -> None:
    paths = RunFolder(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    for number in range(1, 12):
        assert paths.next_evaluation() == tmp_path / f"evaluation-{number}"
        paths.next_evaluation().mkdir()
    (tmp_path / "evaluation-3").rmdir()
    assert paths.next_evaluation() == tmp_path / "evaluation-3"


@pytest.mark.parametrize("name", ["reference", "preference/reward", "iteration-1/policy", "heldout/policy"])
def test_a_run_writes_where_the_paths_say(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    with Run.create(folder, "caid", {}, versions={}, fingerprint="f") as run:
        assert run.paths == RunFolder(folder)
        run.stage("first", dict, lambda stage: {})
        run.stage(name, dict, lambda stage: stage.save_partial({}) or {})
    paths = RunFolder(folder)
    file = paths.stage_file(name)
    assert file.is_file() and file.name == f"{paths.stage_stem(2, name)}.safetensors"
    assert {paths.config, paths.inputs, paths.lock, paths.stages, paths.metrics, paths.timing} == set(
        folder.iterdir()
    )
