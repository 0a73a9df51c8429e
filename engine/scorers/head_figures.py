"""Held-out figures of a head."""

import torch
from torch import Tensor

from engine.scorers.head_data import Row, Text


def evaluate(rows: list[Row], score_N: Tensor, at: dict[Text, int]) -> dict[str, dict]:
    """Figures by source, and for pairs also by kind ("source / kind")."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.source, []).append(row)
        if row.other is not None and row.kind:
            parts.setdefault(f"{row.source} / {row.kind}", []).append(row)
    figures = {}
    for part, chosen in sorted(parts.items()):
        pairs, labels = [r for r in chosen if r.other is not None], [r for r in chosen if r.other is None]
        figure: dict = {"rows": len(chosen)}
        if pairs:
            figure["pair_accuracy"] = sum(float(score_N[at[r.text]] > score_N[at[r.other]]) for r in pairs) / len(pairs)
        if labels:
            score, label = score_N[[at[r.text] for r in labels]], torch.tensor([r.label for r in labels])
            figure |= {
                "positives": int(label.sum()),
                "accuracy": float(((score > 0) == (label == 1)).double().mean()),
                "calibration_error": calibration_error(torch.sigmoid(score), label),
            }
            if 0 < label.sum() < len(label):
                figure["auc"] = auc(score, label)
        figures[part] = figure
    return figures


def auc(score_N: Tensor, label_N: Tensor) -> float:
    """Share of (positive, negative) pairs in the right order, ties half."""
    positive, negative = score_N[label_N == 1].double(), score_N[label_N == 0].double().sort().values
    below, upto = torch.searchsorted(negative, positive), torch.searchsorted(negative, positive, right=True)
    return float((below + upto).double().mean() / 2 / len(negative))


def calibration_error(probability_N: Tensor, label_N: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean over equal-width bins of |share of positives - mean probability|, weighted by rows."""
    which = (probability_N * bins).long().clamp(max=bins - 1)
    return sum(
        float((label_N[which == b].double().mean() - probability_N[which == b].mean()).abs() * (which == b).double().mean())
        for b in which.unique().tolist()
    )
