"""The panels of a run's picture."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.report.drawing import (
    AXIS_UNITS,
    INK,
    POLICY,
    REFERENCE,
    colour_of,
    crossed_intervals,
    frame,
    png,
    shortened,
)
from engine.report.run_files import RunFiles
from engine.verdict.evaluation import Evaluation

# By label form; a policy gradient's loss has no unit of its own.
LOSSES = {
    "soft": "cross-entropy per pair (nats)",
    "sampled": "cross-entropy per pair (nats)",
    "sampled-once": "cross-entropy per pair (nats)",
    "listwise": "cross-entropy per prompt (nats)",
    "regression": "half squared error per pair",
    "single": "half squared error per response",
}


def picture(run: RunFiles) -> bytes:
    """Draws lambda, improvement, trade-off, scores before and after, the loss, and the looks of the verdict;
    three panels a row."""

    def draw() -> Figure:
        scores = [("reward", "reward", None)]
        scores += [(f"utility {shortened(name, 16)}", "utility", j) for j, name in enumerate(run.names)]
        looked = run.evaluation.constraints if run.evaluation and run.evaluation.looks else ()
        n_panels = 4 + len(scores) + len(looked)
        rows = math.ceil(n_panels / 3)
        figure = Figure(figsize=(12, 4.5 * rows), dpi=130, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle(run.title, fontsize=13, color=INK)
        axes = figure.subplots(rows, 3, squeeze=False).flatten()
        titles = [
            _lambda_panel(axes[0], run),
            _improvement_panel(axes[1], run),
            _tradeoff_panel(axes[2], run),
        ]
        titles += [_histogram_panel(axis, run, *score) for axis, score in zip(axes[3:], scores, strict=False)]
        titles.append(_loss_panel(axes[3 + len(scores)], run))
        titles += [
            _looks_panel(axis, run.evaluation, j)
            for j, axis in enumerate(axes[n_panels - len(looked) : n_panels])
        ]
        for i, (axis, title) in enumerate(zip(axes, titles, strict=False)):
            frame(axis, f"({chr(97 + i)}) {title}")
        for axis in axes[n_panels:]:
            axis.set_axis_off()
        return figure

    return png(draw)


def _lambda_panel(axis: Axes, run: RunFiles) -> str:
    """Draws a step per iteration: the multiplier that its policy was trained at."""
    rows = [row for row in run.iteration if row.get("lam")]
    if rows:
        edges = _edges(rows)
        for j, name in enumerate(run.names):
            lam = _column(rows, "lam", j)
            axis.stairs(lam, edges, baseline=None, color=colour_of(j), linewidth=2, label=shortened(name))
            axis.plot(edges[:-1] + 0.5, lam, "o", color=colour_of(j), markersize=4)
        axis.set_ylim(0, 1.1 * np.nanmax(axis.dataLim.intervaly) or 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set(xlabel="iteration", ylabel="multiplier lambda (run's units)")
    return "Multipliers"


def _improvement_panel(axis: Axes, run: RunFiles) -> str:
    """Draws the measured improvement with +-1.96 standard errors, against b (solid) and the aim (dashed)."""
    rows = [row for row in run.iteration if row.get("improvement")]
    if rows:
        edges = _edges(rows)
        for j, name in enumerate(run.names):
            # Equal thresholds lie on each other: the later, thinner lines leave the earlier ones visible.
            shift, width = 0.12 * (j - (len(run.names) - 1) / 2), 1.3 + 1.5 * (len(run.names) - 1 - j)
            centre, error = (
                _column(rows, "improvement", j),
                1.96 * np.nan_to_num(_column(rows, "improvement_se", j)),
            )
            style = {
                "fmt": "o",
                "color": colour_of(j),
                "markersize": 5,
                "capsize": 3,
                "label": shortened(name),
            }
            axis.errorbar(edges[:-1] + 0.5 + shift, centre, yerr=error, **style)
            style = {"baseline": None, "color": colour_of(j), "linewidth": width}
            axis.stairs(_column(rows, "threshold", j), edges, **style)
            axis.stairs(_column(rows, "aim", j), edges, linestyle="--", **style)
        axis.plot([], [], color=INK, linewidth=1.3, label="b (required)")
        axis.plot([], [], color=INK, linewidth=1.3, linestyle="--", label="aimed at")
        axis.axhline(0, color=REFERENCE, linewidth=1, linestyle=":", label="reference")
        axis.margins(y=0.1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set(xlabel="iteration", ylabel=f"improvement, \u00b11.96 se\n({run.axis_unit})")
    return "Constraints, on slack prompts"


def _tradeoff_panel(axis: Axes, run: RunFiles) -> str:
    """Draws the path from the reference at (0, 0) through the iterations to the held-out result."""
    rows = [row for row in run.iteration if row.get("improvement") and row.get("reward") is not None]
    for j in range(len(run.names)):
        if rows:
            _draw_path(axis, run, rows, j)
        b = None
        if run.evaluation is not None:
            constraint, colour = run.evaluation.constraints[j], colour_of(j)
            label = "held out, 95 %" if j == 0 else None
            style = {"fmt": "none", "ecolor": colour, "elinewidth": 2.2, "capsize": 3, "label": label}
            crossed_intervals(axis, constraint.estimate, run.evaluation.reward, **style)
            b = constraint.required
        elif rows and np.isfinite(threshold := _column(rows, "threshold", j)[-1]):
            b = threshold
        if b is not None:
            axis.axvline(b, color=colour_of(j), linewidth=1.3, label="b (required)" if j == 0 else None)
    if axis.has_data():
        axis.plot(0, 0, "s", color=REFERENCE, markersize=7, zorder=3, label="reference")
        axis.margins(0.1)
    axis.set(
        xlabel=f"constraint improvement\n({run.axis_unit})", ylabel=f"reward improvement\n({run.axis_unit})"
    )
    return "Reward against constraint"


def _draw_path(axis: Axes, run: RunFiles, rows: list[dict], j: int) -> None:
    """Draws the iterations' improvements of constraint j and of the reward, ten of them numbered at most."""
    safety, reward, colour = _column(rows, "improvement", j), _column(rows, "reward"), colour_of(j)
    style = {"color": colour, "markersize": 4, "linewidth": 1.2, "label": shortened(run.names[j])}
    axis.plot(np.append(0, safety), np.append(0, reward), "-o", **style)
    every = math.ceil(len(rows) * len(run.names) / 10)
    for i in range(len(rows) - 1, -1, -every):
        number, offset = str(rows[i].get("iteration", i)), {"xytext": (4, 4), "textcoords": "offset points"}
        axis.annotate(number, (safety[i], reward[i]), **offset, fontsize=8, color=colour)


def _histogram_panel(axis: Axes, run: RunFiles, label: str, key: str, j: int | None) -> str:
    """Draws the held-out scores before and after in common bins, and their means as vertical lines."""
    sides = {side: _column(run.heldout, f"{side}_{key}", j) for side in ("reference", "policy")}
    sides = {side: values[np.isfinite(values)] for side, values in sides.items()}
    if all(len(values) for values in sides.values()):
        low, high = (float(f(np.concatenate(list(sides.values())))) for f in (np.min, np.max))
        edges = np.linspace(low, high, 31) if high > low else np.array([low - 0.5, low + 0.5])
        for (side, values), colour, name in zip(
            sides.items(), (REFERENCE, POLICY), ("before", "after"), strict=True
        ):
            share = np.histogram(values, edges)[0] / len(values)
            axis.stairs(share, edges, fill=True, color=colour, alpha=0.35)
            axis.stairs(share, edges, color=colour, linewidth=1.4, label=f"{name} ({side})")
            axis.axvline(
                values.mean(), color=colour, linewidth=1.6, linestyle="--", label=f"mean {values.mean():+.2f}"
            )
        axis.margins(y=0.1)
        axis.set_ylim(bottom=0)
    axis.set(xlabel=f"{label}, larger is better\n({run.axis_unit})", ylabel="share of held-out responses")
    return f"Held-out {label}"


def _loss_panel(axis: Axes, run: RunFiles) -> str:
    """Draws the training loss of each policy step, iterations one after another."""
    steps = run.step
    if steps:
        x = np.arange(1, len(steps) + 1)
        marker = "o" if len(steps) < 2 else None
        axis.plot(x, _column(steps, "loss"), color=POLICY, linewidth=1.2, marker=marker, label="loss")
        starts = [
            i for i in range(1, len(steps)) if steps[i].get("iteration") != steps[i - 1].get("iteration")
        ]
        for i in starts:
            label = "next iteration" if i == starts[0] else None
            axis.axvline(i + 0.5, color=REFERENCE, linewidth=1, linestyle=":", label=label)
        axis.margins(y=0.1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(
        xlabel="policy step, all iterations",
        ylabel=LOSSES.get(run.config.get("config", {}).get("labels"), "loss"),
    )
    return "Training loss"


def _looks_panel(axis: Axes, evaluation: Evaluation, j: int) -> str:
    """Draws the one-sided bounds of constraint j and its mean at each look, against what it asks for."""
    limit, looks, colour = evaluation.constraints[j].limit, evaluation.looks, colour_of(j)
    # A level is printed as the verdict prints it, shares in percent.
    scale = limit.scale if limit.at_most else 1
    x = [look.prompts * look.responses for look in looks]
    mean = scale * np.array([look.means[j] for look in looks])
    lower, upper = scale * np.array([look.bounds[j] for look in looks]).T
    axis.fill_between(x, lower, upper, color=colour, alpha=0.2, linewidth=0)
    bars = [np.maximum(0, mean - lower), np.maximum(0, upper - mean)]
    style = {"color": colour, "markersize": 5, "capsize": 4, "linewidth": 1.4, "label": "mean and bounds"}
    axis.errorbar(x, mean, yerr=bars, fmt="-o", **style)
    for place, bound, look in zip(x, upper, looks, strict=True):
        offset = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axis.annotate(look.words[j], (place, bound), color=INK, **offset)
    asked = f"asked for: {'at most' if limit.at_most else 'at least'} {scale * limit.value:g}"
    axis.axhline(scale * limit.value, color=INK, linewidth=1.3, label=asked)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{n:,}" for n in x])
    axis.set_xticks([], minor=True)
    axis.set_xlim(x[0] / 1.6, x[-1] * 1.6)
    axis.margins(y=0.15)
    what = f"improvement\n({AXIS_UNITS[evaluation.units]})"
    if limit.at_most:
        what = f"{limit.measured} ({limit.percent.strip() or AXIS_UNITS['raw']})"
    axis.set(xlabel="held-out responses of either side", ylabel=what)
    return f"Looks: {shortened(limit.name)}"


def _column(rows: list[dict], key: str, j: int | None = None) -> np.ndarray:
    """Returns row[key], or row[key][j], of each row, float64; NaN where it is missing."""
    values = [row.get(key) for row in rows]
    if j is not None:
        values = [value[j] if value is not None and j < len(value) else None for value in values]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _edges(rows: list[dict]) -> np.ndarray:
    """Returns the borders half a unit around each iteration's number."""
    first = rows[0].get("iteration", 0)
    return np.arange(len(rows) + 1) + first - 0.5
