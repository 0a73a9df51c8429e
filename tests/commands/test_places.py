"""Places that commands are given and that cannot be: one line with the name, exit code 2, before any compute,
and nothing is left behind."""

import json
import os
from pathlib import Path

import pytest

from engine import evaluate, export, train
from engine.dual.__main__ import main as dual
from engine.sweep.__main__ import main as sweep

LONG = "x" * 256
DEEP = "/".join(["d" * 200] * 30)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Moves to a folder that holds one of every place that is no use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("loop", "loop.jsonl"):
        Path(name).symlink_to(name)
    for name in ("folder", "folder.jsonl", "folder/dual.json", "folder/metrics.json"):
        Path(name).mkdir()
    Path("file").write_text("x")
    Path("bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    scores = [
        {"prompt": p, "reward": (p * 7 + g * 3) % 5, "harm": (p + g * g) % 7}
        for p in range(4)
        for g in range(3)
    ]
    Path("scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    pairs = [{"prompt": f"q {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return tmp_path


SMOKE = ["mocan", "--preset", "smoke", "--threads", "1"]
DUAL = ["--cost", "harm", "--threshold", "0.1"]
HEAD = ["head", "--layer", "1", "--model", "nowhere"]
INPUTS = (LONG + ".jsonl", DEEP, "loop.jsonl", "file/x.jsonl", "loop/x.jsonl", "folder.jsonl", "bytes.jsonl")
FOLDERS = (LONG, DEEP, "loop", "file", "file/x", "loop/x")
# The place stands where the word PLACE does; the names that are tried there.
COMMANDS = {
    "prompts": (train.main, [*SMOKE, "--out", "o", "--prompts", "PLACE"], INPUTS),
    "out of a run": (train.main, [*SMOKE, "--out", "PLACE"], (LONG, DEEP, "folder", "file")),
    "model": (train.main, [*SMOKE, "--out", "o", "--model", "PLACE"], (*FOLDERS, "folder")),
    "resume": (train.main, ["--resume", "PLACE"], (*FOLDERS, "folder")),
    "run to judge": (evaluate.main, ["PLACE"], (*FOLDERS, "folder")),
    "out of a judgement": (evaluate.main, ["folder", "--out", "PLACE"], ("folder", "file", "loop")),
    "run to export": (export.main, ["PLACE", "o"], (*FOLDERS, "folder")),
    "scores": (dual, ["PLACE", *DUAL], INPUTS),
    "out of the dual": (dual, ["scores.jsonl", *DUAL, "--out", "PLACE"], (*FOLDERS, "folder")),
    "pairs of the dual": (
        dual,
        ["scores.jsonl", *DUAL, "--out", "o", "--export-pairs", "PLACE"],
        ("file/x.jsonl", "folder.jsonl", "missing/x.jsonl", "loop/x.jsonl"),
    ),
    "data of a head": (train.main, [*HEAD, "--out", "o", "--data", "PLACE"], (*INPUTS, "")),
    "test of a head": (train.main, [*HEAD, "--out", "o", "--data", "pairs.jsonl", "--test", "PLACE"], INPUTS),
    "out of a head": (train.main, [*HEAD, "--data", "pairs.jsonl", "--out", "PLACE"], (*FOLDERS, "folder")),
    "out of a sweep": (sweep, ["--preset", "smoke", "--out", "PLACE"], (*FOLDERS, "folder")),
    "sweep to resume": (sweep, ["--resume", "PLACE"], (*FOLDERS, "folder")),
}
CASES = [(command, place) for command, (_, _, places) in COMMANDS.items() for place in places]


@pytest.mark.parametrize(("command", "place"), CASES, ids=[f"{c}-{p[:12]}-{len(p)}" for c, p in CASES])
def test_a_place_that_cannot_be_is_one_line(here, capsys, command, place):
    main, words, _ = COMMANDS[command]
    before = sorted(os.walk(here))
    assert main([place if word == "PLACE" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 900
    assert (place[:40] or "--data") in err
    assert sorted(os.walk(here)) == before
