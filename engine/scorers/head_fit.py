"""Fit a head: one convex problem in float64, solved by Newton's method, so that
equal data give equal heads."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.scorers.head_data import Row, Text


def fit_head(rows: list[Row], pooled_ND: Tensor, index: dict[Text, int], l2: float) -> tuple[Tensor, float]:
    """Fits weight (float64 [D]) and bias to the rows; `index` maps a text to its place among the N states.

    Minimises  sum over sources of  mean softplus(-margin)  +  l2/2 |w|^2  over w and b, with standardised
    states z. The margin is w . (z_chosen - z_rejected) for a pair (Bradley-Terry) and +-(w . z + b) for a
    label. The standardisation is then folded into weight and bias. Where there are no labels, the bias makes
    the mean score of the training texts 0.
    """
    used = torch.tensor(sorted({index[text] for row in rows for text in row.texts}))
    mean_D, std_D = pooled_ND[used].double().mean(0), pooled_ND[used].double().std(0, correction=0)
    # A state that never varies gets weight 0.
    std_D = torch.where(std_D > 1e-8 * std_D.max(), std_D, torch.inf)
    z_ND = (pooled_ND.double() - mean_D) / std_D
    total = Counter()
    for row in rows:
        total[row.source] += row.weight
    signed, weights = [], []
    for row in rows:
        z = torch.cat((z_ND[index[row.text]], z_ND.new_ones(1)))
        if row.other is not None:
            z = torch.cat((z_ND[index[row.text]] - z_ND[index[row.other]], z_ND.new_zeros(1)))
        signed.append(z if row.label else -z)
        weights.append(row.weight / total[row.source])
    solution = newton(torch.stack(signed), torch.tensor(weights, dtype=torch.float64), l2)
    weight_D = solution[:-1] / std_D
    has_labels = any(row.other is None for row in rows)
    return weight_D, float((solution[-1] if has_labels else 0.0) - weight_D @ mean_D)


def newton(signed_NE: Tensor, weight_N: Tensor, l2: float, steps: int = 100) -> Tensor:
    """Minimises  sum weight softplus(-signed @ w) + l2/2 |w|^2  over w [E], all float64.

    The last entry of w is the bias, which is almost free of the penalty.
    """
    ridge_E = torch.full((signed_NE.shape[1],), l2, dtype=torch.float64)
    ridge_E[-1] = 1e-6 * l2  # keeps the Hessian regular where no row has a bias
    w_E = torch.zeros_like(ridge_E)

    def loss(w_E: Tensor) -> float:
        return float(weight_N @ F.softplus(-(signed_NE @ w_E)) + 0.5 * (ridge_E * w_E * w_E).sum())

    value = loss(w_E)
    for _ in range(steps):
        p_N = torch.sigmoid(-(signed_NE @ w_E))
        gradient_E = ridge_E * w_E - signed_NE.t() @ (weight_N * p_N)
        hessian_EE = (signed_NE.t() * (weight_N * p_N * (1 - p_N))) @ signed_NE + ridge_E.diag()
        step_E = torch.linalg.solve(hessian_EE, gradient_E)
        decrease, scale = float(gradient_E @ step_E), 1.0
        if decrease < 1e-16 * (1 + abs(value)):
            break
        while (trial := loss(w_E - scale * step_E)) > value - 0.25 * scale * decrease and scale > 1e-6:
            scale /= 2
        w_E, value = w_E - scale * step_E, trial
    return w_E
