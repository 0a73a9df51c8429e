"""`python -m bench.run` lists the cases; `python -m bench.run CASE` checks, then measures, prints a table and adds a line to results.jsonl,
from which bench/RESULTS.md is written."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench import loss_head
from bench.measure import interleaved, origin, peak_bytes
from engine.memory import keep_freed_memory

HERE = Path(__file__).parent


@dataclass(frozen=True)
class LossHead:
    """Preference loss, forward and backward, against the bare matrix products and its rivals."""

    shape: str = "smollm2-135m"
    """Head: smollm2-135m, qwen2.5-0.5b, llama-3.2-1b, llama-3.1-8b or qwen3-8b."""
    rows: int = 1024
    """Completion tokens in the batch, a multiple of 128."""
    frozen: bool = False
    """No gradient in the head."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    device: str = "cpu"
    """cpu or cuda."""
    keep_pages: bool = False
    """Freed memory stays with the process, for all candidates, as engine.train arranges it on a CPU; else as the allocator comes."""
    repeats: int = 15
    """Rounds; every candidate runs once in each."""
    save: bool = True
    """Add the figures to bench/results.jsonl and write bench/RESULTS.md anew."""


def run_loss_head(config: LossHead) -> dict:
    """Measure one shape; returns the line of results.jsonl."""
    device = torch.device(config.device)
    if config.keep_pages:
        keep_freed_memory()
    x = loss_head.make(config.shape, config.rows, config.frozen, getattr(torch, config.dtype), device)
    returned = sum(leaf.nbytes for leaf in x.leaves)
    eager_extra = peak_bytes(loss_head.eager(x), device) - returned
    steps = loss_head.candidates(x, eager_extra // 6)
    errors = {name: loss_head.check(name, step, x) for name, step in steps.items()}
    products = loss_head.floor(x)
    bare = {f"{product} / {layout}": step for product, layouts in products.items() for layout, step in layouts.items()}
    times = interleaved(steps | bare, config.repeats, device)
    fastest = {p: min(layouts, key=lambda name, p=p: times[f"{p} / {name}"]["median"]) for p, layouts in products.items()}
    floor_s = sum(times[f"{p} / {name}"]["median"] for p, name in fastest.items())
    width, vocabulary = loss_head.SHAPES[config.shape]
    rows = [
        {
            "name": name,
            **{f"{k}_s": v for k, v in times[name].items()},
            "floor_share": floor_s / times[name]["median"],
            "extra_bytes": peak_bytes(step, device) - returned,
            "errors": errors[name],
        }
        for name, step in steps.items()
    ]
    return {
        "case": "loss_head", "shape": config.shape, "rows": config.rows, "width": width, "vocabulary": vocabulary, "dtype": config.dtype,
        "frozen": config.frozen, "keep_pages": config.keep_pages, "repeats": config.repeats, "floor_s": floor_s, "floor_layouts": fastest,
        "flops": len(products) * 2 * config.rows * width * vocabulary, "candidates": rows, **origin(device),
    }  # fmt: skip


def table_of(line: dict) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, rows) of one line of results."""
    head = ("frozen head" if line["frozen"] else "full fine-tuning") + (", freed memory kept" if line["keep_pages"] else "")
    products = len(line["floor_layouts"])
    title = (
        f"{line['case']}: {line['shape']}, {line['rows']} rows x {line['width']} x {line['vocabulary']}, {line['dtype']}, {head}; floor "
        f"({products} bare products) {1000 * line['floor_s']:.1f} ms, {line['flops'] / line['floor_s'] / 1e9:.0f} Gflop/s"
    )
    rows = []
    ours = next(c["median_s"] for c in line["candidates"] if c["name"] == "dualign")
    for c in line["candidates"]:
        spread = f"{1000 * c['p20_s']:.1f} to {1000 * c['p80_s']:.1f}"
        error = f"{max(c['errors'].values()):.0e}"
        share, ratio, memory = f"{100 * c['floor_share']:.1f} %", f"{c['median_s'] / ours:.2f}", f"{c['extra_bytes'] / 1e6:.0f}"
        rows.append([c["name"], f"{1000 * c['median_s']:.1f}", spread, share, ratio, memory, error])
    return title, ["", "ms, median", "p20 to p80", "of the floor", "time / ours", "extra memory, MB", "largest relative error"], rows


def write_results(lines: list[dict]) -> None:
    """bench/RESULTS.md from all lines, the latest of each case and shape."""
    latest = {tuple(x[k] for k in ("case", "shape", "rows", "dtype", "frozen", "keep_pages", "device")): x for x in lines}
    text = ["# Results", "", "Written by `python -m bench.run`; do not edit. Only figures of one table are comparable.", ""]
    for line in latest.values():
        title, header, rows = table_of(line)
        text += [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        text += ["| " + " | ".join(row) + " |" for row in rows]
        versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items())
        driver = f", driver {line['driver']}" if line["driver"] else ""
        text += ["", f"{line['device']}, {line['threads']} threads{driver}, {versions}, commit {line['commit']}, {line['date']}.", ""]
    (HERE / "RESULTS.md").write_text("\n".join(text), encoding="utf-8")


CASES = {"loss_head": (LossHead, run_loss_head)}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if not arguments or arguments[0] not in CASES:
        print("python -m bench.run CASE [--help]; cases:")
        for name, (config, _) in CASES.items():
            print(f"  {name:12} {config.__doc__}")
        return 2 if arguments and arguments[0] not in ("-h", "--help") else 0
    config_class, function = CASES[arguments[0]]
    config = tyro.cli(config_class, args=arguments[1:], prog=f"python -m bench.run {arguments[0]}")
    line = function(config)
    title, header, rows = table_of(line)
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if config.save:
        path = HERE / "results.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
        write_results([json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
