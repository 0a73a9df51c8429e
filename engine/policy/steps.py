"""AdamW steps on the weights of a policy: learning rate, clipping, metrics, partial states and the stop at a
loss that is not finite."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.errors import NonFiniteError
from engine.model.decoder import Decoder
from engine.policy.weights import Weights
from engine.run.rows import StepRow
from engine.run.run import Stage
from engine.run.store import save


@dataclass(frozen=True, kw_only=True)
class Policy:
    """An iterate with the optimizer that led to it: tensors by name, steps taken in all,
    and the losses of this update's steps."""

    adapter: dict[str, Tensor]
    first_moment: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    steps: int
    losses: list[float]  # of the label form, see `engine.config`
    pace: float = 1.0  # share of the learning rate at which updates go on from it, see `engine.stages.trust`

    @property
    def loss(self) -> float:
        """Mean loss of the update."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Holds what an update works with: the stage that it runs in, and the weights that it changes."""

    stage: Stage
    config: RunConfig
    model: Decoder
    weights: Weights
    start: Policy | None  # the iterate that it goes on from; None: the weights as they are
    iteration: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """The figures of one step, after it has added its gradients."""

    loss: float
    figures: dict[str, float]  # further fields of its metrics row
    batch: dict[str, Tensor]  # saved where the loss is not finite


def take_steps(update: Update, row: type[StepRow], step_of: Callable[[int], Step]) -> Policy:
    """Takes `config.steps` AdamW steps; step_of(i) adds the gradients of step i, from 0.

    Raises: NonFiniteError with the batch saved in the run folder.
    """
    stage, config, weights, start = update.stage, update.config, update.weights, update.start
    names, parameters = zip(*weights.named_parameters(), strict=True)
    # One pass over all weights and their moments; an adapter is too small to gain by it on a CPU.
    fused = config.tune == "full" or parameters[0].is_cuda
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=fused
    )
    partial = stage.partial(Policy)
    losses = list(partial.losses) if partial else []
    done, taken, pace = len(losses), start.steps if start else 0, start.pace if start else 1.0
    if known := partial or start:
        _restore(known, weights, optimizer)
    with stage.progress(config.steps, "steps", f"policy {update.iteration}") as progress:
        progress.advance(done)
        for i in range(done, config.steps):
            rate = pace * config.learning_rate * learning_rate_factor(config, i, taken)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            step = step_of(i)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm))
            if not (math.isfinite(step.loss) and math.isfinite(norm)):
                _stop_non_finite(stage, step, weights, norm)
            optimizer.step()
            losses.append(step.loss)
            stage.log(
                row(
                    iteration=update.iteration,
                    step=i + 1,
                    loss=step.loss,
                    grad_norm=norm,
                    learning_rate=rate,
                    **step.figures,
                )
            )
            progress.advance(1)
            if stage.stopping or ((i + 1) % config.checkpoint_every == 0 and i + 1 < config.steps):
                stage.save_partial(_policy(taken + i + 1, weights, optimizer, losses, pace))
                stage.check_stop()
    optimizer.zero_grad(set_to_none=True)
    return _policy(taken + config.steps, weights, optimizer, losses, pace)


def learning_rate_factor(config: RunConfig, step: int, taken: int) -> float:
    """Returns the share of the peak rate at `step` of an update (from 0), before which
    the policy took `taken` steps.

    A linear rise over the policy's first steps, then config.schedule over the steps x of S that are left of
    the update: constant 1, linear 1 - x / S or cosine (1 + cos(pi x / S)) / 2, as transformers has them. Each
    update starts at the peak again, as lambda has moved.
    """
    rising = max(0, config.warmup_steps - taken)
    if step < rising:
        return (taken + step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - rising) / (config.steps - rising)
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def _policy(
    steps: int, weights: Weights, optimizer: torch.optim.AdamW, losses: list[float], pace: float
) -> Policy:
    state = {name: optimizer.state[value] for name, value in weights.named_parameters()}
    return Policy(
        adapter=weights.tensors(),
        first_moment={name: of["exp_avg"] for name, of in state.items()},
        second_moment={name: of["exp_avg_sq"] for name, of in state.items()},
        steps=steps,
        losses=losses,
        pace=pace,
    )


def _restore(policy: Policy, weights: Weights, optimizer: torch.optim.AdamW) -> None:
    """Puts weights and optimizer back to where `policy` was."""
    weights.set_tensors(policy.adapter)
    for name, value in weights.named_parameters():
        optimizer.state[value] = {
            # Where AdamW keeps it: beside the weights when it is fused.
            "step": torch.tensor(
                float(policy.steps), device=value.device if optimizer.defaults["fused"] else "cpu"
            ),
            # Copies: the optimizer changes them in place.
            "exp_avg": policy.first_moment[name].to(value.device, copy=True),
            "exp_avg_sq": policy.second_moment[name].to(value.device, copy=True),
        }


def _stop_non_finite(stage: Stage, step: Step, weights: Weights, norm: float) -> None:
    path = stage.paths.nonfinite
    save(path, {**step.batch, **weights.tensors()}, stage=stage.name)
    raise NonFiniteError(
        f"{stage.name}: loss {step.loss}, gradient norm {norm}; the batch and the adapter are in {path}; "
        "lower --learning-rate, or use --dtype float32."
    )
