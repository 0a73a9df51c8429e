"""The policy updates, steps on an adapter or on all weights: the preference loss on pairs of responses (arXiv
2505.19387, Algorithm 2, step 4), or the policy gradient on the policy's own samples.

The layers below an adapter equal the reference, so their states are computed once per sample and kept for
all iterations (`LowerStates`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.data.dealing import Schedule
from engine.errors import UserError
from engine.model import packing
from engine.policy.forward import policy_states
from engine.policy.pairs import own_pairs, within_prompts
from engine.policy.preference_loss import PreferenceLoss, parts, rows_by_prompt, share_of
from engine.policy.samples import Samples
from engine.policy.steps import Policy, Step, Update, take_steps, with_others
from engine.policy.weights import Weights
from engine.records import Pairs, Score, ScoredTarget
from engine.run.machine import repeatable
from engine.run.rows import AscentStepRow, PairStepRow
from kernels import lagrangian_policy_loss

STEPS_CHECKED = 1000  # steps whose pairs are looked for before the first step


def fit(
    update: Update, samples: Samples, target: ScoredTarget, train_on: list[int], anchor: Weights | None = None
) -> Policy:
    """Takes `config.steps` steps of the preference loss on pairs of `samples`.

    train_on: the prompts whose pairs may be used. anchor: the weights of `target.anchor`, None for the
    reference. Labels that are random are drawn from target.score_PG, afresh in every step or once. Each rank
    takes its share of a step's prompts.

    Raises: NonFiniteError with the batch saved in the run folder; UserError where a step will have no pair
    left, before the first.
    """
    config = update.config
    pairs_of = _scheduled_pairs(update, samples, target, train_on)
    loss_of = PreferenceLoss(
        config=config,
        model=update.model,
        weights=update.weights,
        samples=samples,
        target=target,
        anchor=anchor,
        iteration=update.iteration,
    )

    def step_of(i: int) -> Step:
        pairs = pairs_of(i)
        own, before = own_pairs(pairs, update.ranks)
        # loss, accuracy, margin, gradient_bound, left_out
        sums = torch.zeros(5, dtype=torch.float64, device=update.model.device)
        own_parts = parts(own, samples.groups(rows_by_prompt(own)), config.tokens_per_forward)
        for part, first in with_others(update, own_parts, loss_of.passed_anchor):
            found = loss_of(part, i, before + first)
            loss = add_gradient(found.loss, share_of(config.labels, part, pairs))
            share = len(part.pairs) / len(pairs.pairs)
            figures = found.accuracy, found.margin.abs().mean(), found.gradient_bound, found.left_out
            sums += torch.stack((loss, *(share * figure.to(sums) for figure in figures)))
        # The first time in the step that a GPU is waited for, but for what a large part leaves out.
        loss, accuracy, margin, bound, left_out = sums.tolist()
        return Step(
            loss=loss,
            figures={
                "accuracy": accuracy,
                "margin": margin,
                "gradient_bound": bound,
                "left_out": left_out,
            },
            counts={"pairs": len(pairs.pairs)},
            batch={"row": torch.tensor(pairs.row), "pairs": pairs.pairs},
        )

    return take_steps(update, PairStepRow, step_of)


def ascend(update: Update, samples: Samples, score: Score) -> Policy:
    """Takes `config.steps` clipped policy-gradient steps on samples of the policy
    itself, of a config with --clip.

    beta x log-ratio to the reference is taken off the score; `config.advantage` says how a response's score
    is compared with those of its prompt's others.
    Each rank takes its share of a step's prompts.

    Raises: NonFiniteError with the batch saved in the run folder.
    """
    config, model, rollouts = update.config, update.model, samples.rollouts
    plan = Schedule(samples.prompts, config.seed, f"iteration-{update.iteration}", config.prompts_per_step)
    n, length = rollouts.n, rollouts.length

    def step_of(i: int) -> Step:
        prompts = list(dict.fromkeys(plan[i]))
        step_rows = [r for p in prompts for r in range(p * n, (p + 1) * n)]
        own = [prompts[place] for place in update.ranks.share(len(prompts))]
        groups = samples.groups({p: list(range(p * n, (p + 1) * n)) for p in own})
        # loss, clipped share, gradient_bound, left_out, advantage
        sums = torch.zeros(5, dtype=torch.float64, device=model.device)
        batches = list(packing.batches(groups, config.tokens_per_forward, packing.WHOLE))
        for batch in with_others(update, batches):
            packed = packing.pack(batch, model.device)
            row = torch.tensor([r for g in batch for r in g.rows])
            found = lagrangian_policy_loss(
                *policy_states(config, model, samples.lower, batch, packed, update.weights),
                packed.target_T,
                packed.cu_seqlens,
                row // n,
                *score.at(row),
                old_logprob=torch.cat([rollouts.model_logprob[r, : int(length[r])] for r in row.tolist()]).to(
                    model.device, non_blocking=True
                ),
                ref_logprob=samples.scores.ref_logprob_PG.reshape(-1)[row],
                clip=(config.clip, config.clip),
                kl_coef=config.beta,
                kl="score",
                advantage=config.advantage,
                normalize="token",
                temperature=config.temperature,
                softcap=model.config.logit_softcap,
                memory_budget_bytes=config.memory_budget_bytes,
            )
            # The loss is a mean over tokens.
            share = int(length[row].sum()) / max(1, int(length[step_rows].sum()))
            loss = add_gradient(found.loss, share)
            figures = found.clip_fraction, found.gradient_bound, found.left_out
            size = len(row) / len(step_rows) * found.advantage.abs().mean().to(sums)
            sums += torch.stack((loss, *(share * figure.to(sums) for figure in figures), size))
        loss, clipped, bound, left_out, advantage = sums.tolist()
        return Step(
            loss=loss,
            figures={
                "clip_fraction": clipped,
                "advantage": advantage,
                "gradient_bound": bound,
                "left_out": left_out,
            },
            counts={"responses": len(step_rows)},
            batch={"row": torch.tensor(step_rows)},
        )

    return take_steps(update, AscentStepRow, step_of)


def add_gradient(loss: Tensor, share: float) -> Tensor:
    """Runs the backward pass of a part that is `share` of a step's loss;
    returns what the part adds to the loss, float64, which the host does not wait for."""
    value = loss * share
    with repeatable(loss.device):
        value.backward()
    return value.detach().double()


def _scheduled_pairs(
    update: Update, samples: Samples, target: ScoredTarget, train_on: list[int]
) -> Callable[[int], Pairs]:
    """Returns a function that forms the pairs of a step, from 0. Raises UserError where a step has none:
    before the first for the steps at the start, which are many, else at that step."""
    config, score_PG, dropped_PG = update.config, target.score_PG, target.dropped_PG
    pool = samples.prompts.select(train_on)
    plan = Schedule(pool, config.seed, f"iteration-{update.iteration}", config.prompts_per_step)
    per_prompt = config.trained_responses(samples.rollouts.n)

    def pairs_of(step: int) -> Pairs:
        pairs = within_prompts(score_PG, [train_on[i] for i in plan[step]], per_prompt, dropped_PG)
        if not len(pairs.pairs):
            raise UserError(
                f"policy update {update.iteration}: no pair of the {config.prompts_per_step} prompts "
                f"of step {step + 1} "
                "has a safe response; raise --prompts-per-step, --responses-per-prompt or --unsafe-above."
            )
        return pairs

    if dropped_PG is not None:
        for step in range(min(config.steps, STEPS_CHECKED)):
            pairs_of(step)
    return pairs_of
