"""Runs every algorithm's loop in the exact world and measures where it ends."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.theory.exact_stages import ExactWorld, Update, preferred
from bench.theory.optima import Optima
from bench.theory.problem import Problem, make
from bench.theory.updates import listwise, maximiser, missed_maximum, regression, sampled, single, soft
from engine import caid, cdpo, dpo, mocan, opd, pd_dpo, primal_dual, repo, sacpo, safe_dpo
from engine.config import (
    CaidConfig,
    CdpoConfig,
    DpoConfig,
    MocanConfig,
    OpdConfig,
    PdDpoConfig,
    PrimalDualConfig,
    RepoConfig,
    SacpoConfig,
    SafeDpoConfig,
)
from engine.records import Target

# How the runs update a policy: the exact maximiser, the population minimiser of a form, or 16 draws a prompt for labels and slack.
KINDS: dict[str, tuple[Update, int | None]] = {
    "exact": (maximiser, None), "soft": (soft, None), "regression": (regression, None), "listwise": (listwise, None),
    "single": (single, None), "samples": (regression, 16), "drawn": (sampled, 16),
}  # fmt: skip
# Rules of CAID's dual step from which lambda* has to be reached where nu is 0.
CAID_RULES = (("newton", 1.0), ("newton", 0.5), ("secant", 0.5), ("optimistic", 0.5))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One algorithm from one start in one world."""

    name: str
    start: str
    world: ExactWorld
    theta: torch.Tensor
    lam: torch.Tensor
    per_iteration: int = 1  # policy updates


def runs(
    problem: Problem, update: Update, iterations: int, draws: int | None = None, seed: int = 0
) -> list[Run]:
    """Every algorithm, those with multipliers of their own from 0 and from 3 lambda*. draws: of updates and slacks."""

    def world(config, problem: Problem = problem) -> ExactWorld:
        return ExactWorld(problem, config, update, draws=draws, slack_draws=draws, seed=seed)

    base = {"beta": problem.beta}
    warm = world(CaidConfig(**base)).solve_dual().lam
    found = []

    def add(
        name: str,
        start: str,
        loop: Callable,
        config,
        lam_init: torch.Tensor | None = None,
        per_iteration: int = 1,
        problem: Problem = problem,
    ) -> None:
        here = world(config, problem)
        here.lam_init = lam_init
        theta, lam = loop(here, config)
        found.append(
            Run(name=name, start=start, world=here, theta=theta, lam=lam, per_iteration=per_iteration)
        )

    starts = {"lambda*": None, "0": 0 * warm, "3 lambda*": 3 * warm}
    for name, rule, step in (
        ("CAID, dual step 1", "newton", 1.0), (f"CAID, dual step {CaidConfig.dual_step:g}", "newton", CaidConfig.dual_step),
        ("CAID, secant", "secant", CaidConfig.dual_step),
    ):  # fmt: skip
        for start, lam in starts.items():
            add(
                name,
                start,
                caid.loop,
                CaidConfig(**base, iterations=iterations, dual_rule=rule, dual_step=step),
                lam,
            )
    config = CaidConfig(**base, iterations=iterations, dual_step=1.0)
    # Fitted log-ratios may be too weak for the thresholds: then lambda stops at its largest value.
    tilts, fitted = preferred(ExactWorld(problem, config)), preferred(world(config))
    add("PeCAID, exact tilts", "lambda*", caid.loop, config, problem=tilts)
    add("PeCAID, fitted", "lambda*", caid.loop, replace(config, force=True), problem=fitted)
    add("PeCAN, exact tilts", "lambda*", mocan.loop, MocanConfig(**base), problem=tilts)
    add("PeCAN, fitted", "lambda*", mocan.loop, MocanConfig(**base, force=True), problem=fitted)
    high = float(3 * warm.max())
    for start, lam in (("0", 0.0), ("3 lambda*", high)):
        many = dict(base, iterations=iterations, lam_init=lam)
        add("C-DPO", start, cdpo.loop, CdpoConfig(**many))
        add("PD-DPO", start, pd_dpo.loop, PdDpoConfig(**many))
        add("OPD", start, opd.loop, OpdConfig(**many), per_iteration=2)
    # ln lambda cannot leave 0.
    for start, lam in (("0.05", 0.05), ("3 lambda*", high)):
        many = dict(base, iterations=iterations, lam_init=lam)
        add("primal-dual, RLOO", start, primal_dual.loop, PrimalDualConfig(**many))
        add(
            "primal-dual, group_norm",
            start,
            primal_dual.loop,
            PrimalDualConfig(**many, advantage="group_norm"),
        )
        add("RePO", start, repo.loop, RepoConfig(**many))
    add("MoCAN", "lambda*", mocan.loop, MocanConfig(**base))
    add("SACPO", "lambda* given", sacpo.loop, SacpoConfig(**base, lam=tuple(warm.tolist())))
    add("DPO, reward", "", dpo.loop, DpoConfig(**base))
    add("DPO, safety", "", dpo.loop, DpoConfig(**base, objective="safety"))
    add("SafeDPO", "", safe_dpo.loop, SafeDpoConfig(**base))
    return found


def ends(
    seed: int, J: int, eps: float, iterations: int, kind: str
) -> dict[str, tuple[int, float, float, float, float]]:
    """ "algorithm|start" -> (policy updates, |slack|, |lambda - lambda*_p|, value - P_p*, eps_app) of the result, all exact; the largest
    entries of slack and lambda."""
    problem = make(seed, J=J, eps=eps)
    lam_p, best = optimum_in_class(problem)
    update, draws = KINDS[kind]
    result = {}
    for run in runs(problem, update, iterations, draws, seed):
        updates = max(len(run.world.fitted), len(run.world.history))
        slack, off = (
            float(problem.slack_J(run.theta).abs().max()),
            float(np.abs(run.lam.numpy() - lam_p).max()),
        )
        result[f"{run.name}|{run.start}"] = (
            updates,
            slack,
            off,
            problem.value(run.theta) - best,
            missed_maximum(problem, run.lam, run.theta),
        )
    return result


def optimum_in_class(problem: Problem) -> tuple[np.ndarray, float]:
    """(lambda*_p, P_p*) by scipy."""
    optima = Optima(problem)
    lam_p, _, _ = optima.solve_dual_in_class(optima.solve_dual())
    return lam_p, optima.solve_primal_in_class(optima.best_in_class(lam_p).theta).value


def no_gap(seed: int, J: int) -> dict[str, tuple[int | None, float]]:
    """ "algorithm|start|iterations" -> (iterations after which the errors of lambda and slack stay below 1e-6, the larger error at the end)
    at nu = 0. Policies are fitted by regression, whose minimiser is there the maximiser itself, in closed form."""
    problem = make(seed, J=J)
    lam_star = Optima(problem).solve_dual()
    found = {}

    def add(name: str, start: str, loop: Callable, config) -> None:
        world = ExactWorld(problem, config, regression, lam_init=torch.tensor(float(start[:1]) * lam_star))
        loop(world, config)
        errors = [
            max(float(np.abs(x.lam_J.numpy() - lam_star).max()), float(x.slack_J.abs().max()))
            for x in world.history
        ]
        above = [t for t, error in enumerate(errors, 1) if error >= 1e-6]
        found[f"{name}|{start}|{config.iterations}"] = (
            None if above and above[-1] == len(errors) else 1 + max(above, default=0),
            errors[-1],
        )

    for start, factor in (("0", 0.0), ("3 lambda*", 3.0)):
        for rule, step in CAID_RULES:
            config = CaidConfig(beta=problem.beta, iterations=60, dual_rule=rule, dual_step=step)
            add(f"CAID, {rule} {step:g}", start, caid.loop, config)
        many = {"beta": problem.beta, "lam_init": factor * float(lam_star.max())}
        add("C-DPO", start, cdpo.loop, CdpoConfig(**many, iterations=60))
        add("PD-DPO", start, pd_dpo.loop, PdDpoConfig(**many, iterations=60))
        add("OPD", start, opd.loop, OpdConfig(**many, iterations=300))
        # ln lambda cannot leave 0.
        many["lam_init"] = many["lam_init"] or 0.05
        add(
            "primal-dual, RLOO",
            start if factor else "0.05",
            primal_dual.loop,
            PrimalDualConfig(**many, iterations=100),
        )
        add("RePO", start if factor else "0.05", repo.loop, RepoConfig(**many, iterations=100))
    return found


def six_steps(seed: int, J: int, eps: float) -> dict[str, float]:
    """Largest |slack| of CAID's policy after six dual steps with the exact maximiser, by rule, dual step and start."""
    problem, result = make(seed, J=J, eps=eps), {}
    for rule, step in (
        ("newton", 1.0),
        ("newton", CaidConfig.dual_step),
        ("secant", CaidConfig.dual_step),
        ("secant", 1.0),
    ):
        for start, factor in (("lambda*", 1.0), ("0", 0.0), ("3 lambda*", 3.0)):
            world = ExactWorld(
                problem,
                CaidConfig(beta=problem.beta, iterations=7, dual_rule=rule, dual_step=step),
                maximiser,
            )
            world.lam_init = factor * world.solve_dual().lam
            caid.loop(world, world.config)
            result[f"{rule} {step:g}, {start}"] = float(world.history[-1].slack_J.abs().max())
    return result


def curves(seed: int, eps: float, iterations: int) -> dict[str, list[tuple[int, float, float, float]]]:
    """ "algorithm|start" -> (policy updates, |slack|, lambda, value - P_p*) of each measured iterate, exact maximiser, J = 1; and under
    "optimum" lambda*_p."""
    problem = make(seed, eps=eps)
    optima = Optima(problem)
    lam_p, _, _ = optima.solve_dual_in_class(optima.solve_dual())
    best = optima.solve_primal_in_class(optima.best_in_class(lam_p).theta).value
    found = {"optimum": [(0, 0.0, float(lam_p[0]), 0.0)]}
    for run in runs(problem, maximiser, iterations):
        points = [
            (
                min(i + 1, iterations) * run.per_iteration,
                abs(float(x.slack_J[0])),
                float(x.lam_J[0]),
                problem.value(x.theta) - best,
            )
            for i, x in enumerate(run.world.history)
        ]
        if not points:  # one-shot methods measure nothing
            n = len(run.world.fitted)
            points = [
                (
                    n,
                    abs(float(problem.slack_J(run.theta)[0])),
                    float(run.lam[0]),
                    problem.value(run.theta) - best,
                )
            ]
        found[f"{run.name}|{run.start}"] = points
    return found


def standardising(seed: int, eps: float) -> dict[str, tuple[float, float, float, float]]:
    """Advantage -> (slack at lambda* held fixed; then lambda - lambda*_p, slack, value - P_p* of primal-dual run to its end); J = 1."""
    problem = make(seed, eps=eps)
    optima = Optima(problem)
    lam_star = optima.solve_dual()
    lam_p, _, _ = optima.solve_dual_in_class(lam_star)
    best = optima.solve_primal_in_class(optima.best_in_class(lam_p).theta).value
    result = {}
    for advantage in ("rloo", "group_norm"):
        config = PrimalDualConfig(
            beta=problem.beta, advantage=advantage, iterations=150, dual_rate=1.0, lam_init=float(lam_star[0])
        )
        world = ExactWorld(problem, config, ascent_rate=0.5)
        held = None
        for t in range(20):
            held = world.ascend(held, torch.tensor(lam_star), t)
        theta, lam = primal_dual.loop(world, config)
        result[advantage] = (
            float(problem.slack_J(held)[0]), float(lam[0] - lam_p[0]), float(problem.slack_J(theta)[0]), problem.value(theta) - best,
        )  # fmt: skip
    return result


def lagging(world: ExactWorld, target: Target, number: int) -> torch.Tensor:
    """A policy update that goes a twentieth of the way from target.start to the maximiser."""
    start = (
        torch.zeros(world.problem.features_PYF.shape[2], dtype=torch.float64)
        if target.start is None
        else target.start
    )
    return start + 0.05 * (maximiser(world, target, number) - start)


def oscillation(seed: int = 0, iterations: int = 120) -> dict[str, list[float]]:
    """Slack per dual step by CAID's loop, with policies that lag behind lambda and with the maximiser; J = 1, eps 0.3, from 3 lambda*. All
    take the same dual step, the inverse Hessian, without a cap on the change."""
    problem, found = make(seed, eps=0.3), {}
    for name, rule, update in (
        ("plain primal-dual: a small policy step, a dual step", "newton", lagging),
        ("the same with optimistic dual steps", "optimistic", lagging),
        ("dual method: the maximiser, a dual step", "newton", maximiser),
    ):
        config = CaidConfig(
            beta=problem.beta, iterations=iterations, dual_rule=rule, dual_step=1.0, lam_max_change=1e9
        )
        world = ExactWorld(problem, config, update)
        world.lam_init = 3 * world.solve_dual().lam
        caid.loop(world, config)
        found[name] = [float(x.slack_J[0]) for x in world.history]
    return found
