"""Other engines that sample on the same weights: transformers' `generate` and its continuous batching, and
vLLM. llama.cpp stands in bench/run/llamacpp.py."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.run.work import TEMPERATURE, Responses, Work


def stock(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Loads a checkpoint as transformers does."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def _options(work: Work) -> dict:
    """Returns the options of transformers' sampling."""
    options = dict(do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, pad_token_id=0)
    return options | dict(max_new_tokens=work.new)


def transformers_generate(model: torch.nn.Module, work: Work) -> Callable[[], Responses]:
    """Returns a step of `generate` with n return sequences."""
    longest = work.longest
    padding = [longest - len(prompt) for prompt in work.prompts]
    both = list(zip(padding, work.prompts, strict=True))
    tokens = torch.tensor([[0] * pad + prompt for pad, prompt in both], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in both], device=model.device)
    end = dict(eos_token_id=list(work.stop)) if work.stop else dict(min_new_tokens=work.new)
    options = _options(work) | end

    @torch.inference_mode()
    def step() -> Responses:
        torch.manual_seed(0)
        rows = model.generate(tokens, attention_mask=mask, num_return_sequences=work.n, **options)
        return work.cut(rows[:, longest:].tolist())

    return step


def continuous_batching(model: torch.nn.Module, work: Work) -> Callable[[], Responses]:
    """Returns a step of `generate_batch`, with each prompt n times and room for all of them at once."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    options = _options(work) | dict(eos_token_id=list(work.stop) or -1)
    requests = [prompt for prompt in work.prompts for _ in range(work.n)]
    blocks = (work.longest + work.new) // 64 + 1
    # Left to itself it takes most of the machine's memory and fills it in every call.
    room = ContinuousBatchingConfig(
        page_size=64,
        num_blocks=len(requests) * blocks + 1,
        max_batch_tokens=max(len(requests), 2048),
        max_requests_per_batch=len(requests),
    )

    def step() -> Responses:
        torch.manual_seed(0)
        config = GenerationConfig(**options)
        answers = model.generate_batch(requests, generation_config=config, continuous_batching_config=room)
        return work.cut([x.generated_tokens for x in answers.values()])

    return step


def vllm(folder: Path, dtype: torch.dtype, work: Work) -> Callable[[], Responses]:
    """Returns a step of vLLM's `LLM.generate` with n responses to each prompt,
    which is computed once in every call."""
    from vllm import LLM, SamplingParams, TokensPrompt

    # Other candidates hold memory too, hence the low share of it.
    engine = LLM(
        str(folder),
        dtype=str(dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        max_model_len=work.longest + work.new,
        max_num_seqs=work.rows,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.4,
        seed=0,
    )
    # Rows of a seeded request are sampled one by one, so there is a seed only where lengths depend on it.
    params = SamplingParams(
        n=work.n,
        temperature=TEMPERATURE,
        max_tokens=work.new,
        ignore_eos=True,
        stop_token_ids=list(work.stop),
        detokenize=False,
        seed=0 if work.stop else None,
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in work.prompts]

    def step() -> Responses:
        engine.reset_prefix_cache()
        answers = engine.generate(prompts, params, use_tqdm=False)
        return [list(output.token_ids) for x in answers for output in x.outputs]

    return step


def vllm_serves(device: torch.device) -> bool:
    """Returns whether vLLM is installed, in a build for the device."""
    if not find_spec("vllm"):
        return False
    from vllm.platforms import current_platform

    return current_platform.device_type == device.type
