"""A new algorithm is its file and one row of a table: the one below goes through train,
resume, evaluate and sweep."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engine import evaluate, train
from engine.config import ALGORITHMS, RunConfig
from engine.config.algorithms import Algorithm
from engine.config.bounds import bounded
from engine.records import Target, lagrangian
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages
from engine.sweep import __main__ as sweep
from tests.helpers.pictures import in_pixels
from tests.helpers.runs import SMOKE, files

# --- What would be the algorithm's file: MoCAN's box with a multiplier that is given, not solved for. ---


@dataclass(frozen=True, kw_only=True)
class FixedConfig(RunConfig):
    """Align once at a given multiplier."""

    multiplier: float = bounded(1.0, at_least=0, at_most=9)
    """The multiplier of every utility."""

    has_thresholds = False


def fixed_train(config: FixedConfig, *, resume: str | None = None) -> Result:
    """Aligns once; `before_verdict` of the module stands for a Ctrl-C at that moment."""
    with open_stages("fixed", config, resume) as stages:
        policy, lam_J = loop(stages, config)
        sys.modules["fixed_multiplier"].before_verdict()
        return stages.verdict(policy, lam_J)


def loop(stages: Stages, config: FixedConfig):
    """Fits the policy to the Lagrangian at the given multiplier;
    returns policy and multipliers, float64 [J]."""
    stages.sample_reference()
    lam_J = torch.full((stages.n_constraints,), config.multiplier, dtype=torch.float64)
    return stages.fit(Target(lam_J=lam_J, score=lagrangian(lam_J), coefficient=config.beta), 1), lam_J


# --- What would be its row. ---

ROW = Algorithm(FixedConfig, "fixed_multiplier", "align once at a given multiplier", "a fixed multiplier")
FLAGS = [*SMOKE, "--force"]


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[ModuleType]:
    """Makes the algorithm's module, which the row names, and puts the row into the table."""
    module = ModuleType("fixed_multiplier")
    module.train, module.before_verdict = fixed_train, lambda: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        patch.setitem(ALGORITHMS, "fixed", ROW)
        yield module


@pytest.fixture(scope="module")
def finished(module, tmp_path_factory, cache) -> Path:
    """Trains a run to its end and returns the run's folder."""
    folder = tmp_path_factory.mktemp("fixed") / "run"
    with in_pixels():
        assert train.main(["fixed", *FLAGS, "--multiplier", "0.5", "--out", str(folder)]) == 0
    return folder


def test_the_command_line_knows_it(capsys):
    assert train.main(["fixed", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  fixed       align once at a given multiplier" in out and "--multiplier" in out
    assert train.main(["fixed", *FLAGS, "--multiplier", "-1"]) == 2
    assert capsys.readouterr().err == "error: --multiplier -1.0: must lie in [0, 9].\n"


def test_it_trains_and_is_judged(finished):
    assert json.loads((finished / "evaluation.json").read_text())["constraints"][0]["name"] == "harm"
    assert (finished / "report.html").is_file() and (finished / "report.png").stat().st_size > 10_000
    assert (finished / "adapters" / "iteration-1").is_dir()


def test_a_run_interrupted_after_its_policy_stage_goes_on_and_ends_equal(
    finished, tmp_path, module, monkeypatch, capsys
):
    def press() -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    monkeypatch.setattr(module, "before_verdict", press)
    assert train.main(["fixed", *FLAGS, "--multiplier", "0.5", "--out", str(folder)]) == 130
    assert f"--resume {folder}" in capsys.readouterr().err
    assert (folder / "adapters" / "iteration-1").is_dir() and not (folder / "evaluation.json").exists()
    monkeypatch.undo()
    with in_pixels():
        assert train.main(["--resume", str(folder)]) == 0
    whole, resumed = files(finished), files(folder)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []


def test_it_is_evaluated(finished, tmp_path, capsys):
    assert evaluate.main([str(finished), "--seed", "0", "--out", str(tmp_path / "judged")]) == 0
    assert "a fixed multiplier on smoke" in capsys.readouterr().out
    again, own = (json.loads((f / "evaluation.json").read_text()) for f in (tmp_path / "judged", finished))
    assert again["reward"]["mean"] == pytest.approx(own["reward"]["mean"], rel=1e-9)


def test_it_is_swept_once_for_each_seed_as_it_knows_no_threshold(tmp_path):
    out = tmp_path / "sweep"
    flags = [
        "--preset",
        "smoke",
        "--algorithms",
        "fixed:multiplier=0.5",
        "--thresholds",
        "0.05",
        "0.1",
        "--out",
        str(out),
    ]
    assert sweep.main([*flags, "--", "--threads", "1", "--force"]) == 0
    assert [p.name for p in out.glob("fixed*")] == ["fixed-multiplier=0.5-seed0"]
    assert "a fixed multiplier:multiplier=0.5" in (out / "index.html").read_text()
