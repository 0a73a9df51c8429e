"""One decoder for rollout, scoring and training (Llama 2/3, SmolLM2, Qwen2/2.5, Qwen3, Mistral, Gemma 2, Gemma 3 text), read from and
written to Hugging Face folders.

The same norms, rotary positions, attention and MLP code runs packed (training, scoring) and step by step (decoding), so the
log-probs that are sampled are the ones that are trained. Base weights are frozen; an `engine.policy.lora.Adapter` passed to a call is added
to them, and no adapter means the reference model. A policy whose weights are all trained is a decoder of its own (`engine.policy.full`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
