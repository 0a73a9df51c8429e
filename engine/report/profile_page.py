"""The picture and the page of a profile: what its sets say of the policy and of the reference."""

import base64
import math
from collections.abc import Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.intervals import Estimate
from engine.report.drawing import INK, POLICY, REFERENCE, frame, png, shortened
from engine.report.html import document, table
from engine.verdict import profile
from engine.verdict.profile import SetVerdict

COLUMNS = 3  # panels in a row of the picture
STYLE = ".profile td:first-child, .profile td:nth-child(2) { text-align: left; }"


def picture(title: str, verdicts: Sequence[SetVerdict], confidence: float) -> bytes:
    """Draws a panel for each measure, `COLUMNS` in a row: a line for each set, the reference's and the
    policy's figure on it with their intervals."""
    names = list(dict.fromkeys(m.name for verdict in verdicts for m in verdict.measures))

    def draw() -> Figure:
        rows, columns = math.ceil(len(names) / COLUMNS), min(COLUMNS, len(names))
        size = (13, (1.5 + 0.42 * len(verdicts)) * rows + 0.6)
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle(f"{shortened(title, 110)}; intervals of {100 * confidence:g} %", color=INK)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for i, (axis, name) in enumerate(zip(axes, names, strict=False)):
            _panel(axis, name, verdicts)
            axis.tick_params(labelleft=i % columns == 0)
            frame(axis, f"({chr(97 + i)}) {shortened(name, 40)}")
        for axis in axes[len(names) :]:
            axis.set_axis_off()
        return figure

    return png(draw)


def _panel(axis: Axes, name: str, verdicts: Sequence[SetVerdict]) -> None:
    """Draws one measure of all sets, the first set at the top."""
    found = {
        height: measure
        for height, verdict in enumerate(verdicts)
        for measure in verdict.measures
        if measure.name == name
    }
    share = any(measure.share for measure in found.values())
    scale = 100 if share else 1
    reference = {h: m.reference for h, m in found.items() if m.reference is not None}
    apart = 0.13 if reference else 0.0  # two points of a set stand below each other
    for side, points, colour, shift in (
        ("reference", reference, REFERENCE, -apart),
        ("policy", {h: m.policy for h, m in found.items()}, POLICY, apart),
    ):
        if points:
            _draw_points(axis, {h + shift: e for h, e in points.items()}, scale, colour, side)
    if name == profile.WIN_RATE:
        axis.axvline(50, color=REFERENCE, linewidth=1, linestyle=":", label="as often as the reference")
    axis.set_yticks(range(len(verdicts)), [shortened(verdict.name, 24) for verdict in verdicts])
    axis.set_ylim(len(verdicts) - 0.5, -0.5)
    if share:
        axis.set_xlim(-3, 103)
    for height in range(len(verdicts)):
        if height not in found:
            place = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 8}
            axis.text(0.03, height, "fewer than 2 such prompts", color=REFERENCE, **place)
    words = "share of responses (%)" if share else "the scorer's own units"
    axis.set(xlabel="share of pairs, ties half (%)" if name == profile.WIN_RATE else words)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)


def _draw_points(axis: Axes, points: dict[float, Estimate], scale: float, colour: str, label: str) -> None:
    """Draws figures with their intervals, by the height of each."""
    estimates = points.values()
    means = [scale * e.mean for e in estimates]
    # Rounding may put the mean of an exact interval a hair outside of it.
    below = [max(0.0, scale * (e.mean - e.low)) for e in estimates]
    above = [max(0.0, scale * (e.high - e.mean)) for e in estimates]
    style = {"fmt": "o", "color": colour, "markersize": 5, "capsize": 3, "linewidth": 1.6, "label": label}
    axis.errorbar(means, list(points), xerr=[below, above], **style)


def page(
    title: str, verdicts: Sequence[SetVerdict], lines: Sequence[str], image: bytes, confidence: float
) -> str:
    """Returns the HTML page, in which every text is escaped; lines: what else there is to say."""
    head, rows = profile.table(verdicts)
    said = "\n".join(f"<p>{escape(line)}</p>" for line in lines)
    body = f"""<h1>{escape(title)}</h1>
{said}
<h2>Table</h2>
<p class="small">In brackets: intervals of {100 * confidence:g} %, clustered by prompt.</p>
{table(head, rows, "profile")}
<h2>Picture</h2>
<p><img alt="Every measure of the table, for each set, of reference and policy"
src="data:image/png;base64,{base64.b64encode(image).decode()}"></p>"""
    return document(escape(title), body, STYLE)
