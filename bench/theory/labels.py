"""Compares label forms and sources of pairs by how far a fitted policy stays from the maximum of the Lagrangian."""

import math
from dataclasses import replace

import torch

from bench.theory.exact_stages import ExactWorld, Update
from bench.theory.optima import Optima
from bench.theory.problem import Problem, make
from bench.theory.updates import highest_lagrangian, listwise, regression, sampled, single, soft
from engine.config import (
    MocanConfig,
)
from engine.pairs import within_prompts
from engine.records import Target

FORMS: dict[str, Update] = {
    "Bradley-Terry, sampled": sampled, "Bradley-Terry, soft": soft, "pairwise regression": regression, "listwise": listwise,
    "single response (DRO)": single,
}  # fmt: skip
SOURCES = (
    "all pairs of reference samples",
    "lowest and highest of them",
    "half from the reference, half from the policy fitted to it",
)
SOURCE_DRAWS = (8, 32)


def of_labels(seed: int, eps: float, beta: float) -> tuple[Problem, torch.Tensor]:
    """A problem on which label forms are compared, of 32 prompts with 12 responses and J = 1, and its lambda*."""
    problem = make(seed, eps=eps, beta=beta, P=32, Y=12)
    return problem, ExactWorld(problem, MocanConfig(beta=beta)).solve_dual().lam


def label_errors(seed: int, eps: float, beta: float, draws: tuple[int, ...]) -> dict[str, list[float]]:
    """Form -> eps_app at lambda* for each number of draws a prompt."""
    problem, lam = of_labels(seed, eps, beta)
    highest = highest_lagrangian(problem, lam)
    return {
        name: [
            highest
            - problem.lagrangian(from_source(problem, lam, update, n, SOURCES[0], 1000 * seed + n), lam)
            for n in draws
        ]
        for name, update in FORMS.items()
    }


def pair_sources(seed: int, eps: float, beta: float) -> dict[str, list[float]]:
    """ "form|source" -> eps_app at lambda* for each of SOURCE_DRAWS. Single responses are no pairs."""
    problem, lam = of_labels(seed, eps, beta)
    highest = highest_lagrangian(problem, lam)
    return {
        f"{name}|{source}": [
            highest - problem.lagrangian(from_source(problem, lam, update, n, source, 1000 * seed + n), lam)
            for n in SOURCE_DRAWS
        ]
        for name, update in FORMS.items()
        if update is not single
        for source in SOURCES
    }


def from_source(
    problem: Problem, lam: torch.Tensor, update: Update, n: int, source: str, seed: int
) -> torch.Tensor:
    """The policy that `update` fits at lambda to pairs from a source, with n draws a prompt in all."""
    fresh = source == SOURCES[2]
    world = ExactWorld(
        problem, MocanConfig(beta=problem.beta), update, draws=n // 2 if fresh else n, seed=seed
    )
    P = len(world.index_PG)

    def fit(start: torch.Tensor | None, number: int) -> torch.Tensor:
        score_PG = world.scores.reward_PG + world.scores.utility_PGJ @ lam
        return update(
            world, Target(lam_J=lam, score_PG=score_PG, coefficient=problem.beta, start=start), number
        )

    if source == SOURCES[1]:
        # What --responses-per-prompt 2 takes.
        score_PG = world.scores.reward_PG + world.scores.utility_PGJ @ lam
        chosen = torch.tensor(within_prompts(score_PG, list(range(P)), 2).row).view(P, 2) % n
        world.index_PG = world.index_PG.gather(1, chosen)
    theta = fit(None, 1)
    if fresh:
        pi = problem.policy_PY(theta)
        world.index_PG = torch.multinomial(pi, n // 2, replacement=True, generator=world.generator(2))
        theta = fit(theta, 3)
    return theta


def two_ends(seed: int, eps: float) -> dict[str, tuple[float, ...]]:
    """Policy -> (gain of r + lambda* g over the reference, KL, beta), of problems at beta 1.

    The maximiser; regression on all pairs of SOURCE_DRAWS[0] draws and on their two ends; the maximiser of the beta at which it gains as
    much as the policy of the two ends.
    """
    problem, lam = of_labels(seed, eps, beta=1.0)

    def row(theta: torch.Tensor, beta: float) -> tuple[float, float, float]:
        return (
            problem.lagrangian(theta, lam) - problem.lagrangian(None, lam) + problem.beta * problem.kl(theta),
            problem.kl(theta),
            beta,
        )

    def best(beta: float) -> tuple[float, float, float]:
        return row(
            torch.as_tensor(Optima(replace(problem, beta=beta)).best_in_class(lam.numpy()).theta), beta
        )

    found = {"maximiser": best(problem.beta)}
    for name, source in (("all pairs", SOURCES[0]), ("two ends", SOURCES[1])):
        found[name] = row(
            from_source(problem, lam, regression, SOURCE_DRAWS[0], source, 1000 * seed + SOURCE_DRAWS[0]),
            problem.beta,
        )
    low, high = 0.02, 5.0  # the gain falls with beta
    for _ in range(14):
        middle = best(math.sqrt(low * high))
        low, high = (middle[2], high) if middle[0] > found["two ends"][0] else (low, middle[2])
    return found | {"maximiser that gains as much": middle}
