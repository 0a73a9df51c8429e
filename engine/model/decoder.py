"""One decoder for rollout, scoring and training (Llama 2/3, SmolLM2, Qwen2/2.5, Qwen3, Mistral, Gemma 2, Gemma 3 text), read from and
written to Hugging Face folders.

The same norms, rotary positions, attention and MLP code runs packed (training, scoring) and step by step (decoding), so the
log-probs that are sampled are the ones that are trained. Base weights are frozen; an `engine.policy.lora.Adapter` passed to a call is added
to them, and no adapter means the reference model. A policy whose weights are all trained is a decoder of its own (`engine.policy.full`).
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError
from engine.model.architecture import ModelConfig, Rope
from engine.model.attention import Layout, attend_packed
from engine.policy.lora import Adapter
from kernels.layer import add_rms_norm, gated_silu, rms_norm, rotated, split_rotated
from kernels.products import linear

if TYPE_CHECKING:
    from engine.rollout.cache import AnyCache

# What sees the residual stream before a layer: (layer, states [tokens, D]).
Tap = Callable[[int, Tensor], None]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors names them


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a safetensors file, as the file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


class Decoder(nn.Module):
    """A frozen decoder. `forward(tokens, cu_seqlens)` gives hidden states after the final norm, `head_weight` the output matrix."""

    def __init__(self, config: ModelConfig, raw_config: dict, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, self.raw_config = config, raw_config
        c, options = config, {"dtype": dtype, "device": device}
        self.embed = _frozen(c.vocab_size, c.hidden_size, **options)
        self.head = None if c.tied else _frozen(c.vocab_size, c.hidden_size, **options)
        self.norm = _frozen(c.hidden_size, **options)
        self.layers = nn.ModuleList(Layer(c, index, **options) for index in range(c.num_layers))
        # In the weights' dtype, as transformers rounds it.
        self.embed_scale = float(torch.tensor(c.hidden_size**0.5, dtype=dtype)) if c.gemma else None
        ropes = [rope for rope in (c.rope, c.local_rope) if rope is not None]
        frequency = torch.stack([_inverse_frequency(rope, c.head_dim) for rope in ropes])
        self.register_buffer("inverse_frequency", frequency.to(device), persistent=False)  # float32 [1 or 2, d / 2]

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output matrix, the embedding itself when tied."""
        return self.embed if self.head is None else self.head

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embed.device

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, *, adapter: Adapter | None = None) -> Tensor:
        """Hidden states after the final norm, [M, D], of packed sequences.

        tokens: int64 [M]; cu_seqlens: int [N+1], positions restart at 0 in each sequence. Without an adapter this is the reference.
        """
        layout = Layout.packed(cu_seqlens).to(self.device)
        hidden = self.run(self.embed_tokens(tokens), layout, 0, self.config.num_layers, adapter)
        return self.final_norm(hidden)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Input embeddings [M, D] of tokens [M]."""
        hidden = F.embedding(tokens.to(self.device), self.embed)
        return hidden if self.embed_scale is None else hidden * self.embed_scale

    def run(
        self, hidden: Tensor, layout: Layout, start: int, stop: int, adapter: Adapter | None = None, *, checkpointed: bool = False
    ) -> Tensor:
        """The residual stream [M, D] after layer `stop - 1`, given the stream before layer `start`. `checkpointed`: the backward pass
        computes each layer again from its input instead of keeping what is in it."""
        rotary, layouts = self.rotary(layout.position), self.layouts(layout)
        fused = None if adapter is None else adapter.fused(start, stop)
        for index in range(start, stop):
            layer = self.layers[index]
            given = hidden, *rotary[layer.rope], layouts[layer.window], None if fused is None else fused.get(index)
            again = checkpointed and torch.is_grad_enabled()
            hidden = checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False) if again else layer(*given)
        return hidden

    def layouts(self, layout: Layout) -> dict[int | None, Layout]:
        """Window of a layer (None for none) -> the layout that it attends on."""
        return {window: layout.windowed(window) for window in (None, self.config.window)}

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the head."""
        return _norm(hidden, self.norm, self.config)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., D] after the final norm."""
        logits, softcap = linear(hidden, self.head_weight), self.config.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def rotary(self, position: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cosine and sine [..., head_dim] of rotary positions, in the model's dtype; a layer uses those at `layer.rope`."""
        pairs = []
        for inverse_frequency in self.inverse_frequency:
            angle = position.to(torch.float32)[..., None] * inverse_frequency
            angle = torch.cat((angle, angle), dim=-1)
            pairs.append((angle.cos().to(self.dtype), angle.sin().to(self.dtype)))
        return pairs

    def prefill(
        self, tokens: Tensor, cu_seqlens: Tensor, adapter: Adapter | None, tap: Tap | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden state of each sequence's last token [N, D], and per layer the rotated keys and the values [M, Hkv, d], packed.

        tap(layer, states [M, D]) sees the residual stream before each layer.
        """
        layout = Layout.packed(cu_seqlens).to(self.device)
        hidden, rotary, layouts = self.embed_tokens(tokens), self.rotary(layout.position), self.layouts(layout)
        fused = None if adapter is None else adapter.fused(0, self.config.num_layers)
        kept = []
        for index, layer in enumerate(self.layers):
            if tap is not None:
                tap(index, hidden)
            lora = None if fused is None else fused.get(index)
            hidden, key, value = layer.attend(hidden, *rotary[layer.rope], layouts[layer.window], lora)
            kept.append((key, value))
        return self.final_norm(hidden[cu_seqlens[1:].to(self.device, torch.int64) - 1]), kept

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        cache: "AnyCache",
        fused: dict | None,
        tap: Tap | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """One decoding step: hidden states [R, D] after the final norm of one new token per row; the cache grows by it.

        tap(layer, states [R, D]) sees the residual stream before each layer; with `stop` the layers from there on are left out.
        """
        hidden, rotary = self.embed_tokens(tokens), self.rotary(position)
        for index, layer in enumerate(self.layers[:stop]):
            if tap is not None:
                tap(index, hidden)
            hidden = layer.decode(hidden, *rotary[layer.rope], cache, index, None if fused is None else fused.get(index))
        if tap is not None and stop is not None:
            tap(stop, hidden)
        cache.advance()
        return self.final_norm(hidden)


class Layer(nn.Module):
    """One decoder layer. q, k, v are one matrix and gate, up are one matrix; the split is undone on saving."""

    def __init__(self, c: ModelConfig, index: int, **options) -> None:
        super().__init__()
        self.config = c
        self.heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        self.window = c.window_of(index)
        self.rope = 0 if self.window is None or c.local_rope is None else 1
        self.activation = ACTIVATIONS[c.activation]
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.qkv = _frozen(qkv, c.hidden_size, **options)
        self.o = _frozen(c.hidden_size, c.num_heads * c.head_dim, **options)
        self.gate_up = _frozen(2 * c.intermediate_size, c.hidden_size, **options)
        self.down = _frozen(c.hidden_size, c.intermediate_size, **options)
        self.qkv_bias = _frozen(qkv, **options) if c.qkv_bias else None
        self.o_bias = _frozen(c.hidden_size, **options) if c.o_bias else None
        self.gate_up_bias = _frozen(2 * c.intermediate_size, **options) if c.mlp_bias else None
        self.down_bias = _frozen(c.hidden_size, **options) if c.mlp_bias else None
        self.norm1 = _frozen(c.hidden_size, **options)
        self.norm2 = _frozen(c.hidden_size, **options)
        self.q_norm, self.k_norm = (_frozen(c.head_dim, **options) if c.qk_norm else None for _ in range(2))
        self.after_attention, self.after_mlp = (_frozen(c.hidden_size, **options) if c.gemma else None for _ in range(2))

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, layout: Layout, lora: dict | None) -> Tensor:
        return self.attend(hidden, cos, sin, layout, lora)[0]

    def attend(self, hidden: Tensor, cos: Tensor, sin: Tensor, layout: Layout, lora: dict | None) -> tuple[Tensor, Tensor, Tensor]:
        """The layer on packed tokens [M, D]; also its rotated keys and its values [M, Hkv, d]."""
        q, k, v = self._project(hidden, cos, sin, lora)
        mixed = attend_packed(q, k, v, layout, self.config.attention_scale, self.config.attention_softcap)
        return self._finish(hidden, mixed.flatten(1), lora), k, v

    def decode(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: "AnyCache", index: int, lora: dict | None) -> Tensor:
        """The layer on one new token per row [R, D]."""
        c, qkv = self.config, self._project(hidden, cos, sin, lora)
        mixed = cache.attend(index, *qkv, scale=c.attention_scale, softcap=c.attention_softcap, window=self.window)
        return self._finish(hidden, mixed, lora)

    def _project(self, hidden: Tensor, cos: Tensor, sin: Tensor, lora: dict | None) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads, d = self.heads
        normed = _norm(hidden, self.norm1, self.config)
        qkv = _linear(normed, self.qkv, self.qkv_bias, lora, "qkv")
        if self.q_norm is None:
            return split_rotated(qkv, cos, sin, heads, kv_heads)
        q, k, v = qkv.view(hidden.shape[0], -1, d).split((heads, kv_heads, kv_heads), dim=1)
        q, k = _norm(q, self.q_norm, self.config), _norm(k, self.k_norm, self.config)
        return rotated(q, cos, sin), rotated(k, cos, sin), v

    def _finish(self, hidden: Tensor, mixed: Tensor, lora: dict | None) -> Tensor:
        out = _linear(mixed, self.o, self.o_bias, lora, "o")
        if self.after_attention is None:
            hidden, normed = add_rms_norm(hidden, out, self.norm2, self.config.rms_eps)
        else:
            hidden = hidden + _norm(out, self.after_attention, self.config)
            normed = _norm(hidden, self.norm2, self.config)
        gate_up = _linear(normed, self.gate_up, self.gate_up_bias, lora, "gate_up")
        if self.config.activation == "silu":
            inner = gated_silu(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        out = _linear(inner, self.down, self.down_bias, lora, "down")
        return hidden + (out if self.after_mlp is None else _norm(out, self.after_mlp, self.config))


def load(path_or_id: str | Path, *, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The decoder of a Hugging Face folder or hub id (safetensors only), frozen, in `dtype` on `device`.

    Raises: UserError naming the file and the tensor or switch that cannot be used.
    """
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise UserError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}.")
    folder = resolve(path_or_id)
    raw = read_config(folder)
    config = ModelConfig.from_json(raw, folder / "config.json")
    stored = check_weights(folder, config)
    model = Decoder(config, raw, DTYPES.get(dtype, dtype), torch.device(device))
    targets = _named_targets(model)
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(n for n, tensor in stored.items() if tensor.file == file):
                targets[name].copy_(tensors.get_tensor(name))
    return model


def check_weights(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The stored tensor of each weight that `config` asks for, by name; only headers are read.

    Raises: UserError as `stored_tensors`, and naming a tensor that is missing, unknown, of another shape or of no floating dtype.
    """
    stored = stored_tensors(folder)
    if config.tied:
        stored.pop("lm_head.weight", None)
    wanted = _named_targets(Decoder(config, {}, torch.float32, torch.device("meta")))
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has unknown", extra)
        raise UserError(f"{folder}: the checkpoint {kind} tensor {names[0]} ({len(names)} in all); use a complete checkpoint.")
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{tensor.file}: tensor {name} has shape {tensor.shape}, config.json wants {tuple(wanted[name].shape)}; "
                "use a config.json and weights that belong together."
            )
        if tensor.dtype not in STORED_DTYPES:
            raise UserError(
                f"{tensor.file}: tensor {name} is stored as {tensor.dtype}; use a checkpoint in {', '.join(STORED_DTYPES)}, "
                "one that is not quantised."
            )
    return stored


def resolve(path_or_id: str | Path) -> Path:
    """The local folder of a model: itself, or a hub id's files downloaded by huggingface_hub. Raises UserError when neither works."""
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model {name}: no such folder, and not a hub id of the form owner/name; give an existing folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model {name}: not a local folder, and the hub did not give it ({reason}); give a local folder.") from error


def read_config(folder: Path) -> dict:
    """config.json of a model folder. Raises UserError when it is missing or malformed."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json; give a Hugging Face model folder.")
    return read_json(file)


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises: UserError where it cannot be read, or is not one object."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(contents, dict):
        raise UserError(f"{file}: a JSON {type(contents).__name__}, not an object; fetch the file again.")
    return contents


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder. Raises: UserError where it cannot be loaded, brings code, or has more tokens than the model."""
    from transformers import AutoTokenizer

    refuse_code(folder)
    size = ModelConfig.from_json(read_config(folder), folder / "config.json").vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder}: no tokenizer could be loaded ({reason}); give a complete model folder.") from error
    # Special tokens may lie beyond (Gemma 3 has one for images): no text gives them, and prompts that name them are refused.
    plain = (number for number, token in tokenizer.added_tokens_decoder.items() if not token.special)
    if max(tokenizer.vocab_size, 1 + max(plain, default=-1)) > size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, vocab_size in config.json is {size}; "
            "give the model together with its own tokenizer."
        )
    return tokenizer


def refuse_code(folder: Path) -> None:
    """Raises: UserError where a model folder asks for code of its own to be run."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file() and "auto_map" in read_json(file):
            raise UserError(f"{file}: auto_map names code that comes with the checkpoint, which is never run; use a checkpoint without it.")


def save(model: Decoder, folder: str | Path, *, adapter: Adapter | None = None, tokenizer_from: Path | None = None) -> None:
    """Write a Hugging Face folder (config.json, model.safetensors) that transformers and vLLM load, with `adapter` merged if given.

    The folder appears whole or not at all. Files of `tokenizer_from` other than weights and config are copied along.
    Raises: UserError when the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is {'not empty' if folder.is_dir() else 'a file'}; choose another folder.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    merged = {} if adapter is None else adapter.deltas()
    tensors = {}
    for name, weight in _named_targets(model).items():
        delta = merged.get(name)
        tensors[name] = (weight if delta is None else (weight.float() + delta.float()).to(weight.dtype)).contiguous().cpu()
    raw = {**model.raw_config, "dtype": str(model.dtype).removeprefix("torch.")}
    raw.pop("torch_dtype", None)
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        for file in sorted(tokenizer_from.iterdir()) if tokenizer_from else []:
            other = file.name.startswith(("config.", "model.", "adapter_"))
            if file.is_file() and file.suffix in {".json", ".jinja", ".model", ".txt"} and not other:
                shutil.copyfile(file, temporary / file.name)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose a folder with room for it.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fingerprint(folder: Path) -> str:
    """A short hash of a checkpoint: config.json, each file's size and tensor table, and samples of its bytes."""
    import hashlib

    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted({tensor.file for tensor in stored_tensors(folder).values()}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for block in range(64):
                stream.seek(size * block // 64)
                digest.update(stream.read(65536))
    return digest.hexdigest()[:16]


def _frozen(*shape: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, **options), requires_grad=False)


def _norm(x: Tensor, weight: Tensor, c: ModelConfig) -> Tensor:
    """RMS norm of the last dimension; Gemma's multiplies by 1 + weight, in float32 before it rounds."""
    if not c.gemma:
        return rms_norm(x, weight, c.rms_eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), (x.shape[-1],), 1 + weight.to(wide), c.rms_eps).to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: dict | None, name: str) -> Tensor:
    out = linear(x, weight, bias)
    if lora is None or name not in lora:
        return out
    down, up = lora[name]
    return torch.addmm(out, F.linear(x, down), up.t())


def _inverse_frequency(rope: Rope, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    scaling = rope.scaling
    if scaling is None:
        return inverse
    if scaling["rope_type"] == "linear":
        return inverse / scaling["factor"]
    # Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between are blended.
    wavelength = 2 * math.pi / inverse
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inverse / scaling["factor"] + blend * inverse


def _named_targets(model: Decoder) -> dict[str, Tensor]:
    """Hugging Face tensor names -> views of this model's weights."""
    c, named = model.config, {"model.embed_tokens.weight": model.embed.data, "model.norm.weight": model.norm.data}
    if model.head is not None:
        named["lm_head.weight"] = model.head.data
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for i, layer in enumerate(model.layers):
        prefix, own = f"model.layers.{i}.", {}
        for kind, qkv, gate_up, o, down in (
            ("weight", layer.qkv, layer.gate_up, layer.o, layer.down),
            ("bias", layer.qkv_bias, layer.gate_up_bias, layer.o_bias, layer.down_bias),
        ):
            q_part, k_part, v_part = (None,) * 3 if qkv is None else qkv.split([q, kv, kv])
            gate, up = (None,) * 2 if gate_up is None else gate_up.chunk(2)
            own |= {f"self_attn.q_proj.{kind}": q_part, f"self_attn.k_proj.{kind}": k_part, f"self_attn.v_proj.{kind}": v_part}
            own |= {f"self_attn.o_proj.{kind}": o, f"mlp.gate_proj.{kind}": gate, f"mlp.up_proj.{kind}": up, f"mlp.down_proj.{kind}": down}
        own |= {"self_attn.q_norm.weight": layer.q_norm, "self_attn.k_norm.weight": layer.k_norm, "input_layernorm.weight": layer.norm1}
        if c.gemma:
            own |= {
                "post_attention_layernorm.weight": layer.after_attention,
                "pre_feedforward_layernorm.weight": layer.norm2,
                "post_feedforward_layernorm.weight": layer.after_mlp,
            }
        else:
            own["post_attention_layernorm.weight"] = layer.norm2
        named |= {prefix + name: weight.data for name, weight in own.items() if weight is not None}
    return named


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, from the headers of its safetensors files; positions that were saved as weights are left out.

    Raises: UserError naming the file that is missing, truncated, a pickle, or that its index says otherwise of.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        file = folder / "model.safetensors"
        if not file.is_file():
            pickles = sorted(p.name for p in folder.glob("*.bin"))
            why = f"only {pickles[0]}, a pickle, which is never executed" if pickles else "no model.safetensors"
            raise UserError(f"{folder}: {why}; use a safetensors checkpoint.")
        return _header(file)
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: no weight_map that names the file of each tensor; fetch it again.")
    weight_map = {name: folder / file for name, file in weight_map.items() if _is_weight(name)}
    stored = {}
    for file in sorted(set(weight_map.values())):
        if not file.is_file():
            raise UserError(f"{folder}: {file.name} is missing, {index.name} names it; fetch it again.")
        header, named = _header(file), {name for name, place in weight_map.items() if place == file}
        for name in sorted(header.keys() ^ named):
            kind = "lacks" if name in named else "has unknown"
            raise UserError(f"{file}: it {kind} tensor {name}, by {index.name}; fetch the checkpoint again.")
        stored |= header
    return stored


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys() if _is_weight(name)}
            return {name: Stored(file=file, shape=tuple(part.get_shape()), dtype=part.get_dtype()) for name, part in parts.items()}
    except Exception as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch it again.") from error


def _is_weight(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")
