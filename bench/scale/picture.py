"""Draws how well GPUs are used, as predicted."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from bench.scale.predicted import Prediction


def draw(curves: dict[str, Sequence[Prediction]], card: str) -> Figure:
    """Draws efficiency against ranks. curves: by name, predictions that fit."""
    figure = Figure(figsize=(7.2, 4.6), dpi=110, layout="constrained")
    panel = figure.subplots()
    panel.axhline(100, color="#222222", linewidth=1, linestyle=":")
    ticks = set()
    for name, points in curves.items():
        x = [point.ranks for point in points]
        y = [100 * share for share in efficiencies(points)]
        panel.plot(
            x,
            y,
            "o-",
            markersize=4,
            label=f"{name}, from {x[0]}: {points[-1].seconds / 60:.1f} min at {x[-1]}",
        )
        ticks |= set(x)
    panel.set(
        xscale="log", xlabel="GPUs, eight to a machine", ylabel="efficiency, % of the best", ylim=(0, 106)
    )
    panel.set_xticks(sorted(ticks), [f"{x}" for x in sorted(ticks)], minor=False)
    panel.minorticks_off()
    panel.set_title(f"Prediction, not a measurement: CAID on {card}", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower left")
    return figure


def efficiencies(points: Sequence[Prediction]) -> list[float]:
    """Returns how well each prediction uses its ranks' time, as a share of the one that uses it best."""
    spent = [point.ranks * point.seconds for point in points]
    return [min(spent) / time for time in spent]
