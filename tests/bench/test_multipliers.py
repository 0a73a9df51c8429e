"""The simulation of the multipliers' intervals: its truths, and that a cell's numbers are its own."""

import numpy as np
import pytest
import torch

from bench.verdict.multipliers import KINDS, Cell, draw, rows, table, true_lam, warm_starts
from engine import dual


@pytest.mark.parametrize("kind", ["normal", "unequal prompts"])
def test_closed_forms_are_what_many_responses_give(kind):
    cell = Cell(kind=kind, b_J=(0.3, -0.27), beta=2.0)
    spread = torch.distributions.Normal(0, 1).icdf((torch.arange(400) + 0.5) / 400).numpy()[:, None, None]
    reward, utility = draw(cell, np.random.default_rng(0), 400, 1000, spread)
    solved = dual.solve(reward, utility, cell.b_J, cell.beta).lam
    torch.testing.assert_close(true_lam(cell), solved, rtol=0, atol=0.03)


def test_a_multiplier_without_use_is_0_in_the_closed_form():
    alone = true_lam(Cell(b_J=(0.3,)))
    assert true_lam(Cell(b_J=(0.3, -0.5))).tolist() == pytest.approx([alone.item(), 0.0])


def test_every_kind_has_scores_of_its_scale_that_pull_against_the_reward():
    for kind in KINDS:
        rng = np.random.default_rng(1)
        reward, utility = draw(Cell(kind=kind), rng, 400, 200, rng.normal(size=(400, 1, 1)))
        assert 0.7 < utility.var(1).mean() < 1.3, kind
        assert -0.6 < np.corrcoef(reward.ravel(), utility.ravel())[0, 1] < -0.25, kind


def test_a_row_does_not_depend_on_other_cells():
    small, few = Cell(P=20), Cell(P=20, G=4)
    both, alone = rows(12, 3, [few, small]), rows(12, 3, [small])
    assert both[1] == alone[0] != rows(12, 4, [small])[0]
    assert both[1]["claimed"] == 1 and both[1]["truth"] == 0.75 < both[1]["solved"]
    assert both[1]["coverage"] >= 0.5 and both[0]["claimed"] == 0 and both[0]["coverage"] is None
    lines = table(both)
    assert len(lines) == 4 and "no claim" in lines[2] and "no claim" not in lines[3]
    assert {line.count("|") for line in lines} == {13}


def test_a_class_with_the_tilts_in_it_ends_where_they_are():
    found = {(row["eps"], row["J"], row["G"]): row for row in warm_starts(range(4))}
    for J, G in ((1, 4), (1, 8), (2, 8)):
        row = found[0.0, J, G]
        for name in ("solved", "corrected"):
            assert row[f"class, {name}"] == pytest.approx(row[f"tilt, {name}"], abs=1e-6)
        assert row["tilt, corrected"] < row["tilt, solved"]
    assert found[1.0, 1, 8]["short, corrected"] > found[1.0, 1, 8]["short, solved"] > 0
