"""Runs of a method as arrays, read from the rows of a sweep's table."""

from dataclasses import dataclass

import numpy as np

from bench.study.plan import CAID, COST, MOCAN, SEEDS, THRESHOLDS


@dataclass(frozen=True)
class Arm:
    """One method's runs: improvement minus b, its standard error over test prompts
    and the reward, [seeds, thresholds]."""

    slack_SB: np.ndarray
    se_SB: np.ndarray
    reward_SB: np.ndarray
    cost: tuple[float, ...] = ()  # means of `costs`


def threshold(row: dict) -> float:
    """Returns b of the question's constraint."""
    return float(row[f"{COST} threshold"])


def costs(row: dict) -> list[float]:
    """Returns the tokens sampled in a run's training, those of the reference's samples,
    both, policy steps and seconds."""
    trained, reference = float(row["sampled tokens"]), float(row["reference tokens"])
    return [trained, reference, trained + reference, float(row["policy steps"]), float(row["seconds"])]


def costs_of(row: dict) -> list[str]:
    """Names the constraints of a run."""
    return [
        name.removesuffix(" threshold")
        for name, value in row.items()
        if name.endswith(" threshold") and value != ""
    ]


def judged(rows: list[dict]) -> list[dict]:
    """Picks the runs with a verdict on the question's constraint alone."""
    return [r for r in rows if not r["error"] and costs_of(r) == [COST]]


def arm(rows: list[dict], label: str, seeds: list[int]) -> Arm:
    """Returns a method's runs at the question's thresholds. Raises: KeyError where one is missing."""
    runs = {(int(r["seed"]), threshold(r)): r for r in judged(rows) if r["algorithm"] == label}
    return _arm([[runs[seed, b] for b in THRESHOLDS] for seed in seeds])


def runs_of(rows: list[dict], label: str) -> Arm:
    """Returns all runs of a method, whatever their seeds and thresholds, as [runs, 1]."""
    return _arm([[r] for r in judged(rows) if r["algorithm"] == label])


def _arm(runs: list[list[dict]]) -> Arm:
    def column(name: str) -> np.ndarray:
        return np.array([[float(r[name]) for r in of_seed] for of_seed in runs])

    cost = np.array([costs(r) for of_seed in runs for r in of_seed]).mean(0)
    slack_SB = column(COST) - column(f"{COST} threshold")
    return Arm(slack_SB, column(f"{COST} se"), column("reward"), tuple(cost.tolist()))


def complete(rows: list[dict]) -> list[int]:
    """Lists the seeds of the question that have both methods at both thresholds."""
    done = {(r["algorithm"], int(r["seed"]), threshold(r)) for r in judged(rows)}
    return [
        seed for seed in SEEDS if all((label, seed, b) in done for label in (CAID, MOCAN) for b in THRESHOLDS)
    ]
