"""Predicted improvement at lambda, by re-weighting reference samples, against that
of the policy that was trained at it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bench.figures.drawing import finish
from bench.figures.stored import Stored
from engine import dual
from engine.run.rows import IterationRow, read_rows
from engine.sweep.outcomes import kept_lam
from engine.verdict.evaluation import Evaluation


class Improvement(NamedTuple):
    """The measured improvement of a policy over the reference."""

    utility: list[float]  # of each constraint
    utility_se: list[float]
    reward: float
    reward_se: float


def realised(folder: Path, samples: Stored) -> list[dict]:
    """Returns predicted and measured improvement of every policy of a run whose multipliers are known."""
    rows = []

    def add(what: str, lam: list[float], measured: Improvement) -> None:
        gain_P, gain_PJ = dual.tilted_improvement(samples.reward_PG, samples.utility_PGJ, lam, samples.beta)
        rows.append(
            {
                "run": folder.name,
                "what": what,
                "lam": lam,
                "predicted": gain_PJ.mean(0).tolist(),
                "measured": measured.utility,
                "se": measured.utility_se,
                "predicted reward": float(gain_P.mean()),
                "reward": measured.reward,
                "reward se": measured.reward_se,
            }
        )

    for row in read_rows(folder, IterationRow):
        measured = Improvement(row.improvement, row.improvement_se, row.reward, row.reward_se)
        add(f"iteration {row.iteration}", row.lam, measured)
    lam, verdict = kept_lam(folder), folder / "evaluation.json"
    if lam is not None and verdict.is_file():
        evaluation = Evaluation.read(verdict, cure="resume the run")
        estimates = [c.estimate for c in evaluation.constraints]
        measured = Improvement(
            [x.mean for x in estimates],
            [x.se for x in estimates],
            evaluation.reward.mean,
            evaluation.reward.se,
        )
        add("held out", lam, measured)
    return rows


def draw_realised(rows: list[dict]) -> Figure:
    """Draws measured against predicted improvements."""
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    runs = list(dict.fromkeys(row["run"] for row in rows))
    for axis, what in zip(figure.subplots(1, 2), ("utility", "reward"), strict=True):
        ends = []
        for i, run in enumerate(runs):
            here = [row for row in rows if row["run"] == run]
            if what == "utility":
                x, y, se = ([row[k][0] for row in here] for k in ("predicted", "measured", "se"))
            else:
                x, y, se = ([row[k] for row in here] for k in ("predicted reward", "reward", "reward se"))
            style = {"fmt": "o", "markersize": 4, "linewidth": 0.8, "color": f"C{i % 10}"}
            axis.errorbar(x, y, yerr=1.96 * np.array(se), label=run[-30:], **style)
            ends += [*x, *y]
        line = [min(ends), max(ends)]
        axis.plot(line, line, color="#222222", linewidth=1, linestyle=":", label="as predicted")
        axis.set(xlabel=f"predicted improvement of the {what}", ylabel="measured improvement, \u00b11.96 se")
        first = "First utility" if what == "utility" else "Reward"
        axis.set_title(f"{first}: re-weighted samples against policies", loc="left")
        finish(axis)
    return figure
