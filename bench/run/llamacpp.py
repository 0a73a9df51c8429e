"""llama.cpp through its Python package `llama_cpp`, as a rival in sampling.

It gets the same weights and cache in float32. It computes each prompt once and hands its keys and values to
its responses, has all rows in one batch, drops rows that finish, and samples with llama.cpp's samplers.
"""

import ctypes
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.run.work import TEMPERATURE, Responses, Work
from engine.model.architecture import ModelConfig
from engine.model.decoder import Decoder
from engine.model.names import to_gguf

FLOAT32 = 0  # ggml's number of the type


def serves(config: ModelConfig, raw: dict) -> bool:
    """Returns whether `write_gguf` writes all of the model."""
    plain = config.rope.scaling is None and not (config.o_bias or config.mlp_bias)
    return raw["architectures"] == ["LlamaForCausalLM"] and plain


@contextmanager
def rival(folder: Path, model: Decoder, work: Work) -> Iterator[Callable[[], Responses]]:
    """Yields the step to time; a GGUF file of the weights exists meanwhile.

    Raises: SystemExit where its log-probs differ from ours.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        write_gguf(folder, model.config, file)
        start = file, work.rows, work.longest + work.new, torch.get_num_threads()
        # It runs in another process: beside the threads of its OpenMP, transformers'
        # batching took 37 s for 15.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, start) as pool:
            prompt = work.prompts[0]
            theirs = torch.from_numpy(pool.submit(_logits, prompt).result()).log_softmax(0)
            difference = float((theirs - log_probs(model, prompt)).abs().max())
            if not difference <= 1e-3:
                raise SystemExit(
                    f"llama.cpp's log-probs differ from ours by up to {difference:.1e} nats; nothing is timed"
                )
            yield lambda: pool.submit(_generate, work).result()


def _start(file: Path, rows: int, room: int, threads: int) -> None:
    """Loads the model once in llama.cpp's process; a pool can hand it to later calls only as a global."""
    global _them
    torch.set_num_threads(threads)
    _them = LlamaCpp(file, rows, room)


def _logits(prompt: list[int]) -> np.ndarray:
    last = len(prompt) - 1
    _them.feed([(token, i, 0, i == last) for i, token in enumerate(prompt)])
    return _them.logits(last)


def _generate(work: Work) -> Responses:
    return _them.generate(work)


@torch.no_grad()
def log_probs(model: Decoder, prompt: list[int]) -> Tensor:
    """Returns this engine's log-probs [V] of the token after `prompt`."""
    hidden = model(torch.tensor(prompt), torch.tensor([0, len(prompt)]))
    return model.logits(hidden[-1:])[0].log_softmax(0)


def write_gguf(folder: Path, config: ModelConfig, path: Path) -> None:
    """Writes the Llama checkpoint in `folder` as a GGUF file in float32 without a tokenizer."""
    from gguf import GGUFWriter
    from safetensors import safe_open

    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model("none")
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, safe_open is no mapping
                weight = tensors.get_tensor(name).float().numpy()
                kind = name.removesuffix(".weight")
                if kind.endswith("q_proj"):
                    weight = permuted(weight, config.num_heads)
                elif kind.endswith("k_proj"):
                    weight = permuted(weight, config.num_kv_heads)
                writer.add_tensor(to_gguf(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns query or key rows in llama.cpp's order;
    `engine.quickstart.gguf_file.undo_permutation` turns them back."""
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, width))


class LlamaCpp:
    """A model, and a cache for `rows` sequences of `room` tokens."""

    def __init__(self, file: Path, rows: int, room: int) -> None:
        """Loads the model and makes the cache."""
        import llama_cpp as api

        self.api = api
        self._log = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._log, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {file}")
        params = api.llama_context_default_params()
        params.n_seq_max, params.n_ctx, params.n_batch = rows, rows * room, rows * room
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.type_k, params.type_v = FLOAT32, FLOAT32
        # Flash attention is less exact here (5e-3 nats of a log-prob) and slower on a CPU, and so is one
        # cache for all sequences.
        params.flash_attn_type, params.kv_unified = 0, False
        params.no_perf = True
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {rows} sequences x {room} tokens")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def feed(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Computes (token, position, sequence, whether its logits are wanted)."""
        limit = self.api.llama_n_batch(self.context)
        assert len(tokens) <= limit, f"{len(tokens)} tokens in a batch of at most {limit}"
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def logits(self, index: int) -> np.ndarray:
        """Returns the logits [V] of a token of the last batch."""
        logits = self.api.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).copy()

    def generate(self, work: Work) -> Responses:
        """Samples the responses of `work`."""
        prompts, n, api = work.prompts, work.n, self.api
        memory = api.llama_get_memory(self.context)
        api.llama_memory_clear(memory, True)
        samplers = [self._sampler(seed) for seed in range(work.rows)]
        self.feed(
            [
                (token, i, p * n, i == len(prompt) - 1)
                for p, prompt in enumerate(prompts)
                for i, token in enumerate(prompt)
            ]
        )
        for p in range(len(prompts)):
            for row in range(p * n + 1, (p + 1) * n):
                api.llama_memory_seq_cp(memory, p * n, row, -1, -1)
        ends = np.cumsum([len(prompt) for prompt in prompts]) - 1
        responses: Responses = [[] for _ in samplers]
        # Row -> the place of its logits in the last batch.
        at = {row: int(ends[row // n]) for row in range(len(responses))}
        while True:
            for row, index in at.items():
                responses[row].append(api.llama_sampler_sample(samplers[row], self.context, index))
            going = [row for row in at if self._goes_on(responses[row], work)]
            if not going:
                break
            position = {row: len(prompts[row // n]) + len(responses[row]) - 1 for row in going}
            self.feed([(responses[row][-1], position[row], row, True) for row in going])
            at = {row: index for index, row in enumerate(going)}
        for sampler in samplers:
            api.llama_sampler_free(sampler)
        return responses

    def _goes_on(self, response: list[int], work: Work) -> bool:
        return len(response) < work.new and response[-1] not in work.stop

    def _sampler(self, seed: int) -> object:
        chain = self.api.llama_sampler_chain_init(self.api.llama_sampler_chain_default_params())
        self.api.llama_sampler_chain_add(chain, self.api.llama_sampler_init_temp(TEMPERATURE))
        self.api.llama_sampler_chain_add(chain, self.api.llama_sampler_init_dist(seed))
        return chain
