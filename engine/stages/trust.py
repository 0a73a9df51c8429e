"""Keeps policies near the reference: one that an update took too far is taken back towards it.

AdamW moves a policy by its learning rate, however little the target asks for. Where a scorer counts what
every token can do, such as the length of words, five steps went to seven nats for a tilt of one. So after an
update the policy answers some prompts, those that measure its slack where the algorithm has one, and where
its KL(policy || reference) is above `--max-kl-ratio` times that of the tilt it learns, by more than its
standard error, its weights go back towards the reference's until it is not. The weights that further steps
go on from go back as far, and these steps are as much shorter.
"""

import math
from dataclasses import replace

from torch import Tensor

from engine import keys
from engine.model import packing
from engine.policy.forward import frozen_forward
from engine.policy.steps import Policy
from engine.policy.weights import Weights, before_whole, whole
from engine.records import Prompts
from engine.run.needs import KL_PROMPTS
from engine.run.rows import TrustRow
from engine.run.run import Stage
from engine.stages.job import Job
from engine.stages.sampling import naming, respond
from engine.stages.shares import by_shares

# A policy that is still too far after so many times stays so, and the run says it. Each time takes at least
# a twentieth off the way, and where the KL grows as the square of the way, the first is enough.
MOST_TIMES, LEAST = 8, 0.95


def taken_back(
    job: Job,
    stage: Stage,
    policy: Policy,
    weights: Weights,
    untrained: dict[str, Tensor],
    prompts: Prompts,
    limit: float,
    iteration: int,
    known: tuple[float, float] | None = None,
) -> Policy:
    """Returns the policy, or one on the way from the reference to it whose KL is within the limit.

    weights: hold those of `policy`, and in the end those of what is returned. untrained: those of the
    reference. prompts: all that may be asked; the first `KL_PROMPTS` are. limit: nats per response.
    known: the policy's KL and its standard error, where they have been measured.
    """
    share = 1.0
    asked = prompts.select(list(range(min(len(prompts), KL_PROMPTS))))
    for time in range(MOST_TIMES + 1):
        kl, se = known or _measured_kl(job, stage, asked, weights, keys.trust(iteration, time))
        known = None
        stage.log(TrustRow(iteration=iteration, kl=kl, kl_se=se, limit=limit, share=share))
        if kl - se <= limit:  # As a slack within its standard error moves nothing.
            break
        if time == MOST_TIMES:
            stage.warn(
                f"iteration {iteration}: KL {kl:.2f} nats is still above the {limit:.2f} of --max-kl-ratio "
                f"{job.config.max_kl_ratio:g}, at {share:.2g} of the way from the reference"
            )
            break
        step = min(math.sqrt(limit / kl), LEAST)
        weights.take_back(untrained, step)
        share *= step
    if share == 1:
        return policy
    adapter, last = weights.tensors(), {}
    if policy.last:
        weights.set_tensors(policy.last)
        weights.take_back(untrained, share)
        last = weights.tensors()
        weights.set_tensors(adapter)
    return replace(policy, adapter=adapter, last=last, pace=policy.pace * share)


def _measured_kl(
    job: Job, stage: Stage, prompts: Prompts, weights: Weights, purpose: int
) -> tuple[float, float]:
    """Measures KL(policy || reference) on one response of the policy to each prompt; returns it with its
    standard error, nats per response."""

    def work(own: range, part: Prompts) -> Tensor | None:
        with before_whole(job.model):
            rollouts, _ = respond(job, stage, part, weights, n=1, purpose=purpose)
        with whole(job.model, None) as (reference, _), naming(stage):
            if not own:
                return None
            reference_N = frozen_forward(
                reference,
                packing.groups(part, rollouts),
                [],
                temperature=job.config.temperature,
                memory_budget_bytes=job.config.memory_budget_bytes,
            )[1]
        return rollouts.model_logprob.double().sum(1) - reference_N

    kl_N = by_shares(job.ranks, prompts, work)
    return float(kl_N.mean()), float(kl_N.std(correction=0) / math.sqrt(max(1, len(kl_N) - 1)))
