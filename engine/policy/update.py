"""The policy updates, steps on an adapter: the preference loss on pairs of responses (arXiv 2505.19387, Algorithm 2, step 4), or the
policy gradient on the policy's own samples.

The layers below the adapter equal the reference, so their states are computed once per sample and kept for all iterations (`LowerStates`).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import keys
from engine.config import PrimalDualConfig, RunConfig
from engine.data.dealing import schedule
from engine.errors import NonFiniteError, UserError
from engine.model import packing
from engine.model.decoder import Decoder
from engine.model.packing import LowerStates
from engine.policy.forward import states_and_head
from engine.policy.losses import listwise, regression, single
from engine.policy.pairs import within_prompts
from engine.policy.samples import Samples
from engine.policy.weights import Weights, policy_of
from engine.records import Pairs, ScoredTarget
from engine.run.rows import AscentStepRow, PairStepRow, StepRow
from engine.run.run import Run, Stage
from engine.run.store import save
from kernels import lagrangian_policy_loss, lagrangian_preference_loss, sequence_logprob
from kernels.sampling import combine, uniform

# Prompts are never cut: a pair needs both its responses.
WHOLE = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class Policy:
    """An iterate with the optimizer that led to it: tensors by name, steps taken in all, and the losses of this update's steps."""

    adapter: dict[str, Tensor]
    first_moment: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    steps: int
    losses: list[float]  # of the label form, see `engine.config`

    @property
    def loss(self) -> float:
        """Mean loss of the update."""
        return sum(self.losses) / len(self.losses)


def fit(
    stage: Stage, run: Run, config: RunConfig, model: Decoder, samples: Samples, target: ScoredTarget, adapter: Weights, anchor: Weights | None,
    *, train_on: list[int], iteration: int,
) -> Policy:  # fmt: skip
    """`config.steps` steps of the preference loss on pairs of `samples`, going on from `target.start` (None: from
    `adapter` as it is) and changing `adapter`.

    anchor: the adapter of `target.anchor`, None for the reference. train_on: the prompts whose pairs may be used. Labels are drawn afresh
    in every step from target.score_PG.

    Raises: NonFiniteError with the batch saved in the run folder; UserError where a step will have no pair left, before the first.
    """
    pool = samples.prompts.select(train_on)
    plan = schedule(pool, config.seed, f"iteration-{iteration}", config.prompts_per_step, config.steps)
    per_prompt = config.trained_responses(samples.rollouts.n)
    pairs_of = [within_prompts(target.score_PG, [train_on[i] for i in chosen], per_prompt, target.dropped_PG) for chosen in plan]
    for number, pairs in enumerate(pairs_of, 1):
        if not len(pairs.pairs):
            raise UserError(
                f"policy update {iteration}: no pair of the {config.prompts_per_step} prompts of step {number} has a safe response; "
                "raise --prompts-per-step, --responses-per-prompt or --unsafe-above."
            )

    def loss_of(step: int) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        pairs = pairs_of[step]
        total = accuracy = margin = 0.0
        for part, first in parts(pairs, _groups(samples, _rows_by_prompt(pairs)), config.tokens_per_forward):
            result = _preference_loss(config, model, samples, target, adapter, anchor, part, keys.label(iteration, step), first)
            total += _add_gradient(result.loss, _share(config.labels, part, pairs))
            share = len(part.pairs) / len(pairs.pairs)
            accuracy, margin = accuracy + share * float(result.accuracy), margin + share * float(result.margin.abs().mean())
        return total, {"accuracy": accuracy, "margin": margin, "pairs": len(pairs.pairs)}, {
            "row": torch.tensor(pairs.row), "pairs": pairs.pairs
        }  # fmt: skip

    return _take_steps(stage, run, config, adapter, target.start, iteration, PairStepRow, loss_of)


def ascend(
    stage: Stage, run: Run, config: PrimalDualConfig, model: Decoder, samples: Samples, score_PG: Tensor, adapter: Weights,
    *, start: Policy | None, iteration: int,
) -> Policy:  # fmt: skip
    """`config.steps` clipped policy-gradient steps on samples of the policy itself; changes `adapter`. The advantage of a response is its
    score minus the mean score of its prompt's other ones.

    Raises: NonFiniteError with the batch saved in the run folder.
    """
    plan = schedule(samples.prompts, config.seed, f"iteration-{iteration}", config.prompts_per_step, config.steps)
    n = samples.rollouts.n

    def loss_of(step: int) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        groups = _groups(samples, {p: list(range(p * n, (p + 1) * n)) for p in dict.fromkeys(plan[step])})
        step_rows = [r for g in groups for r in g.rows]
        total = clipped = advantage = 0.0
        for batch in packing.batches(groups, config.tokens_per_forward, WHOLE):
            packed = packing.pack(batch, model.device)
            row = torch.tensor([r for g in batch for r in g.rows])
            score = score_PG.reshape(-1)[row].to(model.device)
            logprob, length = samples.rollouts.model_logprob, samples.rollouts.length
            result = lagrangian_policy_loss(
                *_states_and_head(config, model, samples.lower, batch, packed, adapter), packed.target_T, packed.cu_seqlens,
                (row // n).to(model.device), score, score.new_zeros(len(row), 0), score.new_zeros(0),
                old_logprob=torch.cat([logprob[r, : int(length[r])] for r in row.tolist()]).to(model.device),
                clip=(config.clip, config.clip), temperature=config.temperature, softcap=model.config.logit_softcap,
                memory_budget_bytes=config.memory_budget_bytes,
            )  # fmt: skip
            # The loss is a mean over tokens.
            share = int(length[row].sum()) / max(1, int(length[step_rows].sum()))
            total += _add_gradient(result.loss, share)
            clipped += share * float(result.clip_fraction)
            advantage += len(row) / len(step_rows) * float(result.advantage.abs().mean())
        figures = {"clip_fraction": clipped, "advantage": advantage, "responses": len(step_rows)}
        return total, figures, {"row": torch.tensor(step_rows)}

    return _take_steps(stage, run, config, adapter, start, iteration, AscentStepRow, loss_of)


def _take_steps(
    stage: Stage, run: Run, config: RunConfig, adapter: Weights, start: Policy | None, iteration: int, row: type[StepRow],
    loss_of: Callable[[int], tuple[float, dict[str, float], dict[str, Tensor]]],
) -> Policy:  # fmt: skip
    """AdamW on the policy's weights. loss_of(step) adds the gradients and returns (loss, what the metrics row says of it, the batch to save
    where it is not finite)."""
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    # One pass over all weights and their moments; an adapter is too small to gain by it on a CPU.
    fused = config.tune == "full" or parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=fused)
    partial = stage.partial(Policy)
    losses = list(partial.losses) if partial else []
    done, taken = len(losses), start.steps if start else 0
    if known := partial or start:
        _restore(known, adapter, optimizer, names, parameters)
    with stage.progress(config.steps, "steps", f"policy {iteration}") as progress:
        progress.advance(done)
        for step in range(done, config.steps):
            rate = config.learning_rate * learning_rate_factor(config, step, taken)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss, figures, batch = loss_of(step)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                _stop_non_finite(run, stage, batch, adapter, loss, norm)
            optimizer.step()
            losses.append(loss)
            stage.log(row(iteration=iteration, step=step + 1, loss=loss, grad_norm=norm, learning_rate=rate, **figures))
            progress.advance(1)
            if stage.stopping or ((step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps):
                stage.save_partial(_policy(taken + step + 1, adapter, optimizer, names, parameters, losses))
                stage.check_stop()
    optimizer.zero_grad(set_to_none=True)
    return _policy(taken + config.steps, adapter, optimizer, names, parameters, losses)


def learning_rate_factor(config: RunConfig, step: int, taken: int) -> float:
    """Share of the peak rate at `step` of an update (from 0), before which the policy took `taken` steps.

    A linear rise over the policy's first steps, then config.schedule over the steps x of S that are left of the update: constant 1, linear
    1 - x / S or cosine (1 + cos(pi x / S)) / 2, as transformers has them. Each update starts at the peak again, as lambda has moved.
    """
    rising = max(0, config.warmup_steps - taken)
    if step < rising:
        return (taken + step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - rising) / (config.steps - rising)
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def _add_gradient(loss: Tensor, share: float) -> float:
    """Backward pass of a part that is `share` of a step's loss; returns what it adds to the loss."""
    value = loss * share
    value.backward()
    return float(value.detach())


def _share(labels: str, part: Pairs, whole: Pairs) -> float:
    """What a part weighs in the mean that the label form takes: over pairs, prompts or responses."""
    if labels == "listwise":
        return len(set(part.prompt)) / len(set(whole.prompt))
    return len(part.row) / len(whole.row) if labels == "single" else len(part.pairs) / len(whole.pairs)


def parts(pairs: Pairs, groups: list[packing.Group], budget: int) -> list[tuple[Pairs, int]]:
    """The pairs in parts of whole prompts, each of at most `budget` tokens or of one prompt, with the number of sequences before each.
    groups: the pairs' sequences with their prompts, in order."""
    found, first = [], 0
    for batch in packing.batches(groups, budget, WHOLE):
        end = first + sum(len(g.rows) for g in batch)
        inside = (pairs.pairs[:, 0] >= first) & (pairs.pairs[:, 0] < end)
        found.append((Pairs(prompt=pairs.prompt[first:end], row=pairs.row[first:end], pairs=pairs.pairs[inside] - first), first))
        first = end
    return found


def _rows_by_prompt(pairs: Pairs) -> dict[int, list[int]]:
    by_prompt: dict[int, list[int]] = {}
    for p, r in zip(pairs.prompt, pairs.row, strict=True):
        by_prompt.setdefault(p, []).append(r)
    return by_prompt


def _groups(samples: Samples, rows: dict[int, list[int]]) -> list[packing.Group]:
    """The responses at `rows` of each prompt, with the prompt once."""
    tokens, length = samples.rollouts.tokens, samples.rollouts.length
    return [
        packing.Group(samples.prompts.token_ids[p], [tokens[r, : int(length[r])].tolist() for r in chosen], chosen)
        for p, chosen in rows.items()
    ]


def _states_and_head(
    config: RunConfig, model: Decoder, lower: LowerStates | None, batch: list[packing.Group], packed: packing.Packed, adapter: Weights
) -> tuple[Tensor, Tensor]:
    """The states [T, D] that predict the batch's response tokens, and the policy's head [V, D]."""
    network, lora = policy_of(model, adapter)
    assert lower is None or (lora is not None and lora.first_layer == lower.layer), "states below are kept for adapters alone"
    known = None if lower is None else (lower.layer, lower.of(batch))
    return states_and_head(network, lora, packed, lower=known, checkpointed=config.activation_checkpointing)


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """A batch's loss, and what the metrics say of its margins."""

    loss: Tensor
    accuracy: Tensor
    margin: Tensor


def _preference_loss(
    config: RunConfig, model: Decoder, samples: Samples, target: ScoredTarget, adapter: Weights, anchor: Weights | None, pairs: Pairs, draw: int,
    first: int = 0,
) -> _Loss:  # fmt: skip
    """The loss of one batch of pairs in the label form `config.labels`; `first` is the number of its first sequence in the step."""
    batch = _groups(samples, _rows_by_prompt(pairs))
    packed = packing.pack(batch, model.device)
    index, budget = torch.tensor(pairs.row), config.memory_budget_bytes
    reference = samples.scores.ref_logprob_PG.reshape(-1)[index].to(model.device)
    rows = packed.target_T, packed.cu_seqlens
    options = {"temperature": config.temperature, "softcap": model.config.logit_softcap, "memory_budget_bytes": budget}
    if anchor is not None and target.anchor_share > 0:
        with torch.no_grad():
            own = sequence_logprob(*_states_and_head(config, model, samples.lower, batch, packed, anchor), *rows, **options)
        reference = torch.lerp(reference, own.double(), target.anchor_share)
    if target.shift_PG is not None:
        reference = reference + target.shift_PG.reshape(-1)[index].to(model.device) / target.coefficient
    score = target.score_PG.reshape(-1)[index].to(model.device)
    hidden, head = _states_and_head(config, model, samples.lower, batch, packed, adapter)
    if config.labels in ("soft", "sampled"):
        key = combine(config.seed, draw, (pairs.pairs[:, 0] + first) * 65_537 + pairs.pairs[:, 1] + first)
        result = lagrangian_preference_loss(
            hidden, head, *rows, pairs.pairs, score, score.new_zeros(len(score), 0), score.new_zeros(0), reference, beta=target.coefficient,
            labels=config.labels, uniform=uniform(key, 0).to(model.device) if config.labels == "sampled" else None,
            **options,
        )  # fmt: skip
        return _Loss(loss=result.loss, accuracy=result.accuracy, margin=result.margin)
    logprob = sequence_logprob(hidden, head, *rows, **options)
    moved_N = target.coefficient * (logprob - reference)
    prompt_N = torch.tensor(pairs.prompt, device=model.device)
    if config.labels == "single":
        c = target.coefficient
        # The group's value stands for V(x): c ln E_ref exp(score / c).
        value_P = c * ((target.score_PG / c).logsumexp(1) - math.log(target.score_PG.shape[1]))
        loss = single(moved_N, score - value_P.to(model.device)[prompt_N])
    elif config.labels == "listwise":
        loss = listwise(moved_N / target.coefficient, score / target.coefficient, prompt_N)
    else:
        loss = regression(moved_N, score, pairs.pairs.to(model.device))
    a, b = pairs.pairs.to(model.device).unbind(1)
    margin = (moved_N[a] - moved_N[b]).detach()
    accuracy = (((margin * (score[a] - score[b])).sign() + 1) / 2).mean()
    return _Loss(loss=loss, accuracy=accuracy, margin=margin)


def _policy(steps: int, adapter: Weights, optimizer, names, parameters, losses: list[float]) -> Policy:
    state = [optimizer.state[p] for p in parameters]
    return Policy(
        adapter=adapter.tensors(),
        first_moment={n: s["exp_avg"] for n, s in zip(names, state, strict=True)},
        second_moment={n: s["exp_avg_sq"] for n, s in zip(names, state, strict=True)},
        steps=steps,
        losses=losses,
    )


def _restore(policy: Policy, adapter: Weights, optimizer, names, parameters) -> None:
    """Put adapter and optimizer back to where `policy` was."""
    adapter.set_tensors(policy.adapter)
    for name, p in zip(names, parameters, strict=True):
        optimizer.state[p] = {
            # Where AdamW keeps it: beside the weights when it is fused.
            "step": torch.tensor(float(policy.steps), device=p.device if optimizer.defaults["fused"] else "cpu"),
            # Copies: the optimizer changes them in place.
            "exp_avg": policy.first_moment[name].to(p.device, copy=True),
            "exp_avg_sq": policy.second_moment[name].to(p.device, copy=True),
        }


def _stop_non_finite(run: Run, stage: Stage, batch: dict[str, Tensor], adapter: Weights, loss: float, norm: float) -> None:
    path = run.paths.nonfinite
    save(path, {**batch, **adapter.tensors()}, stage=stage.name)
    raise NonFiniteError(
        f"{stage.name}: loss {loss}, gradient norm {norm}; the batch and the adapter are in {path}; "
        "lower --learning-rate, or use --dtype float32."
    )
