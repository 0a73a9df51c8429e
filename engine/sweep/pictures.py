"""A sweep's pictures: reward against each constraint; multipliers and slack of every iteration."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from engine.report.drawing import AXIS_UNITS, INK, REFERENCE, crossed_intervals, frame, png
from engine.sweep.outcomes import Outcome
from engine.sweep.plans import numbers, shown

# A colour for each algorithm and a line style for each threshold.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
    "#999933",
    "#882255",
    "#44AA99",
)
LINES = ("-", "--", ":", "-.")


def pareto(outcomes: list[Outcome]) -> bytes:
    """Draws the reward's improvement against each constraint's.

    Runs have their 95 % intervals; means over seeds are joined along b.
    """

    def draw() -> Figure:
        names = _names(outcomes)
        figure = Figure(figsize=(6.5 * len(names), 5.6), dpi=130, layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for j, axis in enumerate(axes):
            _pareto_panel(axis, outcomes, j, names[j])
        return figure

    return png(draw)


def _pareto_panel(axis: Axes, outcomes: list[Outcome], j: int, name: str) -> None:
    judged = [o.evaluation.constraints[j] for o in outcomes if o.evaluation is not None]
    needed = sorted({c.required for c in judged})
    # A limit on a level asks each run for an improvement over its reference's samples:
    # one line at their mean stands for all.
    if any(c.measured is not None for c in judged):
        needed = [float(np.mean(needed))]
    for i, b in enumerate(needed):
        axis.axvline(b, color=INK, linewidth=1, linestyle=":", label="required" if i == 0 else None)
    for i, (label, by_b) in enumerate(_groups(outcomes).items()):
        colour = COLOURS[i % len(COLOURS)]
        means = [_draw_seeds(axis, at_b, j, colour) for at_b in by_b.values()]
        style = {"color": colour, "linewidth": 1.6, "markersize": 7}
        axis.plot(*zip(*means, strict=True), "-o", label=shown(label)[:40], **style)
    axis.plot(0, 0, "s", color=REFERENCE, markersize=7, zorder=3, label="reference")
    axis.margins(0.08)
    unit = AXIS_UNITS[outcomes[0].plan.config.units]
    axis.set(
        xlabel=f"improvement of {name[:40]}, held out\n({unit})",
        ylabel=f"reward improvement, held out\n({unit})",
    )
    several_seeds = len({o.plan.config.seed for o in outcomes}) > 1
    frame(axis, "Means over seeds; runs with 95 % intervals" if several_seeds else "Runs with 95 % intervals")


def _draw_seeds(axis: Axes, outcomes: list[Outcome], j: int, colour: str) -> tuple[float, float]:
    """Draws the runs of one algorithm at one threshold; returns their mean point."""
    points = [(o.evaluation.constraints[j].estimate, o.evaluation.reward) for o in outcomes]
    marker = "none" if len(points) == 1 else "o"
    for x, y in points:
        crossed_intervals(axis, x, y, fmt=marker, markersize=3, color=colour, elinewidth=0.8, alpha=0.45)
    return np.mean([x.mean for x, _ in points]), np.mean([y.mean for _, y in points])


def multipliers(outcomes: list[Outcome]) -> bytes:
    """Draws lambda and slack of every iteration.

    Colours are algorithms, line styles thresholds, and a line is a run.
    """

    def draw() -> Figure:
        names = _names(outcomes)
        figure = Figure(figsize=(11, 4.6 * len(names)), dpi=130, layout="constrained")
        axes = figure.subplots(len(names), 2, squeeze=False)
        for j, (left, right) in enumerate(axes):
            _multiplier_panels(left, right, outcomes, j, names[j])
        return figure

    return png(draw)


def _multiplier_panels(left: Axes, right: Axes, outcomes: list[Outcome], j: int, name: str) -> None:
    thresholds = sorted({o.plan.threshold for o in outcomes})
    for i, (label, by_b) in enumerate(_groups(outcomes).items()):
        colour = COLOURS[i % len(COLOURS)]
        for threshold, at_b in by_b.items():
            line = LINES[thresholds.index(threshold) % len(LINES)]
            for o in at_b:
                _draw_path(left, right, o, j, colour, line)
        left.plot([], [], color=colour, label=shown(label)[:40])
        if any(o.iterations for at_b in by_b.values() for o in at_b):
            right.plot([], [], color=colour, label=shown(label)[:40])
    for i, threshold in enumerate(thresholds if len(thresholds) > 1 else []):
        left.add_line(
            Line2D([], [], color=INK, linestyle=LINES[i % len(LINES)], label=f"b {numbers(threshold)}")
        )
    right.axhline(0, color=REFERENCE, linewidth=1, linestyle=":")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set(
        xlabel="iteration (level lines: algorithms that have none)",
        ylabel=f"lambda of {name[:40]} (run's units)",
        ylim=(0, None),
    )
    unit = AXIS_UNITS[outcomes[0].plan.config.units]
    right.set(xlabel="iteration", ylabel=f"slack of {name[:40]}, \u00b11.96 se\n({unit})")
    frame(left, "Multipliers")
    frame(right, "Measured slack (improvement - aim)")


def _draw_path(left: Axes, right: Axes, outcome: Outcome, j: int, colour: str, line: str) -> None:
    """Draws a run's lambda on the left and its slack on the right."""
    rows = outcome.iterations
    if not rows:
        left.axhline(outcome.lam[j], color=colour, linestyle=line, linewidth=1)
        return
    x = [row.iteration for row in rows]
    left.plot(x, [row.lam[j] for row in rows], line, color=colour, marker="o", markersize=3)
    slack, se = np.array([row.slack[j] for row in rows]), np.array([row.slack_se[j] for row in rows])
    right.errorbar(x, slack, yerr=1.96 * se, fmt=line, color=colour, marker="o", markersize=3, elinewidth=0.6)


def _groups(outcomes: list[Outcome]) -> dict[str, dict[tuple, list[Outcome]]]:
    """Groups the judged outcomes by label, in the order asked for, then by threshold, rising."""
    groups: dict[str, dict[tuple, list[Outcome]]] = {}
    for o in sorted((o for o in outcomes if o.evaluation is not None), key=lambda o: o.plan.threshold):
        groups.setdefault(o.plan.label, {}).setdefault(o.plan.threshold, []).append(o)
    order = list(dict.fromkeys(o.plan.label for o in outcomes))
    return {label: groups[label] for label in order if label in groups}


def _names(outcomes: list[Outcome]) -> list[str]:
    """Lists the constraints' names; one empty name where no run has a verdict."""
    return list(
        dict.fromkeys(c.name for o in outcomes if o.evaluation for c in o.evaluation.constraints)
    ) or [""]
