"""The program that disturbs every command: what it calls clean, refused, wrong, traceback and hang."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.faults.children import Ended
from bench.faults.edits import WAYS, damage
from bench.faults.outcome import LEFTOVER, compared, differing, ending, lost, tree

ROOT = Path(__file__).resolve().parents[2]
# Runs commands as the program does, without torch; prints the outcome of each.
PROGRAM = """
import sys
from pathlib import Path
from bench.faults.children import call
from bench.faults.operations import Counter, Disk, KillAt, watch
from bench.faults.outcome import compared, ending, tree

work = Path(sys.argv[1])
for words in sys.argv[2:]:
    how, _, act = words.partition("@")
    kind, _, n = act.partition("-")
    acts = {"kill": KillAt, "disk": Disk}
    before = (lambda: watch(work, acts[kind](int(n)))) if act else (lambda: None)
    (work / "out").mkdir(parents=True, exist_ok=True)
    ended = call(("tests.helpers.misbehaving", how), work, limit_s=2.0, before=before)
    outcome = ending(ended, ["--seed"]) or compared(tree(work / "out"), {"a.txt": b"result"})
    print(words, *outcome, sep="|")
"""


def outcomes(folder: Path, *words: str) -> dict[str, tuple[str, str]]:
    """Runs misbehaving commands; returns the outcome and its detail of each."""
    command = [sys.executable, "-c", PROGRAM, str(folder / "work"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {words: (kind, detail) for words, kind, detail in lines}


def test_every_kind_of_misbehaviour_is_told(tmp_path):
    found = outcomes(
        tmp_path, "writes", "writes-other", "refuses", "refuses-in-two-lines", "refuses-without-cure",
        "says-nothing", "raises", "dies", "hangs", "leaves",
    )  # fmt: skip
    assert {how: kind for how, (kind, _) in found.items()} == {
        "writes": "clean", "writes-other": "wrong", "refuses": "refused", "refuses-in-two-lines": "wrong",
        "refuses-without-cure": "wrong", "says-nothing": "traceback", "raises": "traceback",
        "dies": "traceback", "hangs": "hang", "leaves": "wrong",
    }  # fmt: skip
    assert found["writes-other"][1] == "exit 0, but a.txt differs"
    assert found["leaves"][1] == "exit 0, but a.txt.tmp is left over"
    assert "KeyError: 'lost'" in found["raises"][1] and "SIGSEGV" in found["dies"][1]


def test_kills_and_full_disks_come_at_the_chosen_operation(tmp_path):
    # The operations of `writes` are one open and one write of 6 bytes.
    found = outcomes(
        tmp_path, "writes@kill-1", "writes@kill-2", "writes@kill-3", "writes@disk-5", "writes@disk-6"
    )
    assert found["writes@kill-1"] == found["writes@kill-2"] == ("traceback", "died of SIGKILL")
    assert found["writes@kill-3"][0] == found["writes@disk-6"][0] == "clean"
    assert found["writes@disk-5"] == ("traceback", "OSError: [Errno 28] No space left on device")


def test_refusals_name_the_value_and_lose_nothing(tmp_path):
    refused = Ended(2, "", "error: a.txt is cut; fetch it again.\n", 0.1)
    assert ending(refused, ["a.txt"]).kind == "refused"
    assert ending(refused, ["b.txt"]).kind == "wrong"
    assert lost({"a": b"1", "b": b"2", "c.tmp": b"3"}, {"a": b"1"}) == ["b"]
    assert compared({"a": b"1"}, {"a": b"1", "b": b"2"}) == ("wrong", "exit 0, but b is missing")
    assert differing({"a": b"1"}, {"a": "folder"}) == ["a differs"]


@pytest.mark.parametrize("name", ["a.tmp", ".exported-4711", "run/.adapter-1.33.tmp/x", ".smoke-x7_ab"])
def test_leftovers_are_known(name):
    assert LEFTOVER.search(name)


@pytest.mark.parametrize("name", ["a.txt", "samples-seed3/config.json", ".lock", "evaluation-1"])
def test_results_are_no_leftovers(name):
    assert not LEFTOVER.search(name)


def test_seconds_are_no_result(tmp_path):
    for folder, seconds in (("one", "0.2"), ("two", "9")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "table.csv").write_text(f"kl,seconds,error\n0.5,{seconds},\n")
        (tmp_path / folder / "timing.jsonl").write_text(seconds)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") != {}
    (tmp_path / "two" / "table.csv").write_text("kl,seconds,error\n0.6,9,\n")
    assert tree(tmp_path / "one") != tree(tmp_path / "two")


@pytest.mark.parametrize("way", WAYS)
def test_damage_changes_a_file(tmp_path, way):
    path = tmp_path / "a.json"
    path.write_text('{"kl": 0.25}')
    assert damage(path, way, random.Random(0))
    assert not path.is_file() or path.read_text() != '{"kl": 0.25}'
    if way == "edited":
        assert re.fullmatch(r"\d\.\d+", str(json.loads(path.read_text())["kl"]))


CASES = (
    "kills/caid/operation-10", "kills/export/operation", "damage/export/run/report.png/deleted",
    "inputs/lines/unknown-flag", "inputs/prompts-jsonl/cut", "inputs/numbers/caid/beta/nan",
    "inputs/scorer-values/few", "disks/export/full", "ranks/caid-on-2/rank",
)  # fmt: skip


def test_a_few_cases_of_each_part(tmp_path):
    # Operations and sizes are the machine's, so these cases are named by what their names begin with.
    # Each worker makes the undisturbed runs for itself.
    options = ["--workers", "1", "--out", str(tmp_path), "--case", *CASES]
    command = [sys.executable, "-m", "bench.faults", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in (tmp_path / "case.jsonl").read_text().splitlines()]
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert len(lines) == len(CASES)
    assert {line["outcome"] for line in lines} == {"clean", "refused"}
