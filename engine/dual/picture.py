"""The picture of a dual: multipliers and the price in reward along the thresholds."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine import dual
from engine.dual.analysis import Analysis, Curve
from engine.report.drawing import COLOURS, INK, POLICY, REFERENCE, frame, png


def picture(analysis: Analysis, curve: Curve) -> bytes:
    """Draws multipliers and predicted reward along the thresholds, the chosen ones marked; returns a PNG."""

    def draw() -> Figure:
        figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        left, right = figure.subplots(1, 2)
        _lambda_panel(left, analysis, curve)
        _reward_panel(right, analysis, curve)
        P, G = analysis.reward_PG.shape
        size = f"{P} prompts x {G} responses, beta {analysis.config.beta:g}"
        figure.suptitle(f"Dual of {Path(analysis.file).name[-60:]}: {size}", color=INK)
        frame(left, "Multipliers")
        frame(right, "Price in reward")
        return figure

    return png(draw)


def _chosen(analysis: Analysis) -> float:
    """Returns where the given thresholds lie on the horizontal axis."""
    return analysis.config.threshold[0] if len(analysis.b_J) == 1 else 1.0


def _lambda_panel(axis: Axes, analysis: Analysis, curve: Curve) -> None:
    x, interval = _chosen(analysis), analysis.interval
    top = 1.15 * max(float(curve.lam_KJ.max()), 1e-3)
    for j, name in enumerate(analysis.table.names):
        colour = COLOURS[j % len(COLOURS)]
        axis.plot(curve.x_K, curve.lam_KJ[:, j], color=colour, linewidth=2, label=f"lambda of {name[:30]}")
        if np.isfinite(curve.true_KJ[:, j]).any():
            label = "true lambda, bias taken out" if j == 0 else None
            axis.plot(
                curve.x_K, curve.true_KJ[:, j], color=colour, linewidth=1.3, linestyle="--", label=label
            )
        if len(analysis.b_J) == 1:
            high = np.minimum(curve.high_KJ[:, j], 2 * top)
            axis.fill_between(
                curve.x_K, curve.low_KJ[:, j], high, color=colour, alpha=0.2, linewidth=0, label="its 95 %"
            )
        lam, low, high = (float(part[j]) for part in (interval.lam, interval.low, interval.high))
        bars = [[lam - min(low, lam)], [min(max(high, lam), 2 * top) - lam]]
        label = f"here: {'true ' if interval.of_truth else ''}{lam:.3f}, 95 %"
        axis.errorbar(x, lam, yerr=bars, fmt="o", color=colour, markersize=6, capsize=3, label=label)
    axis.axvline(x, color=INK, linewidth=1, linestyle=":")
    axis.set_ylim(-0.03 * top, top)
    per = (
        "reward per utility, units of the file"
        if analysis.config.units == "raw"
        else "reward sd per utility sd"
    )
    axis.set(xlabel=_x_label(analysis), ylabel=f"multiplier lambda\n({per})")


def _reward_panel(axis: Axes, analysis: Analysis, curve: Curve) -> None:
    x, gain, se = (
        _chosen(analysis),
        float(analysis.gain_P.mean()),
        float(dual.standard_error(analysis.gain_P)),
    )
    below, above = curve.gain_K - 1.96 * curve.gain_se_K, curve.gain_K + 1.96 * curve.gain_se_K
    band_label, here_label = "\u00b11.96 se over prompts", f"here: {gain:+.3f} \u00b1 {1.96 * se:.3f}"
    axis.fill_between(curve.x_K, below, above, color=POLICY, alpha=0.2, linewidth=0, label=band_label)
    axis.plot(curve.x_K, curve.gain_K, color=POLICY, linewidth=2, label="reward at the solution")
    axis.plot(x, gain, "o", color=POLICY, markersize=6, label=here_label)
    without = "without constraints (lambda 0)"
    axis.axhline(analysis.gain_at_zero, color=REFERENCE, linewidth=1.3, linestyle="--", label=without)
    axis.axhline(0, color=REFERENCE, linewidth=1, linestyle=":", label="reference")
    axis.axvline(x, color=INK, linewidth=1, linestyle=":")
    axis.margins(y=0.1)
    axis.set(xlabel=_x_label(analysis), ylabel=f"predicted improvement of the reward\n({analysis.unit})")


def _x_label(analysis: Analysis) -> str:
    if len(analysis.b_J) > 1:
        return "common factor of all required improvements\n(1: as given)"
    what = "required level" if analysis.config.absolute else "required improvement b"
    name = ("minus " if analysis.config.cost else "") + analysis.table.names[0][:40]
    largest = analysis.alone_J[0] + analysis.shift_J[0]
    return f"{what} of {name}\n({analysis.unit}; largest supported {largest:.3g})"
