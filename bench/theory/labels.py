"""Compares label forms and sources of pairs by eps_app, how far a policy fitted at lambda* stays below the
maximum of the Lagrangian."""

import math
from typing import NamedTuple

import torch

from bench.theory.exact_stages import ExactStages, Update
from bench.theory.optima import Optima
from bench.theory.problem import Problem, make
from bench.theory.updates import highest_lagrangian, listwise, regression, sampled, single, soft
from engine.config import MocanConfig
from engine.policy.pairs import within_prompts
from engine.records import Score, ScoredTarget

FORMS: dict[str, Update] = {
    "Bradley-Terry, sampled": sampled,
    "Bradley-Terry, soft": soft,
    "pairwise regression": regression,
    "listwise": listwise,
    "single response (DRO)": single,
}
ALL_PAIRS = "all pairs of reference samples"
TWO_ENDS = "lowest and highest of them"
FRESH = "half from the reference, half from the policy fitted to it"
SOURCES = (ALL_PAIRS, TWO_ENDS, FRESH)
SOURCE_DRAWS = (8, 32)


class LabelProblem(NamedTuple):
    """A problem on which label forms are compared."""

    problem: Problem
    lam: torch.Tensor  # lambda*
    seed: int

    def fitted(self, update: Update, n: int, source: str) -> torch.Tensor:
        """Returns the policy that `update` fits at lambda* to pairs from a source,
        with n draws a prompt in all."""
        problem, seed = self.problem, 1000 * self.seed + n
        draws = n // 2 if source == FRESH else n
        world = ExactStages(problem, MocanConfig(beta=problem.beta), update, draws=draws, seed=seed)

        def fit(start: torch.Tensor | None, number: int) -> torch.Tensor:
            target = ScoredTarget(
                score=Score.plain(self.score_PG(world)), coefficient=problem.beta, start=start
            )
            return update(world, target, number)

        if source == TWO_ENDS:
            # These are the pairs that --responses-per-prompt 2 takes.
            P = len(world.index_PG)
            pairs = within_prompts(self.score_PG(world), list(range(P)), 2)
            world.index_PG = world.index_PG.gather(1, torch.tensor(pairs.row).view(P, 2) % n)
        theta = fit(None, 1)
        if source == FRESH:
            pi = problem.policy_PY(theta)
            world.index_PG = torch.multinomial(pi, draws, replacement=True, generator=world.generator(2))
            theta = fit(theta, 3)
        return theta

    def score_PG(self, world: ExactStages) -> torch.Tensor:
        """Returns r + lambda* . g of the responses that updates see."""
        return world.scores.reward_PG + world.scores.utility_PGJ @ self.lam

    def missed(self, theta: torch.Tensor, highest: float) -> float:
        """Returns eps_app; highest is D_p(lambda*)."""
        return highest - self.problem.lagrangian(theta, self.lam)


def label_problem(seed: int, eps: float, beta: float) -> LabelProblem:
    """Makes a problem of 32 prompts with 12 responses and J = 1, and solves its dual."""
    problem = make(seed, eps=eps, beta=beta, P=32, Y=12)
    return LabelProblem(problem, ExactStages(problem, MocanConfig(beta=beta)).solve_dual().lam, seed)


def label_errors(seed: int, eps: float, beta: float, draws: tuple[int, ...]) -> dict[str, list[float]]:
    """Returns form -> eps_app for each number of draws a prompt."""
    x = label_problem(seed, eps, beta)
    highest = highest_lagrangian(x.problem, x.lam)
    return {
        form: [x.missed(x.fitted(update, n, ALL_PAIRS), highest) for n in draws]
        for form, update in FORMS.items()
    }


def pair_sources(seed: int, eps: float, beta: float) -> dict[tuple[str, str], list[float]]:
    """Returns (form, source) -> eps_app for each of SOURCE_DRAWS. Single responses make
    no pairs and are left out."""
    x = label_problem(seed, eps, beta)
    highest = highest_lagrangian(x.problem, x.lam)
    return {
        (form, source): [x.missed(x.fitted(update, n, source), highest) for n in SOURCE_DRAWS]
        for form, update in FORMS.items()
        if update is not single
        for source in SOURCES
    }


class Gain(NamedTuple):
    """A policy in a problem of beta 1."""

    gain: float  # of r + lambda* g over the reference
    kl: float
    beta: float  # at which the policy was fitted


def two_ends(seed: int, eps: float) -> dict[str, Gain]:
    """Compares a policy fitted to two ends of its draws with maximisers, in a problem of beta 1.

    The policies are the maximiser; regression on all pairs of SOURCE_DRAWS[0] draws and on their two ends;
    and the maximiser of the beta at which it gains as much as the policy of the two ends.
    """
    x = label_problem(seed, eps, beta=1.0)
    problem, optima = x.problem, Optima(x.problem)

    def row(theta: torch.Tensor, beta: float) -> Gain:
        more = problem.lagrangian(theta, x.lam) - problem.lagrangian(None, x.lam)
        return Gain(more + problem.beta * problem.kl(theta), problem.kl(theta), beta)

    def best(beta: float) -> Gain:
        return row(torch.as_tensor(optima.at_beta(beta).best_in_class(x.lam.numpy()).theta), beta)

    def fitted(source: str) -> Gain:
        return row(x.fitted(regression, SOURCE_DRAWS[0], source), problem.beta)

    gains = {
        "maximiser": best(problem.beta),
        "all pairs": fitted(ALL_PAIRS),
        "two ends": fitted(TWO_ENDS),
    }
    # The gain falls with beta, so bisection finds the beta of equal gain.
    low, high = 0.02, 5.0
    for _ in range(14):
        middle = best(math.sqrt(low * high))
        low, high = (middle.beta, high) if middle.gain > gains["two ends"].gain else (low, middle.beta)
    return gains | {"maximiser that gains as much": middle}
