"""Stage iteration-t/slack: how far an iterate is from its constraints, on its own responses."""

import torch
from torch import Tensor

from engine import dual, keys
from engine.policy.steps import Policy
from engine.policy.weights import Weights
from engine.run.rows import IterationRow, SpeedRow, read_timing
from engine.run.run import Stage
from engine.stages.job import Job, deal_prompts
from engine.stages.protocol import Slack
from engine.stages.reference import Reference
from engine.stages.sampling import Drawn, drawn
from engine.stages.solve import listed, warn_of_lam_max


def stage_name(iteration: int) -> str:
    """Names the stage in which an iterate's slack is measured."""
    return f"iteration-{iteration}/slack"


def answers(job: Job, stage: Stage, reference: Reference, weights: Weights, iteration: int) -> Drawn:
    """Rolls out an iterate on the prompts that measure its slack, and scores its responses. Equal weights
    give equal ones."""
    prompts = reference.prompts.select(deal_prompts(job.config, reference.prompts, iteration)[1])
    n, purpose = job.config.slack_responses, keys.slack(iteration)
    return drawn(job, stage, prompts, weights, n=n, purpose=purpose)


def measure(
    job: Job,
    reference: Reference,
    weights: Weights,
    policy: Policy,
    lam_J: Tensor,
    iteration: int,
    known: Drawn | None = None,
) -> Slack:
    """Measures u(lambda) = mean(g - E_ref g) - aim on responses of the policy (arXiv 2505.19387, Algorithm 2,
    step 2).

    weights: hold those of `policy`. known: the policy's `answers`, where they are there already.
    """
    config, limits = job.config, reference.limits
    measured_on = deal_prompts(config, reference.prompts, iteration)[1]

    def compute(stage: Stage) -> Slack:
        found = known or answers(job, stage, reference, weights, iteration)
        samples = found.logged(job, stage, weights)
        prompts = samples.prompts
        scores = reference.scoring(stage, samples)
        mean, se, violation = torch.zeros(3, len(limits), dtype=torch.float64)
        missing_PJ = reference.missing(scores.utility_PGJ, measured_on)
        for j, limit in enumerate(limits):
            about = limit.rows(prompts)
            after, before = (
                scores.utility_PGJ[about, :, j],
                reference.scores.utility_PGJ[measured_on][about, :, j],
            )
            mean[j], se[j] = dual.paired_improvement(after, before)
            violation[j] = missing_PJ[about, j].clamp(min=0).mean()
        reward, reward_se = dual.paired_improvement(scores.reward_PG, reference.scores.reward_PG[measured_on])
        slack = Slack(
            improvement_J=mean,
            se_J=se,
            slack_J=mean - reference.aim_J,
            violation_J=violation,
            reward=float(reward),
            reward_se=float(reward_se),
            kl=float(samples.kl_PG.mean()),
            kl_se=float(dual.standard_error(samples.kl_PG.mean(1))),
        )
        stage.log(
            IterationRow(
                iteration=iteration,
                lam=lam_J,
                reward=slack.reward,
                reward_se=slack.reward_se,
                improvement=mean,
                improvement_se=se,
                threshold=reference.needed_J,
                aim=reference.aim_J,
                slack=slack.slack_J,
                slack_se=se,
                kl=slack.kl,
                kl_se=slack.kl_se,
                loss=policy.loss,
                finished=float(samples.rollouts.finished.double().mean()),
                prompts=len(measured_on),
                responses=config.slack_responses,
            )
        )
        return slack

    return job.run.stage(stage_name(iteration), Slack, compute)


def say(job: Job, reference: Reference, lam_J: Tensor, slack: Slack, loss: float, iteration: int) -> None:
    """Prints the line of an iteration, and a warning for a multiplier that --lam-max holds."""
    job.run.display.line(iteration_line(job, reference, lam_J, slack, loss, iteration))
    warn_of_lam_max(job, reference.limits, lam_J, slack.slack_J)


def iteration_line(
    job: Job, reference: Reference, lam_J: Tensor, slack: Slack, loss: float, iteration: int
) -> str:
    """Says in one line what was measured of an iterate."""
    stage = stage_name(iteration)
    speed = [row.tokens_per_s for row in read_timing(job.run.folder, SpeedRow) if row.stage == stage]
    measured = zip(
        slack.improvement_J.tolist(),
        slack.se_J.tolist(),
        reference.needed_J.tolist(),
        reference.aimed,
        strict=True,
    )
    held = [
        limit.progress(*values, reference.units.utility_J[j])
        for j, (limit, values) in enumerate(zip(reference.limits, measured, strict=True))
    ]
    parts = [
        f"iteration {iteration}: lambda {listed(lam_J)}",
        f"reward {slack.reward:+.2f} +- {slack.reward_se:.2f}",
        *held,
        f"{'log-ratio' if job.config.truncated else 'KL'} {slack.kl:.2f} +- {slack.kl_se:.2f} nats",
        f"loss {loss:.3f}",
        *(f"{x:.0f} tokens/s" for x in speed[-1:]),
    ]
    return " | ".join(parts)
