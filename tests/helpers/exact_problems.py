"""Targets and updates for tests on exact problems."""

from bench.theory.updates import listwise, maximiser, regression, single, soft
from engine.records import Score, ScoredTarget

FORMS = [maximiser, soft, regression, listwise, single]


def target_at(problem, lam, **changes):
    """Returns the target r + lambda . g on every response of a problem, with some fields changed."""
    score = problem.reward_PY + problem.utility_PYJ @ lam
    return ScoredTarget(score=Score.plain(score), coefficient=problem.beta, **changes)
