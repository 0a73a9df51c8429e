"""Which responses are refusals: as the scorer that is named refusal says, else by first words.

Whoever gives a cost or audit of that name, such as --audit refusal=FOLDER#LABEL, has a better measure than
first words; so it tells refusals in the verdict too, and there is no setting for it.
"""

from contextlib import nullcontext

import torch

from engine.policy.weights import Weights, before_whole, whole
from engine.records import Prompts, Scores
from engine.run.run import Stage
from engine.scorers.base import Scorers
from engine.scorers.built_in import teller_of_refusals
from engine.scorers.scoring import ReferenceForward, score
from engine.stages.job import Subject
from engine.stages.sampling import respond, warn_of_scorers
from engine.stages.shares import by_shares
from engine.verdict.refusals import is_refusal


def refused(scorers: Scorers, scores: Scores) -> list[bool] | None:
    """Tells which responses are refusals by their scores, prompt-major; None where no scorer tells it."""
    teller = teller_of_refusals(scorers)
    if teller is None:
        return None
    utility_PGS = torch.cat([scores.utility_PGJ, scores.audit_PGA], dim=2)
    names = [scorer.name for scorer in (*scorers.costs, *scorers.audits)]
    return (utility_PGS[..., names.index(teller.name)] < 0).flatten().tolist()


def sampled_refusals(
    subject: Subject, stage: Stage, prompts: Prompts, adapter: Weights | None, *, n: int, purpose: int
) -> list[bool]:
    """Samples n responses to each prompt as `respond` does, and tells which are refusals, prompt-major; each
    rank takes its share of the prompts."""
    teller = teller_of_refusals(subject.scorers)
    alone = Scorers(reward=teller, costs=(), audits=()) if teller else None
    forward = ReferenceForward(temperature=subject.settings.temperature, logprob=False)

    def work(own: range, part: Prompts) -> list[bool]:
        # Without a scorer no rank gathers the reference after its responses.
        with before_whole(subject.model) if alone else nullcontext():
            rollouts, texts = respond(subject, stage, part, adapter, n=n, purpose=purpose)
        if alone is None:
            return [is_refusal(text) for text in texts]
        with whole(subject.model, None) as (reference, _):
            if not own:
                return []
            scores = score(reference, alone, part, rollouts, texts, forward)
        return (scores.reward_PG > 0).flatten().tolist()

    found = by_shares(subject.ranks, prompts, work)
    if alone is not None:
        warn_of_scorers(subject, stage, alone)
    return found
