"""Policy updates for the exact world. An update takes (world, target, number) and returns theta.

`maximiser` is the exact argmax of the Lagrangian over theta, to which the papers' theorems apply. `soft`,
`sampled`, `regression`, `listwise` and `single` minimise the loss of a label form: over all responses (the
population) or, in a world with `draws`, over that many responses drawn from the reference for each prompt.
"""

import math

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from bench.theory.exact_stages import ExactStages
from bench.theory.newton import minimise, moment, softmax
from bench.theory.problem import Problem
from engine.config import MocanConfig
from engine.records import Score, ScoredTarget


def maximiser(world: ExactStages, target: ScoredTarget, number: int) -> Tensor:
    """Returns argmax over theta of E[score + shift] - coefficient KL(pi || anchor),
    the best of several local maxima.

    The searches start at target.start (or 0), at the least-squares fit of the tilt, and at the best small,
    middle and large member of the problem's cloud. They need the score of every response.
    """
    return local_maxima(world, target)[0][1]


def local_maxima(world: ExactStages, target: ScoredTarget) -> list[tuple[float, Tensor]]:
    """Returns (value, theta) from each start of `maximiser`, the best first."""
    phi, score, c = world.problem.features_PYF.numpy(), _tilt_PG(world, target), target.coefficient
    P = len(phi)

    def derivatives(theta: np.ndarray):
        z = phi @ theta
        pi, log_Z = softmax(z)
        inner = score - c * z
        mean = (pi * inner).sum(1, keepdims=True)
        centred = phi - (pi[..., None] * phi).sum(1, keepdims=True)
        weight = pi * (inner - mean)
        metric = c * moment(pi, centred) / P
        gradient = np.tensordot(weight, centred, 2) / P
        return -(mean.mean() + c * log_Z.mean()), -gradient, metric - moment(weight, centred) / P, metric

    centred = (phi - phi.mean(1, keepdims=True)).reshape(-1, phi.shape[2])
    fitted = np.linalg.lstsq(centred, (score - score.mean(1, keepdims=True)).ravel() / c)[0]
    starts = [_start(world, target), fitted]
    # A table of logits makes the problem concave, so one start would do.
    if phi.shape[2] < score.size:
        theta_SF, pi_SN, kl_S = world.problem.cloud
        value_S = pi_SN @ score.ravel() / P - c * kl_S
        thirds = zip(np.array_split(theta_SF, 3), np.array_split(value_S, 3), strict=True)
        starts += [theta[value.argmax()] for theta, value in thirds]
    maxima = [minimise(derivatives, x) for x in starts]
    return sorted(((-value, torch.from_numpy(theta)) for value, theta in maxima), key=lambda pair: -pair[0])


def highest_lagrangian(problem: Problem, lam: Tensor, near: Tensor | None = None) -> float:
    """Returns D_p(lambda), the largest Lagrangian over theta; `near` is a further start."""
    score = problem.reward_PY + problem.utility_PYJ @ lam
    exact = ExactStages(problem, MocanConfig(beta=problem.beta))
    target = ScoredTarget(score=Score.plain(score), coefficient=problem.beta, start=near)
    return problem.lagrangian(maximiser(exact, target, 0), lam)


def missed_maximum(problem: Problem, lam: Tensor, theta: Tensor) -> float:
    """Returns eps_app = D_p(lambda) - L(pi_theta, lambda)."""
    return highest_lagrangian(problem, lam, theta) - problem.lagrangian(theta, lam)


def soft(world: ExactStages, target: ScoredTarget, number: int) -> Tensor:
    """Fits Bradley-Terry to expected labels: cross-entropy of sigmoid(score difference),
    over all pairs of a prompt's responses."""
    return _bradley_terry(world, target, expit(_pairs(world, target)[1]))


def sampled(world: ExactStages, target: ScoredTarget, number: int) -> Tensor:
    """Fits Bradley-Terry to labels drawn afresh for each update, as in the papers;
    its population minimiser is that of `soft`."""
    chance = expit(_pairs(world, target)[1])
    drawn = torch.rand(len(chance), generator=world.generator(number), dtype=torch.float64).numpy()
    return _bradley_terry(world, target, (drawn < chance).astype(float))


def regression(world: ExactStages, target: ScoredTarget, number: int) -> Tensor:
    """Fits coefficient x log-ratio differences to score differences by least squares,
    over all pairs of a prompt's responses."""
    difference, score, offset = _pairs(world, target)
    return torch.from_numpy(np.linalg.lstsq(target.coefficient * difference, score + offset)[0])


def listwise(world: ExactStages, target: ScoredTarget, number: int) -> Tensor:
    """Fits a prompt's responses together: cross-entropy of softmax(score / coefficient), times the anchor,
    against the softmax of log-ratios."""
    phi = world.gather(world.problem.features_PYF).numpy()
    aim, _ = softmax(_tilt_PG(world, target) / target.coefficient)
    P = len(phi)

    def derivatives(theta: np.ndarray):
        z = phi @ theta
        p, log_Z = softmax(z)
        value = (log_Z - (aim * z).sum(1, keepdims=True)).mean()
        hessian = moment(p, phi - (p[..., None] * phi).sum(1, keepdims=True)) / P
        return value, np.tensordot(p - aim, phi, 2) / P, hessian, hessian

    return torch.from_numpy(minimise(derivatives, _start(world, target))[1])


def single(world: ExactStages, target: ScoredTarget, number: int) -> Tensor:
    """Fits coefficient x log-ratio of single responses to score - V by least squares (DRO, arXiv 2405.19107).

    V is the prompt's: coefficient x log-mean-exp of score / coefficient over its responses. Were V fitted
    with theta, this would be `regression`, as the sum of squares over all pairs is that about the mean.
    """
    phi, c = world.problem.features_PYF.numpy(), target.coefficient
    seen = world.gather(world.problem.features_PYF).numpy()
    tilt = _tilt_PG(world, target)
    aim = tilt - c * softmax(tilt / c)[1] + c * math.log(tilt.shape[1])
    Y, n = phi.shape[1], tilt.size

    def derivatives(theta: np.ndarray):
        pi, log_Z = softmax(phi @ theta)
        mean = (pi[..., None] * phi).sum(1, keepdims=True)
        residual = c * (seen @ theta - log_Z + math.log(Y)) - aim
        slope = c * (seen - mean)
        square = moment(np.ones_like(residual), slope) / n
        bend = c * moment(residual.sum(1, keepdims=True) * pi, phi - mean) / n
        return (residual**2).sum() / (2 * n), np.tensordot(residual, slope, 2) / n, square - bend, square

    return torch.from_numpy(minimise(derivatives, _start(world, target))[1])


def _start(world: ExactStages, target: ScoredTarget) -> np.ndarray:
    return np.zeros(world.problem.features_PYF.shape[2]) if target.start is None else target.start.numpy()


def _tilt_PG(world: ExactStages, target: ScoredTarget) -> np.ndarray:
    """Returns the value that coefficient x ln(pi / reference) shall have at the responses that updates see,
    up to a constant per prompt."""
    tilt = target.score_PG if target.shift_PG is None else target.score_PG + target.shift_PG
    if target.anchor is not None:
        anchor = world.gather(world.problem.log_ratio_PY(target.anchor))
        tilt = tilt + target.coefficient * target.anchor_share * anchor
    return tilt.numpy()


def _pairs(world: ExactStages, target: ScoredTarget) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists all pairs [K] within the prompts that are not dropped: feature differences [K, F], score
    differences [K], and the offset [K] of the margin coefficient x (features . theta)."""
    phi, score = world.gather(world.problem.features_PYF).numpy(), target.score_PG.numpy()
    offset = _tilt_PG(world, target) - score
    i, j = np.triu_indices(phi.shape[1], 1)
    kept = np.ones((len(phi), len(i)), dtype=bool)
    if target.dropped_PG is not None:
        dropped = target.dropped_PG.numpy()
        kept = ~(dropped[:, i] & dropped[:, j])
    return (
        (phi[:, i] - phi[:, j])[kept],
        (score[:, i] - score[:, j])[kept],
        (offset[:, i] - offset[:, j])[kept],
    )


def _bradley_terry(world: ExactStages, target: ScoredTarget, label_K: np.ndarray) -> Tensor:
    """Minimises the cross-entropy of labels over the pairs."""
    difference, _, offset = _pairs(world, target)
    c, K = target.coefficient, len(label_K)

    def derivatives(theta: np.ndarray):
        margin = c * (difference @ theta) - offset
        chance = expit(margin)
        value = (np.logaddexp(0, margin) - label_K * margin).mean()
        hessian = c * c * moment(chance * (1 - chance), difference) / K
        return value, c * (chance - label_K) @ difference / K, hessian, hessian

    return torch.from_numpy(minimise(derivatives, _start(world, target))[1])
