"""`python -m bench.figures SAMPLES [RUN ...] [--preference RUN]`: what one-shot multipliers depend on, whether their predictions come
true, and how well scores are calibrated as preferences.

From stored scores alone; nothing is sampled. SAMPLES is a run folder with reference samples (any run, or a sweep's samples-seedSEED);
the predictions for each RUN come from its own. Writes docs/figures.md, figures.json and two pictures.

1. lambda* of random subsets of the prompts, and of the responses, at the run's own thresholds: its spread, the delta-method interval
   (arXiv 2405.19544 has no interval), and the bias of few responses.
2. Predicted improvement at lambda, by re-weighting reference samples, against the improvement measured on samples of the policy that was
   trained at it (arXiv 2405.19544, Table 4).
3. Of a run on preference scores (`pecan`, or `caid --scores preference`): the probability that one response is preferred to another
   according to log-ratios of aligned policies and to model scores, against the probability of the labels, or according to an audit
   (arXiv 2405.19544, Figure 6). Labels of a file are not known here: then the run's scorers are one more judge.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine import dual
from engine.config import RunConfig, was_by_preference
from engine.errors import UserError
from engine.files import write_json, write_whole
from engine.records import Scores, Units
from engine.report.drawing import png
from engine.run.rows import read_rows
from engine.run.run import Run
from engine.run.store import RecordT, Torn, load
from engine.stages.inputs import DEFAULT_MODEL
from engine.stages.reference import ReferenceSamples, units_of
from engine.sweep.outcomes import kept_lam
from engine.verdict.evaluation import Evaluation

DOCS = Path(__file__).parent.parent.parent / "docs"
DRAWS = 60
PROMPTS = (25, 50, 100, 200, 400)
RESPONSES = (2, 3, 4, 5, 6, 7, 8)
BINS = 10


@dataclass(frozen=True)
class Stored:
    """What a run folder holds of the reference's samples, in the run's own units."""

    reward_PG: Tensor
    utility_PGJ: Tensor
    aim_J: Tensor
    beta: float
    says: str  # its name, seed, model and versions


def stored(folder: Path) -> Stored:
    """Scores of a run's reference samples: of its scorers, or of its aligned policies where it was trained on these.

    Raises: UserError for a folder without samples, or a constraint that the figures do not show.
    """
    algorithm, values = Run.read_config(folder)
    # Older runs lack what was fixed then.
    config = RunConfig(**{f.name: values[f.name] for f in fields(RunConfig) if f.name in values})
    if set(config.cost_on) - {"all"} or min(config.cost_rate, default=1) < 1:
        raise UserError(
            f"{folder}: it has a constraint on one kind of prompts or a rate, which these figures do not show; give another run."
        )
    if was_by_preference(algorithm, values):
        scores = _load(folder, "*-preference-scores.safetensors", Scores)
        reward, *utility = _row(folder, "preference")["log_ratio_sd"]
        units = Units(reward=reward, utility_J=utility, audit_A=[1.0] * scores.audit_PGA.shape[2])
        aim = _row(folder, "dual")["aim"]
    else:
        scores = _load(folder, "01-reference.safetensors", ReferenceSamples).sampled.scores
        units, aim = units_of(_row(folder, "reference"), []), _row(folder, "reference")["aim"]
    scores = units.apply(scores)
    versions = json.loads((folder / "config.json").read_text())["versions"]
    shown = ", ".join(f"{name} {value[:12]}" for name, value in sorted(versions.items()))
    return Stored(
        scores.reward_PG, scores.utility_PGJ, torch.tensor(aim, dtype=torch.float64), config.beta,
        f"`{folder.name}`: {algorithm}, seed {config.seed}, {config.model or DEFAULT_MODEL}; {shown}",
    )  # fmt: skip


def _load(folder: Path, pattern: str, cls: type[RecordT]) -> RecordT:
    found = sorted((folder / "stages").glob(pattern))
    if not found:
        raise UserError(f"{folder}: it has no samples with scores (stages/{pattern}); give a run whose first stages are done.")
    try:
        return load(found[0], cls)
    except Torn as error:
        raise UserError(f"{error}; give another run.") from error


def _row(folder: Path, kind: str) -> dict:
    rows = read_rows(folder, kind)
    if not rows:
        raise UserError(f"{folder}: it has no row {kind!r} in metrics.jsonl; give a run whose first stages are done.")
    return rows[0]


def subsets(reward_PG: Tensor, utility_PGJ: Tensor, aim_J: Tensor, beta: float, draws: int = DRAWS) -> dict[str, list[dict]]:
    """lambda* of subsets of the prompts and of the responses: mean, 2.5 and 97.5 % of the draws, and the mean half width of the
    delta-method intervals. Draws that do not support the thresholds count as infinite in the quantiles, which are None there, and are left
    out of the mean."""
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
                "n": n, "mean": mean, "low": _finite(low), "high": _finite(high),
                "half": torch.stack(half).mean(0).tolist() if half else None, "unsupported": len(lam) - len(kept),
                "ess": float(np.mean(ess)) if ess else None,
            })  # fmt: skip
    return {"full": full.tolist(), **found}


def _finite(values: Tensor) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in values.tolist()]


def realised(folder: Path, own: Stored) -> list[dict]:
    """Predicted and measured improvement of every policy of a run whose multipliers are known."""
    rows = []

    def add(what: str, lam: list[float], measured: list[float], se: list[float], reward: float, reward_se: float) -> None:
        gain_P, gain_PJ = dual.tilted_improvement(own.reward_PG, own.utility_PGJ, lam, own.beta)
        rows.append({
            "run": folder.name, "what": what, "lam": lam, "predicted": gain_PJ.mean(0).tolist(), "measured": measured, "se": se,
            "predicted reward": float(gain_P.mean()), "reward": reward, "reward se": reward_se,
        })  # fmt: skip

    for row in read_rows(folder, "iteration"):
        add(f"iteration {row['iteration']}", row["lam"], row["improvement"], row["improvement_se"], row["reward"], row["reward_se"])
    lam = kept_lam(folder)
    if lam is not None and (folder / "evaluation.json").is_file():
        e = Evaluation.from_dict(json.loads((folder / "evaluation.json").read_text()))
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
    """Scores of a run on preference scores as predictions of preferences. Unless they are those of a file, the labels of its alignment
    were drawn from its scorers, which are the truth for the log-ratios; an audit with the name of a cost is an annotator that neither the
    scorer nor the policy has seen."""
    algorithm, config = Run.read_config(folder)
    if not was_by_preference(algorithm, config):
        raise UserError(f"--preference {folder}: it has no log-ratio scores; give a run of pecan, or of caid --scores preference.")
    scores = _load(folder, "*-preference-scores.safetensors", Scores)
    row = _row(folder, "reference")
    by_scorers = "the run's scorer" if config.get("preferences") else "the labels"
    names = ["reward", *row["names"]]
    ratio = [scores.reward_PG, *scores.utility_PGJ.unbind(2)]
    own, audits = scores.audit_PGA.unbind(2)[: len(names)], scores.audit_PGA.unbind(2)[len(names) :]
    rows = []
    for i, name in enumerate(names):
        log_ratio, model = pair_differences(ratio[i]), pair_differences(own[i])
        annotators = {f"{name}: {by_scorers}": model}
        annotators |= {
            f"{name}: {a}": pair_differences(x) for a, x in zip(row.get("audit_names", []), audits, strict=False) if a.startswith(name)
        }
        for truth, difference in annotators.items():
            predictions = {
                "log-ratio, beta as trained": config.get("beta", RunConfig.beta) * log_ratio,
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
        axis.set(xlabel="predicted probability of a preference", ylabel="true probability", xlim=(0, 1), ylim=(0, 1))
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
            low, high = (np.array([math.nan if row[k][j] is None else row[k][j] for row in found[kind]]) for k in ("low", "high"))
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


def page(command: str, samples: Stored, found: dict, rows: list[dict], runs: list[Stored], calibrated: list[dict]) -> str:
    """docs/figures.md."""
    P, G = samples.reward_PG.shape
    lines = [
        "# What one-shot multipliers depend on, and whether their predictions come true",
        "",
        f"From stored scores, nothing sampled anew: {P} prompts x {G} responses of the reference. Improvements and lambda are in "
        "within-prompt standard deviations.",
        "",
        f"    {command}",
        "",
        f"Samples: {samples.says}.",
        "",
        "![One-shot lambda of subsets](figures-subsets.png)",
        "",
        "| of | number | mean lambda | 95 % of subsets | half width of the delta-method interval | effective sample size | not supported |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("prompts", "responses"):
        for row in found[kind]:
            mean, half = (", ".join(f"{x:.3f}" for x in row[k]) if row[k] else "unsupported" for k in ("mean", "half"))
            ends = ", ".join(f"[{_number(a)}, {_number(b)}]" for a, b in zip(row["low"], row["high"], strict=True))
            ess = "unsupported" if row["ess"] is None else f"{row['ess']:.1f}"
            lines.append(f"| {kind} | {row['n']} | {mean} | {ends} | {half} | {ess} | {row['unsupported']} of {DRAWS} |")
    lines += [
        "",
        f"All samples: lambda {', '.join(f'{x:.3f}' for x in found['full'])}. Subsets of the prompts are drawn with replacement; their "
        "spread is what the interval should cover. Fewer responses make lambda larger on average: the best of few is not as good, so more "
        "weight is needed for the same predicted improvement.",
    ]
    if rows:
        lines += ["", *(f"- Run {run.says}" for run in runs)]
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
            f"All pairs of a prompt's responses, in {BINS} bins of equally many. Labels are Bradley-Terry draws from the run's scorers, of "
            "one pair of each prompt that the alignment saw; the truth is their probability. A run aligned to the labels of a file, which "
            "are not here, is set against its scorers. Where an audit judges, neither score was fitted to it.",
        ]
    return "\n".join(lines) + "\n"


def _number(x: float | None) -> str:
    return "unsupported" if x is None else f"{x:.2f}"


def main() -> int:
    """See the module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.split("\n")[0])
    parser.add_argument("samples", type=Path, help="run folder with reference samples")
    parser.add_argument("runs", type=Path, nargs="*", help="run folders whose policies are compared with the predictions")
    parser.add_argument("--preference", type=Path, help="run folder on preference scores, whose calibration is shown")
    given = parser.parse_args()
    try:
        known = {folder: stored(folder) for folder in dict.fromkeys([given.samples, *given.runs])}
        samples, runs = known[given.samples], [known[run] for run in given.runs]
        calibrated = [] if given.preference is None else calibration(given.preference)
        found = subsets(samples.reward_PG, samples.utility_PGJ, samples.aim_J, samples.beta)
        rows = [row for run in given.runs for row in realised(run, known[run])]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    folders = [given.samples, *given.runs, *(["--preference", given.preference] if given.preference else [])]
    command = " ".join(["python -m bench.figures", *(x.name if isinstance(x, Path) and x.is_absolute() else str(x) for x in folders)])
    write_whole(DOCS / "figures-subsets.png", png(lambda: draw_subsets(found)))
    if rows:
        write_whole(DOCS / "figures-realised.png", png(lambda: draw_realised(rows)))
    if calibrated:
        write_whole(DOCS / "figures-calibration.png", png(lambda: draw_calibration(calibrated)))
    write_json(DOCS / "figures.json", {"subsets": found, "realised": rows, "calibration": calibrated})
    write_whole(DOCS / "figures.md", page(command, samples, found, rows, runs, calibrated).encode())
    print(f"written: {DOCS / 'figures.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
