"""`python -m engine.dual SCORES`: what it reads, refuses, prints, draws and writes."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from engine import dual
from engine.dual.__main__ import main
from engine.dual.config import DualConfig
from engine.dual.scores_file import Table, preference_pairs


def scores_rows(P: int = 30, G: int = 6, seed: int = 0) -> list[dict]:
    """Returns rows of scores in which reward and harm rise together and the third column is independent.

    Rows of one prompt stand apart.
    """
    rng = np.random.default_rng(seed)
    reward = 3 * rng.normal(size=(P, G)) + rng.normal(size=(P, 1))
    harm = 0.2 * (rng.normal(size=(P, G)) + 0.4 * reward / 3) + 7
    wit = rng.normal(size=(P, G))
    return [
        {
            "prompt": f"Question {p}?",
            "response": f"Answer {p}.{i}",
            "reward": reward[p, i],
            "harm": harm[p, i],
            "wit": wit[p, i],
        }
        for i in range(G)
        for p in range(P)
    ]


def arrays(rows: list[dict], *names: str) -> tuple[np.ndarray, ...]:
    """Returns each named column as an array [P, G]."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    return tuple(
        np.array([[row[name] for row in rows if row["prompt"] == prompt] for prompt in prompts])
        for name in names
    )


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(capsys, *argv: str, folder: str = "scores-dual") -> tuple[dict, str]:
    """Runs a command line that must succeed; returns its dual.json and what it printed."""
    assert main(list(argv)) == 0, capsys.readouterr().err
    return json.loads((Path(folder) / "dual.json").read_text()), capsys.readouterr().out


def test_one_cost_in_standard_deviations(here, capsys):
    rows = scores_rows()
    found, out = result(capsys, write(here / "scores.jsonl", rows), "--cost", "harm", "--threshold", "0.3")
    reward, harm = arrays(rows, "reward", "harm")
    sd = [np.sqrt(x.var(1, ddof=1).mean()) for x in (reward, harm)]
    expected = dual.solve(reward / sd[0], -harm[..., None] / sd[1], [0.3], DualConfig.beta)
    only = found["constraints"][0]
    assert only["lam"] == pytest.approx(expected.lam.item(), rel=1e-9) and only["negated"]
    assert [found["reward_unit"], only["unit"]] == pytest.approx(sd)
    assert only["improvement"] == pytest.approx(0.3, abs=1e-9)
    assert only["improvement_at_zero"] < 0 < only["lam_interval"][0] < only["lam"] < only["lam_interval"][1]
    assert not found["intervals_of_true_lambda"] and only["lam_corrected"] == only["lam"]
    assert "95 % over prompts, at 6 responses each; the bias of few responses is not in it" in " ".join(
        out.split()
    )
    assert only["largest_improvement"] == pytest.approx(
        dual.largest_threshold(-harm[..., None] / sd[1]).item()
    )
    assert found["largest_multiple"] == pytest.approx(only["largest_improvement"] / 0.3)
    assert found["value"] == pytest.approx(expected.value) and found["kkt"] <= 1e-10
    assert found["ess"] == pytest.approx(expected.ess.mean().item())
    assert "30 prompts x 6 responses; harm is a cost, negated" in out
    assert f"reward {sd[0]:.4g}, harm {sd[1]:.4g} of the file's" in " ".join(out.split())
    assert f"lambda {only['lam']:.3f} [" in out and f"effective sample size {found['ess']:.1f} of 6" in out
    assert f"predicted improvement {found['reward_improvement']:+.3f}" in out
    lam = np.array(found["curve"]["lam"])[:, 0]
    assert lam[0] == pytest.approx(0, abs=1e-6) and (np.diff(lam) > 0).all()
    assert np.interp(0.3, found["curve"]["x"], lam) == pytest.approx(only["lam"], rel=1e-9)
    height, width = matplotlib.image.imread(here / "scores-dual" / "dual.png").shape[:2]
    assert (width, height) == (1430, 650)


def test_raw_units_and_absolute_levels_are_the_same_problem(here, capsys):
    rows = scores_rows()
    file = write(here / "scores.jsonl", rows)
    scaled, _ = result(capsys, file, "--cost", "harm", "--threshold", "0.3")
    (harm,) = arrays(rows, "harm")
    sd_r, sd_g = scaled["reward_unit"], scaled["constraints"][0]["unit"]
    raw_flags = ["--units", "raw", "--beta", str(DualConfig.beta * sd_r)]
    raw, out = result(capsys, file, "--cost", "harm", "--threshold", str(0.3 * sd_g), *raw_flags)
    assert "units: those of the file" in out
    for key in ("lam", "lam_se"):
        assert raw["constraints"][0][key] == pytest.approx(
            scaled["constraints"][0][key] * sd_r / sd_g, rel=1e-6
        )
    level, out = result(
        capsys, file, "--cost", "harm", f"--threshold={-harm.mean() + 0.3 * sd_g}", "--absolute", *raw_flags
    )
    assert level["constraints"][0]["lam"] == pytest.approx(raw["constraints"][0]["lam"], rel=1e-6)
    assert level["constraints"][0]["b"] == pytest.approx(0.3 * sd_g) and "largest supported level" in out
    assert level["curve"]["x"][0] == pytest.approx(raw["curve"]["x"][0] - harm.mean())


def test_two_constraints_from_parquet(here, capsys):
    rows = scores_rows()
    flags = [
        "--utility",
        "wit",
        "--cost",
        "harm",
        "--threshold",
        "0.2",
        "0.3",
        "--out",
        "two",
    ]
    found, out = result(capsys, write(here / "scores.parquet", rows), *flags, folder="two")
    assert [(c["name"], c["negated"], c["threshold"]) for c in found["constraints"]] == [
        ("wit", False, 0.2),
        ("harm", True, 0.3),
    ]
    reward, harm, wit = arrays(rows, "reward", "harm", "wit")
    utility = np.stack(
        [wit / np.sqrt(wit.var(1, ddof=1).mean()), -harm / np.sqrt(harm.var(1, ddof=1).mean())], -1
    )
    expected = dual.solve(reward / found["reward_unit"], utility, [0.2, 0.3], DualConfig.beta)
    np.testing.assert_allclose([c["lam"] for c in found["constraints"]], expected.lam, rtol=1e-8)
    assert found["largest_multiple"] == pytest.approx(dual.largest_multiple(utility, [0.2, 0.3]))
    assert f"largest supported together: {found['largest_multiple']:.3f} x" in out
    assert found["curve"]["x"][0] == 0 and 1.0 in found["curve"]["x"] and len(found["curve"]["lam"][0]) == 2


def test_without_names_all_further_numbers_are_utilities(here, capsys):
    rows = [{key: row[key] for key in ("prompt", "reward", "wit")} for row in scores_rows()]
    found, out = result(capsys, write(here / "scores.jsonl", rows), "--threshold", "0.1")
    assert [c["name"] for c in found["constraints"]] == [
        "wit"
    ] and "wit is a utility, larger is better" in out


def test_equal_commands_write_equal_files_and_prompts_may_be_numbers(here, capsys):
    rows = [{**row, "prompt": int(row["prompt"].split()[1][:-1])} for row in scores_rows()]
    file = write(here / "scores.jsonl", rows)
    written = []
    for out in ("a", "b"):
        result(capsys, file, "--cost", "harm", "--threshold", "0.3", "--out", out, folder=out)
        written.append([(here / out / name).read_bytes() for name in ("dual.json", "dual.png")])
    assert written[0] == written[1]


def test_pairs_are_the_best_and_the_worst_at_lambda_with_drawn_labels(here, capsys):
    rows = scores_rows(P=8)
    for row in rows:  # one prompt without a preference: all its responses are alike
        if row["prompt"] == "Question 3?":
            row.update(response="same", reward=1.0, harm=7.0)
    argv = [
        write(here / "scores.jsonl", rows),
        "--cost",
        "harm",
        "--threshold",
        "0.1",
        "--export-pairs",
        "pairs.jsonl",
    ]
    found, out = result(capsys, *argv)
    pairs = [json.loads(line) for line in (here / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 7 and "7 pairs, 1 prompt(s) left out" in out
    lam = found["constraints"][0]["lam"]
    score = {
        row["response"]: row["reward"] / found["reward_unit"]
        - lam * row["harm"] / found["constraints"][0]["unit"]
        for row in rows
    }
    for pair in pairs:
        assert list(pair) == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
        own = [row["response"] for row in rows if row["prompt"] == pair["prompt"]]
        assert {pair["chosen"], pair["rejected"]} == {max(own, key=score.get), min(own, key=score.get)}
        assert pair["score_chosen"] == pytest.approx(score[pair["chosen"]])
        assert pair["score_rejected"] == pytest.approx(score[pair["rejected"]])
    # TRL's explicit-prompt preference format: exactly these three columns of text (or of messages), each with
    # something in it, and the answers without the prompt. Further columns are not read.
    import datasets

    table = datasets.Dataset.from_json("pairs.jsonl", cache_dir=str(here / "cache"))
    assert table.column_names[:3] == ["prompt", "chosen", "rejected"]
    assert {table.features[name].dtype for name in table.column_names[:3]} == {"string"}
    assert all(row[name].strip() for row in table for name in table.column_names[:3])
    assert not any(row[name].startswith(row["prompt"]) for row in table for name in ("chosen", "rejected"))
    first = (here / "pairs.jsonl").read_bytes()
    result(capsys, *argv)
    assert (here / "pairs.jsonl").read_bytes() == first


def test_labels_of_pairs_are_bradley_terry():
    P = 4000
    table = Table(
        prompts=[str(p) for p in range(P)],
        responses=[["a", "b"]] * P,
        reward_PG=torch.zeros(P, 2),
        utility_PGJ=torch.zeros(P, 2, 1),
        names=["u"],
    )
    for rise in (0.5, 2.0):
        rows, _ = preference_pairs(table, torch.tensor([[0.0, rise]]).double().expand(P, 2), seed=1)
        share = np.mean([row["chosen"] == "b" for row in rows])
        assert share == pytest.approx(1 / (1 + np.exp(-rise)), abs=0.03)
    other, _ = preference_pairs(table, torch.tensor([[0.0, 2.0]]).double().expand(P, 2), seed=2)
    assert [row["chosen"] for row in rows] != [row["chosen"] for row in other]


def test_two_columns_that_ask_for_the_same_are_not_identified(here, capsys):
    rows = [row | {"twin": 2 * row["harm"]} for row in scores_rows()]
    argv = ["--cost", "harm", "twin", "--threshold", "0.3", "0.3"]
    found, out = result(capsys, write(here / "scores.jsonl", rows), *argv)
    assert [(c["lam_se"], c["lam_interval"]) for c in found["constraints"]] == [(None, [0.0, None])] * 2
    assert out.count("not identified") == 2


def test_what_cannot_be_written_is_refused_before_the_work(here, capsys, monkeypatch):
    file = write(here / "scores.jsonl", scores_rows())
    (here / "d.jsonl").mkdir()
    (here / "out" / "dual.json").mkdir(parents=True)
    (here / "file").write_text("")
    own = '{"prompt": "mine", "chosen": "a", "rejected": "b"}\n'
    (here / "own.jsonl").write_text(own)
    monkeypatch.setattr("engine.dual.answer.analyse", lambda *a: pytest.fail("the work was begun"))
    for flags, message in (
        (["--export-pairs", "d.jsonl"], "--export-pairs d.jsonl: that is a folder"),
        (
            ["--export-pairs", "own.jsonl"],
            "--export-pairs own.jsonl: that file holds no pairs of this command",
        ),
        (["--out", "out"], "out/dual.json is a folder"),
        (["--out", "file/below"], "no folder can be made in"),
        (["--seed", "9" * 20], "--seed 99999999999999999999: must lie in [0,"),
        (["--seed", "-1"], "--seed -1: must lie in [0,"),
    ):
        assert main([file, "--cost", "harm", "--threshold", "0.3", *flags]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert (here / "own.jsonl").read_text() == own


def test_ctrl_c_is_one_line_and_130(here, capsys, monkeypatch):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.dual.answer.analyse", press)
    assert main([write(here / "scores.jsonl", scores_rows()), "--cost", "harm", "--threshold", "0.3"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("interrupted") and err.count("\n") == 1


def test_few_effective_responses_are_warned_of_and_their_interval_claims_less(here, capsys):
    file = write(here / "scores.jsonl", scores_rows(G=8))
    found, out = result(capsys, file, "--cost", "harm", "--threshold", "0.3", "--beta", "0.05")
    assert found["ess"] < 2 and found["warnings"]
    assert re.search(r"warning: The tilted weights rest on 1\.\d of 8 .* so lambda is over-estimated", out)
    assert not found["intervals_of_true_lambda"] and "true lambda" not in out
    calm, out = result(capsys, file, "--cost", "harm", "--threshold", "0.1", "--beta", "2")
    assert calm["warnings"] == [] and "warning" not in out


def test_enough_responses_have_their_bias_taken_out(here, capsys):
    rows = scores_rows(G=8)
    found, out = result(
        capsys, write(here / "scores.jsonl", rows), "--cost", "harm", "--threshold", "0.3", "--beta", "2"
    )
    reward, harm = arrays(rows, "reward", "harm")
    reward, utility = reward / found["reward_unit"], -harm[..., None] / found["constraints"][0]["unit"]
    solution = dual.solve(reward, utility, [0.3], 2.0)
    interval, only = dual.lam_interval(reward, utility, [0.3], 2.0, solution), found["constraints"][0]
    assert interval.of_truth and found["intervals_of_true_lambda"]
    assert 0 < only["lam_corrected"] < only["lam"]
    expected = [interval.lam.item(), interval.low.item(), interval.high.item()]
    assert [only["lam_corrected"], *only["lam_interval"]] == pytest.approx(expected, rel=1e-6)
    true, low, high = expected
    said = f"lambda {only['lam']:.3f}, true lambda {true:.3f} [{low:.3f}, {high:.3f}]"
    assert f"{said} (95 %, the bias of 8 responses taken out)" in " ".join(out.split())


def test_unsupported_thresholds_exit_2_with_the_largest(here, capsys):
    file = write(here / "scores.jsonl", scores_rows())
    first, _ = result(capsys, file, "--cost", "harm", "--threshold", "0.3")
    assert main([file, "--cost", "harm", "--threshold", "9", "--out", "none"]) == 2
    out, err = capsys.readouterr()
    largest = first["constraints"][0]["largest_improvement"]
    assert out == "" and err.count("\n") == 1 and f"largest supported b = [{largest:.4g}] alone" in err
    assert not (here / "none").exists()


def spoiled(change) -> list[dict]:
    rows = scores_rows()
    change(rows)
    return rows


def set_to(line: int, column: str, value):
    return lambda rows: rows[line - 1].__setitem__(column, value)


def all_to(column: str, value):
    return lambda rows: [row.__setitem__(column, value) for row in rows]


FILES = {
    "missing column": (
        lambda rows: rows[4].pop("harm"),
        r"scores\.jsonl:5: no column 'harm'; columns found: prompt, response, reward",
    ),
    "no reward": (lambda rows: [row.pop("reward") for row in rows], r"scores\.jsonl:1: no column 'reward'"),
    "no prompt": (lambda rows: rows[2].pop("prompt"), r"scores\.jsonl:3: no column 'prompt'"),
    "nan": (set_to(7, "reward", float("nan")), r"scores\.jsonl:7: column 'reward' is nan; it must be finite"),
    "inf": (set_to(9, "harm", float("-inf")), r"scores\.jsonl:9: column 'harm' is -inf; it must be finite"),
    "huge": (set_to(9, "harm", 10**400), r"scores\.jsonl:9: column 'harm' is inf; it must be finite"),
    "text": (set_to(2, "harm", "high"), r"scores\.jsonl:2: column 'harm' holds 'high'; give a number"),
    "null": (set_to(2, "harm", None), r"scores\.jsonl:2: column 'harm' holds 'None'; give a number"),
    "true": (set_to(5, "harm", True), r"scores\.jsonl:5: column 'harm' holds 'True'; give a number"),
    "false reward": (
        set_to(5, "reward", False),
        r"scores\.jsonl:5: column 'reward' holds 'False'; give a number",
    ),
    "prompt true": (
        set_to(5, "prompt", True),
        r"scores\.jsonl:5: column 'prompt' holds a bool; give text or a whole number",
    ),
    "prompt kind": (
        set_to(2, "prompt", [1]),
        r"scores\.jsonl:2: column 'prompt' holds a list; give text or a whole number",
    ),
    "ragged": (
        lambda rows: rows.pop(),
        r"scores\.jsonl:30: prompt 'Question 29\?' has 5 response\(s\), but 29 prompt\(s\) have 6",
    ),
    "single": (lambda rows: rows.__delitem__(slice(30, None)), r"scores\.jsonl: one response per prompt"),
    "one prompt": (
        lambda rows: rows.__setitem__(slice(None), [r for r in rows if r["prompt"] == "Question 3?"]),
        "one prompt;",
    ),
    "no rows": (lambda rows: rows.clear(), r"scores\.jsonl: no rows in it"),
    "constant reward": (
        all_to("reward", 1.5),
        r"scores\.jsonl: column 'reward' gives all responses of a prompt one score",
    ),
    "constant cost": (
        all_to("harm", 0),
        r"scores\.jsonl: column 'harm' gives all responses of a prompt one score",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_take_one_line_that_names_the_place(here, capsys, case):
    change, message = FILES[case]
    write(here / "scores.jsonl", spoiled(change))
    assert main(["scores.jsonl", "--cost", "harm", "--threshold", "0.3"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match("error: " + (message if "scores" in message else r"scores\.jsonl: " + message), err), err
    assert [path.name for path in here.iterdir()] == ["scores.jsonl"]


LINES = {
    "": r"the scores file is missing",
    "--threshold 0.3": r"the scores file is missing",
    "scores.jsonl": r"--threshold is missing",
    "absent.jsonl --threshold 0.3": r"absent\.jsonl: no such file",
    "scores.csv --threshold 0.3": r"scores\.csv: not one of \.jsonl, \.parquet, also with \.gz or \.xz "
    "behind; convert it",
    "scores.jsonl --cost harm --threshold 0.3 0.2": r"--threshold 0\.3 0\.2: 2 value\(s\) "
    r"for 1 constraint\(s\) \(harm\)",
    "scores.jsonl --threshold 0.3": r"--threshold 0\.3: 1 value\(s\) for 2 constraint\(s\) \(harm, wit\)",
    "scores.jsonl --cost harm --threshold nan": r"--threshold nan: must be finite",
    "scores.jsonl --cost harm --threshold x": r"--threshold x: must be a number",
    "scores.jsonl --cost harm --threshold 0.3 --beta 0": r"--beta 0\.0: must lie in \[1e-08, 1e\+08\]",
    "scores.jsonl --cost harm --threshold 0.3 --beta inf": r"--beta inf: must be finite",
    "scores.jsonl --cost harm harm --threshold 0.3 0.2": r"--utility and --cost: two "
    r"constraints are named harm",
    "scores.jsonl --cost harm "
    "--utility harm --threshold 0.3 0.2": r"--utility and --cost: two constraints are named harm",
    "scores.jsonl --cost harm --cost wit --threshold 0.3": r"--cost is given twice",
    "scores.jsonl --cost reward --threshold 0.3": r"--utility or --cost reward: "
    r"that column has its own meaning",
    "scores.jsonl --cost nothing --threshold 0.3": r"scores\.jsonl:1: no column 'nothing'; "
    r"columns found: prompt, response, reward, harm",
    "scores.jsonl --treshold 0.3": r"unknown flag --treshold\. Did you mean --threshold\?",
    "scores.jsonl other.jsonl --threshold 0.3": r"unexpected word 'other\.jsonl'; "
    r"the scores file comes first",
    "scores.jsonl --cost harm --threshold "
    "0.3 --export-pairs pairs.csv": r"--export-pairs pairs\.csv: must end in \.jsonl",
    "scores.jsonl --cost harm --threshold "
    "0.3 --export-pairs ./scores.jsonl": r"--export-pairs scores\.jsonl: that is the scores file",
    "scores.jsonl --cost harm --threshold "
    "0.3 --export-pairs no/pairs.jsonl": r"--export-pairs no/pairs\.jsonl: the folder no does not",
    "scores.jsonl --cost harm --threshold "
    "0.3 --export-pairs pipe.jsonl": r"--export-pairs pipe\.jsonl: that is no file but a pipe",
    "scores.jsonl --cost harm --threshold "
    "0.3 --export-pairs circle.jsonl": r"--export-pairs circle\.jsonl: that is no file but",
    "scores.jsonl --cost harm --threshold 0.3 --out scores.jsonl": r"--out scores\.jsonl: that is a file",
}


@pytest.mark.parametrize("line", LINES)
def test_bad_command_lines_take_one_line(here, capsys, line):
    write(here / "scores.jsonl", scores_rows())
    (here / "scores.csv").write_text("prompt,reward,harm\n")
    os.mkfifo(here / "pipe.jsonl")
    (here / "circle.jsonl").symlink_to("circle.jsonl")
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match("error: " + LINES[line], err), err
    assert (here / "scores.jsonl").read_text().count("\n") == 180


@pytest.mark.parametrize("value", [None, True, "high"])
def test_a_column_whose_first_cell_is_no_number_is_not_left_out(here, capsys, value):
    file = write(here / "scores.jsonl", spoiled(set_to(1, "wit", value)))
    assert main([file, "--threshold", "0.3"]) == 2
    assert f"scores.jsonl:1: column 'wit' holds {str(value)!r}; give a number" in capsys.readouterr().err
    # A column of flags is no score, and is read by its name alone.
    flagged = write(here / "flagged.jsonl", [row | {"done": True} for row in scores_rows()])
    assert main([flagged, "--threshold", "0.3", "0.3"]) == 2
    assert "name the columns to read with --utility and --cost" in capsys.readouterr().err


def test_a_column_that_may_be_a_cost_must_be_named(here, capsys):
    rows = [{"prompt": row["prompt"], "reward": row["reward"], "cost": row["harm"]} for row in scores_rows()]
    file = write(here / "scores.jsonl", rows)
    assert main([file, "--threshold", "0.3"]) == 2
    assert "column 'cost' may be a cost; write --cost cost, or --utility cost" in capsys.readouterr().err
    assert main([file, "--threshold", "0.3", "--cost", "cost"]) == 0


def test_pairs_need_texts(here, capsys):
    argv = ["scores.jsonl", "--cost", "harm", "--threshold", "0.3", "--export-pairs", "pairs.jsonl"]
    write(here / "scores.jsonl", spoiled(lambda rows: [row.pop("response") for row in rows]))
    assert main(argv) == 2
    assert "scores.jsonl:1: no column 'response'" in capsys.readouterr().err
    write(here / "scores.jsonl", spoiled(set_to(1, "prompt", 7)))
    assert main(argv) == 2
    assert "scores.jsonl:1: column 'prompt' holds a int; give text." in capsys.readouterr().err
    write(here / "scores.jsonl", spoiled(set_to(4, "response", None)))
    assert main(argv) == 2
    assert "scores.jsonl:4: column 'response' holds a NoneType; give text." in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_module_is_the_command(here, capsys, monkeypatch):
    file = write(here / "scores.jsonl", scores_rows())

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["engine.dual", *argv])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("engine.dual", run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    code, out, _ = run(file, "--cost", "harm", "--threshold", "0.3")
    assert code == 0 and "lambda" in out and (here / "scores-dual" / "dual.png").exists()
    code, out, err = run(file, "--cost", "harm", "--threshold", "9")
    assert code == 2 and "largest supported b" in err and err.count("\n") == 1
    code, out, _ = run("--help")
    assert code == 0 and "--export-pairs" in out and "usage: python -m engine.dual SCORES" in out
