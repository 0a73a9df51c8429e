"""Draws the four pictures of docs/theory.md."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.theory.labels import FORMS
from bench.theory.tables import read_as

COLOURS = ["#1b6ca8", "#d1495b", "#2e933c", "#7d5ba6", "#e08e0b", "#444444", "#17a2a2", "#b07aa1"]


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def save(made: Figure, path: Path) -> None:
    made.savefig(path, dpi=100, metadata={"Software": None})


def draw_curves(results: dict, path: Path) -> None:
    lam_p = results["optimum"][0][2]
    shown = dict(
        zip(
            ("C-DPO", "PD-DPO", "OPD", "primal-dual, RLOO", "primal-dual, group_norm", "RePO", "MoCAN"),
            COLOURS[1:],
            strict=True,
        )
    )
    shown |= {
        "CAID, dual step 1": COLOURS[0],
        "CAID, dual step 0.5": COLOURS[0],
        "CAID, secant": COLOURS[0],
        "SACPO": COLOURS[1],
    }
    one_shot, mark = ("MoCAN", "SACPO"), {"MoCAN": "*", "SACPO": "D"}
    made, axes = figure(3, 2, 11, 9)
    titles = ("from lambda = 0 (policy gradient: 0.05)", "from 3 lambda* (MoCAN, SACPO: at lambda*)")
    for column, (title, starts) in enumerate(
        zip(titles, (("0", "0.05"), ("3 lambda*", "lambda*", "lambda* given")), strict=True)
    ):
        for key, points in results.items():
            name, _, start = key.partition("|")
            if name not in shown or start not in starts or (start == "lambda*" and name not in one_shot):
                continue
            style = {"CAID, dual step 0.5": "--", "CAID, secant": ":"}.get(name, "-")
            x, *ys = zip(*points, strict=True)
            for row, y in enumerate(ys):
                axes[row, column].plot(
                    x, np.maximum(y, 1e-12) if row == 0 else y, label=read_as(name), color=shown[name], linestyle=style,
                    marker=mark.get(name), markersize=8, linewidth=1.3,
                )  # fmt: skip
        axes[0, column].set(title=title, yscale="log", ylabel="|slack|", ylim=(1e-9, 2))
        axes[1, column].axhline(lam_p, color="#999999", linewidth=0.8, linestyle=":")
        axes[1, column].set(ylabel="lambda (dotted: lambda*_p)", ylim=(-0.05, 3.2))
        axes[2, column].axhline(0, color="#999999", linewidth=0.8, linestyle=":")
        axes[2, column].set(ylabel="value - P_p*", xlabel="policy updates")
        for axis in axes[:, column]:
            axis.set_xlim(0, 36)
    made.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(made, path)


def draw_bounds(lines: list[dict], path: Path) -> None:
    made, axes = figure(1, 3, 14, 6)
    here = [x for x in lines if x["nu"] > 1e-6]
    nu = np.array([x["nu"] for x in here])
    left = axes[0, 0]
    for label, marker, colour, value in (
        (
            "|lambda*_p - lambda*|",
            "o",
            COLOURS[2],
            lambda x: np.linalg.norm(np.subtract(x["lambda*_p"], x["lambda*"])),
        ),
        ("P* - D_p*: cost of the class", "+", COLOURS[0], lambda x: x["P*"] - x["D_p*"]),
        ("D_p* - P_p*: duality gap, where above 1e-6", "x", COLOURS[1], lambda x: x["D_p*"] - x["P_p*"]),
    ):
        y = np.array([value(x) for x in here])
        left.scatter(nu[y > 1e-6], y[y > 1e-6], s=18, marker=marker, color=colour, label=label, alpha=0.6)
    left.plot(np.sort(nu), np.sort(nu) ** 2, color="#999999", linewidth=0.8, label="nu squared")
    left.set(ylabel="reward units; lambda", title="Gaps close with nu")
    panels = (
        (axes[0, 1], ("printed", "corrected"), "Printed bounds", (
            "Lemma 3: D - D_p <= B", "Thm 2: P* - D_p* <= B(lambda*_p)", "Lemma 4 with B", "Thm 3, R-OPT", "Thm 4, U-OPT",
            "Thm 6, U-OPT, soft labels",
        )),
        (axes[0, 2], ("sharp",), "With the measured gap in place of B", (
            "Thm 2: P* - D_p* <= gap(lambda*_p)", "gap(lambda*) <= P* - D_p*", "Lemma 4 with D(lambda*_p) - D*",
            "Lemma 5 off along h alone", "Lemma 5 with gap(lambda*_p)", "Thm 4, U-OPT, with gap",
        )),
    )  # fmt: skip
    for axis, forms, title, names in panels:
        for name, colour in zip(names, COLOURS, strict=False):
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
    save(made, path)


def draw_oscillation(results: dict[str, list[float]], path: Path) -> None:
    made, axes = figure(1, 1, 9, 3.8)
    for (name, slack), colour in zip(results.items(), COLOURS, strict=False):
        axes[0, 0].plot(range(1, len(slack) + 1), slack, label=name, color=colour, linewidth=1.3)
    axes[0, 0].axhline(0, color="#999999", linewidth=0.8)
    axes[0, 0].set(
        xlabel="dual steps",
        ylabel="slack",
        title="Equal dual steps, from 3 lambda*, exact expectations, eps 0.3",
    )
    axes[0, 0].legend(loc="upper right")
    save(made, path)


def draw_labels(results: list, path: Path) -> None:
    betas, epses = sorted({a[2] for a, _ in results}, reverse=True), sorted({a[1] for a, _ in results})
    draws = results[0][0][3]
    made, axes = figure(len(betas), len(epses), 4 * len(epses) + 1, 3.6 * len(betas))
    for row, beta in enumerate(betas):
        for column, eps in enumerate(epses):
            axis = axes[row, column]
            for name, colour in zip(FORMS, COLOURS, strict=False):
                values = np.array([r[name] for a, r in results if (a[1], a[2]) == (eps, beta)])
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
        axes[row, 0].set_ylabel("eps_app = D_p - L, reward units")
    made.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(made, path)
