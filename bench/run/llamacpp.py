"""llama.cpp through its Python package `llama_cpp`, as a rival in sampling: the same weights and cache in float32, each prompt computed
once and its keys and values handed to its responses, all rows in one batch, rows that finish leave it, llama.cpp's own samplers."""

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

from bench.run.rollout import Responses, Work
from engine.architecture import ModelConfig
from engine.model import Decoder
from engine.quickstart import INNER, OUTER

FLOAT32 = 0  # ggml's number of the type


def serves(config: ModelConfig, raw: dict) -> bool:
    """Whether `write_gguf` writes all that there is of the model."""
    return raw["architectures"] == ["LlamaForCausalLM"] and config.rope.scaling is None and not (config.o_bias or config.mlp_bias)


@contextmanager
def rival(folder: Path, model: Decoder, work: Work, temperature: float) -> Iterator[Callable[[], Responses]]:
    """The step to time; a GGUF file of the weights is there meanwhile. Raises: SystemExit where its log-probs are others than ours."""
    with tempfile.TemporaryDirectory() as scratch:
        file, room = Path(scratch) / "model.gguf", max(map(len, work.prompts)) + work.new
        write_gguf(folder, model.config, file)
        # A process of its own: beside the threads of its OpenMP, transformers' batching took 37 s for 15.
        start = file, work.rows, room, torch.get_num_threads()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, start) as pool:
            theirs = torch.from_numpy(pool.submit(_logits, work.prompts[0]).result()).log_softmax(0)
            difference = float((theirs - log_probs(model, work.prompts[0])).abs().max())
            if not difference <= 1e-3:
                raise SystemExit(f"llama.cpp's log-probs differ from ours by up to {difference:.1e} nats; nothing is timed")
            yield lambda: pool.submit(_generate, work, temperature).result()


def _start(file: Path, rows: int, room: int, threads: int) -> None:
    """In the process of its own, which ends with it."""
    global _them
    torch.set_num_threads(threads)
    _them = LlamaCpp(file, rows, room)


def _logits(prompt: list[int]) -> np.ndarray:
    _them.feed([(t, i, 0, i == len(prompt) - 1) for i, t in enumerate(prompt)])
    return _them.logits(len(prompt) - 1)


def _generate(work: Work, temperature: float) -> Responses:
    return _them.generate(work, temperature)


@torch.no_grad()
def log_probs(model: Decoder, prompt: list[int]) -> Tensor:
    """This engine's [V] of the token after `prompt`."""
    hidden, _ = model.prefill(torch.tensor(prompt), torch.tensor([0, len(prompt)]), None)
    return model.logits(hidden)[0].log_softmax(0)


def write_gguf(folder: Path, config: ModelConfig, path: Path) -> None:
    """The Llama checkpoint in `folder` as a GGUF file in float32 without a tokenizer."""
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
                writer.add_tensor(gguf_name(kind) + ".weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows in llama.cpp's order; `engine.quickstart.undo_permutation` turns them back."""
    rows, width = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width))


def gguf_name(name: str) -> str:
    """A Hugging Face tensor name without its suffix in GGUF's terms."""
    if name.startswith("model.layers."):
        layer, inner = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}." + next(mine for mine, theirs in INNER.items() if theirs == inner)
    return next(mine for mine, theirs in OUTER.items() if theirs == name)


class LlamaCpp:
    """A model, and a cache for `rows` sequences of `room` tokens."""

    def __init__(self, file: Path, rows: int, room: int) -> None:
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
        # Its flash attention is less exact (5e-3 nats of a log-prob here) and slower on a CPU, and so is one cache for all sequences.
        params.type_k, params.type_v, params.flash_attn_type, params.kv_unified = FLOAT32, FLOAT32, 0, False
        params.no_perf = True
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {rows} sequences x {room} tokens")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def feed(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, whether its logits are wanted)."""
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
        """Logits [V] of a token of the last batch."""
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, index), shape=(self.vocabulary,)).copy()

    def generate(self, work: Work, temperature: float) -> Responses:
        """What `work` asks for."""
        prompts, n, api, memory = work.prompts, work.n, self.api, self.api.llama_get_memory(self.context)
        api.llama_memory_clear(memory, True)
        samplers = [self._sampler(temperature, seed) for seed in range(work.rows)]
        self.feed([(t, i, p * n, i == len(prompt) - 1) for p, prompt in enumerate(prompts) for i, t in enumerate(prompt)])
        for p in range(len(prompts)):
            for row in range(p * n + 1, (p + 1) * n):
                api.llama_memory_seq_cp(memory, p * n, row, -1, -1)
        ends = np.cumsum([len(prompt) for prompt in prompts]) - 1
        made: Responses = [[] for _ in samplers]
        at = {row: int(ends[row // n]) for row in range(len(made))}
        while True:
            for row, index in at.items():
                made[row].append(api.llama_sampler_sample(samplers[row], self.context, index))
            going = [row for row in at if len(made[row]) < work.new and made[row][-1] not in work.stop]
            if not going:
                break
            self.feed([(made[row][-1], len(prompts[row // n]) + len(made[row]) - 1, row, True) for row in going])
            at = {row: index for index, row in enumerate(going)}
        for sampler in samplers:
            api.llama_sampler_free(sampler)
        return made

    def _sampler(self, temperature: float, seed: int) -> object:
        chain = self.api.llama_sampler_chain_init(self.api.llama_sampler_chain_default_params())
        self.api.llama_sampler_chain_add(chain, self.api.llama_sampler_init_temp(temperature))
        self.api.llama_sampler_chain_add(chain, self.api.llama_sampler_init_dist(seed))
        return chain
