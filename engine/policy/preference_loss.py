"""The preference loss of a policy on pairs of responses, in each label form
(arXiv 2505.19387, Algorithm 2, step 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import keys
from engine.config import RunConfig
from engine.model import packing
from engine.model.decoder import Decoder
from engine.policy.forward import policy_states
from engine.policy.lora import Adapter
from engine.policy.samples import Samples
from engine.policy.weights import Weights
from engine.records import Pairs, ScoredTarget
from kernels import lagrangian_preference_loss, sequence_logprob
from kernels.random import combine, uniform


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of some pairs, a scalar with its graph, and what the metrics say of their margins."""

    loss: Tensor
    accuracy: Tensor  # share of pairs that the policy orders as the labels do
    margin: Tensor  # float64 [K], in units of the score
    # What was left out of its gradients, see `kernels.lagrangian_preference_loss`
    gradient_bound: Tensor
    left_out: Tensor


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """The loss of pairs of `samples` under the weights, towards a target.

    anchor: the weights of `target.anchor`, None for the reference. iteration: keys what is drawn at random.
    """

    config: RunConfig
    model: Decoder
    weights: Weights
    samples: Samples
    target: ScoredTarget
    anchor: Weights | None = None
    iteration: int = 0

    def __call__(self, pairs: Pairs, step: int, first: int = 0) -> Loss:
        """Returns the loss of one batch of pairs in the label form `config.labels`.

        step: its number, from 0, which keys dropout and labels that are drawn. first: the number of the
        batch's first sequence in the step.
        """
        config, target, samples, model = self.config, self.target, self.samples, self.model
        batch = samples.groups(rows_by_prompt(pairs))
        packed = packing.pack(batch, model.device)
        options = {
            "temperature": config.temperature,
            "softcap": model.config.logit_softcap,
            "memory_budget_bytes": config.memory_budget_bytes,
        }
        lower = self._lower(batch, packed)
        reference_N = self._anchor_logprob(batch, packed, pairs, lower, options)
        dropout = int(combine(config.seed, keys.label(self.iteration, step), first))
        hidden, head = policy_states(config, model, lower, batch, packed, self.weights, dropout=dropout)
        labels = "sampled" if config.labels == "sampled-once" else config.labels
        result = lagrangian_preference_loss(
            hidden,
            head,
            packed.target_T,
            packed.cu_seqlens,
            pairs.pairs,
            *target.score.at(torch.tensor(pairs.row)),
            reference_N,
            beta=target.coefficient,
            labels=labels,
            uniform=self._uniform(pairs, step, first) if labels == "sampled" else None,
            value=target.value_P[torch.tensor(pairs.prompt)] if labels == "single" else None,
            group=torch.tensor(pairs.prompt) if labels == "listwise" else None,
            **options,
        )
        return Loss(
            loss=result.loss,
            accuracy=result.accuracy,
            margin=result.margin.double(),
            gradient_bound=result.gradient_bound,
            left_out=result.left_out,
        )

    @property
    def passes_reference(self) -> bool:
        """Tells whether the reference's log-probs are computed here, and not those of the samples."""
        return self.model.dtype.itemsize == 2 and isinstance(self.weights, Adapter)

    def _lower(self, batch: list[packing.Group], packed: packing.Packed) -> packing.LowerStates | None:
        """Returns the states below the adapter; where none were kept and the reference is passed too, its own
        of this batch, so that they are computed once."""
        kept = self.samples.lower
        if kept is not None or not self.passes_reference:
            return kept
        lower = packing.LowerStates(self.weights.first_layer)
        with torch.no_grad():
            lower.keep(batch, self.model(packed.tokens, packed.layout, stop=lower.layer))
        return lower

    @property
    def passed_anchor(self) -> Weights | None:
        """The anchor where a batch passes it too; with a share of 0 the reference stands in its place."""
        return self.anchor if self.target.anchor_share > 0 else None

    def _uniform(self, pairs: Pairs, step: int, first: int) -> Tensor:
        """Returns the uniform numbers float64 [K] that draw the labels of pairs: of their places in the step,
        or, where labels are drawn once, of their responses."""
        a, b = pairs.pairs.unbind(1)
        if self.config.labels == "sampled-once":
            row = torch.tensor(pairs.row)
            return uniform(
                combine(self.config.seed, keys.label(self.iteration, keys.ONCE), row[a], row[b]), 0
            )
        place = (a + first) * 65_537 + b + first
        return uniform(combine(self.config.seed, keys.label(self.iteration, step), place), 0)

    def _anchor_logprob(
        self,
        batch: list[packing.Group],
        packed: packing.Packed,
        pairs: Pairs,
        lower: packing.LowerStates | None,
        options: dict,
    ) -> Tensor:
        """Returns float64 [N], from which log-ratios count: the log-prob under the anchor,
        plus shift / coefficient."""
        config, target, samples, model = self.config, self.target, self.samples, self.model
        index = torch.tensor(pairs.row)
        if self.passes_reference:
            # In the same pass as the policy's, so that what both round alike cancels.
            with torch.no_grad():
                states = policy_states(config, model, lower, batch, packed, None)
                reference_N = sequence_logprob(
                    *states, packed.target_T, packed.cu_seqlens, **options
                ).double()
        else:
            reference_N = samples.scores.ref_logprob_PG.reshape(-1)[index]
            reference_N = reference_N.to(model.device, non_blocking=True)
        if self.passed_anchor is not None:
            with torch.no_grad():
                states = policy_states(config, model, lower, batch, packed, self.passed_anchor)
                own_N = sequence_logprob(*states, packed.target_T, packed.cu_seqlens, **options)
            reference_N = torch.lerp(reference_N, own_N.double(), target.anchor_share)
        if target.shift_PG is not None:
            shift_N = target.shift_PG.reshape(-1)[index].to(model.device, non_blocking=True)
            reference_N = reference_N + shift_N / target.coefficient
        return reference_N


def share_of(labels: str, part: Pairs, whole: Pairs) -> float:
    """Returns what a part weighs in the mean that the label form takes: over pairs, prompts or responses."""
    if labels == "listwise":
        return len(set(part.prompt)) / len(set(whole.prompt))
    return len(part.row) / len(whole.row) if labels == "single" else len(part.pairs) / len(whole.pairs)


def parts(pairs: Pairs, groups: list[packing.Group], budget: int) -> list[tuple[Pairs, int]]:
    """Cuts the pairs into parts of whole prompts, each of at most `budget` tokens or of one prompt; beside
    each stands the number of sequences before it.

    groups: the pairs' sequences with their prompts, in order."""
    found, first = [], 0
    for batch in packing.batches(groups, budget, packing.WHOLE):
        end = first + sum(len(g.rows) for g in batch)
        inside = (pairs.pairs[:, 0] >= first) & (pairs.pairs[:, 0] < end)
        found.append(
            (
                Pairs(
                    prompt=pairs.prompt[first:end],
                    row=pairs.row[first:end],
                    pairs=pairs.pairs[inside] - first,
                ),
                first,
            )
        )
        first = end
    return found


def rows_by_prompt(pairs: Pairs) -> dict[int, list[int]]:
    """Returns the rows of the pairs' sequences by prompt, both in order."""
    by_prompt: dict[int, list[int]] = {}
    for p, r in zip(pairs.prompt, pairs.row, strict=True):
        by_prompt.setdefault(p, []).append(r)
    return by_prompt
