"""The policy update: steps of the Lagrangian preference loss on an adapter, against the fixed reference (Algorithm 2, step 4).

The layers below the adapter equal the reference, so their states are computed once per sample and kept for all iterations (`LowerStates`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import packing
from engine.checkpoint import Run, Stage, save
from engine.config import RunConfig
from engine.errors import NonFiniteError
from engine.lora import Adapter
from engine.model import Decoder
from engine.packing import LowerStates
from engine.pairs import informative, lagrangian_score, schedule
from engine.records import Pairs, Prompts, Rollouts, Scores
from kernels import lagrangian_preference_loss
from kernels.sampling import combine, uniform


@dataclass(frozen=True, kw_only=True)
class Policy:
    """An iterate with the optimizer that led to it: tensors by name, steps taken in all, and the losses of this update's steps."""

    adapter: dict[str, Tensor]
    first_moment: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    steps: int
    losses: list[float]  # nats per pair

    @property
    def loss(self) -> float:
        """Mean loss of the update, nats per pair."""
        return sum(self.losses) / len(self.losses)


def update(
    stage: Stage,
    run: Run,
    config: RunConfig,
    model: Decoder,
    lower: LowerStates | None,
    prompts: Prompts,
    rollouts: Rollouts,
    scores: Scores,
    lam_J: Tensor,
    adapter: Adapter,
    *,
    before: Policy | None,
    train_on: list[int],
    iteration: int,
) -> Policy:
    """`config.steps` steps on pairs of reference samples, going on from `before` (None: from `adapter` as it is) and changing `adapter`.

    prompts, rollouts, scores (in the run's units): the reference's; lower: its kept states, or None to compute them in each step.
    train_on: the prompts whose pairs may be used. Labels are drawn afresh in every step from s = r + lambda . g.

    Raises: NonFiniteError with the batch saved in the run folder.
    """
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    partial = stage.partial(Policy)
    losses = list(partial.losses) if partial else []
    done, taken = len(losses), before.steps if before else 0
    if start := partial or before:
        _restore(start, adapter, optimizer, names, parameters)
    score_PG = lagrangian_score(scores, lam_J)
    pool = prompts.select(train_on)
    plan = schedule(pool, config.seed, f"iteration-{iteration}", config.prompts_per_step, config.steps)
    with stage.progress(config.steps, "steps", f"policy {iteration}") as progress:
        progress.advance(done)
        for step in range(done, config.steps):
            pairs = informative(score_PG, [train_on[i] for i in plan[step]], config.responses_per_prompt)
            rate = config.learning_rate * learning_rate_factor(taken + step, config.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            result = _loss(config, model, lower, prompts, rollouts, scores, lam_J, adapter, pairs, iteration * 1_000_003 + step)
            optimizer.zero_grad(set_to_none=True)
            result.loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm))
            loss = float(result.loss.detach())
            if not (math.isfinite(loss) and math.isfinite(norm)):
                _stop_non_finite(run, stage, pairs, adapter, loss, norm)
            optimizer.step()
            losses.append(loss)
            stage.row(
                "step", iteration=iteration, step=step + 1, loss=loss, accuracy=float(result.accuracy), grad_norm=norm,
                learning_rate=rate, margin=float(result.margin.abs().mean()), pairs=len(pairs.pairs),
            )  # fmt: skip
            progress.advance(1)
            if stage.stopping or ((step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps):
                stage.save_partial(_policy(taken + step + 1, adapter, optimizer, names, parameters, losses))
                stage.check_stop()
    return _policy(taken + config.steps, adapter, optimizer, names, parameters, losses)


def learning_rate_factor(step: int, warmup: int) -> float:
    """Share of the peak rate at `step` of the run (from 0): a linear rise over `warmup` steps, then constant, as lambda still moves."""
    return min(1.0, (step + 1) / (warmup + 1))


def _loss(
    config: RunConfig, model: Decoder, lower: LowerStates | None, prompts: Prompts, rollouts: Rollouts, scores: Scores, lam_J: Tensor,
    adapter: Adapter, pairs: Pairs, draw: int,
):  # fmt: skip
    """The Lagrangian preference loss of one batch of pairs."""
    by_prompt: dict[int, list[int]] = {}
    for p, r in zip(pairs.prompt, pairs.row, strict=True):
        by_prompt.setdefault(p, []).append(r)
    batch = [
        packing.Group(prompts.token_ids[p], [rollouts.tokens[r, : int(rollouts.length[r])].tolist() for r in rows], rows)
        for p, rows in by_prompt.items()
    ]
    packed = packing.pack(batch, model.device)
    if lower is not None:
        hidden = lower.of(batch)
    else:
        with torch.no_grad():
            hidden = model.run(model.embed_tokens(packed.tokens), packed.layout, 0, adapter.first_layer)
    hidden = model.final_norm(model.run(hidden, packed.layout, adapter.first_layer, model.config.num_layers, adapter))
    index, j = torch.tensor(pairs.row), scores.utility_PGJ.shape[2]
    key = combine(config.seed, draw, pairs.pairs[:, 0] * 65_537 + pairs.pairs[:, 1])
    return lagrangian_preference_loss(
        # index_select, not indexing: its backward adds rows in a fixed order.
        hidden.index_select(0, packed.predict_T),
        model.head_weight,
        packed.target_T,
        packed.cu_seqlens,
        pairs.pairs,
        scores.reward_PG.reshape(-1)[index].to(model.device),
        scores.utility_PGJ.reshape(-1, j)[index].to(model.device),
        lam_J.to(model.device),
        scores.ref_logprob_PG.reshape(-1)[index].to(model.device),
        beta=config.beta,
        labels=config.labels,
        uniform=uniform(key, 0).to(model.device) if config.labels == "sampled" else None,
        temperature=config.temperature,
        memory_budget_bytes=config.memory_budget_mb * 2**20,
    )


def _policy(steps: int, adapter: Adapter, optimizer, names, parameters, losses: list[float]) -> Policy:
    state = [optimizer.state[p] for p in parameters]
    return Policy(
        adapter=adapter.tensors(),
        first_moment={n: s["exp_avg"] for n, s in zip(names, state, strict=True)},
        second_moment={n: s["exp_avg_sq"] for n, s in zip(names, state, strict=True)},
        steps=steps,
        losses=losses,
    )


def _restore(policy: Policy, adapter: Adapter, optimizer, names, parameters) -> None:
    """Put adapter and optimizer back to where `policy` was."""
    adapter.set_tensors(policy.adapter)
    for name, p in zip(names, parameters, strict=True):
        optimizer.state[p] = {
            "step": torch.tensor(float(policy.steps)),
            # Copies: the optimizer changes them in place.
            "exp_avg": policy.first_moment[name].to(p.device, copy=True),
            "exp_avg_sq": policy.second_moment[name].to(p.device, copy=True),
        }


def _stop_non_finite(run: Run, stage: Stage, pairs: Pairs, adapter: Adapter, loss: float, norm: float) -> None:
    path = run.folder / "nonfinite.safetensors"
    save(path, {"row": torch.tensor(pairs.row), "pairs": pairs.pairs, **adapter.tensors()}, stage=stage.name)
    raise NonFiniteError(
        f"{stage.name}: loss {loss}, gradient norm {norm}; the batch and the adapter are in {path}; "
        "lower --learning-rate, or use --dtype float32."
    )
