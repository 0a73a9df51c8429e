"""One decoder for rollout, scoring and training (Llama family: SmolLM2, Llama 2/3), read from and written to Hugging Face folders.

The same norms, rotary positions, attention and MLP code runs packed (training, scoring) and step by step (decoding), so the
log-probs that are sampled are the ones that are trained. Base weights are frozen; an `engine.lora.Adapter` passed to a call is added
to them, and no adapter means the reference model.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.cache import Cache, SharedCache
from engine.errors import UserError
from engine.lora import Adapter

# What sees the residual stream before a layer: (layer, states [tokens, D]).
Tap = Callable[[int, Tensor], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a Llama-family decoder, from a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_eps: float
    tied: bool
    rope_theta: float
    rope_scaling: dict | None  # None, or {"rope_type": "linear" | "llama3", ...}

    @staticmethod
    def from_json(raw: dict, file: Path) -> "ModelConfig":
        """Read a config.json. Raises UserError naming an unsupported architecture or switch."""
        architecture = (raw.get("architectures") or [raw.get("model_type", "unknown")])[0]
        if architecture != "LlamaForCausalLM":
            raise UserError(f"{file}: architecture {architecture} is not supported; use a LlamaForCausalLM checkpoint.")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{file}: hidden_act {raw['hidden_act']} is not supported; only silu is.")
        for switch in ("attention_bias", "mlp_bias"):
            if raw.get(switch):
                raise UserError(f"{file}: {switch} true is not supported; use a checkpoint without biases.")
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "linear", "llama3"):
            raise UserError(f"{file}: rope type {rope_type} is not supported; default, linear and llama3 are.")
        heads = raw["num_attention_heads"]
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_positions=raw.get("max_position_embeddings", 2048),
            rms_eps=raw.get("rms_norm_eps", 1e-6),
            tied=bool(raw.get("tie_word_embeddings", False)),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rope_scaling=None if rope_type == "default" else {**rope, "rope_type": rope_type},
        )

    def parameter_count(self) -> int:
        """Number of weights, the head counted once when it is tied."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_layers * layer + self.hidden_size + self.vocab_size * self.hidden_size * (1 if self.tied else 2)


@dataclass(frozen=True)
class Layout:
    """Where packed tokens [M] stand: their positions, and the padded [B, T] grid on which attention runs.

    `mask` is None for plain causal sequences; for groups that share a prompt it says which keys each query sees.
    """

    position: Tensor  # int64 [M]
    slot: Tensor  # int64 [M]: index into the flattened [B, T] grid
    shape: tuple[int, int]  # B, T
    mask: Tensor | None  # bool [B, 1, T, T], True = visible

    @staticmethod
    def packed(cu_seqlens: Tensor) -> "Layout":
        """Independent causal sequences: cu_seqlens int [N+1]."""
        cu = cu_seqlens.to("cpu", torch.int64)
        length = cu[1:] - cu[:-1]
        longest = int(length.max()) if len(length) else 0
        row = torch.repeat_interleave(torch.arange(len(length)), length)
        position = torch.arange(int(cu[-1])) - cu[:-1][row]
        return Layout(position, row * longest + position, (len(length), longest), None)

    @staticmethod
    def shared_prompt(prompt_length: list[int], response_length: list[list[int]]) -> "Layout":
        """Groups [prompt, response 1, ..., response n]: each response sees the prompt and itself, never another response."""
        totals = [p + sum(r) for p, r in zip(prompt_length, response_length, strict=True)]
        longest = max(totals)
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        segment = torch.full((len(totals), longest), -1)
        positions, slots = [], []
        for b, (p, responses) in enumerate(zip(prompt_length, response_length, strict=True)):
            parts, start = [torch.arange(p)], p
            segment[b, :p] = 0
            for i, r in enumerate(responses):
                parts.append(torch.arange(p, p + r))
                segment[b, start : start + r] = i + 1
                start += r
            positions.append(torch.cat(parts))
            slots.append(torch.arange(totals[b]) + b * longest)
        same = segment[:, :, None] == segment[:, None, :]
        mask = causal & (same | (segment == 0)[:, None, :])
        return Layout(torch.cat(positions), torch.cat(slots), (len(totals), longest), mask[:, None])

    def to(self, device: torch.device) -> "Layout":
        """The same layout with its tensors on `device`."""
        return Layout(self.position.to(device), self.slot.to(device), self.shape, None if self.mask is None else self.mask.to(device))


class Decoder(nn.Module):
    """A frozen decoder. `forward(tokens, cu_seqlens)` gives hidden states after the final norm, `head_weight` the output matrix."""

    def __init__(self, config: ModelConfig, raw_config: dict, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, self.raw_config = config, raw_config
        c, options = config, {"dtype": dtype, "device": device}
        self.embed = _frozen(c.vocab_size, c.hidden_size, **options)
        self.head = None if c.tied else _frozen(c.vocab_size, c.hidden_size, **options)
        self.norm = _frozen(c.hidden_size, **options)
        self.layers = nn.ModuleList(Layer(c, **options) for _ in range(c.num_layers))
        self.register_buffer("inverse_frequency", _inverse_frequency(c).to(device), persistent=False)

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
        return F.embedding(tokens.to(self.device), self.embed)

    def run(self, hidden: Tensor, layout: Layout, start: int, stop: int, adapter: Adapter | None = None) -> Tensor:
        """The residual stream [M, D] after layer `stop - 1`, given the stream before layer `start`."""
        cos, sin = self.rotary(layout.position)
        fused = None if adapter is None else adapter.fused(start, stop)
        for index in range(start, stop):
            hidden = self.layers[index](hidden, cos, sin, layout, None if fused is None else fused.get(index))
        return hidden

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the head."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.norm, self.config.rms_eps)

    def rotary(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [..., head_dim] of rotary positions, in the model's dtype."""
        angle = position.to(torch.float32)[..., None] * self.inverse_frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def prefill(
        self, tokens: Tensor, cu_seqlens: Tensor, adapter: Adapter | None, tap: Tap | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden state of each sequence's last token [N, D], and per layer the rotated keys and the values [M, Hkv, d], packed.

        tap(layer, states [M, D]) sees the residual stream before each layer.
        """
        layout = Layout.packed(cu_seqlens).to(self.device)
        hidden, cos_sin = self.embed_tokens(tokens), self.rotary(layout.position)
        fused = None if adapter is None else adapter.fused(0, self.config.num_layers)
        kept = []
        for index, layer in enumerate(self.layers):
            if tap is not None:
                tap(index, hidden)
            hidden, key, value = layer.attend(hidden, *cos_sin, layout, None if fused is None else fused.get(index))
            kept.append((key, value))
        return self.final_norm(hidden[cu_seqlens[1:].to(self.device, torch.int64) - 1]), kept

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        cache: Cache | SharedCache,
        fused: dict | None,
        tap: Tap | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """One decoding step: hidden states [R, D] after the final norm of one new token per row; the cache grows by it.

        tap(layer, states [R, D]) sees the residual stream before each layer; with `stop` the layers from there on are left out.
        """
        hidden, (cos, sin) = F.embedding(tokens, self.embed), self.rotary(position)
        for index, layer in enumerate(self.layers[:stop]):
            if tap is not None:
                tap(index, hidden)
            hidden = layer.decode(hidden, cos, sin, cache, index, None if fused is None else fused.get(index))
        if tap is not None and stop is not None:
            tap(stop, hidden)
        cache.advance()
        return self.final_norm(hidden)


class Layer(nn.Module):
    """One decoder layer. q, k, v are one matrix and gate, up are one matrix; the split is undone on saving."""

    def __init__(self, c: ModelConfig, **options) -> None:
        super().__init__()
        self.heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        self.eps = c.rms_eps
        self.qkv = _frozen((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.hidden_size, **options)
        self.o = _frozen(c.hidden_size, c.num_heads * c.head_dim, **options)
        self.gate_up = _frozen(2 * c.intermediate_size, c.hidden_size, **options)
        self.down = _frozen(c.hidden_size, c.intermediate_size, **options)
        self.norm1 = _frozen(c.hidden_size, **options)
        self.norm2 = _frozen(c.hidden_size, **options)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, layout: Layout, lora: dict | None) -> Tensor:
        return self.attend(hidden, cos, sin, layout, lora)[0]

    def attend(self, hidden: Tensor, cos: Tensor, sin: Tensor, layout: Layout, lora: dict | None) -> tuple[Tensor, Tensor, Tensor]:
        """The layer on packed tokens [M, D]; also its rotated keys and its values [M, Hkv, d]."""
        q, k, v = self._project(hidden, cos, sin, lora)
        grid = [self._to_grid(x, layout) for x in (q, k, v)]
        mixed = F.scaled_dot_product_attention(
            *grid, attn_mask=layout.mask, is_causal=layout.mask is None, enable_gqa=self.heads[0] != self.heads[1]
        )
        mixed = mixed.transpose(1, 2).reshape(-1, self.heads[0] * self.heads[2])
        if mixed.shape[0] != hidden.shape[0]:
            mixed = mixed.index_select(0, layout.slot)
        return self._finish(hidden, mixed, lora), k, v

    def decode(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Cache | SharedCache, index: int, lora: dict | None) -> Tensor:
        """The layer on one new token per row [R, D]."""
        return self._finish(hidden, cache.attend(index, *self._project(hidden, cos, sin, lora)), lora)

    def _project(self, hidden: Tensor, cos: Tensor, sin: Tensor, lora: dict | None) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads, d = self.heads
        normed = F.rms_norm(hidden, (hidden.shape[-1],), self.norm1, self.eps)
        qkv = _linear(normed, self.qkv, lora, "qkv").view(hidden.shape[0], -1, d)
        q_k, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        half = d // 2
        turned = torch.cat((-q_k[..., half:], q_k[..., :half]), dim=-1)
        q_k = q_k * cos[:, None] + turned * sin[:, None]
        return q_k[:, :heads], q_k[:, heads:], v

    def _finish(self, hidden: Tensor, mixed: Tensor, lora: dict | None) -> Tensor:
        hidden = hidden + _linear(mixed, self.o, lora, "o")
        normed = F.rms_norm(hidden, (hidden.shape[-1],), self.norm2, self.eps)
        gate, up = _linear(normed, self.gate_up, lora, "gate_up").chunk(2, dim=-1)
        return hidden + _linear(F.silu(gate) * up, self.down, lora, "down")

    def _to_grid(self, x: Tensor, layout: Layout) -> Tensor:
        rows, longest = layout.shape
        if rows * longest != x.shape[0]:
            x = x.new_zeros(rows * longest, *x.shape[1:]).index_copy(0, layout.slot, x)
        return x.view(rows, longest, *x.shape[1:]).transpose(1, 2)


def load(path_or_id: str | Path, *, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The decoder of a Hugging Face folder or hub id (safetensors only), frozen, in `dtype` on `device`.

    Raises: UserError naming the file and the tensor or switch that cannot be used.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    folder = resolve(path_or_id)
    raw = read_config(folder)
    config = ModelConfig.from_json(raw, folder / "config.json")
    where = _tensor_files(folder)
    model = Decoder(config, raw, dtype, torch.device(device))
    targets = _named_targets(model)
    if config.tied:
        where.pop("lm_head.weight", None)
    where = {name: file for name, file in where.items() if not name.endswith("rotary_emb.inv_freq")}
    missing, extra = sorted(set(targets) - set(where)), sorted(set(where) - set(targets))
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has unknown", extra)
        raise UserError(f"{folder}: the checkpoint {kind} tensor {names[0]} ({len(names)} in all); use a complete Llama checkpoint.")
    for file in sorted(set(where.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(n for n, f in where.items() if f == file):
                value = tensors.get_tensor(name)
                if value.shape != targets[name].shape:
                    raise UserError(
                        f"{file}: tensor {name} has shape {tuple(value.shape)}, config.json wants {tuple(targets[name].shape)}; "
                        "use a config.json and weights that belong together."
                    )
                targets[name].copy_(value)
    return model


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
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); fetch the file again.") from error


def save(model: Decoder, folder: str | Path, *, adapter: Adapter | None = None, tokenizer_from: Path | None = None) -> None:
    """Write a Hugging Face folder (config.json, model.safetensors) that transformers and vLLM load, with `adapter` merged if given.

    The folder appears whole or not at all. Files of `tokenizer_from` other than weights and config are copied along.
    Raises: UserError when the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; choose another folder.")
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
            if file.is_file() and file.suffix in {".json", ".jinja", ".model", ".txt"} and not file.name.startswith(("config.", "model.")):
                shutil.copyfile(file, temporary / file.name)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose a folder with room for it.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fingerprint(folder: Path) -> str:
    """A short hash of a checkpoint: config.json, each file's size and tensor table, and samples of its bytes."""
    import hashlib

    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(_tensor_files(folder).values())):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for block in range(64):
                stream.seek(size * block // 64)
                digest.update(stream.read(65536))
    return digest.hexdigest()[:16]


def _frozen(*shape: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, **options), requires_grad=False)


def _linear(x: Tensor, weight: Tensor, lora: dict | None, name: str) -> Tensor:
    out = F.linear(x, weight)
    if lora is None or name not in lora:
        return out
    down, up = lora[name]
    return torch.addmm(out, F.linear(x, down), up.t())


def _inverse_frequency(c: ModelConfig) -> Tensor:
    inverse = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim))
    scaling = c.rope_scaling
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
        prefix = f"model.layers.{i}."
        for name, part in zip("qkv", layer.qkv.data.split([q, kv, kv]), strict=True):
            named[f"{prefix}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), layer.gate_up.data.chunk(2), strict=True):
            named[f"{prefix}mlp.{name}_proj.weight"] = part
        named[f"{prefix}self_attn.o_proj.weight"] = layer.o.data
        named[f"{prefix}mlp.down_proj.weight"] = layer.down.data
        named[f"{prefix}input_layernorm.weight"] = layer.norm1.data
        named[f"{prefix}post_attention_layernorm.weight"] = layer.norm2.data
    return named


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises UserError for missing, truncated or pickle-only checkpoints."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only {pickles[0]}, a pickle, which is never executed" if pickles else "no model.safetensors"
        raise UserError(f"{folder}: {why}; use a safetensors checkpoint.")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: file for name in tensors.keys()}
    except Exception as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch it again.") from error
