"""How the time of sampling and of a training step grows with rows, tokens and layers:
one of them at a time, from a common size."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from matplotlib.figure import Figure

from bench.run import rollout, train_step
from bench.run.candidates import in_seconds
from bench.run.measure import interleaved
from bench.run.options import Device, Dtype, Model
from bench.run.origin import origin
from bench.run.tables import Table, pages
from bench.run.work import random_work
from engine.model.decoder import Decoder
from engine.model.folder import load
from engine.run.machine import keep_freed_memory
from engine.stages.inputs import model_folder

GROUP, PROMPT = 8, 64
# Axis -> (its common size, the sizes tried in place of it); layers are in thirtieths of the model's.
SAMPLING = {
    "rows": (32, (8, 16, 32, 64, 128)),
    "new tokens": (32, (16, 32, 64, 128, 256)),
    "layers": (30, (6, 12, 18, 24, 30)),
}
TRAINING = {
    "pairs": (8, (2, 4, 8, 16)),
    "tokens of a response": (64, (16, 32, 64, 128, 256)),
    "layers": (30, (6, 12, 18, 24, 30)),
}


@dataclass(frozen=True)
class Growth:
    """How the time of sampling and of a training step grows with rows,
    tokens and layers; draws bench/growth.png."""

    model: Model = ""
    dtype: Dtype = "float32"
    device: Device = "cpu"
    repeats: int = 3
    """Rounds; every size runs once in each."""
    save: bool = True
    """Add the figures to bench/results.jsonl, and write bench/RESULTS.md and the picture anew."""


def run(config: Growth) -> dict:
    """Measures; returns the line of results.jsonl."""
    device = torch.device(config.device)
    keep_freed_memory()
    folder = model_folder(config.model)
    by_size = steps(load(folder, dtype=getattr(torch, config.dtype), device=device))
    times = interleaved({size.name: step for size, step in by_size.items()}, config.repeats, device)
    return {
        "case": "growth",
        "shape": folder.name,
        "dtype": config.dtype,
        "keep_pages": True,
        "repeats": config.repeats,
        "points": [asdict(size) | in_seconds(times[size.name]) for size in by_size],
        **origin(device),
    }


def table(line: dict) -> Table:
    """Returns the table of a line."""
    rows = []
    for (what, axis), curve in curves(line["points"]).items():
        sizes = ", ".join(f"{x}" for x, _ in curve)
        times = ", ".join(f"{1000 * s:.0f}" for _, s in curve)
        rows.append([what, axis, sizes, times, f"{slope(curve):.2f}"])
    title = f"growth: {line['shape']}, prompts of {PROMPT}, {line['dtype']}{pages(line)}; one size at a time"
    return Table(
        title, ["", "size", "tried", "ms, medians", "power of the size at the end (1: linear)"], rows
    )


@dataclass(frozen=True)
class Size:
    """One point of a curve."""

    what: str  # "sampling" or "training step"
    axis: str
    x: int

    @property
    def name(self) -> str:
        """Names the point's times."""
        return f"{self.what}, {self.axis} {self.x}"


def shallow(model: Decoder, layers: int) -> Decoder:
    """Returns the first `layers` of a model under its head; the weights are shared."""
    cut = copy.copy(model)
    cut._modules = {**model._modules, "layers": model.layers[:layers]}
    cut.config = replace(model.config, num_layers=layers)
    return cut


def steps(model: Decoder) -> dict[Size, Callable[[], object]]:
    """Returns the step that is timed at every size."""
    whole, by_size = model.config.num_layers, {}
    for what, grid in (("sampling", SAMPLING), ("training step", TRAINING)):
        for axis, (_, tried) in grid.items():
            for x in tried:
                size = {name: base for name, (base, _) in grid.items()} | {axis: x}
                layers = max(1, round(size["layers"] * whole / 30))
                point = Size(what, axis, layers if axis == "layers" else x)
                by_size[point] = _step(what, shallow(model, layers), size)
    return by_size


def _step(what: str, model: Decoder, size: dict[str, int]) -> Callable[[], object]:
    vocabulary = model.config.vocab_size
    if what == "sampling":
        return rollout.ours(model, random_work(vocabulary, size["rows"], GROUP, PROMPT, size["new tokens"]))
    groups = train_step.batch(vocabulary, size["pairs"], PROMPT, size["tokens of a response"])
    return train_step.ours(model, groups, train_step.reference_logprob(model, groups))


Curve = list[tuple[int, float]]  # (size, median seconds), in order


def curves(points: list[dict]) -> dict[tuple[str, str], Curve]:
    """Returns (what, axis) -> curve, from the points of a line of results."""
    by_axis: dict[tuple[str, str], Curve] = {}
    for p in points:
        by_axis.setdefault((p["what"], p["axis"]), []).append((p["x"], p["median_s"]))
    return by_axis


def slope(curve: Curve) -> float:
    """Returns the power of the size with which the time grows between the last two sizes: 1 is linear."""
    (x, s), (next_x, next_s) = curve[-2:]
    return math.log(next_s / s) / math.log(next_x / x)


def draw(points: list[dict]) -> Figure:
    """Draws time against size, both as multiples of the smallest, for sampling and for training."""
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    panels = dict(zip(("sampling", "training step"), figure.subplots(1, 2), strict=True))
    for (what, axis), curve in curves(points).items():
        x, s = ([value / column[0] for value in column] for column in zip(*curve, strict=True))
        panels[what].plot(x, s, "o-", markersize=4, label=f"{axis}, {curve[0][0]} to {curve[-1][0]}")
    for what, panel in panels.items():
        panel.plot([1, 16], [1, 16], color="#222222", linewidth=1, linestyle=":", label="linear")
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="size, multiple of the smallest",
            ylabel="time, multiple of the smallest size's",
        )
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xticks([1, 2, 4, 8, 16], minor=False)
        panel.minorticks_off()
        panel.set_title(what.capitalize(), loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    return figure
