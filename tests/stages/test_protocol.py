"""The stages of a run offer what the algorithms may ask."""

import inspect
import re
from pathlib import Path

import pytest

from engine.stages.protocol import Stages
from engine.stages.run import RunStages

MEMBERS = [name for name in vars(Stages) if not name.startswith("_")]
ALGORITHMS = [
    path
    for path in sorted((Path(__file__).parents[2] / "engine").glob("**/*.py"))
    if "open_stages(" in path.read_text(encoding="utf-8") and path.parent.name != "stages"
]


def parameters(function) -> list[tuple[str, object, object]]:
    """Returns the names, kinds and defaults of a function's parameters."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", MEMBERS)
def test_the_stages_of_a_run_offer_every_member_with_the_same_parameters(name):
    asked, offered = vars(Stages)[name], vars(RunStages).get(name)
    assert type(offered) is type(asked), name
    if not isinstance(asked, property):
        assert parameters(offered) == parameters(asked)


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_an_algorithm_asks_for_members_of_the_protocol_alone(path):
    asked = set(re.findall(r"(?<!engine\.)\bstages\.(\w+)", path.read_text(encoding="utf-8")))
    assert asked and asked <= set(MEMBERS)


def test_all_members_and_algorithms_are_looked_at():
    assert {"sample_reference", "solve_dual", "fit", "ascend", "measure_slack", "kept"} <= set(MEMBERS)
    assert {"caid", "mocan", "pecan", "primal_dual", "opd"} <= {path.stem for path in ALGORITHMS}
