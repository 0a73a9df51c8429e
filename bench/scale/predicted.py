"""Predicts a CAID run on so many GPUs stage by stage: what each rank computes, sends and holds.

The work of a rank is that of `bench.run.floors`, the memory that of `engine.run.plan`, what is sent that of
`engine.ranks` and FSDP2. What is taken for granted stands in `bench.scale.cards`.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.run import floors
from bench.run.floors import Rates
from bench.run.shapes import Sizes, config_json
from bench.scale.cards import DECODE_SHARE, PASS_SHARE, PER_MACHINE, PROMPT_TOKENS, Card
from bench.scale.counted import FIGURES, RESPONSE_BYTES, TOKEN_BYTES
from engine.config import CaidConfig
from engine.model.architecture import ModelConfig
from engine.model.slices import sliced
from engine.run.needs import adapter_parameters, kept_states_bytes, largest_share
from engine.run.plan import Work, shards_to_try, what_fits
from engine.run.spread import pieces

DTYPE, ITEM = torch.bfloat16, 2
TEXT_BYTES = 4  # of a token, in the text of a response
# Collective operations: two each to look for a stage's file, to clear its place, to save it and to tell what
# stands in it; two each of a sampling for samples, speed, judges' answers and scorers' warnings; two for the
# digests of replicas at an update's end.
STAGE_MESSAGES, SAMPLING_MESSAGES, DIGEST_MESSAGES = 8, 8, 2
SAMPLING_GATHERS = 3  # of spread weights: to sample, to score, and to measure how far the two are apart


# The numbers of the published config.json files of Llama 3 8B, Qwen 2.5 32B and Llama 3 70B.
CONFIGS = {
    name: config_json(family, Sizes(*sizes), 5e5, 8192, tie_word_embeddings=False)
    for name, family, sizes in (
        ("8b", "Llama", (32, 4096, 32, 8, 14336, 128256)),
        ("32b", "Qwen2", (64, 5120, 40, 8, 27648, 152064)),
        ("70b", "Llama", (80, 8192, 64, 8, 28672, 128256)),
    )
}
MODELS = {name: ModelConfig.from_json(raw, Path("config.json")) for name, raw in CONFIGS.items()}
# The papers' sizes: 20 steps of 256 prompts in each of five iterations, and the last weights as iterates.
RUN = CaidConfig(
    n_prompts=8192,
    n_responses=8,
    max_new_tokens=256,
    prompts_per_step=256,
    steps=20,
    slack_prompts=1024,
    slack_responses=4,
    eval_prompts=1024,
    eval_responses=6,
    tokens_per_forward=8192,
    learning_rate=1e-5,
    weight_average=0.0,
)
# Flags that spare memory, which may make room for more rows or for shards within a machine.
SPARED: dict[str, dict[str, Any]] = {
    "": {},
    "--activation-checkpointing": {"activation_checkpointing": True},
    "--activation-checkpointing --tokens-per-forward 2048": {
        "activation_checkpointing": True,
        "tokens_per_forward": 2048,
    },
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage on the rank that has most to do, as often as a run has it."""

    name: str
    times: int
    compute_s: float
    messages: int
    sent_bytes: float  # by one rank
    message_s: float

    @property
    def seconds(self) -> float:
        """Returns the time of all of them."""
        return self.times * (self.compute_s + self.message_s)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run on so many ranks."""

    ranks: int
    shards: int  # ranks that a weight is spread over
    rows: int  # responses side by side
    needed_bytes: int
    stages: list[Stage]  # none where it does not fit
    fits: bool
    spared: str  # flags that it takes to fit
    cure: str  # what would fit, where it does not

    @property
    def seconds(self) -> float:
        """Returns the time of all stages."""
        return sum(stage.seconds for stage in self.stages)


def predict(model: str, tune: str, card: Card, ranks: int, model_ranks: int = 1) -> Prediction:
    """Predicts a run of a model of `MODELS` on `ranks` GPUs, with the flags of `SPARED` that make it fastest
    of those with which it fits; where it fits with none, it says so of those that need least."""
    config = replace(RUN, tune=tune, model_ranks=model_ranks)
    found = [
        predicted(MODELS[model], replace(config, **settings), card, ranks, flags)
        for flags, settings in SPARED.items()
    ]
    fitting = [one for one in found if one.fits]
    return min(fitting, key=lambda one: one.seconds) if fitting else found[-1]


def predicted(shape: ModelConfig, config: CaidConfig, card: Card, ranks: int, spared: str = "") -> Prediction:
    """Predicts a run of a config on `ranks` GPUs, in bfloat16. spared: flags that it has to spare memory."""
    prompts = [PROMPT_TOKENS] * config.n_prompts, [PROMPT_TOKENS] * config.eval_prompts
    work = Work(
        config=config,
        shape=shape,
        dtype=DTYPE,
        device=torch.device("cuda"),
        train=prompts[0],
        heldout=prompts[1],
        model_ranks=config.model_ranks,
    )
    for shards in shards_to_try(config, ranks, min(ranks, PER_MACHINE)):
        rows = work.rows(int(card.free_bytes), ranks, shards)
        needed = work.needed(rows, ranks, shards)
        if fits := needed <= card.free_bytes:
            break
    stages, cure = [], ""
    if fits:
        run = _Run(shape, config, card, ranks, shards, rows)
        # Steps on an adapter pass the reference themselves, so that its own samples are not scored.
        alone, reference = config.compares_with_reference, (config.n_prompts, config.n_responses)
        stages.append(run.sampling("reference", 1, *reference, kept=True, scored=alone))
        stages.append(run.steps(config.policy_updates * config.steps))
        stages.append(run.iterate(config.policy_updates))
        for times, n_prompts, n in config.fresh_samples:
            stages.append(run.sampling("slack", times, n_prompts, n, kept=False))
        heldout = config.eval_prompts, config.eval_responses
        stages.append(run.sampling("held-out reference", 1, *heldout, kept=True, scored=alone))
        stages.append(run.sampling("held-out policy", 1, *heldout, kept=True))
    else:
        cure = what_fits(work, int(card.free_bytes), rows, ranks, min(ranks, PER_MACHINE))
    return Prediction(
        ranks=ranks,
        shards=shards,
        rows=rows,
        needed_bytes=needed,
        stages=stages,
        fits=fits,
        spared=spared,
        cure=cure,
    )


@dataclass(frozen=True)
class _Sums:
    messages: int
    bytes: float  # sent by one rank

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.messages + other.messages, self.bytes + other.bytes)


@dataclass(frozen=True)
class _Run:
    whole: ModelConfig
    config: CaidConfig
    card: Card
    ranks: int
    shards: int
    rows: int

    @property
    def shape(self) -> ModelConfig:
        """Returns what a rank holds of the model."""
        return sliced(self.whole, self.config.model_ranks)

    @property
    def shares(self) -> int:
        """Returns the number of shares of the prompts: ranks that hold one model together have one."""
        return self.ranks // self.config.model_ranks

    @property
    def full(self) -> bool:
        return self.config.tune == "full"

    @property
    def trained(self) -> float:
        """Returns the share of the layers that are trained."""
        return 1.0 if self.full else 1 - self.config.lora_from

    def keeps(self, prompts: int, n: int) -> bool:
        """Tells whether the states below an adapter of so many prompts and responses are kept for a while."""
        lengths, new = [PROMPT_TOKENS] * prompts, n * self.config.max_new_tokens
        return not self.full and kept_states_bytes(lengths, new, self.shape.hidden_size, DTYPE) > 0

    def seconds(self, parts: list[floors.Part]) -> float:
        """Returns the time of work on the card, at the shares of its peaks that are assumed."""
        rates = Rates(DECODE_SHARE * self.card.bytes_per_s, PASS_SHARE * self.card.flops_per_s)
        return sum(floors.seconds(parts, rates).values())

    def wire(self, sent_bytes: float, ranks: int) -> float:
        """Returns the time of a message around a ring of ranks, of which each sends so many bytes."""
        within = ranks <= PER_MACHINE
        return sent_bytes / (self.card.local_bytes_per_s if within else self.card.remote_bytes_per_s)

    def state_sums(self, passes: int, tokens: float, share: float) -> "_Sums":
        """Counts what goes between the ranks that hold one model: in each pass, forward or backward, two sums
        of its tokens' states in every layer of a share."""
        ranks, layers = self.config.model_ranks, int(share * self.shape.num_layers)
        if ranks == 1:
            return _Sums(0, 0.0)
        size = 2 * layers * tokens * self.shape.hidden_size * ITEM
        return _Sums(2 * layers * passes, self._summed(size, ranks))

    def drawing_sums(self, prompts: int, n: int, scored: bool) -> "_Sums":
        """Counts these for `drawing`; the last token of a response passes no layer when it is drawn."""
        own, new = largest_share(prompts, self.shares), self.config.max_new_tokens
        batches = math.ceil(own / max(1, self.rows // n))
        drawn = self.state_sums(batches * new, own * (PROMPT_TOKENS + n * (new - 1)), 1.0)
        tokens = own * (PROMPT_TOKENS + n * new)
        share = self.trained if self.keeps(own, n) else 1.0
        passes = math.ceil(tokens / self.config.tokens_per_forward)
        return drawn + self.state_sums(passes, tokens, share) if scored else drawn

    def drawing(self, prompts: int, n: int, scored: bool) -> float:
        """Returns the time of sampling n responses to each prompt, and of scoring them by the reference."""
        own, new = largest_share(prompts, self.shares), self.config.max_new_tokens
        at_once = max(1, self.rows // n)
        compute = 0.0
        for batch, count in ((at_once, own // at_once), (own % at_once, 1)):
            if batch and count:
                lengths = [new] * batch * n
                compute += count * self.seconds(
                    floors.sampling(self.shape, ITEM, [PROMPT_TOKENS] * batch, n, lengths)
                )
        tokens = own * (PROMPT_TOKENS + n * new)
        share = self.trained if self.keeps(own, n) else 1.0
        once = floors.passes(self.shape, ITEM, tokens, own * n * new, 1, share=share)
        return compute + self.seconds(once) if scored else compute

    def sampling(
        self, name: str, times: int, prompts: int, n: int, *, kept: bool, scored: bool = True
    ) -> Stage:
        """Samples responses, which all ranks get, and scores them by the reference. kept: they are the
        stage's result, which rank 0 sends to all again."""
        whole = prompts * n * (self.config.max_new_tokens * (TOKEN_BYTES + TEXT_BYTES) + RESPONSE_BYTES)
        host, messages = 0.0, 0
        if self.ranks > 1:
            host = whole * (self.ranks - 1) / self.ranks + whole * kept
            messages = SAMPLING_MESSAGES + STAGE_MESSAGES
        sums, compute_s = self.drawing_sums(prompts, n, scored), self.drawing(prompts, n, scored)
        return self.stage(name, times, compute_s, messages, host, SAMPLING_GATHERS, sums)

    def iterate(self, times: int) -> Stage:
        """Ends an update: rank 0 sends an adapter with its moments to all, or gathers all weights to write
        them."""
        messages = STAGE_MESSAGES + DIGEST_MESSAGES if self.ranks > 1 else 0
        adapter = 0 if self.full or self.ranks == 1 else adapter_parameters(self.config, self.whole)
        return self.stage("iterate", times, 0.0, messages, 3 * 4.0 * adapter, 1, _Sums(0, 0.0))

    def stage(
        self,
        name: str,
        times: int,
        compute_s: float,
        messages: int,
        host_bytes: float,
        gathers: int,
        sums: "_Sums",
    ) -> Stage:
        """Returns a stage that sends bytes from processor to processor, gathers all weights so often where
        they are spread, and sums states where the model is cut."""
        sent, waits = host_bytes + sums.bytes, host_bytes / self.card.host_bytes_per_s
        messages, waits = messages + sums.messages, waits + self.wire(sums.bytes, self.config.model_ranks)
        if self.shards > 1:
            gathered = gathers * ITEM * self.shape.parameter_count() * (self.shards - 1) / self.shards
            sent, messages = sent + gathered, messages + gathers * (self.shape.num_layers + 1)
            waits += self.wire(gathered, self.shards)
        return Stage(
            name=name,
            times=times,
            compute_s=compute_s,
            messages=messages,
            sent_bytes=sent,
            message_s=waits + messages * self.card.message_s,
        )

    def steps(self, times: int) -> Stage:
        """Takes a policy step on the pairs of a rank's prompts."""
        config, shape = self.config, self.shape
        own = largest_share(config.prompts_per_step, self.shares)
        answers = config.trained_responses(config.n_responses) * config.max_new_tokens
        tokens, completions = own * (PROMPT_TOKENS + answers), own * answers
        passes = math.ceil(tokens / config.tokens_per_forward)
        if self.full:
            # Three products for each weight; AdamW reads and writes seven numbers for each of the shard.
            parts = floors.passes(shape, ITEM, tokens, completions, 3)
            parts.append(floors.Part("optimizer", 7 * 4 * shape.parameter_count() / self.shards))
        else:
            # Forward and backward, and forward through the reference.
            parts = floors.passes(shape, ITEM, tokens, completions, 3, share=self.trained)
            below = floors.weights(shape)[0] * config.lora_from
            # Several ranks compute the states below the adapter again, and so does one with many prompts.
            if self.ranks > 1 or not self.keeps(config.n_prompts, config.n_responses):
                parts.append(floors.Part("below", below * ITEM, 2 * below * tokens))
        if config.activation_checkpointing:
            again = floors.weights(shape)[0] * self.trained
            parts.append(floors.Part("again", again * ITEM, 2 * again * tokens))
        # Forward through all layers and backward through the trained ones, which are computed once more where
        # their activations are not kept.
        sums = self.state_sums(passes, tokens, 1.0)
        for _ in range(1 + config.activation_checkpointing + (not self.full)):
            sums += self.state_sums(passes, tokens, self.trained)
        sent, messages, waits = sums.bytes, sums.messages, self.wire(sums.bytes, config.model_ranks)
        if self.ranks > 1:
            sent, messages = sent + self._summed(8 * FIGURES, self.ranks), messages + 1
        if self.ranks > 1 and not self.full:
            adapter = self._summed(4 * adapter_parameters(config, self.whole), self.ranks)
            sent, messages, waits = sent + adapter, messages + 1, waits + self.wire(adapter, self.ranks)
        if self.shards > 1:
            messages += 3  # how many passes each rank has, in two, and the norm
            fsdp, copied = self.fsdp_bytes(), 0.0
            copies = self.ranks // self.shards
            if copies > 1:
                copied = self._summed(4 * shape.parameter_count() / self.shards, copies)
            sent += passes * (fsdp + copied)
            messages += passes * (3 * shape.num_layers + 2 + (shape.num_layers + 1) * (copies > 1))
            waits += passes * (self.wire(fsdp, self.shards) + copied / self.card.remote_bytes_per_s)
        return Stage(
            name="policy step",
            times=times,
            compute_s=self.seconds(parts),
            messages=messages,
            sent_bytes=sent,
            message_s=waits + messages * self.card.message_s,
        )

    def fsdp_bytes(self) -> float:
        """Returns what a rank sends in a pass: each layer is gathered twice, the rest once, and the gradients
        are summed in float32."""
        outer, whole = pieces(self.shape, 1)[1], self.shape.parameter_count()
        return ((2 * whole - outer) * ITEM + whole * 4) * (self.shards - 1) / self.shards

    @staticmethod
    def _summed(size: float, ranks: int) -> float:
        """Returns what a rank sends where `size` bytes of each are added up around a ring."""
        return 2 * size * (ranks - 1) / ranks
