"""Runs every algorithm's loop in the exact world, from several multipliers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.theory.exact_stages import ExactStages, Update, preferred
from bench.theory.problem import Problem
from bench.theory.updates import listwise, maximiser, regression, sampled, single, soft
from engine import caid, mocan
from engine.baselines import cdpo, dpo, opd, pd_dpo, primal_dual, repo, sacpo, safe_dpo
from engine.config import (
    CaidConfig,
    CdpoConfig,
    DpoConfig,
    MocanConfig,
    OpdConfig,
    PdDpoConfig,
    PrimalDualConfig,
    RepoConfig,
    RunConfig,
    SacpoConfig,
    SafeDpoConfig,
)

# How the runs update a policy: the exact maximiser, the population minimiser of a form, or a form on as many
# draws a prompt, which also measure the slack.
KINDS: dict[str, tuple[Update, int | None]] = {
    "exact": (maximiser, None),
    "soft": (soft, None),
    "regression": (regression, None),
    "listwise": (listwise, None),
    "single": (single, None),
    "samples": (regression, 16),
    "drawn": (sampled, 16),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One algorithm from one start in one world."""

    name: str
    start: str
    world: ExactStages
    theta: torch.Tensor
    lam: torch.Tensor
    per_iteration: int = 1  # policy updates


def run_algorithms(problem: Problem, kind: str, iterations: int, seed: int = 0) -> list[Run]:
    """Runs every algorithm with the updates of a kind; those that keep multipliers
    start at 0 and at 3 lambda*."""
    update, draws = KINDS[kind]

    def world(config: RunConfig, problem: Problem = problem) -> ExactStages:
        return ExactStages(problem, config, update, draws=draws, slack_draws=draws, seed=seed)

    base = {"beta": problem.beta}
    warm = world(CaidConfig(**base)).solve_dual().lam
    high = float(3 * warm.max())
    runs = []

    def add(
        name: str,
        start: str,
        loop: Callable,
        config: RunConfig,
        *,
        lam_init: torch.Tensor | None = None,
        per_iteration: int = 1,
        problem: Problem = problem,
    ) -> None:
        here = world(config, problem)
        here.lam_init = lam_init
        theta, lam = loop(here, config)
        runs.append(
            Run(name=name, start=start, world=here, theta=theta, lam=lam, per_iteration=per_iteration)
        )

    default = CaidConfig.dual_step
    for name, rule, step in (
        ("CAID, dual step 1", "newton", 1.0),
        (f"CAID, dual step {default:g}", "newton", default),
        ("CAID, secant", "secant", default),
    ):
        for start, lam in {"lambda*": None, "0": 0 * warm, "3 lambda*": 3 * warm}.items():
            config = CaidConfig(**base, iterations=iterations, dual_rule=rule, dual_step=step)
            add(name, start, caid.loop, config, lam_init=lam)
    config = CaidConfig(**base, iterations=iterations, dual_step=1.0)
    # Fitted log-ratios may be too weak for the thresholds; with `force` lambda then
    # stops at its largest value.
    tilts, fitted = preferred(ExactStages(problem, config)), preferred(world(config))
    add("PeCAID, exact tilts", "lambda*", caid.loop, config, problem=tilts)
    add("PeCAID, fitted", "lambda*", caid.loop, replace(config, force=True), problem=fitted)
    add("PeCAN, exact tilts", "lambda*", mocan.loop, MocanConfig(**base), problem=tilts)
    add("PeCAN, fitted", "lambda*", mocan.loop, MocanConfig(**base, force=True), problem=fitted)
    for start, lam in (("0", 0.0), ("3 lambda*", high)):
        many = dict(base, iterations=iterations, lam_init=lam)
        add("C-DPO", start, cdpo.loop, CdpoConfig(**many))
        add("PD-DPO", start, pd_dpo.loop, PdDpoConfig(**many))
        add("OPD", start, opd.loop, OpdConfig(**many), per_iteration=2)
    # These step on ln lambda, which cannot leave 0.
    for start, lam in (("0.05", 0.05), ("3 lambda*", high)):
        many = dict(base, iterations=iterations, lam_init=lam)
        standardised = PrimalDualConfig(**many, advantage="group_norm")
        add("primal-dual, RLOO", start, primal_dual.loop, PrimalDualConfig(**many))
        add("primal-dual, group_norm", start, primal_dual.loop, standardised)
        add("RePO", start, repo.loop, RepoConfig(**many))
    add("MoCAN", "lambda*", mocan.loop, MocanConfig(**base))
    add("SACPO", "lambda* given", sacpo.loop, SacpoConfig(**base, lam=tuple(warm.tolist())))
    add("DPO, reward", "", dpo.loop, DpoConfig(**base))
    add("DPO, safety", "", dpo.loop, DpoConfig(**base, objective="safety"))
    add("SafeDPO", "", safe_dpo.loop, SafeDpoConfig(**base))
    return runs
