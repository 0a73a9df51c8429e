"""Computes everything that the page shows, each problem as a task of its own, on several processes."""

import importlib
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from bench.theory.algorithms import KINDS
from bench.theory.bounds import all_bounds
from bench.theory.broken import BROKEN, flipped_sign_of_the_slack, reds
from bench.theory.facts import Facts
from bench.theory.labels import label_errors, pair_sources, two_ends
from bench.theory.measuring import measure
from bench.theory.runs import curves, ends, no_gap, oscillation, six_steps, standardising


@dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    seeds: int = 20
    Js: tuple[int, ...] = (1, 2, 3)
    epses: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
    runs: int = 8  # seeds of the runs of every algorithm
    run_epses: tuple[float, ...] = (0.0, 0.3, 1.0)
    iterations: int = 24
    draws: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    label_seeds: int = 20
    betas: tuple[float, ...] = (1.0, 0.3)
    variant_seeds: int = 5


QUICK = Sizes(
    seeds=1,
    Js=(1, 2),
    epses=(0.0, 0.3),
    runs=1,
    run_epses=(0.3,),
    iterations=6,
    draws=(4, 16),
    label_seeds=2,
    betas=(1.0,),
    variant_seeds=1,
)


class Variant(NamedTuple):
    """Constants of problems beside those with beta 1 and b 0.3."""

    J: int
    beta: float
    b: float | tuple[float, ...]


# They have another beta, and a second constraint that holds anyway.
VARIANTS = (Variant(1, 0.3, 0.3), Variant(2, 0.3, 0.3), Variant(2, 1.0, (0.3, -1.0)))


class Outcome(NamedTuple):
    """A task's arguments by name, and its result."""

    asked: SimpleNamespace
    result: Any


Results = dict[str, list[Outcome]]


def facts(seed: int, J: int, eps: float) -> dict:
    """Returns the line of one problem in the results file, and the bounds that each
    deliberate mistake breaks."""
    f = measure(seed, J, eps)
    return line(f) | {"broken": {name: reds(f, wrong(f)) for name, wrong in BROKEN.items()}}


def variant(seed: int, J: int, eps: float, beta: float, b: float | tuple[float, ...]) -> dict:
    """Returns the line of a problem with other constants."""
    return line(measure(seed, J, eps, beta=beta, b=b)) | {"b": b}


def scaled(seed: int, scale: float, eps: float) -> dict:
    """Returns the line of a problem in other units of utility, where printed constants show
    that their units are wrong."""
    return line(measure(seed, 1, eps, scale=scale))


def line(f: Facts) -> dict:
    """Returns a line of the results file: a problem's constants and every bound."""
    return {
        "J": f.J,
        "eps": f.eps,
        "seed": f.seed,
        "beta": f.beta,
        "nu": f.star.nu,
        "M": f.M,
        "L_D": f.L,
        "mu_D": f.mu,
        "kink": f.kink,
        "maxima": f.maxima,
        "assumptions": f.assumptions,
        "lambda*": f.star.lam.tolist(),
        "lambda*_p": f.in_class.lam.tolist(),
        "P*": f.primal,
        "D_p*": f.in_class.dual_in_class,
        "P_p*": f.primal_in_class,
        "one_shot_slack": f.one_shot.slack.tolist(),
        "reached": not f.kink and f.caid_off[0] < 1e-4,
        "caid_off": f.caid_off,
        "eps_app": {run.kind: run.eps_app for run in f.stochastic},
        "bounds": [
            {
                "name": b.name,
                "form": b.form,
                "left": float(b.left),
                "right": float(b.right),
                "holds": b.holds,
            }
            for b in all_bounds(f)
        ],
    }


def tasks(sizes: Sizes) -> dict[str, tuple[Callable, list[dict]]]:
    """Returns name -> (function, the arguments of each task)."""
    epses, Js, runs = sizes.run_epses, sizes.Js, range(sizes.runs)
    units = ((0.1, 0.3), (10.0, 0.3), (100.0, 0.0))  # (scale, eps)
    n = {"iterations": sizes.iterations}
    labels = [
        {"seed": seed, "eps": eps, "beta": beta}
        for beta, eps, seed in product(sizes.betas, epses, range(sizes.label_seeds))
    ]
    return {
        "problems": (facts, _grid(J=Js, eps=sizes.epses, seed=range(sizes.seeds))),
        "scaled": (
            scaled,
            [{"seed": s, "scale": x, "eps": eps} for x, eps in units for s in range(min(3, sizes.seeds))],
        ),
        "variants": (
            variant,
            [
                x._asdict() | {"eps": eps, "seed": seed}
                for x, eps, seed in product(VARIANTS, epses, range(sizes.variant_seeds))
            ],
        ),
        "no_gap": (no_gap, _grid(J=Js, seed=runs)),
        "six": (six_steps, _grid(J=Js, eps=sizes.epses, seed=runs)),
        "ends": (
            ends,
            [x | n | {"J": 1} for x in _grid(kind=KINDS, eps=epses, seed=runs)]
            + [x | n | {"J": 3, "kind": "exact"} for x in _grid(eps=epses, seed=runs[:4])],
        ),
        "labels": (label_errors, [x | {"draws": sizes.draws} for x in labels]),
        "sources": (pair_sources, labels),
        "two_ends": (two_ends, _grid(eps=epses, seed=range(sizes.label_seeds))),
        "standardising": (standardising, _grid(eps=epses, seed=runs)),
        "flipped": (flipped_sign_of_the_slack, [{"seed": 0}]),
        "oscillation": (oscillation, [{"seed": 0, "iterations": 5 * sizes.iterations}]),
        "curves": (curves, [{"seed": 0, "eps": 0.3} | n]),
    }


def _grid(**axes) -> list[dict]:
    """Lists all combinations of the axes' values, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def compute(sizes: Sizes, workers: int) -> Results:
    """Runs all tasks on `workers` processes."""
    # The first op of a process imports this in a second, and the processes have what this one has.
    importlib.import_module("torch._dynamo")
    results = {}
    with multiprocessing.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name, (function, arguments) in tasks(sizes).items():
            print(f"{name}: {len(arguments)} tasks", flush=True)
            running = [pool.apply_async(function, kwds=x) for x in arguments]
            results[name] = [
                Outcome(SimpleNamespace(**x), task.get()) for x, task in zip(arguments, running, strict=True)
            ]
    return results
