"""Runs stage dual: the one-shot multipliers from reference samples, with their intervals."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import dual
from engine.config import RunConfig
from engine.constraints import Limit
from engine.errors import UserError
from engine.run.rows import DualRow
from engine.run.run import Stage
from engine.stages.job import Job
from engine.stages.reference import Reference, solved


def one_shot(job: Job, reference: Reference, start_J: Tensor | None = None) -> dual.Solution:
    """Solves for the multipliers of the aimed thresholds, from reference samples. Raises: UserError for
    unsupported thresholds unless --force."""
    config, aim = job.config, reference.aim_J
    try:
        return job.ranks.first(lambda: solved(reference, config, start_J))
    except dual.Infeasible as error:
        margin = aim - reference.needed_J
        asked = ", ".join(f"{limit.flag} {limit.value:g}" for limit in reference.limits)
        opening = f"{asked} (with its margin the dual aims at an improvement of {listed(aim)})"
        if error.proven:
            raise UserError(
                f"{opening} is infeasible, which is proven: no policy improves by "
                f"{listed(error.largest_improvement)} or more; ask for "
                "less, lower --margin, or go on with --force."
            ) from error
        raise UserError(
            f"{opening} is beyond what the {config.n_responses} samples of each prompt show, which "
            "is no proof that it cannot be met; "
            f"alone, they support b up to {listed(error.largest_improvement - margin)}, together "
            f"{error.largest_multiple:.2f} of the aim; "
            "ask for less, lower --margin, raise --n-responses, or go on with --force."
        ) from error


def solve_dual(job: Job, reference: Reference) -> dual.Solution:
    """Runs stage dual: the one-shot multipliers (arXiv 2405.19544, Algorithm 1, step 2), with intervals.

    Raises: UserError as `one_shot`.
    """
    config, aim, limits = job.config, reference.aim_J, reference.limits
    solution = one_shot(job, reference)
    scores = reference.problem
    at_zero = dual.solve(*scores, torch.full_like(aim, -1e6), config.beta).predicted_improvement
    predicted_se = _predicted_se(reference, dual.tilted_improvement(*scores, solution.lam, config.beta)[1])
    interval = None  # lam_max holds a multiplier
    if not held_by_lam_max(config, solution.lam, solution.gradient).any():
        # Where a constraint is about some prompts, their number counts as random too:
        # its interval is a little wide.
        interval = dual.lam_interval(*scores, aim, config.beta, solution)

    def compute(stage: Stage) -> dict[str, Tensor]:
        stage.log(
            DualRow(
                lam=solution.lam,
                lam_low=interval and interval.low,
                lam_high=interval and interval.high,
                lam_se=interval and interval.se,
                lam_corrected=interval and interval.lam,
                predicted_improvement=solution.predicted_improvement,
                predicted_improvement_se=predicted_se,
                improvement_at_zero=at_zero,
                ess=solution.ess.mean(),
                kkt=solution.kkt,
                aim=aim,
                threshold=reference.needed_J,
            )
        )
        return {"lam_J": solution.lam}

    job.run.stage("dual", dict, compute)
    show = job.run.display
    if warning := dual.ess_warning(solution.ess, config.n_responses):
        show.warn(warning)
    warn_of_lam_max(job, limits, solution.lam, solution.gradient)
    said = dual.said(solution.lam, interval, config.n_responses) if interval else listed(solution.lam)
    predicted = zip(solution.predicted_improvement.tolist(), predicted_se.tolist(), strict=True)
    show.line(
        f"one-shot lambda {said}: predicted improvement "
        f"{', '.join(f'{x:.3f} +- {se:.3f}' for x, se in predicted)} (at lambda 0: "
        f"{listed(at_zero)}); effective sample size "
        f"{float(solution.ess.mean()):.1f} of {config.n_responses}"
    )
    return solution


def _predicted_se(reference: Reference, improvement_PJ: Tensor) -> Tensor:
    """Computes the standard errors of the predicted improvements, each over the prompts that its
    constraint is about. float64 [J]."""
    found = []
    for j, limit in enumerate(reference.limits):
        own = limit.rows(reference.prompts)
        # Undo the weight that the Lagrangian gives to this subset of prompts.
        found.append(dual.standard_error(improvement_PJ[own, j] * len(own) / len(reference.prompts)))
    return torch.stack(found)


def held_by_lam_max(config: RunConfig, lam_J: Tensor, gradient_J: Tensor) -> Tensor:
    """Marks multipliers that would rise if lam_max let them; bool [J]."""
    return (lam_J >= config.lam_max * (1 - 1e-12)) & (gradient_J < 0)


def warn_of_lam_max(job: Job, limits: Sequence[Limit], lam_J: Tensor, gradient_J: Tensor) -> None:
    for j in held_by_lam_max(job.config, lam_J, gradient_J).nonzero()[:, 0].tolist():
        job.run.display.warn(
            f"lambda of {limits[j].name} is held by --lam-max {job.config.lam_max:g}, where the "
            "improvement misses the aim by "
            f"{-float(gradient_J[j]):.3f}; raise --lam-max or ask for less."
        )


def listed(values: Tensor) -> str:
    return ", ".join(f"{x:.3f}" for x in values.tolist())
