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
    assert (paths.stages / f"{paths.stage_stem(2, name)}.safetensors").is_file()
    assert {paths.config, paths.inputs, paths.lock, paths.stages, paths.metrics, paths.timing} == set(
        folder.iterdir()
    )
