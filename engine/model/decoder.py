"""One decoder for sampling, scoring and training.

It computes Llama 2 and 3, SmolLM2, Qwen 2, 2.5 and 3, Mistral, Gemma 2 and the text model of Gemma 3.

Packed sequences (training, scoring, prompts) and decoding steps take the same path through a layer and differ
only in the attention that is handed in, so the log-probs that are sampled are the ones that are trained.
The weights are frozen: a low-rank adapter passed to a call is added to them, and a call without
one computes the reference model. A policy whose weights are all trained is a decoder with
other weights (`engine.policy.full`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.model.architecture import ModelConfig
from engine.model.attention import Attention, Layout, PackedAttention
from engine.model.low_rank import LayerMatrices, LowRank
from engine.model.slices import enter, leave, sliced
from engine.ranks import ALONE, Ranks
from kernels.layer.layer import (
    add_rms_norm,
    add_rms_norm_one_more,
    gated_gelu,
    gated_silu,
    rms_norm,
    rms_norm_one_more,
    split_normed_rotated,
    split_rotated,
)
from kernels.layer.records import Places
from kernels.products import by_torch, in_float32, linear

# The residual stream [M, D] in two parts: their sum is formed together with its norm. The second, what the
# last block adds, may be None.
Stream = tuple[Tensor, Tensor | None]
# Is shown the residual stream before each layer and after the last one of a pass: (layer, states [M, D]).
Tap = Callable[[int, Tensor], None]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class Decoder(nn.Module):
    """A frozen decoder: `forward` gives states after the final norm, `head_weight` is the output matrix."""

    def __init__(
        self,
        config: ModelConfig,
        raw_config: dict,
        dtype: torch.dtype,
        device: torch.device,
        slices: Ranks = ALONE,
    ) -> None:
        """slices: the ranks that hold the decoder together, each with a slice of every layer."""
        super().__init__()
        self.config, self.raw_config, self.slices = config, raw_config, slices
        c, options = config, {"dtype": dtype, "device": device}
        self.embed = _frozen(c.vocab_size, c.hidden_size, **options)
        self.head = None if c.tied else _frozen(c.vocab_size, c.hidden_size, **options)
        self.norm = _frozen(c.hidden_size, **options)
        self.layer_config = sliced(c, slices.size)
        self.layers = nn.ModuleList(
            Layer(self.layer_config, index, slices, **options) for index in range(c.num_layers)
        )
        # The scale is rounded to the weights' dtype, as in transformers.
        self.embed_scale = (
            float(torch.tensor(c.hidden_size**0.5, dtype=dtype)) if c.scaled_embeddings else None
        )
        self.register_buffer("inverse_frequency", inverse_frequencies(c).to(device), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]: the embedding itself when tied."""
        return self.embed if self.head is None else self.head

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embed.device

    def forward(
        self,
        tokens: Tensor,
        sequences: Tensor | Layout | Attention,
        *,
        adapter: LowRank | None = None,
        lower: tuple[int, Tensor] | None = None,
        tap: Tap | None = None,
        stop: int | None = None,
        checkpointed: bool = False,
    ) -> Tensor:
        """Computes the hidden states [M, D] of `tokens` int64 [M] after the final norm.

        sequences: how the tokens belong together: cu_seqlens int [N+1] of packed sequences, in each of which
        positions restart at 0; a layout; or an attention, such as a cache of the tokens before.
        adapter: is added to the weights; without one this is the reference. Layers below it need no gradient.
        lower: (layer, states [M, D]): the residual stream before that layer, where it is known already. The
        embedding and the layers below are left out.
        tap: is shown the residual stream before each layer and after the last one.
        stop: leaves out the final norm and the layers from this one on; returns the residual stream there.
        checkpointed: the backward pass computes each layer again from its input, and keeps nothing in it.
        """
        if isinstance(sequences, Tensor):
            sequences = Layout.packed(sequences).to(self.device)
        attention = PackedAttention(sequences) if isinstance(sequences, Layout) else sequences
        start = 0 if lower is None else lower[0]
        end = self.config.num_layers if stop is None else stop
        trained = start if adapter is None else min(max(start, adapter.first_layer), end)
        matrices = {} if adapter is None else adapter.fused(start, end)
        rotary = self.rotary(attention.position)

        def through(first: int, last: int, stream: Stream) -> Stream:
            again = checkpointed and torch.is_grad_enabled()
            for index, layer in enumerate(islice(self.layers, first, last), first):
                if tap is not None:
                    stream = added(stream)
                    tap(index, stream[0])
                given = stream, rotary[layer.rope], attention, matrices.get(index)
                if again:
                    stream = checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False)
                else:
                    stream = layer(*given)
            return stream

        with nullcontext() if adapter is None else torch.no_grad():
            hidden = self._embedded(tokens) if lower is None else lower[1]
            stream = through(start, trained, (hidden, None))
        stream = through(trained, end, stream)
        if tap is not None:
            stream = added(stream)
            tap(end, stream[0])
        if stop is not None:
            return added(stream)[0]
        return _added_and_normed(stream, self.norm, self.config)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes the logits [..., V] of hidden states [..., D] after the final norm.

        Of bfloat16 on a CPU they are float32 where no gradient is asked for, like those that the loss head
        trains on.
        """
        head, softcap = self.head_weight, self.config.logit_softcap
        narrow = hidden.is_cpu and hidden.dtype == head.dtype == torch.bfloat16
        wide = narrow and not torch.is_grad_enabled()
        logits = in_float32(hidden, head) if wide else linear(hidden, head)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def rotary(self, position: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Computes cosine and sine [M, head_dim] of rotary positions in the model's dtype.

        A layer uses those at `layer.rope`.
        """
        pairs = []
        for inverse_frequency in self.inverse_frequency:
            angle = position.to(torch.float32)[..., None] * inverse_frequency
            angle = torch.cat((angle, angle), dim=-1)
            pairs.append((angle.cos().to(self.dtype), angle.sin().to(self.dtype)))
        return pairs

    def _embedded(self, tokens: Tensor) -> Tensor:
        hidden = F.embedding(tokens.to(self.device), self.embed)
        return hidden if self.embed_scale is None else hidden * self.embed_scale


class Layer(nn.Module):
    """One decoder layer. q, k, v are one matrix, and so are gate and up; `engine.model.names` splits them.

    Attention and the MLP share this one module: names and order of its weights stand
    in the files of trained weights.
    """

    def __init__(self, c: ModelConfig, index: int, slices: Ranks, **options) -> None:
        super().__init__()
        self.config, self.index, self.slices = c, index, slices
        self.heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        self.window = c.window_of(index)
        self.attention_options = {
            "scale": c.attention_scale,
            "softcap": c.attention_softcap,
            "window": self.window,
        }
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
        after = (_frozen(c.hidden_size, **options) if c.norms_after_blocks else None for _ in range(2))
        self.after_attention, self.after_mlp = after

    def forward(
        self, stream: Stream, rotary: tuple[Tensor, Tensor], attention: Attention, lora: LayerMatrices | None
    ) -> Stream:
        """Computes the residual stream after the layer.

        rotary: cosine and sine [M, d] of the positions. lora: the layer's adapted matrices.
        """
        hidden, normed = _added_and_normed(stream, self.norm1, self.config)
        qkv = self._queries_keys_values(normed, rotary, lora, attention.places(self.index))
        mixed = attention.attend(self.index, *qkv, **self.attention_options)
        out = leave(_linear(mixed, self.o, self.o_bias, lora, "o"), self.slices)
        if self.after_attention is not None:
            out = _norm(out, self.after_attention, self.config)
        hidden, normed = _added_and_normed((hidden, out), self.norm2, self.config)
        out = self._mlp(normed, lora)
        return hidden, out if self.after_mlp is None else _norm(out, self.after_mlp, self.config)

    def _queries_keys_values(
        self,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
        lora: LayerMatrices | None,
        places: Places | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Computes rotated queries [M, H, d] and keys [M, Hkv, d], and values [M, Hkv, d], or puts keys and
        values at `places`."""
        heads, kv_heads, _ = self.heads
        qkv = _linear(enter(normed, self.slices), self.qkv, self.qkv_bias, lora, "qkv")
        if self.q_norm is None:
            return split_rotated(qkv, *rotary, heads, kv_heads, places)
        norms = self.q_norm, self.k_norm, self.config.rms_eps, self.config.norms_add_one
        return split_normed_rotated(qkv, *rotary, heads, kv_heads, norms, places)

    def _mlp(self, normed: Tensor, lora: LayerMatrices | None) -> Tensor:
        """Computes down(activation(gate) * up)."""
        gate_up = _linear(enter(normed, self.slices), self.gate_up, self.gate_up_bias, lora, "gate_up")
        if self.config.activation == "silu":
            inner = gated_silu(gate_up)
        elif self.config.activation == "gelu_pytorch_tanh":
            inner = gated_gelu(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        return leave(_linear(inner, self.down, self.down_bias, lora, "down"), self.slices)


def inverse_frequencies(c: ModelConfig) -> Tensor:
    """Computes the inverse frequencies float32 [1 or 2, d / 2] of the rotary positions; a layer uses those at
    `layer.rope`."""
    ropes = [rope for rope in (c.rope, c.local_rope) if rope is not None]
    return torch.stack([rope.inverse_frequency(c.head_dim) for rope in ropes])


def _frozen(*shape: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, **options), requires_grad=False)


def _norm(x: Tensor, weight: Tensor, c: ModelConfig) -> Tensor:
    """Computes the RMS norm of the last dimension.

    A norm that multiplies by 1 + weight does so in float32, before it rounds.
    """
    return (rms_norm_one_more if c.norms_add_one else rms_norm)(x, weight, c.rms_eps)


def added(stream: Stream) -> Stream:
    """Computes the sum of a stream's parts."""
    hidden, delta = stream
    return hidden if delta is None else hidden + delta, None


def _added_and_normed(stream: Stream, weight: Tensor, c: ModelConfig) -> tuple[Tensor, Tensor]:
    """Computes the sum of a stream's parts, and its `_norm`."""
    hidden, delta = stream
    if delta is None:
        return hidden, _norm(hidden, weight, c)
    return (add_rms_norm_one_more if c.norms_add_one else add_rms_norm)(hidden, delta, weight, c.rms_eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LayerMatrices | None, name: str) -> Tensor:
    out = linear(x, weight, bias)
    if lora is None or name not in lora:
        return out
    inner, up = lora[name].inner(x), lora[name].up.t()
    if out.is_cuda and not torch.is_grad_enabled():
        return out.addmm_(inner, up)  # nobody else has the product
    return by_torch(torch.addmm, out, inner, up)
