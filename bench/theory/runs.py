"""Measures where the algorithms end on exact problems, and how they get there."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from bench.theory.algorithms import run_algorithms
from bench.theory.exact_stages import ExactStages
from bench.theory.optima import Optima
from bench.theory.problem import Problem, make
from bench.theory.updates import maximiser, missed_maximum, regression
from engine import caid
from engine.baselines import cdpo, opd, pd_dpo, primal_dual, repo
from engine.config import (
    CaidConfig,
    CdpoConfig,
    OpdConfig,
    PdDpoConfig,
    PrimalDualConfig,
    RepoConfig,
    RunConfig,
)
from engine.records import ScoredTarget, lagrangian

# By these rules of its dual step (rule, step) CAID has to reach lambda* where nu is 0.
CAID_RULES = (("newton", 1.0), ("newton", 0.5), ("secant", 0.5), ("optimistic", 0.5))


class End(NamedTuple):
    """The result of a run, all exact; of several constraints the largest entries of slack and lambda."""

    updates: int  # policy updates
    slack: float  # |slack|
    off: float  # |lambda - lambda*_p|
    loss: float  # value - P_p*
    eps_app: float

    @property
    def shown(self) -> tuple[float, ...]:
        """Returns what a cell of the tables shows."""
        return self.slack, self.off, self.loss, self.eps_app


def ends(seed: int, J: int, eps: float, iterations: int, kind: str) -> dict[tuple[str, str], End]:
    """Returns (algorithm, start) -> End with the updates of a kind."""
    problem = make(seed, J=J, eps=eps)
    lam_p, best = optimum_in_class(problem)
    result = {}
    for run in run_algorithms(problem, kind, iterations, seed):
        result[run.name, run.start] = End(
            updates=max(len(run.world.fitted), len(run.world.history)),
            slack=float(problem.slack_J(run.theta).abs().max()),
            off=float(np.abs(run.lam.numpy() - lam_p).max()),
            loss=problem.value(run.theta) - best,
            eps_app=missed_maximum(problem, run.lam, run.theta),
        )
    return result


def optimum_in_class(problem: Problem) -> tuple[np.ndarray, float]:
    """Returns (lambda*_p, P_p*) by scipy."""
    optima = Optima(problem)
    lam_p, _, _ = optima.solve_dual_in_class(optima.solve_dual())
    return lam_p, optima.solve_primal_in_class(optima.best_in_class(lam_p).theta).value


class Convergence(NamedTuple):
    """A run where nu is 0."""

    needed: int | None  # iterations after which the errors of lambda and slack stay below 1e-6, if they do
    error: float  # the larger error at the end


def no_gap(seed: int, J: int) -> dict[tuple[str, str, int], Convergence]:
    """Returns (algorithm, start, iterations) -> Convergence at nu = 0.

    Regression fits the policies: its minimiser is the maximiser itself there, in closed form.
    """
    problem = make(seed, J=J)
    lam_star = Optima(problem).solve_dual()
    runs = {}

    def add(name: str, start: str, loop: Callable, config: RunConfig) -> None:
        lam_init = torch.tensor(float(start[:1]) * lam_star)
        world = ExactStages(problem, config, regression, lam_init=lam_init)
        loop(world, config)
        errors = [
            max(float(np.abs(x.lam_J.numpy() - lam_star).max()), float(x.slack_J.abs().max()))
            for x in world.history
        ]
        above = [t for t, error in enumerate(errors, 1) if error >= 1e-6]
        needed = None if above and above[-1] == len(errors) else 1 + max(above, default=0)
        runs[name, start, config.iterations] = Convergence(needed, errors[-1])

    for start, factor in (("0", 0.0), ("3 lambda*", 3.0)):
        for rule, step in CAID_RULES:
            config = CaidConfig(beta=problem.beta, iterations=60, dual_rule=rule, dual_step=step)
            add(f"CAID, {rule} {step:g}", start, caid.loop, config)
        many = {"beta": problem.beta, "lam_init": factor * float(lam_star.max())}
        add("C-DPO", start, cdpo.loop, CdpoConfig(**many, iterations=60))
        add("PD-DPO", start, pd_dpo.loop, PdDpoConfig(**many, iterations=60))
        add("OPD", start, opd.loop, OpdConfig(**many, iterations=300))
        # These step on ln lambda, which cannot leave 0.
        if not factor:
            start, many["lam_init"] = "0.05", 0.05
        add("primal-dual, RLOO", start, primal_dual.loop, PrimalDualConfig(**many, iterations=100))
        add("RePO", start, repo.loop, RepoConfig(**many, iterations=100))
    return runs


def six_steps(seed: int, J: int, eps: float) -> dict[str, float]:
    """Returns "rule step, start" -> the largest |slack| of CAID's policy after six dual
    steps with the exact maximiser."""
    problem, result, default = make(seed, J=J, eps=eps), {}, CaidConfig.dual_step
    for rule, step in (("newton", 1.0), ("newton", default), ("secant", default), ("secant", 1.0)):
        for start, factor in (("lambda*", 1.0), ("0", 0.0), ("3 lambda*", 3.0)):
            config = CaidConfig(beta=problem.beta, iterations=7, dual_rule=rule, dual_step=step)
            world = ExactStages(problem, config, maximiser)
            world.lam_init = factor * world.solve_dual().lam
            caid.loop(world, config)
            result[f"{rule} {step:g}, {start}"] = float(world.history[-1].slack_J.abs().max())
    return result


class CurvePoint(NamedTuple):
    """A point of a curve."""

    updates: int  # policy updates so far
    slack: float  # |slack|
    lam: float
    loss: float  # value - P_p*


def curves(seed: int, eps: float, iterations: int) -> tuple[float, dict[tuple[str, str], list[CurvePoint]]]:
    """Returns lambda*_p and (algorithm, start) -> a point for each measured iterate,
    with the exact maximiser and J = 1."""
    problem = make(seed, eps=eps)
    lam_p, best = optimum_in_class(problem)
    by_start = {}

    def point(updates: int, slack_J: torch.Tensor, lam_J: torch.Tensor, theta: torch.Tensor) -> CurvePoint:
        return CurvePoint(updates, abs(float(slack_J[0])), float(lam_J[0]), problem.value(theta) - best)

    for run in run_algorithms(problem, "exact", iterations):
        points = [
            point(min(i + 1, iterations) * run.per_iteration, x.slack_J, x.lam_J, x.theta)
            for i, x in enumerate(run.world.history)
        ]
        # One-shot methods measure nothing.
        last = point(len(run.world.fitted), problem.slack_J(run.theta), run.lam, run.theta)
        by_start[run.name, run.start] = points or [last]
    return float(lam_p[0]), by_start


class Standardised(NamedTuple):
    """Policies of primal-dual with one kind of advantage."""

    held_slack: float  # with lambda held at lambda*
    lam_off: float  # lambda - lambda*_p at the end of a run
    slack: float  # at the end
    loss: float  # value - P_p* at the end


def standardising(seed: int, eps: float) -> dict[str, Standardised]:
    """Returns advantage -> where primal-dual ends with it; J = 1."""
    problem = make(seed, eps=eps)
    lam_star = Optima(problem).solve_dual()
    lam_p, best = optimum_in_class(problem)
    result = {}
    for advantage in ("rloo", "group_norm"):
        config = PrimalDualConfig(
            beta=problem.beta, advantage=advantage, iterations=150, dual_rate=1.0, lam_init=float(lam_star[0])
        )
        world = ExactStages(problem, config, ascent_rate=0.5)
        held = None
        for t in range(20):
            lam = torch.tensor(lam_star)
            held = world.ascend(held, lam, lagrangian(lam), t)
        theta, lam = primal_dual.loop(world, config)
        result[advantage] = Standardised(
            held_slack=float(problem.slack_J(held)[0]),
            lam_off=float(lam[0] - lam_p[0]),
            slack=float(problem.slack_J(theta)[0]),
            loss=problem.value(theta) - best,
        )
    return result


def lagging(world: ExactStages, target: ScoredTarget, number: int) -> torch.Tensor:
    """Updates a policy by a twentieth of the way from target.start to the maximiser."""
    start = target.start
    if start is None:
        start = torch.zeros(world.problem.features_PYF.shape[2], dtype=torch.float64)
    return start + 0.05 * (maximiser(world, target, number) - start)


def oscillation(seed: int = 0, iterations: int = 120) -> dict[str, list[float]]:
    """Returns the slack per dual step of CAID's loop, with policies that lag behind
    lambda and with the maximiser.

    The problem has J = 1 and eps 0.3, and all start at 3 lambda*. All take the same dual step, the inverse
    Hessian, without a cap on the change.
    """
    problem, slacks = make(seed, eps=0.3), {}
    for name, rule, update in (
        ("plain primal-dual: a small policy step, a dual step", "newton", lagging),
        ("the same with optimistic dual steps", "optimistic", lagging),
        ("dual method: the maximiser, a dual step", "newton", maximiser),
    ):
        config = CaidConfig(
            beta=problem.beta, iterations=iterations, dual_rule=rule, dual_step=1.0, lam_max_change=1e9
        )
        world = ExactStages(problem, config, update)
        world.lam_init = 3 * world.solve_dual().lam
        caid.loop(world, config)
        slacks[name] = [float(x.slack_J[0]) for x in world.history]
    return slacks
