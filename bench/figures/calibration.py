"""How well scores of a run on preferences are calibrated as preferences."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.figures.drawing import finish
from bench.figures.stored import preference_scores, row
from engine import dual
from engine.config import was_by_preference
from engine.errors import UserError
from engine.run.contents import read_contents
from engine.run.rows import ReferenceRow

BINS = 10


def reliability(predicted_N: Tensor, truth_N: Tensor, bins: int = BINS) -> dict:
    """Compares predicted and true probabilities that the first response of a pair is preferred,
    in bins of equally many pairs.

    Returns the mean predicted and mean true ones, their mean distance (the expected calibration error), and
    how often both prefer the same response.
    """
    order = predicted_N.argsort()
    parts = [order[i * len(order) // bins : (i + 1) * len(order) // bins] for i in range(bins)]
    predicted, true = ([float(x[part].mean()) for part in parts] for x in (predicted_N, truth_N))
    sizes = [len(part) / len(order) for part in parts]
    return {
        "predicted": predicted,
        "true": true,
        "error": sum(n * abs(a - b) for n, a, b in zip(sizes, predicted, true, strict=True)),
        "agreement": float(((predicted_N > 0.5) == (truth_N > 0.5)).double().mean()),
    }


def pair_differences(score_PG: Tensor) -> Tensor:
    """Returns the score of one response minus that of another, for all pairs of a prompt
    in both orders: [P G (G - 1)]."""
    G = score_PG.shape[1]
    others = ~torch.eye(G, dtype=torch.bool)
    return (score_PG[:, :, None] - score_PG[:, None, :])[:, others].flatten().double()


def judge_preferences(folder: Path) -> list[dict]:
    """Judges scores of a run on preference scores as predictions of preferences.

    Unless they are those of a file, the labels of its alignment were drawn from its scorers,
    which are the truth for the log-ratios. An audit with the name of a cost is an annotator that neither
    the scorer nor the policy has seen.
    """
    contents = read_contents(folder)
    algorithm, config = contents.algorithm, contents.config
    if not was_by_preference(algorithm, config):
        raise UserError(
            f"--preference {folder}: it has no log-ratio scores; give a run of pecan, or of caid --scores "
            "preference."
        )
    scores, reference = preference_scores(folder), row(folder, ReferenceRow)
    names = ["reward", *reference.names]
    beta = config["beta"]
    by_scorers = "the run's scorer" if config.get("preferences") else "the labels"
    ratios = [scores.reward_PG, *scores.utility_PGJ.unbind(2)]
    # The scorers of reward and costs come first among the audits.
    columns = scores.audit_PGA.unbind(2)
    scorers = columns[: len(names)]
    audits = list(zip(reference.audit_names, columns[len(names) :], strict=False))
    rows = []
    for name, ratio, scorer in zip(names, ratios, scorers, strict=True):
        log_ratio, model = pair_differences(ratio), pair_differences(scorer)
        annotators = {f"{name}: {by_scorers}": model}
        annotators |= {f"{name}: {a}": pair_differences(x) for a, x in audits if a.startswith(name)}
        for truth, difference in annotators.items():
            predictions = {
                "log-ratio, beta as trained": beta * log_ratio,
                "log-ratio, standardised": log_ratio / dual.within_deviation(ratio, name),
            }
            if difference is not model:
                predictions["model score"] = model
            for what, value in predictions.items():
                judged = reliability(torch.sigmoid(value), torch.sigmoid(difference))
                rows.append({"truth": truth, "what": what, **judged})
    return rows


def draw_calibration(rows: list[dict]) -> Figure:
    """Draws mean true probability against mean predicted one, a panel for each truth."""
    truths = list(dict.fromkeys(x["truth"] for x in rows))
    figure = Figure(figsize=(4.6 * len(truths), 4.6), dpi=130, layout="constrained")
    for axis, truth in zip(figure.subplots(1, len(truths), squeeze=False)[0], truths, strict=True):
        axis.plot([0, 1], [0, 1], color="#222222", linewidth=1, linestyle=":", label="calibrated")
        for x in rows:
            if x["truth"] == truth:
                axis.plot(x["predicted"], x["true"], "o-", markersize=4, label=x["what"])
        axis.set(
            xlabel="predicted probability of a preference",
            ylabel="true probability",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        axis.set_title(truth, loc="left")
        finish(axis)
    return figure
