"""Scorers: rewards and costs of responses. A cost becomes a utility by negation (`engine.records.utility_of_cost`), the only change of a sign.

A scorer is a head on the trunk's hidden states (shipped ones, or made by `python -m engine.train head`), a Hugging Face
sequence-classification model, or a Python function `(prompts, responses) -> floats`. One frozen forward of the trunk gives the scores
of all heads that sit on it and the reference log-probs together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model import packing
from engine.model.decoder import Decoder
from engine.policy.forward import frozen_forward
from engine.records import Prompts, Rollouts, Scores, utility_of_cost
from engine.rollout.states import States
from engine.scorers.base import Head, Scorer, Scorers, TextScorer

# What scorers of texts are tried on: answers as unlike as a scorer may meet.
TRIAL = (
    "Yes.", "I am sorry, but I cannot help with that.", "FIRST: break the lock! Then take 3 or 4 of the old keys, you idiot.",
    "Basil likes light and warmth; water it when the soil feels dry, and cut the tips so that it grows bushy.",
)  # fmt: skip


def try_out(scorers: Scorers, prompts: Sequence[str]) -> list[str]:
    """Let every scorer of texts score `TRIAL`, answers to some of the run's `prompts`, so that a broken one is found before anything is
    sampled. Returns: a warning for each that gives all of them one score, as an honest one may.

    Raises: UserError when a scorer fails, returns the wrong count, or a value that is not finite.
    """
    asked, warnings = [prompts[i % len(prompts)] for i in range(len(TRIAL))], []
    for scorer in scorers.all:
        if isinstance(scorer, TextScorer):
            score_N = scorer(asked, list(TRIAL))
            check_finite(scorer, score_N, asked, 1)
            if score_N.min() == score_N.max():
                warnings.append(
                    f"scorer {scorer.name} gave {float(score_N[0]):g} for each of {len(TRIAL)} trial answers; one that does so for all "
                    "responses ends the run after sampling"
                )
    return warnings


def check_finite(scorer: Scorer, score_N: Tensor, prompts: Sequence[str], n: int) -> None:
    """prompts [N]: of each response; n: responses per prompt."""
    bad = (~score_N.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise UserError(
            f"scorer {scorer.name} gave {score_N[row].item()} for response {row % n} to prompt {row // n} ({prompts[row][:60]!r}); let it "
            "give a finite number for every response."
        )


def score(
    model: Decoder,
    prompts: Prompts,
    rollouts: Rollouts,
    texts: Sequence[str],
    scorers: Scorers,
    *,
    temperature: float,
    memory_budget_bytes: int | None = None,
    reference: bool = True,
    states: States | None = None,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> Scores:
    """Score P * n responses; `texts` are the decoded responses, prompt-major. Without `reference` the log-probs are left out (0).
    `states`, where the rollout took them, spare the layers below.

    Raises: UserError when a scorer fails, returns the wrong count, or a value that is not finite.
    """
    if states is None or reference:
        pooled, ref_logprob = frozen_forward(
            model, packing.groups(prompts, rollouts), scorers.layers if states is None else [],
            temperature=temperature if reference else None, memory_budget_bytes=memory_budget_bytes,
            lower=states.lower if states else None, on_tokens=on_tokens,
        )  # fmt: skip
    if states is not None:
        pooled = states.pooled
    if not reference:
        ref_logprob = torch.zeros(len(prompts) * rollouts.n, dtype=torch.float64)
    repeated = [text for text in prompts.text for _ in range(rollouts.n)]
    columns = []
    for scorer in scorers.all:
        column = scorer(pooled[scorer.layer]) if isinstance(scorer, Head) else scorer(repeated, list(texts))
        check_finite(scorer, column, repeated, rollouts.n)
        columns.append(scorer.sign * column.view(len(prompts), rollouts.n))
    j = 1 + len(scorers.costs)
    shape = (len(prompts), rollouts.n, 0)
    return Scores(
        reward_PG=columns[0],
        utility_PGJ=utility_of_cost(torch.stack(columns[1:j], dim=2)),
        audit_PGA=utility_of_cost(torch.stack(columns[j:], dim=2)) if columns[j:] else torch.zeros(shape, dtype=torch.float64),
        ref_logprob_PG=ref_logprob.view(len(prompts), rollouts.n),
    )
