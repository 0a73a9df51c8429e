"""The picture of docs/foreign.md."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.foreign.pairs import FAR, RULES, SLACK_NATS
from engine.report.drawing import POLICY, frame, png

COLOURS = dict(zip(RULES, ("#D55E00", POLICY), strict=True))


def picture(rows: Sequence[dict]) -> bytes:
    """Draws the runs as PNG: how far each is from b, and its KL against its tilt's."""
    names = list(dict.fromkeys((r["pair"], r["b"]) for r in rows))

    def draw() -> Figure:
        figure = Figure(figsize=(12, 1.8 + 0.26 * len(names)), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_off(left, rows, names)
        _draw_kl(right, rows)
        return figure

    return png(draw)


def _draw_off(axis: Axes, rows: Sequence[dict], names: Sequence[tuple[str, float]]) -> None:
    """Draws improvement less b of every run; those of a pair and threshold share a line."""
    for i, (rules, colour) in enumerate(COLOURS.items()):
        of = [r for r in rows if r["rules"] == rules]
        x = np.array([[r["improvement"], r["low"], r["high"]] for r in of]).reshape(-1, 3).T
        y = [names.index((r["pair"], r["b"])) + 0.3 * i - 0.15 for r in of]
        mean, low, high = x - np.array([r["b"] for r in of])
        axis.errorbar(mean, y, xerr=(mean - low, high - mean), fmt="o", ms=4, lw=1, color=colour, label=rules)
    axis.axvline(0, color="#222222", linewidth=1, linestyle=":")
    axis.set(
        yticks=range(len(names)),
        yticklabels=[f"{pair}, b {b:g}" for pair, b in names],
        xlabel="improvement less b, 95 % (within-prompt standard deviations of the reference)",
    )
    axis.invert_yaxis()
    frame(axis, "How far from the threshold")


def _draw_kl(axis: Axes, rows: Sequence[dict]) -> None:
    """Draws the KL of every run against that of its tilt."""
    for rules, colour in COLOURS.items():
        of = [r for r in rows if r["rules"] == rules]
        axis.plot([r["tilt"] for r in of], [r["kl"] for r in of], "o", ms=4, color=colour, label=rules)
    x = np.linspace(0, 1.05 * max(r["tilt"] for r in rows), 2)
    axis.plot(x, x, color="#222222", linewidth=1, linestyle=":", label="the tilt's own")
    far = f"{FAR:g} times, plus {SLACK_NATS:g} nats"
    axis.plot(x, FAR * x + SLACK_NATS, color="#222222", linewidth=1, linestyle="--", label=far)
    axis.set(xlabel="KL of the tilt, nats", ylabel="KL of the policy, nats")
    frame(axis, "How far from the reference")
