"""Predicted time and memory of a run, printed before it starts; too little memory stops it there."""

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.architecture import ModelConfig
from engine.config import IterativeConfig, PrimalDualConfig, RunConfig, pairs_file, policy_updates, trained_responses
from engine.errors import UserError

# Share of the speed of bare matrix products that sampling, scoring and training reach here; only the printed prediction depends on it.
EFFICIENCY = 0.65
ANSWER_SHARE = 0.7  # of max_new_tokens, until measured
KEPT_STATES_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Plan:
    """What a run is predicted to need: bytes at the peak, bytes available, and seconds."""

    needed_bytes: int
    available_bytes: int
    seconds: float

    @staticmethod
    def of(config: RunConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device, train: list[int], heldout: list[int]) -> "Plan":
        """Count weights, KV slab, loss head and activations, and the products of every pass; time a matrix product for the rate.
        `train` and `heldout` are the lengths in tokens of the prompts that will be sampled."""
        lengths = train + heldout
        longest_prompt, mean_prompt = max(lengths), sum(lengths) / len(lengths)
        size, c = dtype.itemsize, shape
        weights = c.parameter_count() * size
        context = longest_prompt + config.max_new_tokens
        rows = min(config.rollout_rows, max(config.n_prompts, config.eval_prompts) * config.n_responses)
        cache = rows * context * cache_bytes(c, dtype)
        logits = rows * c.vocab_size * 4 * 3
        in_group = trained_responses(config, 2 if pairs_file(config) else config.n_responses)
        group = longest_prompt + in_group * config.max_new_tokens
        full = config.tune == "full"
        trained = 1.0 if full else 1 - config.lora_from  # share of the layers
        layers = c.num_layers * trained
        inside = 10 * c.hidden_size + 4 * c.intermediate_size
        per_token = size * (inside + layers * c.hidden_size if config.activation_checkpointing else inside * layers)
        at_once = min(config.prompts_per_step * group, max(config.tokens_per_forward, group))
        training = at_once * per_token + config.memory_budget_mb * 2**20
        if c.attention_softcap is not None:  # all scores are stored: before and after the cap, masked, and as weights
            training += int(at_once * 4 * group * c.num_heads * (1 if config.activation_checkpointing else layers)) * size
        kept = 0 if full else kept_states_bytes(train, config.n_responses * config.max_new_tokens, c.hidden_size, dtype)
        if full:
            # Float32 weights, those of the start, gradients, two moments, and on a CPU too: the last iterate with its moments and what a
            # checkpoint writes. On a GPU: the weights in 16 bits with their gradients, and a copy for the iterate.
            kept += c.parameter_count() * (28 if device.type == "cuda" else 60)
        needed = int(1.15 * (weights + max(cache + logits, training + kept))) + 600 * 2**20

        answer = ANSWER_SHARE * config.max_new_tokens
        head = c.hidden_size * c.vocab_size
        body = c.parameter_count() - head * (1 if c.tied else 2)

        def sampled(prompts: int, n: int) -> float:
            return prompts * (mean_prompt * body + n * answer * (body + head))

        def scored(prompts: int, n: int) -> float:
            """The reference's log-probs: the layers above those that sampling has passed already."""
            return prompts * (mean_prompt + n * answer) * (body * trained + head)

        reference, heldout = (config.n_prompts, config.n_responses), (config.eval_prompts, config.eval_responses)
        products = sampled(*reference) + 2 * sampled(*heldout) + scored(*heldout)
        if dtype != torch.float32:  # see stages.sample
            products += scored(*reference) + scored(*heldout)
        if isinstance(config, IterativeConfig):
            slack = config.slack_prompts, config.slack_responses
            products += config.iterations * (sampled(*slack) + scored(*slack))
        if isinstance(config, PrimalDualConfig):
            fresh = config.ascent_prompts, config.n_responses
            products += config.iterations * (sampled(*fresh) + scored(*fresh))
        if getattr(config, "pairs", "") == "policy":
            fresh = config.steps * config.prompts_per_step, config.n_responses
            products += (config.iterations - 1) * (sampled(*fresh) + scored(*fresh))
        tokens = config.prompts_per_step * (mean_prompt + in_group * answer)
        passes = 3 if full else 2  # forward, to the states, to the weights
        products += policy_updates(config) * config.steps * tokens * passes * (body * trained + head)
        return Plan(needed, available_memory(device), 2 * products / (EFFICIENCY * _matmul_rate(dtype, device)))

    def check(self) -> None:
        """Raises: UserError when the memory that is free is less than what is needed."""
        if self.needed_bytes > self.available_bytes:
            raise UserError(
                f"this run needs about {self.needed_bytes / 1e9:.1f} GB of memory and {self.available_bytes / 1e9:.1f} GB are free; "
                "lower --rollout-rows, --prompts-per-step or --max-new-tokens, or use --dtype bfloat16."
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


def kept_states_bytes(prompt_lengths: list[int], new_tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of the states below the adapter of prompts with `new_tokens` response tokens each, at most; 0 when they pass
    KEPT_STATES_BYTES, as then they are not kept but computed in every step."""
    size = (sum(prompt_lengths) + len(prompt_lengths) * new_tokens) * hidden_size * dtype.itemsize
    return size if size <= KEPT_STATES_BYTES else 0


def available_memory(device: torch.device) -> int:
    """Bytes free on the GPU, or in main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Flop per second of a product of the engine's usual shape: the best within half a second, as an idle machine starts slowly."""
    a, b = torch.ones(256, 1024, dtype=dtype, device=device), torch.ones(1024, 4096, dtype=dtype, device=device)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.5:
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 256 * 1024 * 4096 / best


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of any size instead of giving them back: fresh pages for every large tensor cost more than the
    arithmetic on it. Does nothing where the C library is another one."""
    mmap_max, trim_threshold = -4, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
