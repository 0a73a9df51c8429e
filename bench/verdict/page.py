"""Writes docs/verdict-simulation.md from the template page.md, its picture, and what each part has found."""

import json
import re
from pathlib import Path

import torch

from bench.grid import Grid
from bench.verdict.parts import Found
from bench.verdict.pictures import draw
from bench.verdict.sizes import Sizes
from engine.constraints import Improvement, judge
from engine.files import write_whole

TEMPLATE = Path(__file__).parent / "page.md"
NAME = "verdict-simulation"


def write(part: str, found: Found, sizes: Sizes, out: Path) -> None:
    """Writes the page, its picture and its parts to `out`; parts that it has already stay as they are."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{NAME}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tables = {name: grid._asdict() for name, grid in found.tables.items()}
    stored[part] = {
        "replications": sizes.replications,
        "seed": sizes.seed,
        "tables": tables,
        "drawn": found.drawn,
        "wrong": found.wrong,
    }
    write_whole(path, (json.dumps(stored, sort_keys=True, indent=0, ensure_ascii=False) + "\n").encode())
    draw({name: points for each in stored.values() for name, points in each["drawn"].items()}, out, NAME)
    write_whole(out / f"{NAME}.md", page(stored).encode())


def page(stored: dict[str, dict]) -> str:
    """Returns the page."""
    pieces = {
        name: Grid(**grid).markdown() for each in stored.values() for name, grid in each["tables"].items()
    }
    wrong = [statement for each in stored.values() for statement in each["wrong"]]
    pieces["wrong"] = "\n".join(f"- {statement}" for statement in wrong) or "Nothing."
    pieces["sentence"] = refusal(8)
    each_size = sorted({(each["replications"], each["seed"]) for each in stored.values()})
    pieces["sizes"] = "; ".join(f"{n:,} verdicts a cell, seed {seed}" for n, seed in each_size)

    def piece(place: re.Match) -> str:
        return pieces.get(place[1], "(This part has not been simulated.)")

    return re.sub(r"<!-- (.*?) -->", piece, TEMPLATE.read_text(encoding="utf-8"))


def refusal(prompts: int) -> str:
    """Returns what a verdict says instead of a word where so few prompts have scores without a range."""
    scores = torch.linspace(0, 1, prompts)[:, None]
    harm = Improvement(name="harm", value=0.0)
    (judged,) = judge([harm], [0.0], [scores], [torch.zeros_like(scores)], [1.0])
    return judged.silent_for
