"""CAID (arXiv 2505.19387, Algorithms 2 and 3): alternate a policy update that maximises
the Lagrangian with dual descent.

Where the paper is silent, this is decided: the multipliers start at the one-shot optimum,
so the literal step at t = 0 is left out; one adapter and its optimizer go on through all iterations;
the reference stays the original model; labels are drawn afresh in every step; the improvement is measured
against each prompt's own reference samples; the dual step is half the inverse Hessian at the warm start,
with a cap on the change, as a policy of few steps lags behind lambda, and less where lambda was lowered too
far; an iterate is a running mean over steps; the last one is the result, and no dual step follows it. An
update learns from the reference's samples that the dual is solved on, in Algorithm 3 too, where the paper
takes the preference set's pairs: --pairs with that file does so, --pairs policy takes fresh samples of the
last iterate.
"""

from torch import Tensor

from engine import dual
from engine.config import CaidConfig
from engine.ranks import ALONE, Ranks
from engine.records import Target, lagrangian
from engine.stages.protocol import Result, Stages
from engine.stages.run import open_stages


def train(config: CaidConfig, *, resume: str | None = None, ranks: Ranks = ALONE) -> Result:
    """Runs CAID; returns the run folder, the held-out verdict and the last multipliers. `resume`: the folder
    of a run to go on with.

    Raises: UserError, NonFiniteError, Interrupted.
    """
    with open_stages("caid", config, resume, ranks) as stages:
        return stages.verdict(*loop(stages, config))


def loop(stages: Stages, config: CaidConfig):
    """Runs Algorithm 2; returns the last policy and its multipliers, float64 [J]."""
    stages.sample_reference()
    warm = stages.solve_dual()
    policy, history = None, []
    for t in range(1, config.iterations + 1):
        lam_J = descend(history, warm.hessian, config) if history else warm.lam
        policy = stages.fit(
            Target(lam_J=lam_J, score=lagrangian(lam_J), coefficient=config.beta, start=policy), t
        )
        u = stages.measure_slack(policy, lam_J, t)
        if u is None:
            break
        history.append((lam_J, u.slack_J, u.se_J))
    return stages.kept


def descend(history: list[tuple[Tensor, Tensor, Tensor]], hessian_JJ: Tensor, config: CaidConfig) -> Tensor:
    """Returns the next multipliers from the rows (lambda, slack, standard error) so far,
    by the step that the config names.

    hessian_JJ: of the dual at the warm start. See `engine.dual` for the steps. No multiplier is moved by a
    slack within one standard error. Beyond it guarded and newton, the paper's step, take the slack as it was
    measured, as half a step averages noise already; the others shrink it (`engine.dual.resolved`).
    """
    bounds = {"max_change": config.lam_max_change, "lam_max": config.lam_max}
    if config.dual_rule == "guarded":
        return dual.guarded_step(history, hessian_JJ, config.dual_step, **bounds)
    hessian_JJ = hessian_JJ / config.dual_step
    if config.dual_rule == "secant":
        return dual.secant_step(history, hessian_JJ, **bounds)
    if config.dual_rule == "bisection":
        return dual.bisection_step(history, **bounds)
    if config.dual_rule == "optimistic":
        return dual.optimistic_step(history, hessian_JJ, **bounds)
    lam_J, slack_J, se_J = history[-1]
    return dual.step(lam_J, slack_J.where(slack_J.abs() > se_J, 0.0), hessian_JJ, **bounds)
