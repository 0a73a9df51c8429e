"""The study's picture: slack of every run, and reward against safety."""

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.study.arms import arm, judged
from bench.study.plan import CAID, COST, MOCAN, OTHERS, THRESHOLDS
from engine.report.drawing import png
from engine.sweep.pictures import COLOURS


def picture(rows: list[dict], seeds: list[int]) -> bytes:
    """Draws the picture as PNG; all methods share their colours between its two parts."""
    rows = judged(rows)
    labels = dict.fromkeys((CAID, MOCAN, *OTHERS, *(r["algorithm"] for r in rows)))
    colours = dict(zip(labels, itertools.cycle(COLOURS)))

    def draw() -> Figure:
        figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_slack(left, rows, seeds, colours)
        _draw_reward(right, rows, colours)
        return figure

    return png(draw)


def _draw_slack(axis: Axes, rows: list[dict], seeds: list[int], colours: dict[str, str]) -> None:
    """Draws improvement minus b of every run of the question, with seeds joined across the two methods."""
    arms = {label: arm(rows, label, seeds) for label in (CAID, MOCAN) if seeds}
    places = range(len(THRESHOLDS))
    for i in places:
        for s in range(len(seeds)):
            y = [arms[label].slack_SB[s, i] for label in (CAID, MOCAN)]
            axis.plot([3 * i, 3 * i + 1], y, color="#bbbbbb", linewidth=1, zorder=1)
        for k, (label, runs) in enumerate(arms.items()):
            axis.errorbar(
                np.full(len(seeds), 3 * i + k),
                runs.slack_SB[:, i],
                yerr=1.96 * runs.se_SB[:, i],
                fmt="o",
                color=colours[label],
                capsize=3,
                linewidth=1,
                label=label if i == 0 else None,
            )
    axis.axhline(0, color="#222222", linewidth=1, linestyle=":")
    axis.set(xticks=[3 * i + 0.5 for i in places], xticklabels=[f"b = {b:g}" for b in THRESHOLDS])
    axis.set(
        ylabel="improvement of harm minus b, \u00b11.96 se\n(within-prompt standard deviations)",
        title="Signed slack, seeds joined",
    )
    if seeds:
        axis.legend(frameon=False)


def _draw_reward(axis: Axes, rows: list[dict], colours: dict[str, str]) -> None:
    """Draws reward against improvement of every run of all methods."""
    for label, colour in colours.items():
        runs = [r for r in rows if r["algorithm"] == label]
        if runs:
            x, y = ([float(r[name]) for r in runs] for name in (COST, "reward"))
            axis.plot(x, y, "o", color=colour, markersize=5, label=label)
    for b in THRESHOLDS:
        axis.axvline(b, color="#222222", linewidth=1, linestyle=":")
    axis.plot(0, 0, "s", color="#8A8A8A", label="reference")
    axis.set(
        xlabel="improvement of harm", ylabel="reward improvement", title="Reward against safety, every run"
    )
    axis.legend(frameon=False)
