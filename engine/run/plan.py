"""The time and memory that a run is predicted to need, printed before it starts.

Where memory is short, fewer responses are decoded side by side; where it does not suffice even
then, the run stops there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.config import RunConfig
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.model.names import linear_shapes, linears_of
from engine.ranks import ALONE, Ranks
from engine.run.machine import available_memory, matmul_rate
from kernels.loss_head.schemes import budget_or_default

# The share of the speed of bare matrix products that sampling, scoring and training reach here. Only the
# printed prediction depends on it.
EFFICIENCY = 0.65
ANSWER_SHARE = 0.7  # of max_new_tokens, until measured
KEPT_STATES_BYTES = 2 * 2**30
TOKEN_BYTES = 32  # of a response's token: its id, two log-probs, a flag, its text and copies on their way
PAIR_BYTES = 128  # of two responses' indices, in lists and in a tensor
ADAPTER_BYTES = 24  # of an adapter's weight: float32 with gradient, two moments, the start and a checkpoint


@dataclass(frozen=True, kw_only=True)
class ScorerSize:
    """What a model that scores texts costs."""

    weight_bytes: int
    working_bytes: int  # of a forward pass
    products: int  # multiplications for a token
    shares_prompts: bool  # a prompt is passed once for all its responses
    # There are scores already of the reference's responses that are not sampled.
    spared: bool = False


@dataclass(frozen=True)
class Plan:
    """The prediction for a run."""

    needed_bytes: int  # at the peak
    available_bytes: int
    seconds: float
    rows: int  # responses to decode side by side
    spare: str = ""  # what else spares memory

    @staticmethod
    def of(
        config: RunConfig,
        shape: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        train: list[int],
        heldout: list[int],
        *,
        scorers: Sequence[ScorerSize] = (),
        fewer_rows: bool = False,
        ranks: Ranks = ALONE,
    ) -> "Plan":
        """Counts the bytes and the products of a run, and time a matrix product for the rate.

        train, heldout: lengths in tokens of the prompts that will be sampled. scorers: models beside the
        policy's. fewer_rows: `rows` may be lowered to those that fit, down to the responses of one prompt.
        ranks: share out the work, and those of one machine its main memory.
        """
        lengths = train + heldout
        longest, mean = max(lengths), sum(lengths) / len(lengths)
        weights = shape.parameter_count() * dtype.itemsize
        training = _training_bytes(config, shape, dtype, device, longest) + _kept_bytes(
            config, shape, dtype, device, train
        )
        results = _samples_bytes(config)
        beside, scoring = scorer_bytes(config, device, scorers)
        most_rows = max(config.n_prompts, config.eval_prompts) * config.n_responses

        def needed(rows: int) -> int:
            sampling = sampling_bytes(shape, dtype, longest + config.max_new_tokens, min(rows, most_rows))
            return _peak(weights + beside + results + max(sampling, training, scoring))

        available, rows = available_memory(device), config.rollout_rows
        if device.type == "cpu":
            available //= ranks.local_size
        if fewer_rows:
            rows = rows_that_fit(rows, max(config.n_responses, config.eval_responses), needed, available)
        products = _products(config, shape, dtype, mean) + _scorer_products(config, scorers, mean)
        seconds = 2 * products / (EFFICIENCY * matmul_rate(dtype, device) * ranks.size)
        spare = "--offload-scorers or " if device.type == "cuda" and beside else ""
        return Plan(needed(rows), available, seconds, rows, spare)

    def check(self) -> None:
        """Stops a run that does not fit. Raises: UserError when less memory is free than is needed."""
        if self.needed_bytes > self.available_bytes:
            raise UserError(
                f"this run needs about {self.needed_bytes / 1e9:.1f} GB of memory and "
                f"{self.available_bytes / 1e9:.1f} GB are free; lower --rollout-rows (here {self.rows}), "
                "--prompts-per-step, --n-responses, --eval-responses, --max-new-tokens or --lora-rank, "
                f"or use {self.spare}--dtype bfloat16."
            )

    def sentence(self) -> str:
        """Says the prediction in one line for the user."""
        return (
            f"predicted: about {max(1, round(self.seconds / 60))} min, {self.needed_bytes / 1e9:.1f} GB of "
            f"memory ({self.available_bytes / 1e9:.1f} GB free)"
        )


def _trained_share(config: RunConfig) -> float:
    """Returns the share of the layers that a policy step trains."""
    return 1.0 if config.tune == "full" else 1 - config.lora_from


def _trained_responses(config: RunConfig) -> int:
    """Counts the responses of a prompt in a policy step; a row of a file of pairs has two."""
    return config.trained_responses(2 if config.pairs_file else config.n_responses)


def _training_bytes(
    config: RunConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device, longest_prompt: int
) -> float:
    """Counts what a policy step needs besides weights and states: activations and the loss head."""
    group = longest_prompt + _trained_responses(config) * config.max_new_tokens
    m = min(_trained_responses(config), config.responses_per_prompt or config.n_responses)
    pairs = config.prompts_per_step * m * (m - 1) / 2 * PAIR_BYTES
    at_once = min(config.prompts_per_step * group, max(config.tokens_per_forward, group))
    layers, checkpointed = shape.num_layers * _trained_share(config), config.activation_checkpointing
    inside = 10 * shape.hidden_size + 4 * shape.intermediate_size
    per_token = dtype.itemsize * (inside + layers * shape.hidden_size if checkpointed else inside * layers)
    total = pairs + at_once * per_token + budget_or_default(config.memory_budget_bytes, device)
    if shape.attention_softcap is not None:
        # All scores are stored: before and after the cap, masked, and as weights.
        stored_layers = 1 if checkpointed else layers
        total += int(at_once * 4 * group * shape.num_heads * stored_layers) * dtype.itemsize
    return total


def _samples_bytes(config: RunConfig) -> int:
    """Counts the responses that are in memory together: the reference's, those of the verdict and the largest
    set that training draws."""
    fresh = max((prompts * responses for _, prompts, responses in config.fresh_samples), default=0)
    rows = config.n_prompts * config.n_responses + 2 * config.eval_prompts * config.eval_responses + fresh
    return rows * config.max_new_tokens * TOKEN_BYTES


def _adapter_parameters(config: RunConfig, shape: ModelConfig) -> int:
    """Counts the weights of an adapter."""
    layers = math.ceil(shape.num_layers * _trained_share(config))
    shapes = linear_shapes(shape)
    return layers * config.lora_rank * sum(sum(shapes[name]) for name in linears_of(config.lora_targets))


def _kept_bytes(
    config: RunConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device, train: list[int]
) -> int:
    """Counts what training keeps from step to step: the states below the adapter,
    or copies of all weights."""
    if config.tune != "full":
        states = kept_states_bytes(
            train, config.n_responses * config.max_new_tokens, shape.hidden_size, dtype
        )
        return states + ADAPTER_BYTES * _adapter_parameters(config, shape)
    # Float32 weights, those of the start, gradients and two moments. On a CPU also the last iterate with
    # its moments, and what a checkpoint writes. On a GPU also the weights in 16 bits with their gradients,
    # and a copy for the iterate.
    return shape.parameter_count() * (28 if device.type == "cuda" else 60)


def _products(config: RunConfig, shape: ModelConfig, dtype: torch.dtype, mean_prompt: float) -> float:
    """Counts the multiplications of every pass through the model."""
    answer = ANSWER_SHARE * config.max_new_tokens
    head = shape.hidden_size * shape.vocab_size
    body = shape.parameter_count() - head * (1 if shape.tied else 2)
    adapter = 0 if config.tune == "full" else _adapter_parameters(config, shape)
    trained = body * _trained_share(config) + head + adapter

    def sampled(prompts: int, n: int) -> float:
        return prompts * (mean_prompt * body + n * answer * (body + head))

    def scored(prompts: int, n: int) -> float:
        """Counts the reference's log-probs: sampling has passed the layers below the adapter already."""
        return prompts * (mean_prompt + n * answer) * trained

    reference = config.n_prompts, config.n_responses
    heldout = config.eval_prompts, config.eval_responses
    total = sampled(*heldout) + scored(*heldout)  # of the policy
    if not config.samples_of:
        again = dtype != torch.float32  # see engine.stages.sampling
        total += sampled(*heldout) + again * scored(*heldout)
        # Given responses are passed once, as a sampled one is token by token.
        total += sampled(*reference) + (again and not config.samples) * scored(*reference)
    for times, prompts, responses in config.fresh_samples:
        total += times * (sampled(prompts, responses) + scored(prompts, responses))
    tokens = config.prompts_per_step * (mean_prompt + _trained_responses(config) * answer)
    passes = 3 if config.tune == "full" else 2  # forward, to the states, to the weights
    steps = config.policy_updates * config.steps
    if config.by_preference:
        steps += (1 + len(config.cost)) * config.preference_steps
    return total + steps * tokens * passes * trained


def scorer_bytes(config: RunConfig, device: torch.device, scorers: Sequence[ScorerSize]) -> tuple[int, int]:
    """Counts what scorers' weights take all the time, and what they need while they score.

    Weights that are put aside need the memory of the GPU only then, one model at a time.
    """
    aside = config.offload_scorers and device.type == "cuda"
    working = max((scorer.working_bytes for scorer in scorers), default=0)
    if aside:
        return 0, max((scorer.weight_bytes + scorer.working_bytes for scorer in scorers), default=0)
    return sum(scorer.weight_bytes for scorer in scorers), working


def _scorer_products(config: RunConfig, scorers: Sequence[ScorerSize], mean_prompt: float) -> float:
    """Counts the multiplications of the models that score the texts."""
    reference = 1, config.n_prompts, config.n_responses
    heldout = config.eval_prompts, config.eval_responses
    total = 0.0
    for scorer in scorers:
        samples = [] if scorer.spared else [reference]
        samples.append((1 if scorer.spared and config.samples_of else 2, *heldout))
        for times, prompts, n in [*samples, *config.fresh_samples]:
            passed = mean_prompt * (1 if scorer.shares_prompts else n)
            total += times * prompts * (passed + n * ANSWER_SHARE * config.max_new_tokens) * scorer.products
    return total


def cache_bytes(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Counts the bytes of the keys and values of one token in all layers."""
    return 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * dtype.itemsize


def sampling_bytes(shape: ModelConfig, dtype: torch.dtype, tokens: int, rows: int) -> int:
    """Counts the bytes of the KV slab and of the logits, with `rows` sequences of `tokens` side by side."""
    return rows * tokens * cache_bytes(shape, dtype) + rows * shape.vocab_size * 4 * 3


def _peak(counted: float) -> int:
    """Adds to the bytes that are counted those that are not, and the libraries."""
    return int(1.15 * counted) + 600 * 2**20


def rows_that_fit(rows: int, n: int, needed: Callable[[int], int], available: int) -> int:
    """Lowers `rows` by whole prompts of n responses until needed(rows) <= available
    bytes, down to one prompt."""
    if rows <= n or needed(rows) <= available:
        return rows
    fewer, most = 1, -(-(rows - n) // n)  # prompts to leave out: the fewest that do, or all but one
    while fewer < most:
        middle = (fewer + most) // 2
        if needed(max(n, rows - middle * n)) <= available:
            most = middle
        else:
            fewer = middle + 1
    return max(n, rows - fewer * n)


def evaluation_rows(
    config: RunConfig,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    heldout: list[int],
    n_prompts: int,
    scorers: Sequence[ScorerSize] = (),
    ranks: Ranks = ALONE,
) -> int:
    """Returns how many responses `engine.evaluate` decodes side by side, on this rank:
    config.rollout_rows, or as many as fit.

    heldout: lengths in tokens of all prompts; n_prompts: the most that are scored at once. scorers: models
    beside the policy's.
    Raises: UserError where there is no room for one prompt's responses.
    """
    n, longest, weights = config.eval_responses, max(heldout), shape.parameter_count() * dtype.itemsize
    if config.tune == "full":
        weights += shape.parameter_count() * (dtype.itemsize + max(4, dtype.itemsize))
    kept = kept_states_bytes([longest] * n_prompts, n * config.max_new_tokens, shape.hidden_size, dtype)
    loss_head = budget_or_default(config.memory_budget_bytes, device)
    beside, scoring = scorer_bytes(config, device, scorers)

    def needed(rows: int) -> int:
        sampling = sampling_bytes(shape, dtype, longest + config.max_new_tokens, min(rows, n_prompts * n))
        return _peak(weights + beside + kept + max(sampling, loss_head, scoring))

    available = available_memory(device)
    if device.type == "cpu":
        available //= ranks.local_size
    rows = rows_that_fit(config.rollout_rows, n, needed, available)
    if needed(rows) > available:
        raise UserError(
            f"this evaluation needs about {needed(rows) / 1e9:.1f} GB of memory and {available / 1e9:.1f} "
            "GB are free; lower --n-prompts or --n-responses, or give shorter --prompts."
        )
    return rows


def kept_states_bytes(
    prompt_lengths: list[int], new_tokens: int, hidden_size: int, dtype: torch.dtype
) -> int:
    """Counts the bytes, at most, of the states below the adapter of prompts with
    `new_tokens` response tokens each.

    0 when they pass KEPT_STATES_BYTES, as then they are not kept but computed in every step.
    """
    size = (sum(prompt_lengths) + len(prompt_lengths) * new_tokens) * hidden_size * dtype.itemsize
    return size if size <= KEPT_STATES_BYTES else 0
