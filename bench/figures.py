"""`python -m bench.figures SAMPLES [RUN ...] [--preference RUN]`: what one-shot multipliers depend on, whether their predictions come
true, and how well scores are calibrated as preferences.

From stored scores alone; nothing is sampled. SAMPLES is a run folder with reference samples (any run, or a sweep's samples-seedSEED);
the RUNs are trained on these samples, or on others with equal settings. Writes docs/figures.md, figures.json and two pictures.

1. lambda* of random subsets of the prompts, and of the responses, at the run's own thresholds: its spread, the delta-method interval
   (arXiv 2405.19544 has no interval), and the bias of few responses.
2. Predicted improvement at lambda, by re-weighting reference samples, against the improvement measured on samples of the policy that was
   trained at it (arXiv 2405.19544, Table 4).
3. Of a run on preference scores (`pecan`, or `caid --scores preference`): the probability that one response is preferred to another
   according to log-ratios of aligned policies and to model scores, against the probability of the labels (arXiv 2405.19544, Figure 6).
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine import dual, stages
from engine.checkpoint import Run, load, write_whole
from engine.errors import UserError
from engine.evaluate import Evaluation
from engine.metrics import read_rows
from engine.records import Scores
from engine.report import png
from engine.stages import ReferenceSamples

DOCS = Path(__file__).parent.parent / "docs"
DRAWS = 60
PROMPTS = (25, 50, 100, 200, 400)
RESPONSES = (2, 3, 4, 5, 6, 7, 8)
BINS = 10


def scores_of(folder: Path) -> tuple[Tensor, Tensor, Tensor, float]:
    """(reward [P, G], utility [P, G, J], aim [J], beta) of a run's reference samples, in its units."""
    (path,) = (folder / "stages").glob("01-reference.safetensors")
    scores = load(path, ReferenceSamples).sampled.scores
    (row,) = read_rows(folder, "reference")
    _, config = Run.read_config(folder)
    if set(config["cost_on"]) - {"all"} or min(config["cost_rate"], default=1) < 1:
        raise UserError(
            f"{folder}: it has a constraint on one kind of prompts or a rate, which these figures do not show; give another run."
        )
    scores = stages.units_of(row, []).apply(scores)
    return scores.reward_PG, scores.utility_PGJ, torch.tensor(row["aim"], dtype=torch.float64), config["beta"]


def subsets(reward_PG: Tensor, utility_PGJ: Tensor, aim_J: Tensor, beta: float, draws: int = DRAWS) -> dict[str, list[dict]]:
    """lambda* of subsets of the prompts and of the responses: mean, 2.5 and 97.5 % of the draws, and the mean half width of the
    delta-method intervals. Draws that do not support the thresholds count as infinite in the quantiles and are left out of the mean."""
    P, G = reward_PG.shape
    full = dual.solve(reward_PG, utility_PGJ, aim_J, beta).lam
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[dict]] = {"prompts": [], "responses": []}
    for kind, sizes in (("prompts", PROMPTS), ("responses", RESPONSES)):
        for n in sizes:
            if n > (P if kind == "prompts" else G):
                continue
            lam, half, ess = [], [], []
            for _ in range(draws):
                if kind == "prompts":
                    # Of other prompts like these, not of these: with replacement.
                    rows = torch.randint(P, (n,), generator=generator)
                    r, g = reward_PG[rows], utility_PGJ[rows]
                else:
                    own = torch.rand(P, G, generator=generator).argsort(1)[:, :n]
                    r, g = reward_PG.gather(1, own), utility_PGJ.gather(1, own[..., None].expand(-1, -1, utility_PGJ.shape[2]))
                try:
                    solution = dual.solve(r, g, aim_J, beta, start_J=full)
                except UserError:
                    lam.append(torch.full_like(full, math.inf))
                    continue
                interval = dual.lam_interval(r, g, aim_J, beta, solution)
                lam.append(solution.lam)
                half.append((interval.high - interval.low) / 2)
                ess.append(float(solution.ess.mean()))
            low, high = dual.percentiles(torch.stack(lam))
            kept = [x for x in lam if x.isfinite().all()]
            mean = torch.stack(kept).mean(0).tolist() if kept else None
            found[kind].append({
                "n": n, "mean": mean, "low": low.tolist(), "high": [x if math.isfinite(x) else None for x in high.tolist()],
                "half": torch.stack(half).mean(0).tolist() if half else None, "unsupported": len(lam) - len(kept),
                "ess": float(np.mean(ess)) if ess else None,
            })  # fmt: skip
    return {"full": full.tolist(), **found}


def realised(folder: Path, reward_PG: Tensor, utility_PGJ: Tensor, beta: float) -> list[dict]:
    """Predicted and measured improvement of every policy of a run whose multipliers are known."""
    rows = []

    def add(what: str, lam: list[float], measured: list[float], se: list[float], reward: float, reward_se: float) -> None:
        gain_P, gain_PJ = dual.tilted_improvement(reward_PG, utility_PGJ, lam, beta)
        rows.append({
            "run": folder.name, "what": what, "lam": lam, "predicted": gain_PJ.mean(0).tolist(), "measured": measured, "se": se,
            "predicted reward": float(gain_P.mean()), "reward": reward, "reward se": reward_se,
        })  # fmt: skip

    for row in read_rows(folder, "iteration"):
        add(f"iteration {row['iteration']}", row["lam"], row["improvement"], row["improvement_se"], row["reward"], row["reward_se"])
    if (folder / "evaluation.json").is_file():
        e = Evaluation.from_dict(json.loads((folder / "evaluation.json").read_text()))
        lam = read_rows(folder, "policy")[-1]["lam"]
        estimates = [c.estimate for c in e.constraints]
        add("held out", lam, [x.mean for x in estimates], [x.se for x in estimates], e.reward.mean, e.reward.se)
    return rows


def reliability(predicted_N: Tensor, truth_N: Tensor, bins: int = BINS) -> dict:
    """Probabilities that the first response of a pair is preferred, in bins of equally many pairs: mean predicted and mean true ones, their
    mean distance (the expected calibration error), and how often both prefer the same response."""
    order = predicted_N.argsort()
    parts = [order[i * len(order) // bins : (i + 1) * len(order) // bins] for i in range(bins)]
    predicted, true = ([float(x[part].mean()) for part in parts] for x in (predicted_N, truth_N))
    sizes = [len(part) / len(order) for part in parts]
    return {
        "predicted": predicted, "true": true,
        "error": sum(n * abs(a - b) for n, a, b in zip(sizes, predicted, true, strict=True)),
        "agreement": float(((predicted_N > 0.5) == (truth_N > 0.5)).double().mean()),
    }  # fmt: skip


def pair_differences(score_PG: Tensor) -> Tensor:
    """Score of one response minus that of another, of all pairs of a prompt in both orders: [P G (G - 1)]."""
    G = score_PG.shape[1]
    return (score_PG[:, :, None] - score_PG[:, None, :])[:, ~torch.eye(G, dtype=torch.bool)].flatten().double()


def calibration(folder: Path) -> list[dict]:
    """Scores of a run on preference scores as predictions of preferences. The labels of its alignment were drawn from its scorers, which
    are the truth for the log-ratios; an audit with the name of a cost is an annotator that neither the scorer nor the policy has seen."""
    found = sorted((folder / "stages").glob("*-preference-scores.safetensors"))
    if not found:
        raise UserError(f"--preference {folder}: it has no log-ratio scores; give a run of pecan, or of caid --scores preference.")
    scores = load(found[0], Scores)
    _, config = Run.read_config(folder)
    (row,) = read_rows(folder, "reference")
    names = ["reward", *row["names"]]
    ratio = [scores.reward_PG, *scores.utility_PGJ.unbind(2)]
    own, audits = scores.audit_PGA.unbind(2)[: len(names)], scores.audit_PGA.unbind(2)[len(names) :]
    rows = []
    for i, name in enumerate(names):
        log_ratio, model = pair_differences(ratio[i]), pair_differences(own[i])
        annotators = {f"{name}: the labels": model}
        annotators |= {f"{name}: {a}": pair_differences(x) for a, x in zip(row["audit_names"], audits, strict=True) if a.startswith(name)}
        for truth, difference in annotators.items():
            predictions = {
                "log-ratio, beta as trained": config["beta"] * log_ratio,
                "log-ratio, standardised": log_ratio / dual.within_deviation(ratio[i], name),
            }
            if difference is not model:
                predictions["model score"] = model
            for what, value in predictions.items():
                rows.append({"truth": truth, "what": what, **reliability(torch.sigmoid(value), torch.sigmoid(difference))})
    return rows


def draw_calibration(rows: list[dict]) -> Figure:
    """A panel for each truth: mean true probability against mean predicted one."""
    truths = list(dict.fromkeys(row["truth"] for row in rows))
    figure = Figure(figsize=(4.6 * len(truths), 4.6), dpi=130, layout="constrained")
    for axis, truth in zip(figure.subplots(1, len(truths), squeeze=False)[0], truths, strict=True):
        axis.plot([0, 1], [0, 1], color="#222222", linewidth=1, linestyle=":", label="calibrated")
        for row in rows:
            if row["truth"] == truth:
                axis.plot(row["predicted"], row["true"], "o-", markersize=4, label=row["what"])
        axis.set(xlabel="predicted probability of a preference", ylabel="probability of the labels", xlim=(0, 1), ylim=(0, 1))
        axis.set_title(truth, loc="left")
        _legend(axis)
    return figure


def draw_subsets(found: dict) -> Figure:
    """lambda* against the numbers of prompts and responses."""
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2), ("prompts", "responses"), strict=True):
        x = [row["n"] for row in found[kind]]
        for j, lam in enumerate(found["full"]):
            colour = f"C{j}"
            mean = [row["mean"][j] if row["mean"] else math.nan for row in found[kind]]
            low = np.array([row["low"][j] for row in found[kind]])
            high = np.array([row["high"][j] if row["high"][j] is not None else math.nan for row in found[kind]])
            half = np.array([row["half"][j] if row["half"] else math.nan for row in found[kind]])
            axis.plot(x, mean, "o-", color=colour, label=f"mean of {DRAWS} subsets" if j == 0 else None)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, label="95 % of subsets" if j == 0 else None)
            axis.errorbar(
                x, mean, yerr=half, fmt="none", ecolor="#222222", capsize=3, label="delta-method interval, mean width" if j == 0 else None
            )
            axis.axhline(lam, color=colour, linewidth=1, linestyle=":", label="all samples" if j == 0 else None)
        axis.set(xlabel=f"number of {kind}", ylabel="one-shot lambda (run's units)")
        axis.set_title("Drawn with replacement: spread" if kind == "prompts" else "Fewer responses of each prompt: bias", loc="left")
        if kind == "prompts":
            axis.set_xscale("log")
            axis.set_xticks(x, [str(n) for n in x])
            axis.minorticks_off()
        _legend(axis)
    return figure


def draw_realised(rows: list[dict]) -> Figure:
    """Measured against predicted improvements."""
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    for axis, what in zip(figure.subplots(1, 2), ("utility", "reward"), strict=True):
        runs = list(dict.fromkeys(row["run"] for row in rows))
        ends = []
        for i, run in enumerate(runs):
            own = [row for row in rows if row["run"] == run]
            if what == "utility":
                x, y, se = ([row[k][0] for row in own] for k in ("predicted", "measured", "se"))
            else:
                x, y, se = ([row[k] for row in own] for k in ("predicted reward", "reward", "reward se"))
            axis.errorbar(x, y, yerr=1.96 * np.array(se), fmt="o", markersize=4, linewidth=0.8, color=f"C{i % 10}", label=run[-30:])
            ends += [*x, *y]
        axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#222222", linewidth=1, linestyle=":", label="as predicted")
        axis.set(xlabel=f"predicted improvement of the {what}", ylabel="measured improvement, \u00b11.96 se")
        axis.set_title(f"{'First utility' if what == 'utility' else 'Reward'}: re-weighted samples against policies", loc="left")
        _legend(axis)
    return figure


def _legend(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def page(samples: Path, shape: tuple[int, int], found: dict, rows: list[dict], calibrated: list[dict]) -> str:
    """docs/figures.md."""
    lines = [
        "# What one-shot multipliers depend on, and whether their predictions come true",
        "",
        f"From stored scores (`python -m bench.figures`), nothing sampled anew: {shape[0]} prompts x {shape[1]} responses of the "
        "quickstart's reference. Improvements and lambda are in within-prompt standard deviations.",
        "",
        "![One-shot lambda of subsets](figures-subsets.png)",
        "",
        "| of | number | mean lambda | 95 % of subsets | half width of the delta-method interval | effective sample size | not supported |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("prompts", "responses"):
        for row in found[kind]:
            mean, half = (", ".join(f"{x:.3f}" for x in row[k]) if row[k] else "-" for k in ("mean", "half"))
            ends = ", ".join(f"[{a:.2f}, {'unbounded' if b is None else f'{b:.2f}'}]" for a, b in zip(row["low"], row["high"], strict=True))
            ess = "-" if row["ess"] is None else f"{row['ess']:.1f}"
            lines.append(f"| {kind} | {row['n']} | {mean} | {ends} | {half} | {ess} | {row['unsupported']} of {DRAWS} |")
    lines += [
        "",
        f"All samples: lambda {', '.join(f'{x:.3f}' for x in found['full'])}. Subsets of the prompts are drawn with replacement; their "
        "spread is what the interval should cover. Fewer responses make lambda larger on average: the best of few is not as good, so more "
        "weight is needed for the same predicted improvement.",
    ]
    if rows:
        lines += [
            "",
            "![Predicted against measured improvements](figures-realised.png)",
            "",
            "| run | policy | lambda | predicted | measured | reward predicted | reward measured |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            lam, predicted = (", ".join(f"{x:.2f}" for x in row[k]) for k in ("lam", "predicted"))
            measured = ", ".join(f"{x:+.2f} \u00b1 {1.96 * s:.2f}" for x, s in zip(row["measured"], row["se"], strict=True))
            reward = f"{row['predicted reward']:+.2f} | {row['reward']:+.2f} \u00b1 {1.96 * row['reward se']:.2f}"
            lines.append(f"| {row['run']} | {row['what']} | {lam} | {predicted} | {measured} | {reward} |")
        lines += [
            "",
            "The prediction re-weights the reference's samples with the tilt; a trained policy falls short of it as far as its few steps "
            "and its class do. Policies measured in an iteration are judged on training prompts outside its pairs, the last one on "
            "held-out ones.",
        ]
    if calibrated:
        lines += [
            "",
            "![Calibration of scores as preferences](figures-calibration.png)",
            "",
            "| truth | prediction | mean distance from calibration | same preference |",
            "|---|---|---|---|",
        ]
        lines += [f"| {r['truth']} | {r['what']} | {r['error']:.3f} | {100 * r['agreement']:.0f} % |" for r in calibrated]
        lines += [
            "",
            f"All pairs of a prompt's responses, in {BINS} bins of equally many. The labels are Bradley-Terry draws from the run's "
            "scorers, of one pair of each prompt that the alignment saw; the truth is their probability. Where an audit judges, neither "
            "score was fitted to it.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.split("\n")[0])
    parser.add_argument("samples", type=Path, help="run folder with reference samples")
    parser.add_argument("runs", type=Path, nargs="*", help="run folders whose policies are compared with the predictions")
    parser.add_argument("--preference", type=Path, help="run folder on preference scores, whose calibration is shown")
    given = parser.parse_args()
    calibrated = [] if given.preference is None else calibration(given.preference)
    reward_PG, utility_PGJ, aim_J, beta = scores_of(given.samples)
    found = subsets(reward_PG, utility_PGJ, aim_J, beta)
    rows = [row for run in given.runs for row in realised(run, reward_PG, utility_PGJ, beta)]
    write_whole(DOCS / "figures-subsets.png", png(lambda: draw_subsets(found)))
    if rows:
        write_whole(DOCS / "figures-realised.png", png(lambda: draw_realised(rows)))
    write_whole(DOCS / "figures.md", page(given.samples, tuple(reward_PG.shape), found, rows, calibrated).encode())
    if calibrated:
        write_whole(DOCS / "figures-calibration.png", png(lambda: draw_calibration(calibrated)))
    stages.write_json(DOCS / "figures.json", {"subsets": found, "realised": rows, "calibration": calibrated})
    print(f"written: {DOCS / 'figures.md'}")


if __name__ == "__main__":
    main()
