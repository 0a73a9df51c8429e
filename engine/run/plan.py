"""Predicted time and memory of a run, printed before it starts; where memory is short fewer responses are decoded side by side, and too
little stops it there."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.config import RunConfig
from engine.errors import UserError
from engine.model.architecture import ModelConfig
from engine.run.machine import available_memory, matmul_rate
from kernels.reference import budget_or_default

# Share of the speed of bare matrix products that sampling, scoring and training reach here; only the printed prediction depends on it.
EFFICIENCY = 0.65
ANSWER_SHARE = 0.7  # of max_new_tokens, until measured
KEPT_STATES_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Plan:
    """What a run is predicted to need: bytes at the peak, bytes available, and seconds; rows: responses to decode side by side."""

    needed_bytes: int
    available_bytes: int
    seconds: float
    rows: int

    @staticmethod
    def of(
        config: RunConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device, train: list[int], heldout: list[int],
        *, fewer_rows: bool = False,
    ) -> "Plan":  # fmt: skip
        """Count weights, KV slab, loss head and activations, and the products of every pass; time a matrix product for the rate.
        `train` and `heldout` are the lengths in tokens of the prompts that will be sampled. fewer_rows: `rows` are those that fit, down to
        the responses of one prompt."""
        lengths = train + heldout
        longest_prompt, mean_prompt = max(lengths), sum(lengths) / len(lengths)
        size, c = dtype.itemsize, shape
        weights = c.parameter_count() * size
        in_group = config.trained_responses(2 if config.pairs_file else config.n_responses)
        group = longest_prompt + in_group * config.max_new_tokens
        full = config.tune == "full"
        trained = 1.0 if full else 1 - config.lora_from  # share of the layers
        layers = c.num_layers * trained
        inside = 10 * c.hidden_size + 4 * c.intermediate_size
        per_token = size * (
            inside + layers * c.hidden_size if config.activation_checkpointing else inside * layers
        )
        at_once = min(config.prompts_per_step * group, max(config.tokens_per_forward, group))
        training = at_once * per_token + budget_or_default(config.memory_budget_bytes, device)
        if (
            c.attention_softcap is not None
        ):  # all scores are stored: before and after the cap, masked, and as weights
            training += (
                int(at_once * 4 * group * c.num_heads * (1 if config.activation_checkpointing else layers))
                * size
            )
        kept = (
            0
            if full
            else kept_states_bytes(train, config.n_responses * config.max_new_tokens, c.hidden_size, dtype)
        )
        if full:
            # Float32 weights, those of the start, gradients, two moments, and on a CPU too: the last iterate with its moments and what a
            # checkpoint writes. On a GPU: the weights in 16 bits with their gradients, and a copy for the iterate.
            kept += c.parameter_count() * (28 if device.type == "cuda" else 60)

        def needed(rows: int) -> int:
            return _peak(
                weights + max(sampling_bytes(config, shape, dtype, longest_prompt, rows), training + kept)
            )

        available = available_memory(device)
        rows = rows_that_fit(config, needed, available) if fewer_rows else config.rollout_rows

        answer = ANSWER_SHARE * config.max_new_tokens
        head = c.hidden_size * c.vocab_size
        body = c.parameter_count() - head * (1 if c.tied else 2)

        def sampled(prompts: int, n: int) -> float:
            return prompts * (mean_prompt * body + n * answer * (body + head))

        def scored(prompts: int, n: int) -> float:
            """The reference's log-probs: the layers above those that sampling has passed already."""
            return prompts * (mean_prompt + n * answer) * (body * trained + head)

        reference, heldout = (
            (config.n_prompts, config.n_responses),
            (config.eval_prompts, config.eval_responses),
        )
        products = sampled(*reference) + 2 * sampled(*heldout) + scored(*heldout)
        if dtype != torch.float32:  # see stages.sample
            products += scored(*reference) + scored(*heldout)
        for times, prompts, responses in config.fresh_samples:
            products += times * (sampled(prompts, responses) + scored(prompts, responses))
        tokens = config.prompts_per_step * (mean_prompt + in_group * answer)
        passes = 3 if full else 2  # forward, to the states, to the weights
        products += config.policy_updates * config.steps * tokens * passes * (body * trained + head)
        return Plan(needed(rows), available, 2 * products / (EFFICIENCY * matmul_rate(dtype, device)), rows)

    def check(self) -> None:
        """Raises: UserError when the memory that is free is less than what is needed."""
        if self.needed_bytes > self.available_bytes:
            raise UserError(
                f"this run needs about {self.needed_bytes / 1e9:.1f} GB of memory and {self.available_bytes / 1e9:.1f} GB are free; "
                f"lower --rollout-rows (here {self.rows}), --prompts-per-step, --n-responses or --max-new-tokens, or use --dtype bfloat16."
            )

    def sentence(self) -> str:
        """One line for the user."""
        return (
            f"predicted: about {max(1, round(self.seconds / 60))} min, {self.needed_bytes / 1e9:.1f} GB of memory "
            f"({self.available_bytes / 1e9:.1f} GB free)"
        )


def cache_bytes(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Of the keys and values of one token in all layers."""
    return 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * dtype.itemsize


def sampling_bytes(
    config: RunConfig, shape: ModelConfig, dtype: torch.dtype, longest_prompt: int, rows: int
) -> int:
    """Bytes of the KV slab and of the logits, with `rows` responses side by side."""
    rows = min(rows, max(config.n_prompts, config.eval_prompts) * config.n_responses)
    cache = rows * (longest_prompt + config.max_new_tokens) * cache_bytes(shape, dtype)
    return cache + rows * shape.vocab_size * 4 * 3


def _peak(counted: int) -> int:
    """Bytes at the peak: what is counted, what is not, and the libraries."""
    return int(1.15 * counted) + 600 * 2**20


def rows_that_fit(config: RunConfig, needed: Callable[[int], int], available: int) -> int:
    """config.rollout_rows, or fewer by whole prompts until needed(rows) <= available bytes; one prompt's responses at least."""
    n, rows = max(config.n_responses, config.eval_responses), config.rollout_rows
    while rows > n and needed(rows) > available:
        rows = max(n, rows - n)
    return rows


def evaluation_rows(
    config: RunConfig,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    heldout: list[int],
    n_prompts: int,
) -> int:
    """Responses that `engine.evaluate` decodes side by side: config.rollout_rows, or as many as fit. heldout: lengths in tokens of all
    prompts; n_prompts: the most that are scored at once.

    Raises: UserError where there is no room for one prompt's responses.
    """
    own = config.eval_responses
    config = replace(config, n_prompts=n_prompts, eval_prompts=n_prompts, n_responses=own)
    policy = (
        shape.parameter_count() * (dtype.itemsize + max(4, dtype.itemsize)) if config.tune == "full" else 0
    )
    weights = shape.parameter_count() * dtype.itemsize + policy
    kept = kept_states_bytes(
        [max(heldout)] * n_prompts, own * config.max_new_tokens, shape.hidden_size, dtype
    )

    def needed(rows: int) -> int:
        sampling = sampling_bytes(config, shape, dtype, max(heldout), rows)
        return _peak(weights + kept + max(sampling, budget_or_default(config.memory_budget_bytes, device)))

    available = available_memory(device)
    rows = rows_that_fit(config, needed, available)
    if needed(rows) > available:
        raise UserError(
            f"this evaluation needs about {needed(rows) / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free; lower "
            "--n-prompts or --n-responses, or give shorter --prompts."
        )
    return rows


def kept_states_bytes(
    prompt_lengths: list[int], new_tokens: int, hidden_size: int, dtype: torch.dtype
) -> int:
    """Bytes of the states below the adapter of prompts with `new_tokens` response tokens each, at most; 0 when they pass
    KEPT_STATES_BYTES, as then they are not kept but computed in every step."""
    size = (sum(prompt_lengths) + len(prompt_lengths) * new_tokens) * hidden_size * dtype.itemsize
    return size if size <= KEPT_STATES_BYTES else 0
