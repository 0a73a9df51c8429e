"""Trains the three shipped score heads and checks them: `python -m bench.heads --data FOLDER --out FOLDER`.

FOLDER of the data holds gptfuzz/responses_labeled_{train,evaluate}.csv and
xstest/xstest_v2_completions_{mistralguard,mistralinstruct}_gpteval.csv, which are not part of this project;
bench/heads/*.jsonl is. Prints a table of gates and exits 1 when one fails. Takes minutes on two CPU cores.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench.heads.cards import ABOUT, LICENCES, LIMITS
from bench.heads.gates import check
from bench.heads.rows import harm_rows, helpfulness_rows
from engine.command import run_command
from engine.config import RunConfig
from engine.scorers import training as head
from engine.scorers.base import Head

LAYER = {"helpfulness": 15, "harm": 15, "harm-audit": 11}
L2 = {"helpfulness": 1.0, "harm": 0.3, "harm-audit": 0.5}


def main() -> int:
    """Trains, checks and writes the three heads; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.heads", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gptfuzz/ and xstest/")
    out = "folder for helpfulness/, harm/ and harm-audit/"
    parser.add_argument("--out", type=Path, required=True, help=out)
    options = parser.parse_args()
    return run_command(lambda _, standing: _heads(options), None)


def _heads(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        heads = {name: train(name, options.data, options.out / name, Path(scratch) / name) for name in LAYER}
    gates = check(heads, options.data, options.out)
    return 0 if all(gate.passed for gate in gates) else 1


def train(name: str, folder: Path, out: Path, scratch: Path) -> Head:
    """Trains one head from jsonl files that are written to `scratch`."""
    scratch.mkdir()
    reward = name == "helpfulness"
    rows = helpfulness_rows() if reward else harm_rows(folder, audit=name == "harm-audit")
    for part, chosen in zip(("train", "test"), rows, strict=True):
        (scratch / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    config = head.HeadConfig(
        data=(str(scratch / "train.jsonl"),),
        test=(str(scratch / "test.jsonl"),),
        out=str(out),
        name=name,
        layer=LAYER[name],
        l2=L2[name],
        system=RunConfig.system,
        about=ABOUT[name],
        licence=(LICENCES["own"],) if reward else tuple(LICENCES.values()),
        limits=LIMITS["reward" if reward else "cost"],
    )
    return head.train(config, command="python -m bench.heads --data FOLDER --out FOLDER")


if __name__ == "__main__":
    sys.exit(main())
