"""Make the three shipped score heads and check them: `python -m bench.heads --data FOLDER --out FOLDER`.

FOLDER of the data holds gptfuzz/responses_labeled_{train,evaluate}.csv and xstest/xstest_v2_completions_{mistralguard,mistralinstruct}_
gpteval.csv, which are not part of this project; bench/heads/*.jsonl is. Prints a table of gates and exits 1 when one fails.
Minutes on two CPU cores.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import data, head, quickstart
from engine.model import load
from engine.packing import groups
from engine.rollout import generate
from engine.score import Head, frozen_forward

OWN = Path(__file__).parent / "heads"
SYSTEM = "Answer in one sentence of at most 15 words."
LAYER = {"helpfulness": 15, "harm": 13, "harm-audit": 10}
L2 = {"helpfulness": 0.03, "harm": 0.03, "harm-audit": 0.03}
CARELESS_WEIGHT = 0.5
LICENCES = {
    "gptfuzz": "GPTFuzz labelled responses, training file, seeded half (MIT).",
    "xstest": "XSTest v2 completions of Mistral with a guard prompt, half of the prompts (CC BY 4.0; completions under the model's terms).",
    "own": "The project's own answers to its training prompts, bench/heads/*.jsonl (licence of this project).",
}


@dataclass(frozen=True)
class Gate:
    """One required figure."""

    name: str
    value: float
    bound: float
    above: bool = True

    @property
    def passed(self) -> bool:
        """Whether the figure is on the right side of the bound."""
        return self.value >= self.bound if self.above else self.value <= self.bound


def main() -> int:
    """Train, check and write the three heads; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gptfuzz/ and xstest/")
    parser.add_argument("--out", type=Path, required=True, help="folder for helpfulness/, harm/ and harm-audit/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        heads = {name: train(name, args.data, args.out / name, Path(scratch) / name) for name in LAYER}
    gates = check(heads, args.data, args.out)
    return 0 if all(gate.passed for gate in gates) else 1


def train(name: str, folder: Path, out: Path, scratch: Path) -> Head:
    """Train one head from jsonl files that are written to `scratch`."""
    scratch.mkdir()
    rows = helpfulness_rows() if name == "helpfulness" else harm_rows(folder, audit=name == "harm-audit")
    for part, chosen in zip(("train", "test"), rows, strict=True):
        (scratch / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    reward = name == "helpfulness"
    config = head.HeadConfig(
        data=(str(scratch / "train.jsonl"),),
        test=(str(scratch / "test.jsonl"),),
        out=str(out),
        name=name,
        layer=LAYER[name],
        l2=L2[name],
        system=SYSTEM,
        about=ABOUT[name],
        licence=(LICENCES["own"],) if reward else tuple(LICENCES.values()),
        limits=LIMITS["reward" if reward else "cost"],
    )
    return head.train(config, command="python -m bench.heads --data FOLDER --out FOLDER")
