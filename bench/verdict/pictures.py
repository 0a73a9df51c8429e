"""The picture of docs/verdict-simulation.md."""

from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.verdict.sizes import ALPHA

OURS, OTHER, GREY = "#1b6ca8", "#c8553d", "#999999"
SHADES = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")


def draw(drawn: dict[str, list], out: Path, name: str) -> None:
    """Draws what the parts have found so far."""
    # The user's matplotlibrc must not change the bytes.
    with matplotlib.style.context(["default", {"font.size": 9, "legend.fontsize": 8}]):
        figure = Figure(figsize=(13, 13.5), layout="constrained")
        axes = figure.subplots(3, 2)
        ours, student = (dict(drawn.get(key, [])) for key in ("level", "student"))
        panels = [
            (_levels, [[name, met, student[name]] for name, met in ours.items() if name in student]),
            (_looks, drawn.get("looks", [])),
            (_slacks, drawn.get("slack", [])),
            (_plans, drawn.get("plans", [])),
            (_worst_levels, drawn.get("worst", [])),
            (_worst_power, drawn.get("worst", [])),
        ]
        for axis, (panel, points) in zip(axes.flat, panels, strict=True):
            if points:
                panel(axis, points)
            else:
                axis.set_axis_off()
        figure.savefig(out / f"{name}.png", dpi=100, metadata={"Software": None})


def _levels(axis: Axes, points: list) -> None:
    """Draws false "met" of each loss, by our rule and by Student's t."""
    y = range(len(points))
    for label, colour, marker, column in (("Student's t", OTHER, "x", 2), ("ours", OURS, "o", 1)):
        x = [100 * p[column] for p in points]
        axis.scatter(x, y, color=colour, marker=marker, label=label, zorder=3)
    axis.axvline(100 * ALPHA, color=GREY, linewidth=0.8)
    axis.set_yticks(list(y), [p[0] for p in points])
    axis.invert_yaxis()
    axis.grid(axis="y", linewidth=0.3)
    axis.set(xlabel="%; allowed: 5", title='False "met" at the boundary, 96 prompts x 6', xlim=(-0.5, None))
    axis.legend(loc="lower right")


def _looks(axis: Axes, points: list) -> None:
    """Draws how often retrained policies are ever called met, against their number."""
    for label, colour, column in (("every look at 5 %", OTHER, 2), ("ours", OURS, 1)):
        x, y = [p[0] for p in points], [100 * p[column] for p in points]
        axis.plot(x, y, color=colour, marker="o", markersize=4, label=label)
    axis.axhline(100 * ALPHA, color=GREY, linewidth=0.8)
    axis.set(
        xlabel="policies trained, all at the boundary",
        ylabel="%; allowed: 5",
        title='Ever called "met", retrained policies, same prompts',
        ylim=(0, None),
    )
    axis.legend(loc="upper left")


def _slacks(axis: Axes, points: list) -> None:
    """Draws the slack that is met in 80 %, against the number of prompts."""
    responses = sorted({p[1] for p in points})
    for G, colour in zip(responses, SHADES, strict=False):
        own = [p for p in points if p[1] == G]
        axis.plot(*zip(*[(p[0], p[2]) for p in own], strict=True), color=colour, marker="o", markersize=4)
        axis.lines[-1].set_label(f"{G} responses" if G > 1 else "1 response")
    axis.set(xscale="log", yscale="log", xlabel="prompts", ylabel="deviations of a response")
    axis.set_title("Slack beyond b that is met in 80 %, normal improvements")
    axis.legend(loc="upper right")
    ticks = sorted({p[0] for p in points})
    axis.set_xticks(ticks, [str(x) for x in ticks])
    axis.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_formatter(NullFormatter())


def _plans(axis: Axes, points: list) -> None:
    """Draws the prompts that a limit on a rate needs."""
    for part, colour in ((0, SHADES[1]), (1 / 3, SHADES[2]), (1 / 2, SHADES[3])):
        own = [p for p in points if p[2] and abs(p[1] / p[0] - part) < 1e-6]
        label = "no unsafe answer" if part == 0 else f"true rate {'a third' if part < 0.4 else 'half'} of it"
        axis.plot([100 * p[0] for p in own], [p[2] for p in own], color=colour, marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel="limit, %", ylabel="prompts with 6 responses")
    axis.set_title("Prompts that confirm a limit on a rate in 80 %")
    limits = sorted({100 * p[0] for p in points})
    axis.set_xticks(limits, [f"{x:g}" for x in limits])
    axis.set_yticks([10, 20, 50, 100, 200, 500, 1000], ["10", "20", "50", "100", "200", "500", "1000"])
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_formatter(NullFormatter())
    axis.legend(loc="upper right")


def _worst_levels(axis: Axes, points: list) -> None:
    """Draws false "met" of worst shares at their limit, at 96 prompts: with t as it is chosen (filled), and
    with the best one."""
    for ranged, colour, label in ((True, OURS, "range known or stated"), (False, OTHER, "no range")):
        y = [i for i, point in enumerate(points) if point[1] == ranged]
        found = [(100 * p[1], 100 * p[2]) for i in y for p in points[i][2] if p[0] == 96]
        axis.scatter([x for _, x in found], y, color=colour, label=label, zorder=3)
        axis.scatter([x for x, _ in found], y, edgecolors=colour, facecolors="none", zorder=3)
    axis.axvline(100 * ALPHA, color=GREY, linewidth=0.8)
    axis.set_yticks(range(len(points)), [p[0] for p in points])
    axis.invert_yaxis()
    axis.grid(axis="y", linewidth=0.3)
    axis.set(xlabel="%; allowed: 5 (open: t the policy's own quantile)", xlim=(-0.5, None))
    axis.set_title('Worst share at its limit: false "met", 96 x 6')
    axis.legend(loc="lower right")


def _worst_power(axis: Axes, points: list) -> None:
    """Draws how often policies whose worst share costs half of the limit are met."""
    for _, ranged, met in points:
        x, y, colour = [p[0] for p in met], [100 * p[-1] for p in met], OURS if ranged else OTHER
        axis.plot(x, y, color=colour, linewidth=0.9, marker="o", markersize=3)
    ticks = sorted({p[0] for _, _, met in points for p in met})
    axis.set(xscale="log", xlabel="prompts with 6 responses", ylabel="met, %", ylim=(-2, 102))
    axis.set_title("Worst share at half of its limit (blue: with a range)")
    axis.set_xticks(ticks, [str(x) for x in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
