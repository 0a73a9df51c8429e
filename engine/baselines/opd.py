"""Our reading of OPD (arXiv 2602.22146, known from its abstract): optimistic primal-dual steps,
whose last iterate converges.

Policy and multipliers each have a prediction beside them. With u the slack and prox(p, lambda) the maximiser
of E[r + lambda . g] - beta KL(pi || reference) - kappa KL(pi || p):

    lambda' = [lambda_t - eta u(pi'_{t-1})]+      pi' = prox(pi_t, lambda'_{t-1})        predictions
    lambda_{t+1} = [lambda_t - eta u(pi')]+       pi_{t+1} = prox(pi_t, lambda')         steps

Decided here: pi_0 and pi'_0 are the reference and u of it is taken for 0, so that lambda_init is also the
first prediction; prox is fitted by the label form, with coefficient beta + kappa against the mixture of
reference and p, in place of natural-gradient steps; steps of lambda are bounded by 0 and lam_max alone,
--lam-max-change does not act. An iteration costs two policy updates. The slack of every prediction is
measured, as lambda needs it; of the steps that of the last one alone, which is the result: no dual step
follows it. Where it passes max_kl the prediction before it, whose slack is known, is the result.
"""

import torch
from torch import Tensor

from engine.config import OpdConfig
from engine.ranks import ALONE, Ranks
from engine.records import Target, lagrangian
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: OpdConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs OPD; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder
    of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("opd", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: OpdConfig):
    """Runs OPD; returns the last policy and the multipliers it was trained with, float64 [J]."""
    total = config.beta + config.proximity

    def prox(policy, lam_J: Tensor, number: int):
        # The first step's last policy is the reference itself.
        share = 0.0 if policy is None else config.proximity / total
        target = Target(
            lam_J=lam_J,
            score=lagrangian(lam_J),
            coefficient=total,
            start=policy,
            anchor=policy,
            anchor_share=share,
        )
        return stages.fit(target, number)

    def descend(lam_J: Tensor, slack_J: Tensor) -> Tensor:
        return (lam_J - config.dual_rate * slack_J).clamp(0, config.lam_max)

    stages.sample_reference()
    stages.check_thresholds()
    lam_J = torch.full((stages.n_constraints,), config.lam_init, dtype=torch.float64)
    policy, predicted_lam_J, slack_J = None, lam_J, torch.zeros_like(lam_J)
    number = 0  # of the last step
    for t in range(1, config.iterations + 1):
        if t > 1:
            lam_J = descend(lam_J, slack_J)
        prediction = prox(policy, predicted_lam_J, 2 * t - 1)
        u = stages.measure_slack(prediction, predicted_lam_J, 2 * t - 1)
        if u is None:
            break
        number = 2 * t
        predicted_lam_J = descend(lam_J, slack_J)
        slack_J = u.slack_J
        policy, used_J = prox(policy, predicted_lam_J, number), predicted_lam_J
    if number:
        stages.measure_slack(policy, used_J, number)
    return stages.kept
