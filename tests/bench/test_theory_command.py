"""The command bench.theory, and what it requires."""

import json
from types import SimpleNamespace

from bench.theory import __main__ as command
from bench.theory.failures import failures
from bench.theory.runs import Convergence
from bench.theory.tasks import Outcome


def test_ends_of_caid_at_nu_0_are_required():
    asked = SimpleNamespace(seed=1, J=1)
    runs = {
        ("CAID, secant 0.5", "0", 60): Convergence(12, 1e-9),
        ("RePO", "0.05", 100): Convergence(None, 1e-2),
    }
    results = {"problems": [], "variants": [], "six": [], "ends": [], "no_gap": [Outcome(asked, runs)]}
    assert failures(results) == []
    results["no_gap"] = [Outcome(asked, {("CAID, secant 0.5", "0", 60): Convergence(None, 1e-5)})]
    assert failures(results) == [
        "nu = 0 and CAID, secant 0.5 from 0, 60 iterations end 1.0e-05 off, J 1, seed 1"
    ]


def test_workers_below_1_are_refused(capsys):
    assert command.main(["--workers", "0"]) == 2
    assert capsys.readouterr().err.strip() == "error: --workers 0: must be at least 1."


def test_quick_without_a_folder_leaves_the_committed_page_alone(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(command, "compute", lambda sizes, workers: {})
    monkeypatch.setattr(command, "write", lambda results, out, console: written.append(out) or [])
    assert command.main(["--quick"]) == 0 and command.main([]) == 0
    assert written[0].parent == tmp_path and str(written[1]) == "docs"


def test_quick_command_writes_page_pictures_and_ratios(tmp_path, monkeypatch):
    computed = []
    compute = command.compute
    monkeypatch.setattr(command, "compute", lambda *x: computed.append(compute(*x)) or computed[0])
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "theory.md").read_text(encoding="utf-8")
    assert "<!--" not in page and "pairwise regression" in page
    for name in ("convergence", "bounds", "oscillation", "labels"):
        assert f"theory-{name}.png" in page and (tmp_path / f"theory-{name}.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "theory.json").read_text())
    grid = {(x["J"], x["eps"]) for x in written["problems"] if "b" not in x}
    assert grid == {(1, 0.0), (1, 0.3), (2, 0.0), (2, 0.3)}
    assert {x["beta"] for x in written["problems"]} == {1.0, 0.3}
    sharp = [i for i, (_, form) in enumerate(written["statements"]) if form == "sharp"]
    assert len(sharp) > 10
    for x in written["problems"]:
        assert all(left <= right + 1e-5 for left, right in (x["sides"][i] for i in sharp if x["sides"][i]))
    for _, runs in computed[0]["no_gap"]:
        late = {name for (name, _, _), run in runs.items() if run.needed is None}
        assert late <= {"primal-dual, RLOO", "RePO"}
