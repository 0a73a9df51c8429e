"""Samples and scores that tests give to updates and to the rules of algorithms."""

import torch
from torch import Tensor

from engine.model.packing import LowerStates
from engine.policy.samples import Samples
from engine.records import Prompts, Rollouts, Scored, Scores, Units


def samples_of(
    prompts: Prompts,
    rollouts: Rollouts | None,
    scores: Scores,
    lower: LowerStates | None = None,
) -> Samples:
    """Returns responses of the reference whose scorers give them these scores, each in units of 1."""
    kl_PG = torch.zeros_like(scores.ref_logprob_PG)
    utilities, audits = scores.utility_PGJ.shape[2], scores.audit_PGA.shape[2]
    units = Units(reward=1.0, utility_J=[1.0] * utilities, audit_A=[1.0] * audits)
    return Samples(
        prompts=prompts,
        rollouts=rollouts,
        texts=[],
        scores=scores,
        kl_PG=kl_PG,
        scaled=units.apply(scores),
        lower=lower,
    )


def scored_of(reward_PG: Tensor, utility_PGJ: Tensor, **changes: Tensor) -> Scored:
    """Returns scores in units of 1 on prompts that all count alike, as the rule of an algorithm sees them."""
    fields = {"weight_PJ": torch.ones_like(utility_PGJ[:, 0]), "cost_PGJ": -utility_PGJ, **changes}
    return Scored(reward_PG=reward_PG, utility_PGJ=utility_PGJ, **fields)
