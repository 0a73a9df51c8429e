"""The parts that all pictures share: colours, frames and PNG bytes."""

import io
import math
from collections.abc import Callable

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.intervals import Estimate

# Okabe and Ito's palette, which colour-blind readers can tell apart. Reference and policy have
# the same colours in all panels.
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE, POLICY, INK = "#8A8A8A", "#0072B2", "#222222"
# The unit of improvements on axes, by --units.
AXIS_UNITS = {"deviation": "reference within-prompt sd", "raw": "scorers' own units"}


def png(draw: Callable[[], Figure]) -> bytes:
    """Returns the PNG of the figure that `draw` returns; equal data give equal bytes."""
    # A matplotlibrc of the user must not change the bytes, and a dollar sign in a name is no formula.
    with matplotlib.style.context(
        ["default", {"text.parse_math": False, "font.size": 9, "legend.fontsize": 8}]
    ):
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def frame(axis: Axes, title: str) -> None:
    """Adds the title, and the legend between title and axes, where it covers no data.

    Axes without data say that nothing was measured.
    """
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    columns = 2 if len(handles) > 1 else 1
    lines = math.ceil(len(handles) / columns)
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=6 + 14 * max(lines, 2))
    if handles:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": columns, "frameon": False}
        spacing = {
            "borderaxespad": 0.1,
            "borderpad": 0.2,
            "labelspacing": 0.25,
            "handlelength": 1.8,
            "columnspacing": 1.2,
        }
        axis.legend(handles, labels, **place, **spacing)
    if not axis.has_data():
        axis.set(xticks=[], yticks=[])
        middle = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "not measured in this run", color=REFERENCE, **middle)


def crossed_intervals(axis: Axes, x: Estimate, y: Estimate, **style) -> None:
    """Draws a point with its two-sided intervals in both directions."""
    bars = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
    axis.errorbar(x.mean, y.mean, **bars, **style)


def colour_of(j: int) -> str:
    """Returns the colour of constraint j."""
    return COLOURS[j % len(COLOURS)]


def shortened(text: str, most: int = 22) -> str:
    """Shortens a text to `most` characters: a long path keeps its end, which says most."""
    return text if len(text) <= most else "\u2026" + text[1 - most :]
