"""AdamW steps on the weights of a policy: learning rate, clipping, metrics, partial states and the stop at a
loss that is not finite."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.errors import NonFiniteError, UserError
from engine.model.decoder import Decoder
from engine.model.parallel import is_spread, rows_here
from engine.policy.sharded import ShardedWeights
from engine.policy.weights import Weights
from engine.ranks import ALONE, Ranks, connected
from engine.run.rows import StepRow
from engine.run.run import Stage
from engine.run.shards import Stored, read_into
from engine.run.store import save, sha256_of

PartT = TypeVar("PartT")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """An iterate with the optimizer that led to it: tensors by name, steps taken in all,
    and the losses of this update's steps."""

    adapter: dict[str, Tensor | Stored]
    # The weights after the last step, from which further steps go on, where `adapter` is a mean over steps;
    # else empty.
    last: dict[str, Tensor | Stored] = field(default_factory=dict)
    first_moment: dict[str, Tensor | Stored]
    second_moment: dict[str, Tensor | Stored]
    steps: int
    losses: list[float]  # of the label form, see `engine.config`
    pace: float = 1.0  # share of the learning rate at which updates go on from it, see `engine.stages.trust`

    @property
    def loss(self) -> float:
        """Mean loss of the update."""
        return sum(self.losses) / len(self.losses)

    def read(self, weights: Weights) -> "Policy":
        """Returns it with tensors in the place of stored ones, spread as the weights are."""
        parts = {}
        for part in ("adapter", "last", "first_moment", "second_moment"):
            values = getattr(self, part)
            if any(isinstance(value, Stored) for value in values.values()):
                parts[part] = {name: torch.empty_like(value) for name, value in weights.named_parameters()}
                read_into(parts[part], values)
        return replace(self, **parts)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Holds what an update works with: the stage that it runs in, and the weights that it changes."""

    stage: Stage
    config: RunConfig
    model: Decoder
    weights: Weights
    start: Policy | None  # the iterate that it goes on from; None: the weights as they are
    iteration: int
    ranks: Ranks = ALONE


@dataclass(frozen=True, kw_only=True)
class Step:
    """The figures of one step, after it has added its gradients; of several ranks each has those of its own
    prompts, with their share of the whole step."""

    loss: float
    figures: dict[str, float]  # further fields of its metrics row, which add up over the ranks
    counts: dict[str, int] = field(default_factory=dict)  # and those that are of the whole step already
    batch: dict[str, Tensor]  # the whole step's, saved where the loss is not finite


def take_steps(update: Update, row: type[StepRow], step_of: Callable[[int], Step]) -> Policy:
    """Takes `config.steps` AdamW steps; step_of(i) adds the gradients of step i, from 0.

    Of several ranks each adds those of its own prompts, and their sum is the step's gradient.

    Raises: NonFiniteError with the batch saved in the run folder.
    """
    stage, config, weights, start = update.stage, update.config, update.weights, update.start
    names, parameters = zip(*weights.named_parameters(), strict=True)
    # One pass over all weights and their moments; an adapter is too small to gain by it on a CPU.
    fused = config.tune == "full" or parameters[0].is_cuda
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, 0.99),
        weight_decay=config.weight_decay,
        fused=fused,
    )
    partial = stage.partial(Policy)
    losses = list(partial.losses) if partial else []
    done, taken, pace = len(losses), start.steps if start else 0, start.pace if start else 1.0
    mean = _Mean(weights, config.weight_average) if config.weight_average else None
    if known := partial or start:
        _restore(known, weights, optimizer)
        if mean:
            mean.restore(known)
    with stage.progress(config.steps, "steps", f"policy {update.iteration}") as progress:
        progress.advance(done)
        for i in range(done, config.steps):
            rate = pace * config.learning_rate * learning_rate_factor(config, i, taken)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            with connected():  # Passes of sharded weights send messages, and so does the norm.
                step = step_of(i)
                if update.ranks.size > 1:
                    step = _added_up(update, parameters, step)
                norm = _clipped(parameters, config.clip_norm)
            if not (math.isfinite(step.loss) and math.isfinite(norm)):
                _stop_non_finite(update, step, norm)
            optimizer.step()
            if mean:
                mean.add(taken + i + 1)
            losses.append(step.loss)
            stage.log(
                row(
                    iteration=update.iteration,
                    step=i + 1,
                    loss=step.loss,
                    grad_norm=norm,
                    learning_rate=rate,
                    **step.figures,
                    **step.counts,
                )
            )
            progress.advance(1)
            if stage.stopping or ((i + 1) % config.checkpoint_every == 0 and i + 1 < config.steps):
                _check_replicas(update, i + 1)
                stage.save_partial(_policy(taken + i + 1, weights, mean, optimizer, losses, pace))
                # A rank that stops without the others' knowledge would leave them in the middle of a step.
                if update.ranks.size == 1 or stage.stopping:
                    stage.check_stop()
    optimizer.zero_grad(set_to_none=True)
    _check_replicas(update, config.steps)
    policy = _policy(taken + config.steps, weights, mean, optimizer, losses, pace)
    weights.set_tensors(policy.adapter)
    return policy


class _Mean:
    """The running mean of weights after each step n: mean_n = (sum over i <= n of share^(n-i) weights_i) over
    (the sum of these shares), in the weights' own dtype. A step's noise, and what momentum carries too far,
    go down in it."""

    def __init__(self, weights: Weights, share: float) -> None:
        self.weights, self.share, self.tensors = weights, share, weights.tensors()

    def restore(self, policy: Policy) -> None:
        """Goes on from the mean that an iterate is."""
        read_into(self.tensors, policy.adapter)

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Takes in the weights after a step, counted from 1 over all updates."""
        new = (1 - self.share) / (1 - self.share**step)
        for name, value in self.weights.named_parameters():
            rows_here(self.tensors[name]).lerp_(rows_here(value), new)


def _added_up(update: Update, parameters: Sequence[Tensor], step: Step) -> Step:
    """Adds gradients and figures up over the ranks, and lets them agree on whether to stop after the step.
    Gradients of sharded weights are sums already. Ranks that hold one model together have a part of the
    gradients each, but all of the figures."""
    figures = [step.loss, *step.figures.values()]
    own = [x if update.ranks.leads else 0.0 for x in figures] + [float(update.stage.wants_to_stop)]
    summed = [torch.tensor(own, dtype=torch.float64)]
    if not isinstance(update.weights, ShardedWeights):
        for parameter in parameters:
            if parameter.grad is None:  # a rank without a prompt in this step
                parameter.grad = torch.zeros_like(parameter)
            summed.append(parameter.grad)
    update.ranks.add(summed)
    loss, *rest, stopping = summed[0].tolist()
    if stopping:
        update.stage.agree_to_stop()
    return replace(step, loss=loss, figures=dict(zip(step.figures, rest, strict=True)))


def with_others(update: Update, parts: Sequence[PartT], anchor: Weights | None = None) -> Iterator[PartT]:
    """Yields the parts of a step that this rank passes. Weights that are sharded are gathered in each pass,
    from all ranks: then this rank goes on with passes of nothing until the one with most parts is done.

    anchor: is passed before the weights in each part; None: no anchor is.
    """
    most = len(parts)
    if isinstance(update.weights, ShardedWeights):
        most = max(update.ranks.gather(len(parts)))
    yield from parts
    for _ in range(most - len(parts)):
        if anchor is not None:
            anchor.pass_nothing(gradients=False)
        update.weights.pass_nothing(gradients=True, checkpointed=update.config.activation_checkpointing)


def _clipped(parameters: Sequence[Tensor], largest: float) -> float:
    """Scales gradients whose norm is above the largest one down to it; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    return float(norm.full_tensor() if is_spread(norm) else norm)


def _check_replicas(update: Update, steps: int) -> None:
    """Checks that ranks with the same weights, or rows of them, have the same bits. Raises: UserError naming
    one that has not."""
    weights = update.weights
    place = weights.place if isinstance(weights, ShardedWeights) else 0
    if update.ranks.size == 1 or place is None:
        return
    digest = sha256_of({name: rows_here(value).cpu() for name, value in weights.tensors().items()}, "")[:16]
    every = update.ranks.gather((place, digest))
    first = dict(reversed(every))
    for rank, (where, theirs) in enumerate(every):
        if theirs != first[where]:
            raise UserError(
                f"{update.stage.name}: rank {rank} has other weights after {steps} steps than a rank that "
                "should have the same; start all ranks on equal machines."
            )


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
    steps: int,
    weights: Weights,
    mean: _Mean | None,
    optimizer: torch.optim.AdamW,
    losses: list[float],
    pace: float,
) -> Policy:
    state = {name: optimizer.state[value] for name, value in weights.named_parameters()}
    return Policy(
        adapter=mean.tensors if mean else weights.tensors(),
        last=weights.tensors() if mean else {},
        first_moment={name: of["exp_avg"] for name, of in state.items()},
        second_moment={name: of["exp_avg_sq"] for name, of in state.items()},
        steps=steps,
        losses=losses,
        pace=pace,
    )


def _restore(policy: Policy, weights: Weights, optimizer: torch.optim.AdamW) -> None:
    """Puts weights and optimizer back to where the steps to `policy` ended."""
    weights.set_tensors(policy.last or policy.adapter)
    for value in weights.parameters():
        optimizer.state[value] = {
            # Where AdamW keeps it: beside the weights when it is fused.
            "step": torch.tensor(
                float(policy.steps), device=value.device if optimizer.defaults["fused"] else "cpu"
            ),
            # Copies: the optimizer changes them in place.
            "exp_avg": torch.empty_like(value),
            "exp_avg_sq": torch.empty_like(value),
        }
    for moment, values in (("exp_avg", policy.first_moment), ("exp_avg_sq", policy.second_moment)):
        read_into(
            {name: optimizer.state[value][moment] for name, value in weights.named_parameters()}, values
        )


def _stop_non_finite(update: Update, step: Step, norm: float) -> None:
    stage, path = update.stage, update.stage.paths.nonfinite
    # No rank has room for all of sharded weights.
    tensors = {} if isinstance(update.weights, ShardedWeights) else update.weights.tensors()
    update.ranks.first(lambda: save(path, {**step.batch, **tensors}, stage=stage.name))
    saved = "the batch and the adapter are" if tensors else "the batch is"
    raise NonFiniteError(
        f"{stage.name}: loss {step.loss}, gradient norm {norm}; {saved} in {path}; "
        "lower --learning-rate, or use --dtype float32."
    )
