"""Draws the four pictures of docs/theory.md."""

from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.theory.labels import FORMS
from bench.theory.runs import CurvePoint
from bench.theory.tables import read_as
from bench.theory.tasks import Outcome, Results

COLOURS = ["#1b6ca8", "#d1495b", "#2e933c", "#7d5ba6", "#e08e0b", "#444444", "#17a2a2", "#b07aa1"]
# Algorithm -> its colour; CAID's three rules share one and differ in their lines.
SHOWN = dict(
    zip(
        ("C-DPO", "PD-DPO", "OPD", "primal-dual, RLOO", "primal-dual, group_norm", "RePO", "MoCAN"),
        COLOURS[1:],
        strict=True,
    )
) | {
    "CAID, dual step 1": COLOURS[0],
    "CAID, dual step 0.5": COLOURS[0],
    "CAID, secant": COLOURS[0],
    "SACPO": COLOURS[1],
}
LINES = {"CAID, dual step 0.5": "--", "CAID, secant": ":"}
ONE_SHOT = {"MoCAN": "*", "SACPO": "D"}  # marker of each
# (title, starts) of the columns of the curves.
COLUMNS = (
    ("from lambda = 0 (policy gradient: 0.05)", ("0", "0.05")),
    ("from 3 lambda* (MoCAN, SACPO: at lambda*)", ("3 lambda*", "lambda*", "lambda* given")),
)
# (title, forms, statements) of the panels of ratios.
PRINTED = (
    "Printed bounds",
    ("printed", "corrected"),
    (
        "Lemma 3: D - D_p <= B",
        "Thm 2: P* - D_p* <= B(lambda*_p)",
        "Lemma 4 with B",
        "Thm 3, R-OPT",
        "Thm 4, U-OPT",
        "Thm 6, U-OPT, soft labels",
    ),
)
SHARP = (
    "With the measured gap in place of B",
    ("sharp",),
    (
        "Thm 2: P* - D_p* <= gap(lambda*_p)",
        "gap(lambda*) <= P* - D_p*",
        "Lemma 4 with D(lambda*_p) - D*",
        "Lemma 5 off along h alone",
        "Lemma 5 with gap(lambda*_p)",
        "Thm 4, U-OPT, with gap",
    ),
)


def draw_all(results: Results, out: Path) -> None:
    """Draws all pictures into `out`."""
    # The user's matplotlibrc must not change the bytes.
    with matplotlib.style.context(["default", {"font.size": 9, "legend.fontsize": 8}]):
        draw_curves(*results["curves"][0].result, out / "theory-convergence.png")
        draw_bounds([x.result for x in results["problems"]], out / "theory-bounds.png")
        draw_oscillation(results["oscillation"][0].result, out / "theory-oscillation.png")
        draw_labels(results["labels"], out / "theory-labels.png")


def empty(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Returns a figure and its axes [rows, columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: Path) -> None:
    """Saves a figure without the version of matplotlib in it."""
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_curves(lam_p: float, curves: dict[tuple[str, str], list[CurvePoint]], path: Path) -> None:
    """Draws slack, lambda and value of every algorithm against its policy updates, from two starts."""
    figure, axes = empty(3, 2, 11, 9)
    for column, (title, starts) in zip(axes.T, COLUMNS, strict=True):
        for (name, start), points in curves.items():
            known = name in SHOWN and start in starts
            if known and (start != "lambda*" or name in ONE_SHOT):
                _draw_curve(column, name, points)
        slack, lam, loss = column
        slack.set(title=title, yscale="log", ylabel="|slack|", ylim=(1e-9, 2))
        lam.axhline(lam_p, color="#999999", linewidth=0.8, linestyle=":")
        lam.set(ylabel="lambda (dotted: lambda*_p)", ylim=(-0.05, 3.2))
        loss.axhline(0, color="#999999", linewidth=0.8, linestyle=":")
        loss.set(ylabel="value - P_p*", xlabel="policy updates")
        for axis in column:
            axis.set_xlim(0, 36)
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, path)


def _draw_curve(column: np.ndarray, name: str, points: list[CurvePoint]) -> None:
    """Draws one algorithm into the three axes of a column."""
    x, slack, lam, loss = zip(*points, strict=True)
    for axis, y in zip(column, (np.maximum(slack, 1e-12), lam, loss), strict=True):
        axis.plot(
            x,
            y,
            label=read_as(name),
            color=SHOWN[name],
            linestyle=LINES.get(name, "-"),
            marker=ONE_SHOT.get(name),
            markersize=8,
            linewidth=1.3,
        )


def draw_bounds(lines: list[dict], path: Path) -> None:
    """Draws the gaps of the class, and left over right of some bounds, against nu."""
    figure, axes = empty(1, 3, 14, 6)
    here = [x for x in lines if x["nu"] > 1e-6]
    _draw_gaps(axes[0, 0], here)
    for axis, (title, forms, statements) in zip(axes[0, 1:], (PRINTED, SHARP), strict=True):
        for name, colour in zip(statements, COLOURS, strict=False):
            points = [
                (x["nu"], b["left"] / b["right"])
                for x in here
                for b in x["bounds"]
                if b["name"] == name and b["form"] in forms and b["right"] > 0 and b["left"] > 0
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), s=7, color=colour, label=name, alpha=0.7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(ylabel="left / right; holds below the line", title=title, ylim=(1e-5, 30))
    for axis in axes[0]:
        axis.set(xscale="log", yscale="log", xlabel="nu, measured at pi*")
        axis.set_xticks((0.03, 0.1, 0.3, 1), ("0.03", "0.1", "0.3", "1"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11))
    save(figure, path)


def _draw_gaps(axis: Axes, lines: list[dict]) -> None:
    """Draws how far lambda*_p is from lambda*, and what the class costs, against nu."""
    nu = np.array([x["nu"] for x in lines])
    for label, marker, colour, values in (
        (
            "|lambda*_p - lambda*|",
            "o",
            COLOURS[2],
            [np.linalg.norm(np.subtract(x["lambda*_p"], x["lambda*"])) for x in lines],
        ),
        ("P* - D_p*: cost of the class", "+", COLOURS[0], [x["P*"] - x["D_p*"] for x in lines]),
        (
            "D_p* - P_p*: duality gap, where above 1e-6",
            "x",
            COLOURS[1],
            [x["D_p*"] - x["P_p*"] for x in lines],
        ),
    ):
        y = np.array(values)
        axis.scatter(nu[y > 1e-6], y[y > 1e-6], s=18, marker=marker, color=colour, label=label, alpha=0.6)
    axis.plot(np.sort(nu), np.sort(nu) ** 2, color="#999999", linewidth=0.8, label="nu squared")
    axis.set(ylabel="reward units; lambda", title="Gaps close with nu")


def draw_oscillation(slacks: dict[str, list[float]], path: Path) -> None:
    """Draws the slack per dual step of lagging and of exact policies."""
    figure, axes = empty(1, 1, 9, 3.8)
    axis = axes[0, 0]
    for (name, slack), colour in zip(slacks.items(), COLOURS, strict=False):
        axis.plot(range(1, len(slack) + 1), slack, label=name, color=colour, linewidth=1.3)
    axis.axhline(0, color="#999999", linewidth=0.8)
    axis.set(
        xlabel="dual steps",
        ylabel="slack",
        title="Equal dual steps, from 3 lambda*, exact expectations, eps 0.3",
    )
    axis.legend(loc="upper right")
    save(figure, path)


def draw_labels(outcomes: list[Outcome], path: Path) -> None:
    """Draws eps_app against the number of draws, by label form, a panel for each beta and eps."""
    betas = sorted({x.asked.beta for x in outcomes}, reverse=True)
    epses = sorted({x.asked.eps for x in outcomes})
    draws = outcomes[0].asked.draws
    figure, axes = empty(len(betas), len(epses), 4 * len(epses) + 1, 3.6 * len(betas))
    for row, beta in zip(axes, betas, strict=True):
        for axis, eps in zip(row, epses, strict=True):
            here = [x.result for x in outcomes if (x.asked.eps, x.asked.beta) == (eps, beta)]
            for name, colour in zip(FORMS, COLOURS, strict=False):
                values = np.array([result[name] for result in here])
                low, middle, high = np.percentile(values, (25, 50, 75), axis=0).clip(1e-9)
                axis.plot(draws, middle, label=name, color=colour, marker="o", markersize=3, linewidth=1.3)
                axis.fill_between(draws, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set(
                xscale="log",
                yscale="log",
                title=f"beta {beta:g}, eps {eps:g}",
                xlabel="draws a prompt (32 prompts)",
            )
            axis.set_xticks(draws, [f"{n}" for n in draws])
            axis.minorticks_off()
        row[0].set_ylabel("eps_app = D_p - L, reward units")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, path)
