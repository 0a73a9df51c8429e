"""The picture of a dual: multipliers and the price in reward along the thresholds."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine import dual
from engine.dual.analysis import Analysis, Curve
from engine.report.drawing import COLOURS, INK, POLICY, REFERENCE, frame, png


def picture(found: Analysis, curve: Curve) -> bytes:
    """The PNG: multipliers and the predicted improvement of the reward along the thresholds, the chosen ones marked."""

    def draw() -> Figure:
        figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        left, right = figure.subplots(1, 2)
        _lambda_panel(left, found, curve)
        _reward_panel(right, found, curve)
        P, G = found.reward_PG.shape
        figure.suptitle(f"Dual of {Path(found.file).name[-60:]}: {P} prompts x {G} responses, beta {found.config.beta:g}", color=INK)
        frame(left, "Multipliers")
        frame(right, "Price in reward")
        return figure

    return png(draw)


def _chosen(found: Analysis) -> float:
    """Where the given thresholds lie on the horizontal axis."""
    return found.config.threshold[0] if len(found.b_J) == 1 else 1.0


def _lambda_panel(axis: Axes, found: Analysis, curve: Curve) -> None:
    x, low, high = _chosen(found), *found.bootstrap
    top = 1.15 * max(float(curve.lam_KJ.max()), 1e-3)
    if curve.band is not None:
        axis.fill_between(
            curve.x_K, curve.band[0], np.minimum(curve.band[1], 2 * top), color=COLOURS[0], alpha=0.2, linewidth=0, label="95 %, bootstrap"
        )
    for j, name in enumerate(found.table.names):
        colour = COLOURS[j % len(COLOURS)]
        lam = float(found.solution.lam[j])
        axis.plot(curve.x_K, curve.lam_KJ[:, j], color=colour, linewidth=2, label=f"lambda of {name[:30]}")
        bars = [[lam - min(float(low[j]), lam)], [min(max(float(high[j]), lam), 2 * top) - lam]]
        axis.errorbar(x, lam, yerr=bars, fmt="o", color=colour, markersize=6, capsize=3, label=f"here: {lam:.3f}, 95 % bootstrap")
    axis.axvline(x, color=INK, linewidth=1, linestyle=":")
    axis.set_ylim(-0.03 * top, top)
    per = "reward per utility, units of the file" if found.config.raw else "reward sd per utility sd"
    axis.set(xlabel=_x_label(found), ylabel=f"multiplier lambda\n({per})")


def _reward_panel(axis: Axes, found: Analysis, curve: Curve) -> None:
    x, gain, se = _chosen(found), float(found.gain_P.mean()), float(dual.standard_error(found.gain_P))
    axis.fill_between(
        curve.x_K, curve.gain_K - 1.96 * curve.gain_se_K, curve.gain_K + 1.96 * curve.gain_se_K, color=POLICY, alpha=0.2, linewidth=0,
        label="\u00b11.96 se over prompts",
    )  # fmt: skip
    axis.plot(curve.x_K, curve.gain_K, color=POLICY, linewidth=2, label="reward at the solution")
    axis.plot(x, gain, "o", color=POLICY, markersize=6, label=f"here: {gain:+.3f} \u00b1 {1.96 * se:.3f}")
    axis.axhline(found.gain_at_zero, color=REFERENCE, linewidth=1.3, linestyle="--", label="without constraints (lambda 0)")
    axis.axhline(0, color=REFERENCE, linewidth=1, linestyle=":", label="reference")
    axis.axvline(x, color=INK, linewidth=1, linestyle=":")
    axis.margins(y=0.1)
    axis.set(xlabel=_x_label(found), ylabel=f"predicted improvement of the reward\n({found.unit})")


def _x_label(found: Analysis) -> str:
    if len(found.b_J) > 1:
        return "common factor of all required improvements\n(1: as given)"
    what = "required level" if found.config.absolute else "required improvement b"
    name = ("minus " if found.config.cost else "") + found.table.names[0][:40]
    return f"{what} of {name}\n({found.unit}; largest supported {found.alone_J[0] + found.shift_J[0]:.3g})"
