"""What the parts of a run need: bytes of memory, and multiplications.

`engine.run.plan` adds them up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.config import RunConfig
from engine.model.architecture import ModelConfig
from engine.model.attention import goes_by_runs
from engine.model.names import linear_shapes, linears_of
from engine.model.packing import TOKENS_BY_RUNS, TOKENS_PER_FORWARD
from engine.run.spread import mean_bytes
from kernels import compiled
from kernels.loss_head.schemes import budget_or_default

# The share of the speed of bare matrix products that sampling, scoring and training reach on CPUs, in 32 and
# in 16 bits. Only the printed prediction depends on it.
EFFICIENCY = {4: 0.65, 2: 0.5}
ANSWER_SHARE = 0.7  # of max_new_tokens, until measured
KEPT_STATES_BYTES = 2 * 2**30
GAP_PROMPTS = 4  # of each sampling whose samples are run through the training forward again
KL_PROMPTS = 64  # whose responses, one each, measure a policy's KL where no slack does
TOKEN_BYTES = 32  # of a response's token: its id, two log-probs, a flag, its text and copies on their way
PAIR_BYTES = 128  # of two responses' indices, in lists and in a tensor
ADAPTER_BYTES = 24  # of an adapter's weight: float32 with gradient, two moments, the start and a checkpoint
# And for a mean over steps: itself, and the last weights in the start and in a checkpoint.
ADAPTER_MEAN_BYTES = 12
FLAT_BYTES = 4  # and of its copy in the message that adds its gradient up over several ranks


@dataclass(frozen=True, kw_only=True)
class ScorerSize:
    """What a model that scores texts costs."""

    weight_bytes: int
    working_bytes: int  # of a forward pass
    products: int  # multiplications for a token
    shares_prompts: bool  # a prompt is passed once for all its responses
    # There are scores already of the reference's responses that are not sampled.
    spared: bool = False


def largest_share(n: int, ranks: int) -> int:
    """Counts the prompts of the rank that has most of n, see `Ranks.share`."""
    return -(-n // ranks)


def _trained_share(config: RunConfig) -> float:
    """Returns the share of the layers that a policy step trains."""
    return 1.0 if config.tune == "full" else 1 - config.lora_from


def _trained_responses(config: RunConfig) -> int:
    """Counts the responses of a prompt in a policy step; a row of a file of pairs has two."""
    return config.trained_responses(2 if config.pairs_file else config.n_responses)


def training_bytes(
    config: RunConfig,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    longest_prompt: int,
    ranks: int,
) -> float:
    """Counts what a policy step needs besides weights and states: activations and the loss head."""
    group = longest_prompt + _trained_responses(config) * config.max_new_tokens
    m = min(_trained_responses(config), config.responses_per_prompt or config.n_responses)
    pairs = config.prompts_per_step * m * (m - 1) / 2 * PAIR_BYTES
    own_prompts = largest_share(config.prompts_per_step, ranks)
    at_once = min(own_prompts * group, max(config.tokens_per_forward, group))
    layers, checkpointed = shape.num_layers * _trained_share(config), config.activation_checkpointing
    inside = 10 * shape.hidden_size + 4 * shape.intermediate_size
    per_token = dtype.itemsize * (inside + layers * shape.hidden_size if checkpointed else inside * layers)
    total = pairs + at_once * per_token + budget_or_default(config.memory_budget_bytes, device)
    if shape.attention_softcap is not None:
        # All scores are stored: before and after the cap, masked, and as weights.
        stored_layers = 1 if checkpointed else layers
        total += int(at_once * 4 * group * shape.num_heads * stored_layers) * dtype.itemsize
    return total


def samples_bytes(config: RunConfig) -> int:
    """Counts the responses that are in memory together: the reference's, those of the verdict and the largest
    set that training draws."""
    reference, heldout, fresh = _sample_sizes(config)
    return (reference + 2 * heldout + fresh) * config.max_new_tokens * TOKEN_BYTES


def gathered_bytes(config: RunConfig) -> int:
    """Counts the messages in which the largest set of responses goes between several ranks."""
    return max(_sample_sizes(config)) * config.max_new_tokens * TOKEN_BYTES


def _sample_sizes(config: RunConfig) -> tuple[int, int, int]:
    """Counts the responses of the reference, of a verdict's policy, and of the largest set that training
    draws."""
    fresh = max((prompts * responses for _, prompts, responses in config.fresh_samples), default=0)
    return config.n_prompts * config.n_responses, config.eval_prompts * config.eval_responses, fresh


def adapter_parameters(config: RunConfig, shape: ModelConfig) -> int:
    """Counts the weights of an adapter."""
    layers = math.ceil(shape.num_layers * _trained_share(config))
    shapes = linear_shapes(shape)
    return layers * config.lora_rank * sum(sum(shapes[name]) for name in linears_of(config.lora_targets))


def kept_bytes(
    config: RunConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device, train: list[int]
) -> int:
    """Counts what one process keeps from stage to stage once it has trained: the states below the adapter and
    what training needs of the adapter, or copies of all weights. Gradients are counted although a step alone
    has them."""
    if config.tune != "full":
        return states_bytes(config, shape, dtype, train) + adapter_bytes(config, shape)
    # Float32 weights, those of the start, gradients and two moments. On a CPU also the last iterate with
    # its moments, and what a checkpoint writes. On a GPU also the weights in 16 bits with their gradients,
    # and a copy for the iterate.
    kept = 28 if device.type == "cuda" else 60
    if config.weight_average:
        kept += mean_bytes(on_cpu=device.type == "cpu")
    return shape.parameter_count() * kept


def adapter_bytes(config: RunConfig, shape: ModelConfig) -> int:
    """Counts what training keeps of an adapter."""
    each = ADAPTER_BYTES + (ADAPTER_MEAN_BYTES if config.weight_average else 0)
    return each * adapter_parameters(config, shape)


def states_bytes(config: RunConfig, shape: ModelConfig, dtype: torch.dtype, prompts: list[int]) -> int:
    """Counts the states below the adapter of prompts, given by their lengths, and their responses."""
    return kept_states_bytes(prompts, config.n_responses * config.max_new_tokens, shape.hidden_size, dtype)


def products(
    config: RunConfig, shape: ModelConfig, dtype: torch.dtype, mean_prompt: float, ranks: int, *, keeps: bool
) -> float:
    """Counts the multiplications of every pass through the model, on the rank that has most prompts; of the
    verdict's looks those of the first.

    keeps: the states below the adapter are there in every step, and need not be computed again.
    """
    answer = ANSWER_SHARE * config.max_new_tokens
    head = shape.hidden_size * shape.vocab_size
    body = shape.parameter_count() - head * (1 if shape.tied else 2)
    share, narrow = _trained_share(config), dtype.itemsize == 2
    adapter = 0 if config.tune == "full" else adapter_parameters(config, shape)

    def layers(n: int) -> float:
        """Counts a pass of a prompt and n responses through all layers; a token sees those before it."""
        in_prompt, in_answer = (
            body + attention_products(shape, seen) for seen in (mean_prompt / 2, mean_prompt + answer / 2)
        )
        return mean_prompt * in_prompt + n * answer * in_answer

    def passed(n: int, of_layers: float = 1.0, adapted: int = 0) -> float:
        """Counts a pass through a share of the layers, and of the responses through the head."""
        return of_layers * layers(n) + (mean_prompt + n * answer) * adapted + n * answer * head

    def sampled(prompts: int, n: int, adapted: int = 0) -> float:
        # Some pass the model again on each rank, to see how far log-probs lie apart.
        return (largest_share(prompts, ranks) + min(GAP_PROMPTS, prompts)) * passed(n, adapted=adapted)

    def scored(prompts: int, n: int) -> float:
        """Counts the reference's log-probs: sampling has passed the layers below the adapter already."""
        return largest_share(prompts, ranks) * passed(n, share)

    reference = config.n_prompts, config.n_responses
    heldout = config.eval_prompts, config.eval_responses
    total = sampled(*heldout, adapter) + scored(*heldout)  # of the policy
    if not config.samples_of:
        again = narrow and config.compares_with_reference  # see engine.stages.sampling
        total += sampled(*heldout) + again * scored(*heldout)
        # Given responses are passed once, as a sampled one is token by token.
        total += sampled(*reference) + (again and not config.samples) * scored(*reference)
    for times, prompts, responses in config.fresh_samples:
        total += times * (sampled(prompts, responses, adapter) + scored(prompts, responses))
    if config.trusts and not config.measured_slacks:
        # A slack's responses tell how far a policy went; without them it answers anew.
        asked = largest_share(min(KL_PROMPTS, config.n_prompts), ranks)
        total += config.policy_updates * asked * (passed(1, adapted=adapter) + passed(1))
    steps = config.policy_updates * config.steps
    if config.by_preference:
        aligned = 1 + len(config.cost)
        steps += aligned * config.preference_steps
        # Each of these policies passes all responses that are scored.
        for times, prompts, responses in ((1, *reference), (2, *heldout), *config.fresh_samples):
            total += aligned * times * largest_share(prompts, ranks) * passed(responses, adapted=adapter)
    # Forward, to the states, to all weights; beside an adapter in 16 bits forward through the reference.
    passes = 3 if config.tune == "full" or narrow else 2
    # Forward again through checkpointed layers, and through those below the adapter.
    again = share * config.activation_checkpointing + (1 - share) * (not keeps)
    own_prompts, n = largest_share(config.prompts_per_step, ranks), _trained_responses(config)
    return total + steps * own_prompts * (passes * passed(n, share, adapter) + again * layers(n))


def attention_products(shape: ModelConfig, seen: float) -> float:
    """Counts the multiplications of a token's attention to `seen` others, in all layers: for the scores, and
    for the sum of the values."""
    windows = (shape.window_of(layer) or seen for layer in range(shape.num_layers))
    return 2 * shape.num_heads * shape.head_dim * sum(min(seen, window) for window in windows)


def scorer_bytes(config: RunConfig, device: torch.device, scorers: Sequence[ScorerSize]) -> tuple[int, int]:
    """Counts what scorers' weights take all the time, and what they need while they score.

    Weights that are put aside need the memory of the GPU only then, one model at a time.
    """
    aside = config.offload_scorers and device.type == "cuda"
    working = max((scorer.working_bytes for scorer in scorers), default=0)
    if aside:
        return 0, max((scorer.weight_bytes + scorer.working_bytes for scorer in scorers), default=0)
    return sum(scorer.weight_bytes for scorer in scorers), working


def scorer_products(
    config: RunConfig, scorers: Sequence[ScorerSize], mean_prompt: float, ranks: int
) -> float:
    """Counts the multiplications of the models that score the texts, on the rank that has most prompts."""
    reference = 1, config.n_prompts, config.n_responses
    heldout = config.eval_prompts, config.eval_responses
    total = 0.0
    for scorer in scorers:
        samples = [] if scorer.spared else [reference]
        samples.append((1 if scorer.spared and config.samples_of else 2, *heldout))
        for times, prompts, n in [*samples, *config.fresh_samples]:
            passed = mean_prompt * (1 if scorer.shares_prompts else n)
            own = largest_share(prompts, ranks)
            total += times * own * (passed + n * ANSWER_SHARE * config.max_new_tokens) * scorer.products
    return total


def cache_bytes(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Counts the bytes of the keys and values of one token in all layers."""
    return 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * dtype.itemsize


def shares_prompts(device: torch.device, dtype: torch.dtype) -> bool:
    """Tells whether the rows of a prompt share its keys and values while they are sampled."""
    return compiled.serves(device, dtype) or (device.type == "cuda" and dtype != torch.float64)


def passed_bytes(shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Counts the bytes of a token where a pass without a gradient is widest, in an MLP: the stream, norms and
    states that are wanted, queries, keys and values twice, and gate, up and their product."""
    heads = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    # A CPU that does not multiply 16 bits computes some of them in float32.
    narrow = device.type == "cuda" or (dtype == torch.bfloat16 and compiled.has_16_bit_products())
    itemsize = dtype.itemsize if narrow else max(4, dtype.itemsize)
    return (10 * shape.hidden_size + heads + 3 * shape.intermediate_size) * itemsize


def sampling_bytes(
    config: RunConfig,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    lengths: Sequence[int],
    rows: int,
    sets: Sequence[tuple[int, int]],
) -> int:
    """Counts what sampling needs besides weights, with `rows` responses side by side at most, for the largest
    of `sets`: (prompts, responses to each).

    lengths: those of all prompts, of which the longest are counted.
    """
    ordered, new, token = sorted(lengths, reverse=True), config.max_new_tokens, cache_bytes(shape, dtype)
    shared = shares_prompts(device, dtype)

    def needed(prompts: int, n: int) -> int:
        # As `engine.rollout.sampler.generate` makes its batches.
        side_by_side = min(rows // n * n if n <= rows else rows, prompts * n)
        batch = ordered[: -(-side_by_side // n)]
        packed, own = sum(batch), side_by_side * new
        laid_out = (len(batch) if shared else side_by_side) * batch[0]
        cached = (laid_out + own) * token
        # The prompts' pass, the making of the cache from its keys and values, and the steps, which keep
        # states below an adapter and three times float32 logits at most.
        steps = cached + side_by_side * (passed_bytes(shape, dtype, device) + shape.vocab_size * 4 * 3)
        of_each = n * new
        if config.tune != "full" and kept_states_bytes(ordered[:prompts], of_each, shape.hidden_size, dtype):
            steps += own * shape.hidden_size * dtype.itemsize
        return max(packed * (token + passed_bytes(shape, dtype, device)), packed * token + cached, steps)

    return max(needed(*of_prompts) for of_prompts in sets)


def scoring_bytes(
    config: RunConfig,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    longest_prompt: int,
    sets: Sequence[tuple[int, int]],
) -> int:
    """Counts what the log-probs of `sets`, see `sampling_bytes`, need besides weights: a pass, and the loss
    head."""
    by_runs = goes_by_runs(device, dtype, shape.head_dim, shape.attention_softcap)

    def tokens(prompts: int, n: int) -> int:
        group = longest_prompt + n * config.max_new_tokens
        if by_runs:
            return min(prompts * group, max(TOKENS_BY_RUNS, group))
        return min(prompts * group, max(TOKENS_PER_FORWARD, longest_prompt + config.max_new_tokens))

    passed = max(tokens(*of_prompts) for of_prompts in sets) * passed_bytes(shape, dtype, device)
    return passed + budget_or_default(config.memory_budget_bytes, device)


def sampled_sets(config: RunConfig, ranks: int) -> list[tuple[int, int]]:
    """Lists the sets of responses that a run samples and scores, as (prompts, responses to each) of the rank
    that has most of each."""
    every = [(config.n_prompts, config.n_responses), (config.eval_prompts, config.eval_responses)]
    every += [(prompts, n) for _, prompts, n in config.fresh_samples]
    return [(largest_share(prompts, ranks), n) for prompts, n in every]


def kept_states_bytes(
    prompt_lengths: list[int], new_tokens: int, hidden_size: int, dtype: torch.dtype
) -> int:
    """Counts the bytes, at most, of the states below the adapter of prompts with
    `new_tokens` response tokens each.

    0 when they pass KEPT_STATES_BYTES, as then they are not kept but computed in every step.
    """
    size = (sum(prompt_lengths) + len(prompt_lengths) * new_tokens) * hidden_size * dtype.itemsize
    return size if size <= KEPT_STATES_BYTES else 0
