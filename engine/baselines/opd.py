"""Our reading of OPD (arXiv 2602.22146, known from its abstract): optimistic primal-dual steps, whose last iterate converges.

Policy and multipliers each have a prediction beside them. With u the slack and prox(p, lambda) the maximiser of
E[r + lambda . g] - beta KL(pi || reference) - kappa KL(pi || p):

    lambda' = [lambda_t - eta u(pi'_{t-1})]+      pi' = prox(pi_t, lambda'_{t-1})        predictions
    lambda_{t+1} = [lambda_t - eta u(pi')]+       pi_{t+1} = prox(pi_t, lambda')         steps

Decided here: pi_0 and pi'_0 are the reference and u of it is taken for 0, so that lambda_init is also the first prediction; prox is fitted
by the label form, with coefficient beta + kappa against the mixture of reference and p, in place of natural-gradient steps; steps of lambda
are bounded by 0 and lam_max alone, --lam-max-change does not act. An iteration costs two policy updates. The slack of every prediction is
measured, as lambda needs it; of the steps that of the last one alone, which is the result: no dual step follows it. Where it passes max_kl
the prediction before it, whose slack is known, is the result.
"""

import torch

from engine.config import OpdConfig
from engine.records import Target
from engine.stages.job import open_job
from engine.stages.protocol import Result
from engine.stages.update import World


def train(config: OpdConfig, *, resume: str | None = None) -> Result:
    """Run OPD; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_job("opd", config, resume, n_stages=4 + 3 * config.iterations) as job:
        world = World(job)
        world.check_thresholds()
        return world.verdict(*loop(world, config))


def loop(world: World, config: OpdConfig):
    """OPD in any world: returns the last policy and the multipliers it was trained with, float64 [J]."""
    total = config.beta + config.proximity

    def prox(policy, lam_J: torch.Tensor, number: int):
        score_PG = world.scores.reward_PG + world.scores.utility_PGJ @ lam_J
        share = 0.0 if policy is None else config.proximity / total
        # The first step's last policy is the reference itself.
        return world.fit(Target(lam_J=lam_J, score_PG=score_PG, coefficient=total, start=policy, anchor=policy, anchor_share=share), number)

    def descend(lam_J: torch.Tensor, slack_J: torch.Tensor) -> torch.Tensor:
        return (lam_J - config.dual_rate * slack_J).clamp(0, config.lam_max)

    lam_J = torch.full((world.scores.utility_PGJ.shape[2],), config.lam_init, dtype=torch.float64)
    policy, used_J, predicted_lam_J, slack_J = None, lam_J, lam_J, torch.zeros_like(lam_J)
    before, number = (policy, used_J), 0  # number: of the last step
    for t in range(1, config.iterations + 1):
        prediction = prox(policy, predicted_lam_J, 2 * t - 1)
        u = world.measure_slack(prediction, predicted_lam_J, 2 * t - 1)
        if world.passes_max_kl(u, 2 * t - 1):
            break
        before, number = (prediction, predicted_lam_J), 2 * t
        predicted_lam_J = descend(lam_J, slack_J)
        slack_J = u.slack_J
        policy, used_J = prox(policy, predicted_lam_J, number), predicted_lam_J
        if t < config.iterations:
            lam_J = descend(lam_J, slack_J)
    if number and world.passes_max_kl(world.measure_slack(policy, used_J, number), number):
        return before
    return policy, used_J
