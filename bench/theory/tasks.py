"""The tasks of `python -m bench.theory`: what is computed for which problems, on several processes."""

import multiprocessing
from dataclasses import dataclass

import torch

from bench.theory.bounds import bounds
from bench.theory.broken import BROKEN, flipped_sign_of_the_slack
from bench.theory.facts import Facts
from bench.theory.labels import label_errors, pair_sources, two_ends
from bench.theory.measuring import measure
from bench.theory.runs import KINDS, curves, ends, no_gap, oscillation, six_steps, standardising

# Beside the 360 problems with beta 1 and b 0.3: another beta, and a second constraint that holds anyway.
VARIANTS = ((1, 0.3, 0.3), (2, 0.3, 0.3), (2, 1.0, (0.3, -1.0)))  # (J, beta, b)


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
    seeds=1, Js=(1, 2), epses=(0.0, 0.3), runs=1, run_epses=(0.3,), iterations=6, draws=(4, 16), label_seeds=2, betas=(1.0,),
    variant_seeds=1,
)  # fmt: skip


def compute(sizes: Sizes, workers: int) -> dict:
    """Everything that the page shows."""
    epses, some = sizes.run_epses, range(sizes.runs)
    tasks = {
        "problems": (
            facts,
            [((seed, J, eps),) for J in sizes.Js for eps in sizes.epses for seed in range(sizes.seeds)],
        ),
        "scaled": (
            scaled,
            [
                (s, scale, eps)
                for scale, eps in ((0.1, 0.3), (10.0, 0.3), (100.0, 0.0))
                for s in range(min(3, sizes.seeds))
            ],
        ),
        "variants": (
            variant,
            [
                (s, J, eps, beta, b)
                for J, beta, b in VARIANTS
                for eps in epses
                for s in range(sizes.variant_seeds)
            ],
        ),
        "no_gap": (no_gap, [(seed, J) for J in sizes.Js for seed in some]),
        "six": (six_steps, [(seed, J, eps) for J in sizes.Js for eps in sizes.epses for seed in some]),
        "ends": (
            ends,
            [(seed, 1, eps, sizes.iterations, kind) for kind in KINDS for eps in epses for seed in some]
            + [(seed, 3, eps, sizes.iterations, "exact") for eps in epses for seed in some[:4]],
        ),
        "labels": (
            label_errors,
            [
                (s, eps, beta, sizes.draws)
                for beta in sizes.betas
                for eps in epses
                for s in range(sizes.label_seeds)
            ],
        ),
        "sources": (
            pair_sources,
            [(s, eps, beta) for beta in sizes.betas for eps in epses for s in range(sizes.label_seeds)],
        ),
        "two_ends": (two_ends, [(s, eps) for eps in epses for s in range(sizes.label_seeds)]),
        "standardising": (standardising, [(seed, eps) for eps in epses for seed in some]),
        "flipped": (flipped_sign_of_the_slack, [(0,)]),
        "oscillation": (oscillation, [(0, 5 * sizes.iterations)]),
        "curves": (curves, [(0, 0.3, sizes.iterations)]),
    }
    results = {}
    with multiprocessing.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name, (function, arguments) in tasks.items():
            print(f"{name}: {len(arguments)} tasks", flush=True)
            results[name] = [
                [list(a), r]
                for a, r in zip(arguments, pool.starmap(function, arguments, chunksize=1), strict=True)
            ]
    return results


def facts(task: tuple[int, int, float]) -> dict:
    """The line of one problem in the results file: its constants and every bound."""
    seed, J, eps = task
    f = measure(seed, J, eps)
    return line(f) | {"broken": {name: reds(f, wrong(f)) for name, wrong in BROKEN.items()}}


def variant(seed: int, J: int, eps: float, beta: float, b: float | tuple[float, ...]) -> dict:
    """The line of a problem with other constants."""
    return line(measure(seed, J, eps, beta=beta, b=b)) | {"b": b}


def line(f: Facts) -> dict:
    """Of the results file."""
    return {
        "J": f.J, "eps": f.eps, "seed": f.seed, "beta": f.beta, "nu": f.star.nu, "M": f.M, "L_D": f.L, "mu_D": f.mu,
        "kink": f.kink, "maxima": f.maxima,
        "assumptions": f.assumptions, "lambda*": f.star.lam.tolist(), "lambda*_p": f.in_class.lam.tolist(), "P*": f.primal,
        "D_p*": f.in_class.dual_in_class, "P_p*": f.primal_in_class, "one_shot_slack": f.one_shot.slack.tolist(),
        "reached": not f.kink and f.caid_off[0] < 1e-4, "caid_off": f.caid_off,
        "eps_app": {s.kind: s.eps_app for s in f.stochastic},
        "bounds": [
            {"name": b.name, "form": b.form, "left": float(b.left), "right": float(b.right), "holds": b.holds} for b in bounds(f)
        ],
    }  # fmt: skip


def reds(right: Facts, wrong: Facts) -> list[str]:
    """Names of the bounds that hold with the right facts and not with the wrong ones."""
    held = {(b.name, b.form) for b in bounds(right) if b.holds}
    return list(dict.fromkeys(b.name for b in bounds(wrong) if (b.name, b.form) in held and not b.holds))


def scaled(seed: int, scale: float, eps: float) -> dict:
    """A problem in other units of utility, where printed constants show that their units are wrong."""
    return line(measure(seed, 1, eps, scale=scale))
