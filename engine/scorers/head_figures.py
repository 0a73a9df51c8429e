"""How well a head orders and labels the rows that it was not trained on."""

import torch
from torch import Tensor

from engine.scorers.head_data import Row, Text


def heldout_figures(rows: list[Row], score_N: Tensor, index: dict[Text, int]) -> dict[str, dict]:
    """Judges the scores of each source, and of each kind of pairs in it ("source / kind").

    index: maps a text to its place among the N scores.
    """
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.source, []).append(row)
        if row.other is not None and row.kind:
            parts.setdefault(f"{row.source} / {row.kind}", []).append(row)
    return {part: _figures(chosen, score_N, index) for part, chosen in sorted(parts.items())}


def _figures(rows: list[Row], score_N: Tensor, index: dict[Text, int]) -> dict:
    pairs, labelled = [r for r in rows if r.other is not None], [r for r in rows if r.other is None]
    figures: dict = {"rows": len(rows)}
    if pairs:
        right = sum(float(score_N[index[r.text]] > score_N[index[r.other]]) for r in pairs)
        figures["pair_accuracy"] = right / len(pairs)
    if labelled:
        score, label = score_N[[index[r.text] for r in labelled]], torch.tensor([r.label for r in labelled])
        figures["positives"] = int(label.sum())
        figures["accuracy"] = float(((score > 0) == (label == 1)).double().mean())
        figures["calibration_error"] = calibration_error(torch.sigmoid(score), label)
        if 0 < label.sum() < len(label):
            figures["auc"] = auc(score, label)
    return figures


def auc(score_N: Tensor, label_N: Tensor) -> float:
    """Computes the share of (positive, negative) pairs in the right order, ties counted half."""
    positive, negative = score_N[label_N == 1].double(), score_N[label_N == 0].double().sort().values
    below = torch.searchsorted(negative, positive)
    below_or_equal = torch.searchsorted(negative, positive, right=True)
    return float((below + below_or_equal).double().mean() / 2 / len(negative))


def calibration_error(probability_N: Tensor, label_N: Tensor, bins: int = 10) -> float:
    """Computes the expected calibration error over bins of equal width.

    It is the mean of |share of positives - mean probability|, weighted by the number of rows in each bin.
    """
    bin_N = (probability_N * bins).long().clamp(max=bins - 1)
    error = 0.0
    for b in bin_N.unique().tolist():
        chosen = bin_N == b
        gap = (label_N[chosen].double().mean() - probability_N[chosen].mean()).abs()
        error += float(gap * chosen.double().mean())
    return error
