"""How the time of sampling and of a training step grows with rows, tokens and layers: one of them at a time, from a common size."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from bench.run import rollout, train_step
from engine.model import Decoder

GROUP, PROMPT = 8, 64
# The common size, and what is tried in place of each; layers in thirtieths of the model's.
SAMPLING = {"rows": (32, (8, 16, 32, 64, 128)), "new tokens": (32, (16, 32, 64, 128, 256)), "layers": (30, (6, 12, 18, 24, 30))}
TRAINING = {"pairs": (8, (2, 4, 8, 16)), "tokens of a response": (64, (16, 32, 64, 128, 256)), "layers": (30, (6, 12, 18, 24, 30))}


@dataclass(frozen=True)
class Size:
    """One point of a curve."""

    what: str  # "sampling" or "training step"
    axis: str
    x: int

    @property
    def name(self) -> str:
        """Of its times."""
        return f"{self.what}, {self.axis} {self.x}"


def shallow(model: Decoder, layers: int) -> Decoder:
    """The first `layers` of a model under its head; the weights are shared."""
    cut = copy.copy(model)
    cut._modules = {**model._modules, "layers": model.layers[:layers]}
    cut.config = replace(model.config, num_layers=layers)
    return cut


def steps(model: Decoder) -> dict[Size, Callable[[], object]]:
    """What is timed at every size."""
    whole, made = model.config.num_layers, {}
    for what, grid in (("sampling", SAMPLING), ("training step", TRAINING)):
        for axis, (_, tried) in grid.items():
            for x in tried:
                size = {name: base for name, (base, _) in grid.items()} | {axis: x}
                layers = max(1, round(size["layers"] * whole / 30))
                made[Size(what, axis, layers if axis == "layers" else x)] = _step(what, shallow(model, layers), size)
    return made


def _step(what: str, model: Decoder, size: dict[str, int]) -> Callable[[], object]:
    vocabulary = model.config.vocab_size
    if what == "sampling":
        return rollout.ours(model, rollout.random_work(vocabulary, size["rows"], GROUP, PROMPT, size["new tokens"]))
    groups = train_step.batch(vocabulary, size["pairs"], PROMPT, size["tokens of a response"])
    return train_step.ours(model, groups, train_step.reference_logprob(model, groups))


def curves(points: list[dict]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(what, axis) -> (size, median seconds), in order; from the rows of a line of results."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for p in points:
        found.setdefault((p["what"], p["axis"]), []).append((p["x"], p["median_s"]))
    return found


def slope(curve: list[tuple[int, float]]) -> float:
    """Power of the size with which the time grows between the last two sizes: 1 is linear."""
    (x, s), (next_x, next_s) = curve[-2:]
    return math.log(next_s / s) / math.log(next_x / x)


def draw(points: list[dict]) -> Figure:
    """Time against size, both as multiples of the smallest, for sampling and for training."""
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    panels = dict(zip(("sampling", "training step"), figure.subplots(1, 2), strict=True))
    for (what, axis), curve in curves(points).items():
        x, s = ([value / curve[0][i] for value in column] for i, column in enumerate(zip(*curve, strict=True)))
        panels[what].plot(x, s, "o-", markersize=4, label=f"{axis}, {curve[0][0]} to {curve[-1][0]}")
    for what, panel in panels.items():
        panel.plot([1, 16], [1, 16], color="#222222", linewidth=1, linestyle=":", label="linear")
        panel.set(xscale="log", yscale="log", xlabel="size, multiple of the smallest", ylabel="time, multiple of the smallest size's")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xticks([1, 2, 4, 8, 16], minor=False)
        panel.minorticks_off()
        panel.set_title(what.capitalize(), loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    return figure
