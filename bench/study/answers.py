"""The study's statistics: distances from the threshold, paired by seed, and the answer."""

import math

import numpy as np
from scipy import stats

from bench.study.arms import Arm, judged, threshold
from bench.study.plan import COST, SEEDS, THRESHOLDS


def summary(a: Arm) -> dict[str, float]:
    """Summarises all runs of an arm, in the run's units.

    Returns the mean signed slack, mean violation [b - improvement]+, mean and root mean squared deviation
    from b, the same with the test set's squared standard error removed, and that error's root
    mean square (the noise floor).
    """
    square, noise = float((a.slack_SB**2).mean()), float((a.se_SB**2).mean())
    return {
        "slack": float(a.slack_SB.mean()),
        "violation": float((-a.slack_SB).clip(min=0).mean()),
        "absolute": float(abs(a.slack_SB).mean()),
        "rmse": math.sqrt(square),
        "rmse without noise": math.sqrt(max(0.0, square - noise)),
        "noise": math.sqrt(noise),
    }


def paired(first: Arm, second: Arm, draws: int = 10_000) -> dict[str, float]:
    """Compares |improvement - b| of the first with that of the second, mean over thresholds then seeds; below
    0 the first lands nearer.

    Returns t and bootstrap intervals over seeds, and the p value of flipping the sign of whole seeds.
    """
    difference_S = (abs(first.slack_SB) - abs(second.slack_SB)).mean(1)
    S, mean = len(difference_S), float(difference_S.mean())
    if S < 2:
        return {"seeds": S, "mean": mean}
    half = _t_half_width(difference_S)
    drawn = difference_S[np.random.default_rng(0).integers(S, size=(draws, S))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    if S <= 12:
        signs = np.array(np.meshgrid(*[[-1, 1]] * S)).reshape(S, -1)
    else:
        signs = np.random.default_rng(1).choice([-1, 1], (S, draws))
    return {
        "seeds": S,
        "mean": mean,
        "t low": mean - half,
        "t high": mean + half,
        "bootstrap low": float(low),
        "bootstrap high": float(high),
        "p": float((abs(signs.T @ difference_S) >= abs(difference_S.sum()) - 1e-12).mean()),
    }


def _t_half_width(difference_S: np.ndarray) -> float:
    """Returns half the width of the 95 % t interval over seeds."""
    S = len(difference_S)
    return float(stats.t.ppf(0.975, S - 1) * difference_S.std(ddof=1) / math.sqrt(S))


def matched(rows: list[dict], label: str, other: str) -> dict[str, float]:
    """Compares |improvement - b| of a method with that of another at the same seed and b, mean over
    thresholds, then seeds.

    Returns the numbers of pairs and seeds too, and a t interval over seeds where there are two.
    """

    def absolute(name: str) -> dict[tuple[int, float], float]:
        runs = [r for r in judged(rows) if r["algorithm"] == name]
        return {(int(r["seed"]), threshold(r)): abs(float(r[COST]) - threshold(r)) for r in runs}

    first, second = absolute(label), absolute(other)
    both = sorted(first.keys() & second.keys())
    by_seed: dict[int, list[float]] = {}
    for seed, b in both:
        by_seed.setdefault(seed, []).append(first[seed, b] - second[seed, b])
    difference_S = np.array([np.mean(differences) for differences in by_seed.values()])
    result = {"pairs": len(both), "seeds": len(by_seed)}
    if both:
        result["mean"] = float(difference_S.mean())
    if len(by_seed) > 1:
        half = _t_half_width(difference_S)
        result |= {"low": result["mean"] - half, "high": result["mean"] + half}
    return result


def reward_at_equal_safety(first: Arm, second: Arm) -> list[tuple[float, float]]:
    """Returns (first reward minus second, width of the overlap) of each seed whose ranges
    of measured improvement overlap.

    Both rewards are interpolated along the seed's thresholds at the middle of the overlap.
    """
    b, differences = np.array(THRESHOLDS), []
    for s in range(len(first.slack_SB)):
        curves = [(arm.slack_SB[s] + b, arm.reward_SB[s]) for arm in (first, second)]
        low, high = max(x.min() for x, _ in curves), min(x.max() for x, _ in curves)
        if low < high:
            middle = (low + high) / 2
            at = [float(np.interp(middle, x[np.argsort(x)], y[np.argsort(x)])) for x, y in curves]
            differences.append((at[0] - at[1], float(high - low)))
    return differences


def answer(result: dict[str, float]) -> str:
    """Says the answer in words.

    It is given only at the planned number of seeds, so that nobody stops where it looks good, and is resolved
    only where both intervals leave out 0.
    """
    if result["seeds"] < len(SEEDS):
        return f"not resolved yet, {result['seeds']} of {len(SEEDS)} planned seeds"
    if max(result["t high"], result["bootstrap high"]) < 0:
        return "CAID lands nearer to b"
    if min(result["t low"], result["bootstrap low"]) > 0:
        return "MoCAN lands nearer to b"
    return "not resolved at this number of seeds"
