"""Whether thresholds can be met together by re-weighting the given responses: an exact decision.

They cannot where a direction v >= 0 has mean_p max_i v . g_pi < v . b. The left side less the right one is a
convex function of v with flat pieces; it is minimised over sum v = 1 by cutting planes, each the slope at a
point. A few dozen of them do for a handful of constraints, and both outcomes come with a certificate: the
direction, or a mixture of the cuts, which is a re-weighting that meets all thresholds.
"""

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

# What the linear program of the cuts may miss an optimum by; smaller ones are not accepted by its solver.
EXACT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
MOST_CUTS = 300


def support(g_PGJ: Tensor, direction_J: Tensor) -> float:
    """Computes mean_p max_i v . g_pi, with g centred: the largest improvement of v . g by re-weighting."""
    return float((g_PGJ @ direction_J).amax(1).mean())


def unsupported_direction(g_PGJ: Tensor, b_J: Tensor, room: float = 0.0) -> Tensor | None:
    """Returns a direction v >= 0, sum v = 1, in which the thresholds cannot be met, or None.

    g: centred within prompts, in standard deviations. A direction with at most `room` left counts as one that
    cannot be met, as its multipliers are beyond all numbers; but not one in which the responses of a prompt
    are all alike, as there are multipliers then.
    """
    J = len(b_J)
    v = torch.full((J,), 1 / J, dtype=torch.float64)
    cuts, best, least = [], v, np.inf
    for _ in range(MOST_CUTS):
        chosen = (g_PGJ @ v).argmax(1)
        slope = g_PGJ.take_along_dim(chosen[:, None, None], 1)[:, 0].mean(0) - b_J
        value = float(slope @ v)
        if value < least:
            best, least = v, value
        cuts.append(slope.numpy())
        # The highest t and mixture w of cuts with sum_k w_k cut_k >= t in each coordinate.
        rows = np.stack(cuts)
        size = np.abs(rows).max()
        found = linprog(
            np.append(np.zeros(len(rows)), -1.0),
            A_ub=np.column_stack([-rows.T / size, np.ones(J)]),
            b_ub=np.zeros(J),
            A_eq=np.append(np.ones(len(rows)), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * len(rows) + [(None, None)],
            method="highs",
            options=EXACT,
        )
        if found.status != 0:
            break
        mixture = np.clip(found.x[:-1], 0, None)
        lowest = float((mixture / mixture.sum() @ rows).min())
        if lowest > room or least < -1e-12 or least - lowest <= 1e-13 * size:
            break
        v = torch.from_numpy(np.clip(-found.ineqlin.marginals, 0, None))
        v = v / v.sum()
    at_edge = least <= room and support(g_PGJ, best) > 1e-6
    return best if least < -1e-12 or at_edge else None
